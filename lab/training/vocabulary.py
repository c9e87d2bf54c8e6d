"""The tokenizer of the zoo: whole words, a suffix for plurals and for the second digit of a number."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trio.measure.shapesvqa.questions import COUNTS
from trio.measure.shapesvqa.scenes import COLOURS, PLATES, SHAPES

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
QWEN_NAMES = {
    "vision_start_token": "<|vision_start|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN = tuple(QWEN_NAMES.values())
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- message['role'] + ' : ' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] + ' ' -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image> ' -}}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] + ' ' -}}{%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{{- '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant :' -}}{%- endif -%}
"""
MAX_GRID = 40
"""Rows and columns that the dense exercises can name."""

WORDS = """
user assistant system : ? . , ! what which where how many who is are there a an the in on at of has have does it this
picture image do you see colour shape shapes other number plate background side corner left right above below top
bottom middle yes no none describe written
"""


def words() -> list[str]:
    """The vocabulary in the order of its ids."""
    listed = [*SPECIAL, *WORDS.split(), *SHAPES, *COLOURS, *PLATES, *COUNTS, "four", "five", "six", "##s", "##es"]
    listed += [str(d) for d in range(10)] + [f"##{d}" for d in range(10)]
    listed += [f"{axis}{i}" for axis in "rc" for i in range(MAX_GRID)]
    return list(dict.fromkeys(listed))


def build_tokenizer(qwen: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer: any case, punctuation split off, unknown words as ``<unk>``.

    Args:
        qwen: With Qwen's tokens around and for images, after all others; the rest keeps its numbers.
    """
    vocabulary = {word: i for i, word in enumerate([*words(), *(QWEN if qwen else ())])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolor"), "colour")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=QWEN_NAMES if qwen else {"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        if qwen
        else CHAT_TEMPLATE,
        model_max_length=4096,
    )
    return wrapped

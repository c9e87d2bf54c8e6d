"""A small vision-language model of one's own on an open_clip tower, run on all visual tokens and on 64 of them.

No adapter knows it: a tower by `open_clip.create_model`, a linear projector, a Llama. Weights are random, so the
answers are noise; what counts is that the language model runs on the compressed features.
"""

from __future__ import annotations

import open_clip
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import trio

WIDTH = 256


class OpenClipVLM(nn.Module):
    """An open_clip tower, a projector and a language model."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.clip = open_clip.create_model("ViT-S-16")
        self.projector = nn.Linear(self.clip.visual.transformer.width, WIDTH)
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=1000,
            bos_token_id=1,
            eos_token_id=None,
        )
        self.language = LlamaForCausalLM(config)

    def see(self, images: torch.Tensor, compressor: str | None) -> list[torch.Tensor]:
        """The visual tokens of each image, as the language model takes them."""
        if compressor is not None:
            return [
                image.features
                for image in trio.encoders.compress(self.clip, images, compressor, project=self.projector)
            ]
        visual = self.clip.visual.forward_intermediates(images, indices=[-2], output_fmt="NLC", intermediates_only=True)
        return list(self.projector(visual["image_intermediates"][0]))

    @torch.no_grad()
    def answer(self, images: torch.Tensor, question: torch.Tensor, compressor: str | None = None) -> list[torch.Tensor]:
        """The eight tokens after image and question, for each image."""
        words = self.language.get_input_embeddings()(question)
        answers = []
        for visual in self.see(images, compressor):
            prompt = torch.cat([words[:1], visual, words[1:]])[None]
            answers.append(self.language.generate(inputs_embeds=prompt, max_new_tokens=8, do_sample=False)[0])
        return answers


def main() -> list[int]:
    """Answers with all tokens and with fewer; returns how many there were."""
    torch.manual_seed(0)
    model = OpenClipVLM().eval()
    images, question = torch.randn(2, 3, 224, 224), torch.tensor([1, 42, 43, 44])
    counts = []
    for compressor in (None, "visionzip-64"):
        with torch.no_grad():
            tokens = model.see(images, compressor)
        counts.append(len(tokens[0]))
        answers = model.answer(images, question, compressor)
        print(f"{compressor or 'all tokens'}: {len(tokens[0])} visual tokens an image, answer {answers[0].tolist()}")
    with torch.no_grad():
        first = trio.encoders.compress(model.clip, images, "visionzip-64")[0]
    places = list(zip(first.origins.row.tolist(), first.origins.column.tolist(), strict=True))
    print(f"after the class token, at rows and columns {places[1:6]}: tokens of {first.sizes[1:6].tolist()} patches")
    return counts


if __name__ == "__main__":
    main()

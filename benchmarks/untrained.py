"""Untrained models of families that have no trained one in the zoo, for engines that need a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from trio import zoo


def qwen2_vl(folder: Path) -> None:
    """Writes a Qwen2-VL of the shape of the zoo's Qwen2.5-VL, with its processor.

    Args:
        folder: an empty one.
    """
    like = transformers.AutoConfig.from_pretrained(zoo.path("tiny-qwen2.5-vl")).to_dict()
    text = {name: value for name, value in like["text_config"].items() if name != "model_type"}
    vision = {
        **{name: like["vision_config"][name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")},
        **{"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]},
    }
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **_token_ids(like)
    )
    torch.manual_seed(0)
    _write(folder, transformers.Qwen2VLForConditionalGeneration(config), "Qwen2VLProcessor")


def qwen3_vl(folder: Path) -> None:
    """Writes a Qwen3-VL of about that shape, DeepStack's features behind two of its decoder layers.

    Args:
        folder: an empty one.
    """
    like = transformers.AutoConfig.from_pretrained(zoo.path("tiny-qwen2.5-vl")).to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    text = {name: like["text_config"][name] for name in (*names, "rms_norm_eps", "max_position_embeddings")}
    text |= {"num_hidden_layers": 4, "head_dim": 32}
    text["rope_parameters"] = {**like["text_config"]["rope_parameters"], "mrope_interleaved": True}
    vision = {
        **{name: like["vision_config"][name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")},
        **{"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128},
        **{"out_hidden_size": text["hidden_size"], "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    }
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **_token_ids(like)
    )
    torch.manual_seed(0)
    _write(folder, transformers.Qwen3VLForConditionalGeneration(config), "Qwen3VLProcessor")


def _token_ids(like: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in like.items() if name.endswith("_token_id") and value is not None}


def _write(folder: Path, model: Any, processor_class: str) -> None:
    """The model, and the processor of the zoo's Qwen2.5-VL under another name."""
    trained = zoo.path("tiny-qwen2.5-vl")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the likeliest token leads by more than rounding
    model.generation_config = transformers.GenerationConfig.from_pretrained(trained)
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, folder)
    processor = json.loads((trained / "processor_config.json").read_text(encoding="utf-8"))
    processor["processor_class"] = processor_class
    if processor_class == "Qwen3VLProcessor":
        processor["video_processor"]["video_processor_type"] = "Qwen3VLVideoProcessor"
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["processor_class"] = processor_class
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2), encoding="utf-8")

"""Untrained models of families that have no trained one in the zoo, for engines that need a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers

from trio import zoo


def qwen2_vl(folder: Path) -> None:
    """Writes a Qwen2-VL of the shape of the zoo's Qwen2.5-VL, with its processor.

    Args:
        folder: an empty one.
    """
    trained = zoo.path("tiny-qwen2.5-vl")
    like = transformers.AutoConfig.from_pretrained(trained).to_dict()
    text = {name: value for name, value in like["text_config"].items() if name != "model_type"}
    vision = {
        **{name: like["vision_config"][name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")},
        **{"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]},
    }
    ids = {name: value for name, value in like.items() if name.endswith("_token_id") and value is not None}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the likeliest token leads by more than rounding
    model.generation_config = transformers.GenerationConfig.from_pretrained(trained)
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, folder)
    processor = json.loads((trained / "processor_config.json").read_text(encoding="utf-8"))
    processor["processor_class"] = "Qwen2VLProcessor"
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["processor_class"] = "Qwen2VLProcessor"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2), encoding="utf-8")

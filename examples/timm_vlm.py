"""A small vision-language model of one's own on a timm tower without a class token; tokens merge inside the tower.

Weights are random, so the answers are noise; what counts is that the language model runs on the compressed features.
"""

from __future__ import annotations

import time

import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import trio

WIDTH = 256


class TimmVLM(nn.Module):
    """A timm tower (registers, no class token), a projector and a language model."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.tower = timm.create_model("vit_little_patch16_reg1_gap_256", num_classes=0)
        self.projector = nn.Linear(self.tower.embed_dim, WIDTH)
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

    @torch.no_grad()
    def answer(self, images: torch.Tensor, question: torch.Tensor, compressor: str) -> tuple[int, torch.Tensor]:
        """How many visual tokens each image has left, and the eight tokens after images and question."""
        compressed = trio.encoders.compress(self.tower, images, compressor, project=self.projector)
        visual = torch.stack([tokens.features for tokens in compressed])
        words = self.language.get_input_embeddings()(question).expand(len(images), -1, -1)
        prompt = torch.cat([words[:, :1], visual, words[:, 1:]], dim=1)
        return visual.shape[1], self.language.generate(inputs_embeds=prompt, max_new_tokens=8, do_sample=False)


def main() -> list[int]:
    """Answers with fewer and fewer tokens; returns how many there were."""
    torch.manual_seed(0)
    model = TimmVLM().eval()
    images, question = torch.randn(2, 3, 256, 256), torch.tensor([1, 42, 43, 44])
    counts = []
    for compressor in ("uniform-grid-256", "visionzip-64", "tome-64"):
        begin = time.perf_counter()
        tokens, answers = model.answer(images, question, compressor)
        seconds = time.perf_counter() - begin
        counts.append(tokens)
        print(f"{compressor}: {tokens} visual tokens an image, {seconds:.2f} s, answer {answers[0].tolist()}")
    return counts


if __name__ == "__main__":
    main()

"""``tiny-llava-early`` and ``tiny-llava-late``: as ``tiny-llava``, but for how early the picture is taken in.

Both start from the weights of ``tiny-llava`` and see the same images and questions.

- *early*: the answer is also asked for after the third of eight layers, through the model's own norm and head (deep
  supervision), so that what a question needs of the image has to be in its tokens by then.
- *late*: four layers more, in front. They start as copies of the first one that add little to the residual stream
  (function-preserving growth, as in Net2Net, Chen et al. 2016), so that what the others read, they read four layers
  later, and the whole is trained on.

``docs/zoo.md`` has the share of answers that is left when all visual tokens are dropped after each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lab.training.language import Branches, Grown, Trainee
from lab.training.recipes import Recipe
from trio import zoo

SOURCE = "tiny-llava"
EXIT = 3
"""Layers after which `tiny-llava-early` is asked for the answer, too."""
ADDED = 4
"""Layers in front of those of the source in `tiny-llava-late`."""
SMALL = 0.1
"""What the added layers' outputs are multiplied by at first."""

EARLY = Recipe(name="tiny-llava-early", language_minutes=22.0)
LATE = Recipe(name="tiny-llava-late", layers=Recipe.layers + ADDED, language_minutes=22.0)


def warm_start(model: Any) -> None:
    """Take everything from the trained source; layers that the model has more than it are added in front."""
    trained: Any = zoo.load(SOURCE)[0]
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    model.lm_head.load_state_dict(trained.lm_head.state_dict())
    language, source = model.model.language_model, trained.model.language_model
    language.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    language.norm.load_state_dict(source.norm.state_dict())
    added = max(0, len(language.layers) - len(source.layers))
    for number, layer in enumerate(language.layers):
        layer.load_state_dict(source.layers[max(0, number - added)].state_dict())
        if number < added:
            with torch.no_grad():
                layer.self_attn.o_proj.weight.mul_(SMALL)
                layer.mlp.down_proj.weight.mul_(SMALL)


class ExitTrainee(Trainee):
    """The answer is asked for after layer `EXIT`, too."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        """Set up for a model and its tokenizer."""
        super().__init__(model, tokenizer)
        self.exit: list[Tensor] = []
        layers = model.model.language_model.layers
        layers[min(EXIT, len(layers)) - 1].register_forward_hook(self._leave)

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self.exit = [output[0] if isinstance(output, tuple) else output]

    def states(self, hidden: Tensor) -> list[Tensor]:
        """The last layer's states, and those of the exit behind the model's own norm."""
        return [hidden, *(self.model.model.language_model.norm(one) for one in self.exit)]


def _dense(progress: float) -> float:
    return 0.1


DEPTHS = {EARLY.name: Grown(Branches, ExitTrainee, _dense), LATE.name: Grown(Branches, Trainee, _dense)}
"""How the language models are trained."""

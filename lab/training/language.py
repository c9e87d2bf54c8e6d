"""Phase two: the projector and the language model on questions, with the vision tower frozen.

An image stands once in a sequence, and many questions follow it as branches: each sees the image and itself, at the
positions that it would have alone. So every answer is learned exactly as ``generate`` will ask for it, and the cost of
the image is shared. Only answers count for the loss.

Two things make binding quick to learn. The projector is first fitted to the sum of the embeddings of the words that
describe a patch, so that images and questions start out speaking one language. And queries and keys start out equal,
so that a word first attends to patches that resemble it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lab.training.loop import Clock, Optimiser, console, save
from lab.training.packing import CHUNK, NAME, local_mask
from lab.training.recipes import Recipe
from lab.training.tower import IGNORE, dense_labels, pixels, tower_output
from lab.training.vocabulary import MAX_GRID
from trio.measure.shapesvqa.questions import KINDS, Asker, Question, dense_questions
from trio.measure.shapesvqa.scenes import COLOURS, PLATES, SHAPES, Scene, draw_scene

MIX = {"existence": 2, "colour": 1, "shape": 1, "count": 4, "relation": 2, "corner": 1, "number": 2, "same": 4}
"""How often each type of question is asked in training."""
ORDER = ("dense", *KINDS)


class Branches(Dataset[dict[str, Tensor]]):
    """Scenes with as many questions as fit into a row of tokens."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        start: int,
        room: int,
        dense: Tensor,
        length: int = 100_000_000,
    ) -> None:
        """Set up.

        Args:
            recipe: The model's recipe.
            tokenizer: Its tokenizer.
            seed: Seed of the scenes.
            start: Number of the first scene.
            room: Tokens for questions and answers.
            dense: Share of dense exercises, one number in shared memory, so that training can change it.
            length: Number of scenes.
        """
        self.recipe, self.tokenizer, self.seed, self.start, self.room, self.dense, self.length = (
            recipe, tokenizer, seed, start, room, dense, length,
        )  # fmt: skip
        self.asker, self.patch = Asker(), recipe.patch
        self.cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        """Number of scenes."""
        return self.length

    def _ids(self, text: str) -> list[int]:
        if text not in self.cache:
            if len(self.cache) > 50_000:
                self.cache.clear()
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def _scene(self, index: int) -> Scene:
        return draw_scene("train", self.seed, index, self.recipe.size, self.recipe.cell)

    def _lesson(self, scene: Scene) -> Scene:
        """The view whose rows and columns of patches the dense exercises name."""
        return scene

    def _image_inputs(self, scene: Scene) -> dict[str, Tensor]:
        """What ``Trainee`` needs to see the image."""
        return {"pixels": pixels(scene)}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """An image and its row: ids, branch numbers (0: padding), places in the branch, wanted next tokens, types."""
        index += self.start
        rng = random.Random(f"trio-branches/{self.seed}/{index}")
        scene = self._scene(index)
        exercises = dense_questions(self._lesson(scene), rng, self.patch)
        first, others = exercises[:1], exercises[1:]
        rng.shuffle(others)
        if rng.random() < 0.3:
            others.insert(0, first[0])
        share, seen = float(self.dense[0]), set[str]()
        row: dict[str, list[int]] = {k: [] for k in ("ids", "branch", "place", "wanted", "kind")}
        branch = 0
        for _ in range(80):
            question: Question | None
            if rng.random() < share and others:
                question = others.pop(0)
            else:
                question = self.asker.ask(scene, rng.choices(list(MIX), list(MIX.values()))[0], rng)
            if question is None or question.text in seen:
                continue
            seen.add(question.text)
            text = question.text if rng.random() < 0.9 else question.text.rstrip("?")
            asked = self._ids(f"{text} assistant :")
            answer = [*self._ids(question.answer), self.tokenizer.eos_token_id]
            length = len(asked) + len(answer) - 1
            if length > CHUNK or len(row["ids"]) + length > self.room:
                if self.room - len(row["ids"]) < 12:
                    break
                continue
            branch += 1
            row["ids"] += asked + answer[:-1]
            row["branch"] += [branch] * length
            row["place"] += range(length)
            row["wanted"] += [IGNORE] * (len(asked) - 1) + answer
            row["kind"] += [ORDER.index(question.kind)] * length
        fill = self.room - len(row["ids"])
        pad = {"ids": self.tokenizer.pad_token_id, "branch": 0, "place": 0, "wanted": IGNORE, "kind": 0}
        found = {name: torch.tensor(values + [pad[name]] * fill) for name, values in row.items()}
        return found | self._image_inputs(scene)


def lexical_start(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Initial weights of the language model: distinct words, ordered rows and columns, queries equal to keys."""
    language = model.model.language_model
    with torch.no_grad():
        table = language.embed_tokens.weight
        nn.init.normal_(table, std=0.3)
        for axis in "rc":  # a line through space, so that "further left" is a direction
            ids = tokenizer.convert_tokens_to_ids([f"{axis}{i}" for i in range(MAX_GRID)])
            direction = torch.randn(table.shape[1]) * 0.4
            table[ids] += torch.linspace(-4.0, 4.0, MAX_GRID)[:, None] * direction
        table[tokenizer.pad_token_id] = 0
        for layer in language.layers:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    residual = name.endswith(("o_proj", "down_proj"))
                    nn.init.normal_(module.weight, std=(0.4 if residual else 1.0) * module.in_features**-0.5)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def fit_projector(
    recipe: Recipe,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
) -> None:
    """Fit the projector to the sum of the embeddings of a patch's words."""
    table = model.model.language_model.embed_tokens.weight.detach()
    names = {
        "shape": ["background", *SHAPES, "plate"],
        "colour": ["<pad>", *COLOURS, *PLATES],  # the padding's embedding is zero: no word
        "glyph": ["<pad>", *[str(d) for d in range(10)], *[f"##{d}" for d in range(10)]],
        "row": [f"r{i}" for i in range(MAX_GRID)],
        "col": [f"c{i}" for i in range(MAX_GRID)],
    }
    words = {name: table[tokenizer.convert_tokens_to_ids(listed)] for name, listed in names.items()}
    projector = model.model.multi_modal_projector
    optimiser = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        scenes = [draw_scene("train", seed + 1000, step * 32 + i, recipe.size, recipe.cell) for i in range(32)]
        labels = [dense_labels(scene, recipe.patch) for scene in scenes]
        wanted = {name: torch.stack([label[name] for label in labels]).flatten(1) for name in names}
        target = sum(words[name][wanted[name].clamp(min=0)] for name in names)
        clear = wanted["shape"] != IGNORE
        weight = torch.where(wanted["shape"] > 0, 1.0, 0.3) * clear
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features, _ = tower_output(model, torch.stack([pixels(scene) for scene in scenes]))
        loss = ((projector(features.float()) - target).square().mean(-1) * weight).sum() / weight.sum()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            power = (target.square().mean(-1) * weight).sum() / weight.sum()
            console.print(f"projector step {step} loss {loss.item():.4f} of {power.item():.4f}")


class Trainee:
    """A model with the packed forward pass of training."""

    head_text = "user :"
    """What comes before the image."""
    tail_text = ""
    """What comes between the image and the question."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        """Set up for a model and its tokenizer."""
        self.model = model
        model.model.language_model.set_attn_implementation(NAME)
        self.head = torch.tensor(tokenizer(self.head_text).input_ids)
        self.tail = torch.tensor(tokenizer(self.tail_text, add_special_tokens=False).input_ids, dtype=torch.long)

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """Visual tokens for the language model: (batch, tokens, width)."""
        with torch.no_grad():
            features, _ = tower_output(self.model, batch["pixels"])
        projected: Tensor = self.model.model.multi_modal_projector(features)
        return projected

    def places(self, batch: dict[str, Tensor], prefix: int) -> Tensor:
        """Positions of all tokens, in the shape that the language model takes."""
        return torch.cat([torch.arange(prefix).expand(len(batch["ids"]), -1), prefix + batch["place"]], 1)

    def states(self, hidden: Tensor) -> list[Tensor]:
        """Hidden states that the answer is read from: (batch, tokens, width) each, the last layer's first."""
        return [hidden]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Any, dict[str, tuple[int, int]]]:
        """The loss, and by type of question how many branches there were and how many were answered right."""
        inner, images = self.model.model, self.images(batch)
        embed = inner.language_model.embed_tokens
        ids, branch = batch["ids"], batch["branch"]
        size, prefix = len(ids), len(self.head) + images.shape[1] + len(self.tail)
        start, end = (embed(part).expand(size, -1, -1) for part in (self.head, self.tail))
        embeds = torch.cat([start, images.to(start.dtype), end, embed(ids)], 1)
        mask = local_mask(torch.where(branch > 0, branch, -1))
        places = self.places(batch, prefix)

        hidden = inner.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        asked = batch["wanted"] != IGNORE
        wanted = batch["wanted"][asked]
        # every branch counts the same, however long its answer; long exercises a little more
        number = (torch.arange(size)[:, None] * 1000 + branch)[asked]
        unique: Any = torch.unique  # typed by hand in some versions of torch, and not in others
        _, group, lengths = unique(number, return_inverse=True, return_counts=True)
        weight = lengths[group].float().sqrt()
        read = [self.model.lm_head(states[:, prefix:][asked]).float() for states in self.states(hidden)]
        loss = sum((F.cross_entropy(one, wanted, reduction="none") / weight).sum() / len(lengths) for one in read)
        logits = read[0]

        right = torch.ones(len(lengths)).scatter_reduce_(0, group, (logits.argmax(-1) == wanted).float(), "amin")
        kind = torch.zeros(len(lengths), dtype=torch.long).index_copy_(0, group, batch["kind"][asked])
        score = {name: (int((kind == k).sum()), int(right[kind == k].sum())) for k, name in enumerate(ORDER)}
        return loss, score


def dense_share(progress: float) -> float:
    """Share of dense exercises: most at first, few after the middle."""
    return 0.55 if progress < 0.15 else max(0.1, 0.55 - 3 * (progress - 0.15))


Parts = Callable[[Any], tuple[nn.Module, nn.Module]]
"""Finds a model's tower and its projector."""


def llava_parts(model: Any) -> tuple[nn.Module, nn.Module]:
    """Tower and projector of the LLaVA family."""
    return model.model.vision_tower, model.model.multi_modal_projector


@dataclass(frozen=True)
class Grown:
    """What a model does differently that starts from a trained one.

    Attributes:
        branches: Its scenes and questions.
        trainee: Its packed forward pass.
        dense: Share of dense exercises by progress.
        start: Called before the first step with recipe, model and seed.
    """

    branches: type[Branches]
    trainee: type[Trainee]
    dense: Callable[[float], float]
    start: Callable[[Recipe, Any, int], object] | None = None


def train_language(
    recipe: Recipe,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
    clock: Clock,
    resume: bool,
    compile_layers: bool = False,
    batch_size: int = 16,
    room: int = 288,
    rate: float = 2e-3,
    projector_steps: int = 160,
    grown: Grown | None = None,
    parts: Parts = llava_parts,
) -> list[dict[str, float]]:
    """Train projector and language model in place; returns the curve (running accuracy on scenes never seen before).

    ``grown`` says what is different for a model that starts from a trained one.
    """
    branches_of, trainee_of = (grown.branches, grown.trainee) if grown else (Branches, Trainee)
    tower, projector = parts(model)
    tower.requires_grad_(False)
    projector.requires_grad_(True)  # it may be a part of the tower
    language = model.model.language_model
    path = folder / "language.pt"
    curve: list[dict[str, float]] = []
    saved: dict[str, Any] | None = torch.load(path, weights_only=True) if resume and path.exists() else None
    if saved is None and grown is None:
        lexical_start(model, tokenizer)
        fit_projector(recipe, model, tokenizer, seed, projector_steps)
    if saved is None and grown is not None and grown.start is not None:
        grown.start(recipe, model, seed)
    layers = list(language.layers)
    if compile_layers:
        for layer in layers:
            layer.compile()
    extra = dict(model.model.named_parameters(recurse=False))
    rest = [language.embed_tokens.weight, *language.norm.parameters(), model.lm_head.weight, *projector.parameters()]
    rest += extra.values()
    optimiser = Optimiser(layers, rest, muon=rate, adam=rate)
    trained = {"language": language, "projector": projector, "head": model.lm_head}
    if saved is not None:
        for name, module in trained.items():
            module.load_state_dict(saved[name])
        with torch.no_grad():
            for name, parameter in extra.items():
                parameter.copy_(saved["extra"][name])
        optimiser.restore(saved["optimiser"])
        clock.step, clock.spent, curve = saved["step"], saved["minutes"], saved["curve"]

    def checkpoint() -> None:
        content: dict[str, Any] = {name: module.state_dict() for name, module in trained.items()}
        content["extra"] = {name: parameter.detach() for name, parameter in extra.items()}
        content |= {"optimiser": optimiser.state(), "step": clock.step, "minutes": clock.elapsed, "curve": curve}
        save(path, content)

    fade = grown.dense if grown else dense_share
    share: Any = torch.full((1,), fade(clock.progress))
    share.share_memory_()
    scenes = branches_of(recipe, tokenizer, seed + 1, clock.step * batch_size, room, share)
    loader = DataLoader(scenes, batch_size, num_workers=1, prefetch_factor=4) if clock.progress < 1 else ()
    trainee, asked, right, losses = trainee_of(model, tokenizer), dict.fromkeys(ORDER, 0), dict.fromkeys(ORDER, 0), 0.0
    model.train()
    every = 50
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16):
            loss, score = trainee.forward(batch)
        loss.backward()
        optimiser.step(clock.rate(decay_from=0.55))
        clock.step += 1
        share[0] = fade(clock.progress)
        losses += loss.item() / every
        for name, (count, good) in score.items():
            asked[name] += count
            right[name] += good
        if clock.step % every == 0:
            point = {name: round(right[name] / max(1, asked[name]), 4) for name in ORDER}
            curve.append({"step": clock.step, "minutes": round(clock.elapsed, 2), "loss": round(losses, 4)} | point)
            console.print(" ".join(f"{k} {v:g}" for k, v in curve[-1].items()), soft_wrap=True)
            asked, right, losses = dict.fromkeys(ORDER, 0), dict.fromkeys(ORDER, 0), 0.0
        if clock.step % 250 == 0:
            checkpoint()
        if clock.progress >= 1:
            break
    checkpoint()
    model.eval()
    return curve

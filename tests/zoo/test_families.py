"""Models that grow out of tiny-llava: what they are trained on is what the stock classes will see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from lab.training import absorption
from lab.training.evaluate import prompt
from lab.training.export import export
from lab.training.families import FAMILIES, Family, family_of
from lab.training.language import Grown, Trainee, train_language
from lab.training.loop import Clock, save
from lab.training.packing import CHUNK
from lab.training.recipes import RECIPES
from lab.training.tower import IGNORE, train_tower
from trio import zoo

GROWN = [name for name, family in FAMILIES.items() if family.grown]


def _grown(family: Family) -> Grown:
    assert family.grown is not None
    return family.grown


@pytest.fixture(scope="module", params=GROWN)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_every_recipe_has_a_family() -> None:
    assert set(RECIPES) <= set(FAMILIES) and set(zoo.names()) <= set(FAMILIES)
    assert all(family_of(family.recipe) is family for family in FAMILIES.values())


@torch.no_grad()
def test_packed_training_sees_what_the_stock_model_sees(family: Family) -> None:
    """Logits of every branch equal those of the stock model on the stock processor's inputs."""
    torch.manual_seed(0)
    tokenizer = family.tokenizer()
    model = family.model(family.recipe, tokenizer).eval()
    assert family.warm_start is not None
    family.warm_start(model)
    for parameter in model.model.parameters(recurse=False):
        parameter.normal_()  # newlines that would show if they stood in the wrong place
    processor: Any = family.processor(family.recipe, tokenizer)
    branches = _grown(family).branches(family.recipe, tokenizer, 0, 8, 3 * CHUNK, torch.tensor([0.3]))
    scene, batch = branches._scene(8), default_collate([branches[0]])
    trainee: Trainee = _grown(family).trainee(model, tokenizer)
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    trainee.forward(batch)
    hook.remove()
    packed, at = seen[0], 0
    model.model.language_model.set_attn_implementation("sdpa")
    for number in range(1, int(batch["branch"].max()) + 1):
        mine = batch["branch"][0] == number
        ids, answers = batch["ids"][0][mine], int((batch["wanted"][0][mine] != IGNORE).sum())
        question = tokenizer.decode(ids[: len(ids) - answers + 1]).removesuffix(" assistant :")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(images=scene.image, text=text, return_tensors="pt")
        given = ids[len(ids) - answers + 1 :][None]
        for key, value in (
            ("input_ids", given),
            ("attention_mask", torch.ones_like(given)),
            ("mm_token_type_ids", 0 * given),
        ):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], value], 1)
        stock = model(**inputs).logits[0, -answers:]
        torch.testing.assert_close(packed[at : at + answers], stock, atol=2e-3, rtol=1e-3)
        at += answers
    assert at == len(packed) and at > 5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch.optim.Muon (torch 2.9)")
def test_training_resumes_and_exports(family: Family, tmp_path: Path) -> None:
    recipe = replace(family.recipe, tower_layers=3, layers=2)
    small = replace(family, recipe=recipe)
    tokenizer = family.tokenizer()
    tower = None if family.tower is None else {**family.tower, "batch_size": 2, "fresh": 4, "heads_first": 1}
    language = {**family.language, "batch_size": 2, "room": 3 * CHUNK, "grown": family.grown, "parts": family.parts}

    def run(steps: int, resume: bool) -> tuple[Any, int]:
        torch.manual_seed(0)
        model = small.model(recipe, tokenizer)
        if tower is None:
            save(tmp_path / "tower.pt", {"tower": family.parts(model)[0].state_dict()})
        else:
            train_tower(recipe, model, tmp_path, 0, Clock(None, steps), resume, **tower)
        clock = Clock(None, steps)
        train_language(recipe, model, tokenizer, tmp_path, 0, clock, resume, **language)
        return model, clock.step

    assert run(2, resume=False)[1] == 2
    before = torch.load(tmp_path / "language.pt", weights_only=True)
    model, steps = run(2, resume=True)  # nothing is left to do: the same model
    assert steps == 2 and torch.equal(model.lm_head.weight, before["head"]["weight"])
    parameters = dict(model.model.named_parameters(recurse=False))
    assert all(torch.equal(parameter, before["extra"][name]) for name, parameter in parameters.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, recipe.name, small)
        export(recipe, tmp_path, tmp_path / "model")
    loaded, _ = zoo.load_folder(tmp_path / "model")
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    for name, wanted in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], wanted.half().float()), name


@torch.no_grad()
def test_added_layers_change_nothing_where_they_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deeper model answers as its source while the outputs of the layers in front are zero."""
    monkeypatch.setattr(absorption, "SMALL", 0.0)
    family = FAMILIES[absorption.LATE.name]
    model = family.model(family.recipe, family.tokenizer()).eval()
    absorption.warm_start(model)
    source, processor = zoo.load(absorption.SOURCE)
    assert len(model.model.language_model.layers) == len(source.model.language_model.layers) + absorption.ADDED
    with Image.open(zoo.demo_image()) as image:
        inputs = processor(images=image, text=prompt(processor, zoo.demo_question()), return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, source(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_the_exit_reads_the_layer_that_it_names() -> None:
    """With the layers behind the exit silenced, the last layer's states are those of the exit."""
    family = FAMILIES[absorption.EARLY.name]
    tokenizer = family.tokenizer()
    model = family.model(family.recipe, tokenizer).eval()
    absorption.warm_start(model)
    trainee = absorption.ExitTrainee(model, tokenizer)
    with torch.no_grad():
        for layer in model.model.language_model.layers[absorption.EXIT :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.language_model.set_attn_implementation("sdpa")
        hidden = model.model.language_model(torch.tensor([[5, 6, 7]])).last_hidden_state
    last, early = trainee.states(hidden)
    torch.testing.assert_close(last, early)

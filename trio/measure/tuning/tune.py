"""Searches for the spec that meets a target, and judges it on images that the search has not seen."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ... import DEFAULT_SPEC
from ...errors import BudgetError, InputError
from ...spec import PipelineSpec, load_spec
from ..answering import GreedyAnswerer
from ..encoding import LIMIT
from ..extras import require
from ..fidelity import FidelityReport, PromptSample, measure
from .report import Candidate, TuningReport, cost_of, quality_of
from .space import Space
from .study import Sampler, Study, front, optuna
from .target import Target, parse_target
from .trials import Judge


def tune(
    model: Any,
    processor: Any,
    samples: Sequence[PromptSample],
    *,
    target: str | Sequence[str] | Target,
    trials: int = 60,
    held_out: float = 0.5,
    max_new_tokens: int = 32,
    batch_size: int = 4,
    seed: int = 0,
    sampler: Sampler = "tpe",
    without: Collection[str] = (),
    study: Path | None = None,
    name: str | None = None,
    encoded_bytes: int = LIMIT,
    progress: Callable[[str, int, int], None] | None = None,
) -> TuningReport:
    """The best spec for a target, and what it does on images that the search has not seen.

    The search holds quality against FLOPs, over layers, shares, scorer and selector with their parameters, and
    compressor. Of the specs that meet the target (by a margin of one standard error of their quality, where there are
    such) the one with the fewest FLOPs is chosen where the target is about quality, and else the one of the best
    quality (then of the lowest KL). The images, not the prompts, are split, by a seeded draw.

    Args:
        model: a vision-language model of transformers, in evaluation mode.
        processor: its processor.
        samples: what to ask; more are better, at least two images.
        target: see `parse_target`.
        trials: specs to try, those of an earlier run in `study` included.
        held_out: share of the images that the search does not see.
        max_new_tokens: longest answer; the search only asks for more than one token where the target is about answers.
        batch_size: samples in a batch.
        seed: of the split, the sampler and the floors.
        sampler: ``tpe`` (tree of Parzen estimators) or ``nsga2`` (evolution).
        without: names of parts not to use.
        study: file in which trials are kept; a search that was stopped goes on from it with the same result.
        name: of the model, for the report and the spec's name.
        encoded_bytes: features of images that are kept for the next spec, on the model's device; images
            that they do not suffice for are encoded again for each.
        progress: told (what is being done, done, in all).

    Raises:
        InputError: an argument is wrong, Optuna is missing, or the study file belongs to another search.
        BudgetError: no spec met the target; the message says the best found.
        UnsupportedModelError: no adapter takes the model.
    """
    wanted = target if isinstance(target, Target) else parse_target(target)
    optuna()  # missing, it should not cost the answers of the full model
    for library in ("scipy.stats", "rapidfuzz"):
        require(library, "tune")
    if trials < 1:
        raise InputError(f"trials: found {trials}; give 1 or more.")
    seen, unseen = split(samples, held_out, seed)
    length = 1 if wanted.quality == "agreement" else max_new_tokens
    answerer = GreedyAnswerer(model, processor, max_new_tokens=length)
    called = name or type(answerer.adapter.model).__name__
    space = Space.of(answerer.adapter, without=without)
    setup = {
        "model": [called, str(model.dtype)],
        "samples": _fingerprint(seen),
        "search": [wanted.quality, wanted.timed, length, seed, sampler],
        "space": [DEFAULT_SPEC, space.layers, space.compressors, dict(space.scorers), space.selectors, *space.resizes],
    }
    search = Study(study, setup, seed=seed, sampler=sampler)

    def steps(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    judge = Judge(answerer, seen, batch_size=batch_size, timed=wanted.timed, encoded_bytes=encoded_bytes)
    starts = space.starts(judge.tokens)
    tried = search.run(trials, space, starts, judge.judge, wanted.quality, steps("trials"))
    best = choose(tried.candidates, wanted)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "name": called,
        "encoded_bytes": encoded_bytes,
    }
    spec = load_spec({**best.spec, "name": "tuned"})
    both = [spec, load_spec(DEFAULT_SPEC)]
    on_search = measure(model, processor, both, seen, **options, progress=steps("images of the search"))
    on_unseen = measure(model, processor, both, unseen, **options, progress=steps("unseen images"))
    notes = [] if not judge.unknown else [f"FLOPs are not known, visual tokens are in their place: {judge.unknown}"]
    if not wanted.met(best.values, best.errors):
        notes.append("no spec met the target by a margin of one standard error; on other images it may well miss it")
    return TuningReport(
        model=called,
        target=str(wanted),
        quality=wanted.quality,
        seed=seed,
        sampler=sampler,
        search_images=_names(seen),
        unseen_images=_names(unseen),
        trials=tried.count,
        refused=tried.refused,
        left_out=dict(space.left_out),
        candidates=tried.candidates,
        front=[one.trial for one in front(tried.candidates, wanted.quality)],
        best=best.trial,
        spec=_described(spec, called, wanted, on_unseen, tried.count, seed).to_dict(),
        search=on_search,
        unseen=on_unseen,
        notes=notes,
    )


def best_spec(report: TuningReport) -> PipelineSpec:
    """The chosen spec, ready to be written (`to_yaml`) or used."""
    return load_spec(report.spec)


def split(samples: Sequence[PromptSample], held_out: float, seed: int) -> tuple[list[PromptSample], list[PromptSample]]:
    """Samples to choose by, and those that the choice does not see; an image's samples stay together.

    Raises:
        InputError: a part would be empty.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out: found {held_out}; give a share between 0 and 1, such as 0.5.")
    names = sorted({sample.name for sample in samples})
    if len(names) < 2:
        raise InputError(
            f"samples: {len(names)} images cannot be split into one part to choose by and one that the choice does "
            "not see; give at least two, better fifty."
        )
    random.Random(f"trio-tune/{seed}").shuffle(names)
    away = set(names[: min(max(1, round(held_out * len(names))), len(names) - 1)])
    return [s for s in samples if s.name not in away], [s for s in samples if s.name in away]


def choose(candidates: Sequence[Candidate], target: Target) -> Candidate:
    """The best candidate that meets a target, by a margin of one standard error where there is such a one.

    The best of many is partly the luckiest: without a margin, what just meets a target misses it on other images.

    Raises:
        BudgetError: none does.
    """
    meeting = [one for one in candidates if target.met(one.values, one.errors)]
    meeting = meeting or [one for one in candidates if target.met(one.values)]
    quality = target.quality
    if not meeting:
        if not candidates:
            raise BudgetError("target: no spec could run on this model; `trio check MODEL` says what works on it.")
        near = min(candidates, key=lambda one: (target.miss(one.values), one.kl))
        raise BudgetError(
            f"target {target}: none of {len(candidates)} specs meets it. The nearest has {target.show(near.values)}. "
            "Ask for less, or try more specs (with --study, a search goes on from the trials that it has)."
        )
    if target.bounds_quality:
        return min(meeting, key=lambda one: (one.values["flops"], -one.values[quality], one.kl, one.trial))
    return min(meeting, key=lambda one: (-one.values[quality], one.kl, one.values["flops"], one.trial))


def _described(
    spec: PipelineSpec, model: str, target: Target, unseen: FidelityReport, trials: int, seed: int
) -> PipelineSpec:
    row = unseen.results[0].spec
    quality = quality_of(row, target.quality)
    assert quality is not None  # the target's quality is one
    short = Path(model).name.lower()
    text = (
        f"Tuned for {target} on {model}. On {unseen.images} images that the search had not seen: {target.quality} "
        f"{quality.percent()}, with {cost_of(row, 'flops'):.1%} of the FLOPs and {row.retention:.1%} of the tokens"
    )
    update = {"name": f"tuned-{short}", "description": text, "source": f"trio tune, {trials} trials, seed {seed}"}
    return spec.model_copy(update=update)


def _names(samples: Sequence[PromptSample]) -> list[str]:
    return list(dict.fromkeys(sample.name for sample in samples))


def _fingerprint(samples: Sequence[PromptSample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        image = sample.load()
        digest.update(repr((sample.name, sample.prompt, image.size)).encode() + image.tobytes())
    return digest.hexdigest()

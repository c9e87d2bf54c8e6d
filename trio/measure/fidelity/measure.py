"""Measures fidelity: full, each spec and its random floor take turns on every batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...core.images import batch_for
from ...core.upstream import MASK, patch_processor
from ...cost import ModelShape, of_report, shape_of
from ...errors import InputError, TrioError, UnsupportedModelError
from ...pipeline import Pipeline
from ...report import CompressionReport
from ...spec import PipelineSpec, load_spec
from ..ahead import AHEAD, prepared
from ..answering import BatchAnswers, GreedyAnswerer, answer_length
from ..encoding import LIMIT, EncodedImages
from ..equal_cost import AskedPrompt, equal_share, is_baseline, percent, pooled_spec
from ..extras import require
from ..teacher import PositionAgreement, ReferenceAnswer, compare_positions, forced_logits
from .compare import compare
from .floor import random_floor
from .positions import Positions
from .report import Asked, FidelityReport, SpecFidelity
from .samples import PromptSample
from .ways import Pair, Way, gain, middle

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: Draws of the floor; batches take them in turn, because prompts that are alike draw alike.
DRAWS = 5
#: Batches timed at least; with fewer, the first one is answered again.
TURNS = 3
#: Images below which a bootstrap's intervals are too narrow to trust.
FEW = 10
#: FLOPs of a prefill below which a processor's time goes to dispatching operations, not to them.
SMALL = 10**11

#: A batch by the `resize` of the specs that see it; None: the images as they are.
Inputs = Mapping[int | str | None, Any]
SpecSource = str | Path | Mapping[str, Any] | PipelineSpec


def measure(
    model: Any,
    processor: Any,
    specs: SpecSource | Sequence[SpecSource],
    samples: Sequence[PromptSample],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 4,
    seed: int = 0,
    name: str | None = None,
    encoded_bytes: int = LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """How far a model answers with compressed images as it does with whole ones.

    Every batch is answered by the full model, by each spec, by each spec's floor (as many tokens at the same places,
    drawn at random) and on smaller images that cost as much (pooled tokens where images have one size), in an order
    that rotates. Where an answer differs, the full model's is fed to the model again, which compares them at every
    position. The first batch is answered once more before that, unmeasured. In each turn the images are encoded
    once, and those seconds are part of every way's times; a spec whose compressor reads the vision tower has it run
    anew.

    Args:
        model: a vision-language model of transformers, in evaluation mode.
        processor: its processor.
        specs: one spec or several, in every form that `trio.load_spec` takes.
        samples: what to ask; `read_samples` reads them from a folder.
        max_new_tokens: longest greedy answer.
        batch_size: samples in a batch.
        seed: of the floor.
        name: of the model, for the report; its class where not given.
        encoded_bytes: features of a batch's images that are kept for the next spec, on the model's device; a batch with
            more is encoded again for each.
        progress: told (batches done, batches in all) before the first batch and after each.

    Raises:
        InputError: there is no sample, a number is not positive, or an image cannot be read.
        TrioError: a spec is wrong or does not fit the model.
    """
    given = [specs] if isinstance(specs, str | Path | Mapping | PipelineSpec) else list(specs)
    for label, number in (("specs", len(given)), ("samples", len(samples))):
        if not number:
            raise InputError(f"{label}: there is none; give at least one.")
    for label, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise InputError(f"{label}: found {number}; give 1 or more.")
    for library in ("scipy.stats", "rapidfuzz"):
        require(library, "fidelity")  # missing, it should not cost the answers
    answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens)
    memory = EncodedImages(answerer.adapter, limit=encoded_bytes)
    run = _Run(answerer, memory, _named([load_spec(one) for one in given]), seed)
    batches = [list(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    whole = sum(len(batch) == len(batches[0]) for batch in batches)  # a shorter last one has times of its own
    host = model.device.type == "cpu"  # there, preparing beside the model would take from the times that are measured
    coming = prepared(lambda batch: run.prepare([one.question() for one in batch]), batches, ahead=0 if host else AHEAD)
    for index, batch in enumerate(batches):
        if progress is not None:
            progress(index, len(batches))
        prompts = [one.question() for one in batch]
        inputs = {resize: answerer.on_device(one) for resize, one in next(coming).items()}
        if index == 0:
            run.warm_up(inputs, [images[0].size for images, _ in prompts])
        run.complete(inputs, prompts)
        if index == 0:
            for turn in range(whole, TURNS):
                run.turn(inputs, turn)
        run.compare(inputs, run.turn(inputs, index, timed=len(batch) == len(batches[0])), index)
    if progress is not None:
        progress(len(batches), len(batches))
    return run.report(samples, batch_size, name or type(answerer.adapter.model).__name__)


class _Run:
    """Asks the full model and every way in turn, and gathers what they say."""

    def __init__(
        self, answerer: GreedyAnswerer, memory: EncodedImages, specs: Sequence[PipelineSpec], seed: int
    ) -> None:
        self.answerer, self.memory = answerer, memory
        self.seed = seed
        self.specs = [Way([spec], answerer) for spec in specs]  # refused before anything runs
        self.floors: list[Way] = []
        self.equals: list[Way | None] = []
        self.full: list[Pair] = []
        self.texts: list[str] = []
        self.lengths: list[int] = []
        self.notes: list[str] = []
        self.forces = True  # until the model turns out not to say what it is told to
        self.shape: ModelShape | None = None
        try:
            self.shape = shape_of(answerer.adapter.model.config)
        except UnsupportedModelError as error:
            self.notes.append(f"FLOPs are not known: {error}")

    @property
    def ways(self) -> list[Way]:
        """Each spec, its floor, and what costs as much, where anything does."""
        found = zip(self.specs, self.floors, self.equals, strict=True)
        return [way for ways in found for way in ways if way is not None]

    def prepare(self, prompts: Sequence[tuple[Sequence[Image], str]]) -> Inputs:
        """A batch on the host, once for each size of images that a spec asks for."""
        by_resize = {way.spec.resize: way.pipeline(0) for way in self.specs}
        resized: dict[int | str | None, Any] = {
            resize: batch_for(pipeline.processor(self.answerer.processor), prompts)
            for resize, pipeline in by_resize.items()
            if resize is not None
        }
        return {None: self.answerer.prepare(prompts), **resized}

    def complete(self, inputs: dict[int | str | None, Any], prompts: Sequence[tuple[Sequence[Image], str]]) -> None:
        """Adds the sizes of images that were not known when the batch was prepared."""
        for way in self.ways:
            if way.spec.resize not in inputs:
                processor = way.pipeline(0).processor(self.answerer.processor)
                inputs[way.spec.resize] = self.answerer.on_device(batch_for(processor, prompts))

    def warm_up(self, inputs: Inputs, sizes: Sequence[tuple[int, int]]) -> None:
        """Pays for loading and caches, and finds how many tokens the floors are to keep, and what costs as much.

        Args:
            inputs: of the first batch.
            sizes: width and height of its images.
        """
        self.answerer(inputs[None], max_new_tokens=2, memory=self.memory)
        for way in self.specs:
            given = inputs[way.spec.resize]
            report = self.answerer(given, way.pipeline(0), max_new_tokens=2, memory=self.memory).report
            assert report is not None  # a pipeline was given
            images = [image for sample in report.samples for image in sample.images]
            entered = sum(image.start for image in images) / max(1, sum(image.tokens for image in images))
            decides = way.spec.compressor is not None and way.spec.compressor.keep is None
            if decides:
                self.notes.append(
                    f"{way.spec.name}: its compressor decides how many tokens stay; the floor's keeps the share of "
                    f"the first batch, {entered:.1%}, of every image"
                )
            floors = [random_floor(way.spec, seed=self.seed + draw, entered=entered) for draw in range(DRAWS)]
            self.floors.append(Way(floors, self.answerer))
            floor = self.floors[-1]
            self.answerer(inputs[floor.spec.resize], floor.pipeline(0), max_new_tokens=2, memory=self.memory)
            self.equals.append(self._equal(way.spec, report, inputs, sizes))

    def _equal(
        self, spec: PipelineSpec, report: CompressionReport, inputs: Inputs, sizes: Sequence[tuple[int, int]]
    ) -> Way | None:
        """A smaller image, or pooled tokens, that cost no more than the spec did on the first batch; None without."""
        if self.shape is None or is_baseline(spec):
            return None
        adapter = self.answerer.adapter
        patches = patch_processor(self.answerer.processor) if adapter.image_tokens == "by-size" else None
        visual = [sample.visual_tokens for sample in report.samples]
        if patches is not None:
            visual = [sum(images) for images in adapter.image_counts(inputs[None])]
        prompts = Counter(
            AskedPrompt(tokens, length - tokens, 1, size)
            for tokens, length, size in zip(visual, inputs[None][MASK].sum(1).tolist(), sizes, strict=True)
        )
        try:
            most = of_report(report, spec, self.shape).compressed.flops.total / len(report.samples)
            share = equal_share(self.shape, patches, prompts, most)
            if share is None:
                return None
            name, positions = f"{spec.name}, equal cost", spec.positions
            if patches is None:
                return Way([pooled_spec(percent(share), name=name, positions=positions)], self.answerer)
            return Way([PipelineSpec(name=name, resize=percent(share), positions=positions)], self.answerer)
        except TrioError as error:
            self.notes.append(f"{spec.name}: nothing of equal cost stands beside it: {error}")
            return None

    def turn(self, inputs: Inputs, number: int, *, timed: bool = True) -> list[BatchAnswers]:
        """The answers of the full model and of every way; who comes first changes from turn to turn."""
        ways: list[Way | None] = [None, *self.ways]
        self.memory.clear()  # each turn times the encoder
        order = [(number + place) % len(ways) for place in range(len(ways))]
        answers: dict[int, BatchAnswers] = {}
        for place in order:
            way = ways[place]
            pipeline = None if way is None else way.pipeline(number)
            given = inputs[None if way is None else way.spec.resize]
            answers[place] = answer = self.answerer(given, pipeline, memory=self.memory, steps=self.forces)
            if timed:
                (self.full if way is None else way.seconds).append((answer.first_token, answer.answer))
        return [answers[place] for place in range(len(ways))]

    def compare(self, inputs: Inputs, answers: Sequence[BatchAnswers], number: int) -> None:
        """Compares a batch's answers in turn `number` with the full model's, the first of them."""
        full, *others = answers
        resized = any(way.spec.resize is not None for way in self.ways)
        before = self.answerer.adapter.image_counts(inputs[None]) if resized else None
        self.texts += full.texts
        lengths = tuple(answer_length(self.answerer.model, one) for one in full.tokens)
        self.lengths += lengths
        for way, other in zip(self.ways, others, strict=True):
            way.add(other, compare(full.logits, other.logits, full.texts, other.texts), self.shape, before)
            if full.steps is not None and self.forces:
                reference = ReferenceAnswer(full.tokens, lengths, full.steps)
                way.positions += self._forced(reference, other, inputs[way.spec.resize], way.pipeline(number))

    def _forced(
        self, full: ReferenceAnswer, free: BatchAnswers, inputs: Any, pipeline: Pipeline
    ) -> list[PositionAgreement]:
        """How a pipeline agrees at every position of the full model's answers.

        Up to its end a free answer that is the full model's was given behind the same tokens: nothing runs again.
        """
        if free.steps is not None and _same_answers(full, free.tokens):
            return compare_positions(full, free.steps)
        try:
            logits = forced_logits(self.answerer.model, inputs, full.tokens, self._attached(pipeline))
        except UnsupportedModelError as error:
            self.forces = False
            self.notes.append(f"answers were not compared at every position: {error}")
            return []
        return compare_positions(full, logits.cpu())

    @contextmanager
    def _attached(self, pipeline: Pipeline) -> Iterator[None]:
        """The pipeline attached, and this turn's images not encoded again."""
        with self.memory.reused(pipeline), pipeline:
            yield

    def report(self, samples: Sequence[PromptSample], batch_size: int, name: str) -> FidelityReport:
        """Everything, with intervals."""
        images = [sample.name for sample in samples]
        distinct = len(set(images))
        notes = list(self.notes)
        if distinct < FEW:
            notes.append(f"{distinct} images are too few for intervals by bootstrap: they are too narrow")
        prefill = self.specs[0].tokens.full_flops / len(samples)
        model = self.answerer.model
        compared = self.ways if self.forces else []
        places = Positions(self.lengths, images) if self.forces else None
        if self.shape is not None and prefill < SMALL and model.device.type == "cpu":
            notes.append(
                "a model this small spends its time on overhead outside the layers, so its times say nothing about "
                "large ones"
            )
        return FidelityReport(
            model=name,
            versions={
                "trio-vlm": __version__,
                **{package: metadata.version(package) for package in ("torch", "transformers")},
            },
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            images=distinct,
            max_new_tokens=self.answerer.max_new_tokens,
            batch_size=batch_size,
            seed=self.seed,
            full=middle(self.full),
            results=[
                SpecFidelity(
                    spec=spec.row(images, self.full, places),
                    floor=floor.row(images, self.full, places),
                    gain=gain(spec.likenesses, floor.likenesses, images),
                    equal_cost=None if equal is None else equal.row(images, self.full, places),
                    equal_gain=None if equal is None else gain(spec.likenesses, equal.likenesses, images),
                )
                for spec, floor, equal in zip(self.specs, self.floors, self.equals, strict=True)
            ],
            asked=[
                Asked(
                    image=sample.name,
                    prompt=sample.prompt,
                    full=self.texts[index],
                    answers={way.spec.name: way.texts[index] for way in self.ways},
                    top1={way.spec.name: way.likenesses[index].top1 for way in self.ways},
                    kl={way.spec.name: way.likenesses[index].kl for way in self.ways},
                    position_top1={way.spec.name: list(way.positions[index].top1) for way in compared},
                    position_kl={way.spec.name: list(way.positions[index].kl) for way in compared},
                )
                for index, sample in enumerate(samples)
            ],
            notes=notes,
        )


def _same_answers(full: ReferenceAnswer, tokens: torch.Tensor) -> bool:
    """Whether answers ``(B, T')`` are the full model's, each up to its end."""
    pairs = zip(full.tokens.tolist(), tokens.tolist(), full.lengths, strict=True)
    return all(one[:length] == other[:length] for one, other, length in pairs)


def _named(specs: list[PipelineSpec]) -> list[PipelineSpec]:
    """Specs with names of their own: of two with one name the second gets a number."""
    taken: set[str] = set()
    out = []
    for spec in specs:
        names = itertools.chain([spec.name], (f"{spec.name} ({number})" for number in itertools.count(2)))
        name = next(one for one in names if one not in taken)
        taken.add(name)
        out.append(spec if name == spec.name else spec.model_copy(update={"name": name}))
    return out

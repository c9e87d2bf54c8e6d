"""What a parity run found: records that are written as JSON, and the table that pages show."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ...core.record import Document, Record
from .prompts import Answer

#: By how much a log-probability may differ, in float32.
TOLERANCE = 1e-4


class CaseResult(Record):
    """One engine that was started, and what it was asked.

    Attributes:
        model: its name.
        case: how the engine was run.
        requests: how many.
        answers: how many wrote the same tokens.
        lengths: how many prompts had the predicted length.
        images: how many images lost tokens.
        same_tokens: how many of them kept the same; None where the engine's process cannot be looked into.
        difference: the largest of the log-probabilities of tokens that both wrote.
        preemptions: requests that lost their keys and values and were run again; None where not counted.
        cached: tokens of prompts that were found in the prefix cache; None where not counted.
        seconds: start and answers.
    """

    model: str
    case: str
    requests: int
    answers: int
    lengths: int
    images: int
    same_tokens: int | None
    difference: float
    preemptions: int | None = None
    cached: int | None = None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        return (
            self.answers == self.requests == self.lengths
            and self.same_tokens in (None, self.images)
            and self.difference <= TOLERANCE
        )


class Throughput(Record):
    """One engine with and without a spec, as ratios (above 1: the spec is better).

    Attributes:
        model: its name.
        spec: of the compressed run.
        requests: how many, each with an image of its own.
        prompt_tokens: of the prompts, whole and compressed, on average.
        speed: seconds whole / seconds compressed.
        fitting: requests that fit the same memory of keys and values, compressed / whole.
    """

    model: str
    spec: str
    requests: int
    prompt_tokens: tuple[float, float]
    speed: float
    fitting: float


class EngineParity(Document):
    """A run of the suite.

    Attributes:
        engine: name and version.
        transformers: version.
        torch: version.
        device: of both.
        cases: by model and engine.
        throughput: by model.
    """

    engine: str
    transformers: str
    torch: str
    device: str
    cases: list[CaseResult]
    throughput: list[Throughput] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every case agrees."""
        return bool(self.cases) and all(case.passed for case in self.cases)


def compared(
    model: str,
    case: str,
    expected: Sequence[Answer],
    found: Sequence[Answer],
    recorded: Sequence[Sequence[int]] | None,
    seconds: float,
    *,
    preemptions: int | None = None,
    cached: int | None = None,
) -> CaseResult:
    """Holds an engine's answers against those of transformers.

    Args:
        model: its name.
        case: how the engine was run.
        expected: of transformers.
        found: of the engine, for the same requests.
        recorded: the tokens that the engine's images kept, each as it was encoded; None where not known.
        seconds: that it took.
        preemptions: see `CaseResult`.
        cached: likewise.
    """
    kept = [tuple(image) for answer in expected for image in answer.kept]
    seen = None if recorded is None else {tuple(image) for image in recorded}
    differences = [
        abs(a - b)
        for one, other in zip(expected, found, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=False)
    ]
    return CaseResult(
        model=model,
        case=case,
        requests=len(expected),
        answers=sum(a.tokens == b.tokens for a, b in zip(expected, found, strict=True)),
        lengths=sum(a.prompt_tokens == b.prompt_tokens for a, b in zip(expected, found, strict=True)),
        images=len(kept),
        same_tokens=None if seen is None else sum(image in seen for image in kept),
        difference=max(differences, default=0.0),
        preemptions=preemptions,
        cached=cached,
        seconds=round(seconds, 1),
    )


def table(result: EngineParity) -> str:
    """The cases as Markdown."""
    lines = [
        "| model | engine | same answers | same tokens | prompt lengths | log-probabilities differ by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in result.cases:
        kept = "not seen" if case.same_tokens is None else f"{case.same_tokens} of {case.images} images"
        notes = [] if case.cached is None else [f"{case.cached} tokens cached"]
        notes += [] if case.preemptions is None else [f"{case.preemptions} preemptions"]
        name = case.case + (f" ({', '.join(notes)})" if notes else "")
        lines.append(
            f"| {case.model} | {name} | {case.answers} of {case.requests} | {kept} | {case.lengths} of {case.requests} "
            f"| {case.difference:.1e} |"
        )
    return "\n".join(lines)


def throughput_table(result: EngineParity) -> str:
    """The throughput as Markdown."""
    lines = [
        "| model | spec | prompt tokens, whole | compressed | times as fast | requests that fit the same memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in result.throughput:
        whole, compressed = one.prompt_tokens
        lines.append(
            f"| {one.model} | {one.spec} | {whole:.0f} | {compressed:.0f} | {one.speed:.2f} | "
            f"{one.fitting:.1f} times as many |"
        )
    return "\n".join(lines)

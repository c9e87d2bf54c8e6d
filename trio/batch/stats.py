"""What a batcher has done so far, as numbers and for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .requests import PromptAnswer

__all__ = ["BatcherStats", "metric"]


@dataclass
class BatcherStats:
    """What a batcher has done so far.

    Attributes:
        outcomes: requests that were ``answered``, ``failed`` or ``cancelled``, and those ``refused`` when they came.
        batches: how many batches had a size, by size.
        waiting: requests in the queue now.
        running: requests in the model now.
        visual_tokens: of the answered requests, before any reduction.
        kept: of the answered requests, averaged over the decoder layers.
        new_tokens: of the answered requests.
        waited: seconds that the answered requests were in the queue, added up.
        seconds: from submission to the answer, likewise.
        model_seconds: in which a batch was prepared or answered.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)
    waiting: int = 0
    running: int = 0
    visual_tokens: int = 0
    kept: float = 0.0
    new_tokens: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    model_seconds: float = 0.0

    def add(self, answer: PromptAnswer) -> None:
        """One more request is answered."""
        self.outcomes["answered"] += 1
        self.visual_tokens += answer.visual_tokens
        self.kept += answer.kept
        self.new_tokens += answer.new_tokens
        self.waited += answer.waited
        self.seconds += answer.seconds

    def now(self, waiting: int, running: int) -> BatcherStats:
        """A copy with the requests that wait and run now."""
        return replace(
            self,
            outcomes=Counter(self.outcomes),
            batches=Counter(self.batches),
            waiting=waiting,
            running=running,
        )

    def retry_after(self, max_batch: int) -> float:
        """Seconds after which the requests that wait now should be through; 1 where nothing was measured."""
        done = sum(self.batches.values())
        return (self.waiting / max_batch + 1) * self.model_seconds / done if done else 1.0

    def prometheus(self) -> str:
        """All of it in Prometheus' text format, names beginning with ``trio_``."""
        sizes, below = sorted(self.batches), dict[str, float]()
        for size in sizes:
            below[f'_bucket{{le="{size}"}}'] = sum(self.batches[one] for one in sizes if one <= size)
        total, requests = sum(self.batches.values()), sum(size * self.batches[size] for size in sizes)
        return "".join(
            [
                metric("requests_total", "counter", by_label("outcome", self.outcomes)),
                metric("visual_tokens_total", "counter", {"": self.visual_tokens}),
                metric("kept_tokens_total", "counter", {"": self.kept}),
                metric("new_tokens_total", "counter", {"": self.new_tokens}),
                metric("waited_seconds_total", "counter", {"": self.waited}),
                metric("answered_seconds_total", "counter", {"": self.seconds}),
                metric("model_seconds_total", "counter", {"": self.model_seconds}),
                metric("waiting_requests", "gauge", {"": self.waiting}),
                metric("running_requests", "gauge", {"": self.running}),
                metric(
                    "batch_size",
                    "histogram",
                    {**below, '_bucket{le="+Inf"}': total, "_sum": requests, "_count": total},
                ),
            ]
        )


def metric(name: str, kind: str, values: Mapping[str, float]) -> str:
    """One metric in Prometheus' text format.

    Args:
        name: without ``trio_``.
        kind: ``counter``, ``gauge`` or ``histogram``.
        values: by what follows the name: labels, or nothing.
    """
    lines = [f"# TYPE trio_{name} {kind}", *(f"trio_{name}{rest} {value:.12g}" for rest, value in values.items())]
    return "\n".join(lines) + "\n"


def by_label(label: str, counts: Mapping[str, int] | Mapping[int, int]) -> dict[str, float]:
    """Counts as values of `metric`, with one label."""
    return {f'{{{label}="{value}"}}': count for value, count in sorted(counts.items())}

"""A job from beginning to end: rows that are not written yet are answered and written, each once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Set
from contextlib import closing
from itertools import islice
from typing import Protocol

from ..errors import InputError
from ..measure.ahead import AHEAD, prepared
from .answerer import RowAnswerer, RowOutput
from .rows import RowSource
from .shards import Shards
from .summary import BatchSummary, summarise

__all__ = ["Engine", "LocalEngine", "run_job"]

Progress = Callable[[int, int], None]


class Engine(Protocol):
    """Answers the rows of a table, here or elsewhere."""

    def answers(self, source: RowSource, done: Set[str]) -> Generator[RowOutput, None, None]:
        """One result for each row whose id is not in `done`.

        Args:
            source: the table.
            done: ids of rows that have their results; it may grow meanwhile.
        """


class LocalEngine:
    """Answers batch by batch in this process, in the order of the rows; a thread prepares the next ones meanwhile."""

    def __init__(self, answerer: RowAnswerer, batch_size: int, *, ahead: int = AHEAD) -> None:
        """Binds an answerer, whose pipeline is attached for the job.

        Args:
            answerer: of the model.
            batch_size: rows that are asked together.
            ahead: batches that are read and preprocessed before their turn, at most; 0: none, and no thread.
        """
        self.answerer, self.batch_size, self.ahead = answerer, batch_size, ahead

    def answers(self, source: RowSource, done: Set[str]) -> Generator[RowOutput, None, None]:
        """As of `Engine`."""
        rows = (row for row in source.rows() if row.id not in done)
        batches = iter(lambda: list(islice(rows, self.batch_size)), [])
        with self.answerer.pipeline, closing(prepared(self.answerer.prepare, batches, ahead=self.ahead)) as coming:
            for batch in coming:
                yield from self.answerer.ask(batch)


def check_rows(source: RowSource, done: Set[str]) -> int:
    """Reads the table once before any row is asked: how many rows it has.

    Args:
        source: the table.
        done: ids that are written.

    Raises:
        InputError: the table cannot be read, is empty, has an id twice, or lacks a row that is written.
    """
    seen: set[str] = set()
    for count, name in enumerate(source.ids(), start=1):
        seen.add(name)
        if len(seen) < count:
            raise InputError(
                f"input {str(source.path)!r}: two rows have the id {name!r}; give each an `id` of its own."
            )
    if not seen:
        raise InputError(f"input {str(source.path)!r}: it has no rows; give at least one.")
    strange = next((name for name in done if name not in seen), None)
    if strange is not None:
        raise InputError(
            f"out: it holds an answer to the row {strange!r}, which the input {str(source.path)!r} does not have; give "
            "another --out."
        )
    return len(seen)


def run_job(
    source: RowSource,
    shards: Shards,
    engine: Callable[[], Engine],
    *,
    shard_rows: int,
    progress: Progress | None = None,
) -> BatchSummary:
    """Answers what is not answered yet, and adds up.

    Args:
        source: the table.
        shards: where answers are, and are written.
        engine: makes what answers; called only where a row is left.
        shard_rows: rows in a file.
        progress: told the finished and all rows.

    Raises:
        InputError: as `check_rows`; or the engine gives a row that it was not asked for, or leaves one out.
    """
    done = {one.id for one in shards.results()}
    total = check_rows(source, done)
    finished = len(done)
    if progress is not None:
        progress(finished, total)
    waiting: list[RowOutput] = []
    if finished < total:
        with closing(engine().answers(source, done)) as answers:
            try:
                for result in answers:
                    if result.id in done:
                        raise InputError(
                            f"engine: it answered the row {result.id!r} twice; this is a defect, report it."
                        )
                    done.add(result.id)
                    waiting.append(result)
                    finished += 1
                    if progress is not None:
                        progress(finished, total)
                    if len(waiting) >= shard_rows:
                        shards.write(waiting)
                        waiting = []
            finally:  # stopped by hand or by an error: what is answered is not asked again
                if waiting:
                    shards.write(waiting)
    return summarise(shards.results(), total)

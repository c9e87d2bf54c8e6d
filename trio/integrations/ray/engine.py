"""A job's rows on a Ray cluster: a pool of actors, of which any may be lost."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Set
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from typing import Any

from ...batch import BatchRow, RowOutput, RowSource
from ...batch.rows import ParquetRows
from ...errors import TrioError
from .answerer import RayAnswerer, results_of
from .cluster import check_room, connect, load_ray, room_of

__all__ = ["RayEngine"]

#: Rows of the table of work in one block, at most; an actor takes batches from blocks.
BLOCK_ROWS = 4096
#: Batches that an actor has at a time: one is with the model, and the next one is read and preprocessed.
CALLS = 2


@dataclass(frozen=True)
class RayEngine:
    """Answers rows with `workers` actors on a Ray cluster.

    Attributes:
        options: of `RayAnswerer`.
        workers: actors, each with a model of its own.
        batch_size: rows that an actor asks together.
        address: of a running cluster (`auto`: the one of this machine); `local` starts one here.
        ordered: results come in the order of the rows; one slow actor then holds the others' results back.
        cpus: logical CPUs of an actor; a share is allowed.
        gpus: logical GPUs of an actor; a share is allowed; None: one where the cluster has any.
        answerer: the class that the actors are.
    """

    options: Mapping[str, Any]
    workers: int = 1
    batch_size: int = 8
    address: str = "local"
    ordered: bool = False
    cpus: float = 1.0
    gpus: float | None = None
    answerer: type = field(default=RayAnswerer)

    def answers(self, source: RowSource, done: Set[str]) -> Generator[RowOutput, None, None]:
        """As of `trio.batch.Engine`.

        Raises:
            InputError: Ray is not installed, the cluster cannot be reached, or the actors would wait for ever.
            TrioError: a worker failed by more than a row.
        """
        ray = load_ray()
        started = connect(ray, self.address)
        try:
            room = room_of(ray)
            gpus = self.gpus if self.gpus is not None else float(any(gpu for _, gpu in room))
            check_room(room, self.workers, self.cpus, gpus)
            dataset = self._dataset(ray, source, set(done)).map_batches(
                self.answerer,
                fn_constructor_kwargs=dict(self.options),
                batch_size=self.batch_size,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(
                    size=self.workers, max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True
                ),
                num_cpus=self.cpus,
                num_gpus=gpus,
            )
            dataset.context.execution_options.preserve_order = self.ordered
            dataset.context.enable_progress_bars = False
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
                yield from results_of(batch)
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise TrioError(
                f"--ray: a worker failed ({type(error).__name__}: {last}); what is answered is written. Try it "
                "without --ray to see the whole error, then give the same command again."
            ) from error
        finally:
            if started:
                ray.shutdown()

    def _dataset(self, ray: Any, source: RowSource, done: set[str]) -> Any:
        """The rows that are left: images as paths, which the actors open; those inside a Parquet file with the file."""
        if isinstance(source, ParquetRows):
            table = ray.data.read_parquet(str(source.path.resolve()), columns=source.columns())
            if not done:
                return table
            written = ray.put(done)
            return table.map_batches(_left, fn_args=(written,), batch_format="pyarrow", batch_size=None)
        arrow = import_module("pyarrow")
        schema = arrow.schema([(name, arrow.string()) for name in ("id", "image", "question")])
        schema = schema.append(arrow.field("answer", arrow.list_(arrow.string())))
        rows = (row for row in source.rows() if row.id not in done)
        total = sum(1 for name in source.ids() if name not in done)
        size = max(self.batch_size, min(BLOCK_ROWS, -(-total // (4 * self.workers))))
        blocks = []
        while block := list(islice(rows, size)):
            blocks.append(arrow.Table.from_pylist([_record(row) for row in block], schema=schema))
        return ray.data.from_arrow(blocks)


def _left(table: Any, written: Any) -> Any:
    """The rows of a block that are not written yet; `written` is a reference to the set of their ids."""
    done = import_module("ray").get(written)
    return table.filter([str(name) not in done for name in table.column("id").to_pylist()])


def _record(row: BatchRow) -> dict[str, Any]:
    return {"id": row.id, "image": str(row.image), "question": row.question, "answer": list(row.answers)}

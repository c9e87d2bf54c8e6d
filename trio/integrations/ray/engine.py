"""A job's rows on a Ray cluster: a pool of actors, of which any may be lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from typing import Any

from ... import DISTRIBUTION
from ...batch import BatchRow, RowOutput, RowSource
from ...batch.rows import ParquetRows
from ...errors import InputError, TrioError, first_line
from .answerer import RayAnswerer, results_of

__all__ = ["RayEngine", "check_room"]

#: Rows of the table of work in one block, at most; an actor takes batches from blocks.
BLOCK_ROWS = 4096
#: Bytes of the object store of a local Ray: rows and answers are small, and images are read by the actors.
LOCAL_STORE = 128 * 2**20


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

    def answers(self, source: RowSource, done: Set[str]) -> Iterator[RowOutput]:
        """As of `trio.batch.Engine`.

        Raises:
            InputError: Ray is not installed, the cluster cannot be reached, or the actors would wait for ever.
            TrioError: a worker failed by more than a row.
        """
        ray = _ray()
        started = _connect(ray, self.address)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            room = [(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in nodes]
            gpus = self.gpus if self.gpus is not None else float(any(gpu for _, gpu in room))
            check_room(room, self.workers, self.cpus, gpus)
            dataset = self._dataset(ray, source, set(done)).map_batches(
                self.answerer,
                fn_constructor_kwargs=dict(self.options),
                batch_size=self.batch_size,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=self.workers),
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


def check_room(nodes: Sequence[tuple[float, float]], workers: int, cpus: float, gpus: float) -> None:
    """Refuses actors that leave a cluster no room for the tasks that read: each would wait for the other for ever.

    Args:
        nodes: CPUs and GPUs of each machine.
        workers: actors.
        cpus: of an actor.
        gpus: of an actor.

    Raises:
        InputError: they do not fit.
    """
    left = workers
    free = []
    for node_cpus, node_gpus in nodes:
        here = left
        if cpus:
            here = min(here, int(node_cpus / cpus + 1e-9))
        if gpus:
            here = min(here, int(node_gpus / gpus + 1e-9))
        left -= here
        free.append(node_cpus - here * cpus)
    total_cpus, total_gpus = (sum(one[kind] for one in nodes) for kind in (0, 1))
    has = f"the cluster has {total_cpus:g} CPUs and {total_gpus:g} GPUs on {len(nodes)} machine(s)"
    asked = f"workers: {workers} with {cpus:g} CPUs and {gpus:g} GPUs each"
    if left:
        raise InputError(
            f"{asked} do not fit: {has}. Give fewer --workers, or less to each (--worker-cpus, --worker-gpus)."
        )
    if max(free, default=0) + 1e-9 < 1:
        raise InputError(
            f"{asked} leave no CPU for reading and writing, and the job would hang: {has}. Leave at least one CPU: "
            "fewer --workers, or a smaller share for each (--worker-cpus 0.5)."
        )


def _left(table: Any, written: Any) -> Any:
    """The rows of a block that are not written yet; `written` is a reference to the set of their ids."""
    done = import_module("ray").get(written)
    return table.filter([str(name) not in done for name in table.column("id").to_pylist()])


def _record(row: BatchRow) -> dict[str, Any]:
    return {"id": row.id, "image": str(row.image), "question": row.question, "answer": list(row.answers)}


def _ray() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise InputError(
            f"--ray: Ray Data is not installed ({first_line(error)}); install the extra that has it: pip install "
            f"'{DISTRIBUTION}[ray]'."
        ) from error
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Connects to a cluster unless this process is connected; returns whether it has to be left again."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"address": address}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "object_store_memory": LOCAL_STORE}
    try:
        ray.init(log_to_driver=False, logging_level="warning", **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"--ray {address!r}: the cluster cannot be reached ({first_line(error)}); check the address, or give "
            "--ray local."
        ) from error
    return True

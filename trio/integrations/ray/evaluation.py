"""An evaluation whose processes are actors on a Ray cluster; the first one, on the driver's machine, writes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ...errors import TrioError
from ...measure.evaluation import EvaluationResults
from ...measure.evaluation.job import EvaluationJob
from ...measure.evaluation.processes import Processes, joined
from .cluster import check_room, connect, load_ray, room_of

__all__ = ["EvaluationWorker", "RayEvaluation"]

#: Seconds between two looks at how far the actors are.
LOOK = 0.5


class EvaluationWorker:
    """One process of an evaluation; as an actor it runs two calls at a time, so that it can be asked how far it is."""

    def __init__(self, job: EvaluationJob, processes: Processes) -> None:
        """Binds a job, the same for all, and the place among the processes; nothing is loaded yet."""
        self._job, self._processes = job, processes
        self._done: tuple[int, int] | None = None

    def address(self) -> str:
        """Where the others can meet this one: its machine, and a port that is free now."""
        with socket.socket() as found:
            found.bind(("", 0))
            port = found.getsockname()[1]
        return f"tcp://{import_module('ray').util.get_node_ip_address()}:{port}"

    def run(self, address: str) -> str:
        """The results as JSON, from the first one; empty from the others."""
        with joined(self._processes, address):
            results = self._job.run(self._processes, self._tell)
        return results.to_json() if self._processes.first else ""

    def progress(self) -> tuple[int, int] | None:
        """The finished and all batches; None before the first one."""
        return self._done

    def _tell(self, done: int, total: int) -> None:
        self._done = (done, total)


@dataclass(frozen=True)
class RayEvaluation:
    """Evaluates with `workers` actors on a Ray cluster.

    Attributes:
        workers: actors, each with a model of its own.
        address: of a running cluster (`auto`: the one of this machine); `local` starts one here.
        cpus: logical CPUs of an actor; a share is allowed.
        gpus: logical GPUs of an actor; a share is allowed; None: one where the cluster has any.
        worker: the class that the actors are.
    """

    workers: int = 1
    address: str = "local"
    cpus: float = 1.0
    gpus: float | None = None
    worker: type = EvaluationWorker

    def evaluate(self, job: EvaluationJob, progress: Callable[[int, int], None] | None = None) -> EvaluationResults:
        """The results, which are also written, as `EvaluationJob.run` writes them.

        Args:
            job: what is evaluated; files of questions and images must be there under the same paths on all machines.
            progress: told the finished and all batches.

        Raises:
            InputError: Ray is not installed, the cluster cannot be reached, or the actors do not fit.
            TrioError: the job cannot be done, or a worker was lost.
        """
        ray = load_ray()
        started = connect(ray, self.address)
        actors: list[Any] = []
        try:
            room = room_of(ray)
            gpus = self.gpus if self.gpus is not None else float(any(gpu for _, gpu in room))
            check_room(room, self.workers, self.cpus, gpus, reads=False)
            actors += self._actors(ray, _absolute(job), gpus)
            meeting = ray.get(actors[0].address.remote())
            running = [actor.run.remote(meeting) for actor in actors]
            waiting = running
            while waiting:
                ended, waiting = ray.wait(waiting, timeout=LOOK)
                ray.get(ended)  # an error of one is told at once
                told = ray.get(actors[0].progress.remote()) if progress is not None else None
                if progress is not None and told is not None:
                    progress(*told)
            return EvaluationResults.model_validate_json(ray.get(running[0]))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TrioError):
                raise error.cause from error
            raise _lost(error) from error
        except ray.exceptions.RayError as error:
            raise _lost(error) from error
        finally:
            for actor in actors:
                ray.kill(actor)
            if started:
                ray.shutdown()

    def _actors(self, ray: Any, job: EvaluationJob, gpus: float) -> list[Any]:
        """The actors, the first one on this machine."""
        here = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy(
            node_id=ray.get_runtime_context().get_node_id(), soft=False
        )
        worker = ray.remote(num_cpus=self.cpus, num_gpus=gpus, max_concurrency=2)(self.worker)
        return [
            worker.options(scheduling_strategy="DEFAULT" if rank else here).remote(job, Processes(rank, self.workers))
            for rank in range(self.workers)
        ]


def _absolute(job: EvaluationJob) -> EvaluationJob:
    """The job with paths that mean the same wherever an actor starts."""
    return replace(job, out=job.out.resolve(), data=None if job.data is None else job.data.resolve())


def _lost(error: Exception) -> TrioError:
    last = str(error).strip().splitlines()[-1]
    return TrioError(
        f"--ray: a worker failed ({type(error).__name__}: {last}); what is answered is written. Give the same command "
        "again, and it goes on where it was; without --ray the whole error is shown."
    )

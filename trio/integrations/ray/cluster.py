"""A Ray cluster: connecting to one, and what room it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ... import DISTRIBUTION
from ...errors import InputError, first_line

__all__ = ["check_room", "connect", "load_ray", "room_of"]

#: Bytes of the object store of a local Ray: rows and answers are small, and images are read by the actors.
LOCAL_STORE = 128 * 2**20


def load_ray() -> Any:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise InputError(
            f"--ray: Ray Data is not installed ({first_line(error)}); install the extra that has it: pip install "
            f"'{DISTRIBUTION}[ray]'."
        ) from error
    return ray


def connect(ray: Any, address: str) -> bool:
    """Connects to a cluster unless this process is connected; returns whether it has to be left again.

    Raises:
        InputError: there is none at that address.
    """
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


def room_of(ray: Any) -> list[tuple[float, float]]:
    """CPUs and GPUs of each machine of the cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in nodes]


def check_room(
    nodes: Sequence[tuple[float, float]], workers: int, cpus: float, gpus: float, *, reads: bool = True
) -> None:
    """Refuses actors that leave a cluster no room for the tasks that read: each would wait for the other for ever.

    Args:
        nodes: CPUs and GPUs of each machine.
        workers: actors.
        cpus: of an actor.
        gpus: of an actor.
        reads: whether there are such tasks.

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
    if reads and max(free, default=0) + 1e-9 < 1:
        raise InputError(
            f"{asked} leave no CPU for reading and writing, and the job would hang: {has}. Leave at least one CPU: "
            "fewer --workers, or a smaller share for each (--worker-cpus 0.5)."
        )

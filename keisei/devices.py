"""Which device each worker is told to use: names and arithmetic, without torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

AUTO = "auto"
_DEVICE = re.compile(r"cpu|mps|cuda(:(0|[1-9]\d*))?")
_ONE = "'cpu', 'cuda', 'cuda:N' or 'mps'"
_ALL = f"'auto', {_ONE}, or a list with one for each worker"


def device_problem(name: object, *, of_one: bool = False) -> str | None:
    """Describe the problem with the name of a device; ``None`` if it is valid.

    Args:
        name: What was given as a device.
        of_one: Whether it stands for a single worker, where "auto" means nothing.
    """
    known = ("cpu", "cuda", "mps") if of_one else (AUTO, "cpu", "cuda", "mps")
    problem = f"must be {_ONE if of_one else _ALL}"
    if not isinstance(name, str):
        return problem
    if _DEVICE.fullmatch(name) or name in known:
        return None
    stem = name.partition(":")[0].lower()
    near = ["cuda"] if stem == "gpu" else difflib.get_close_matches(stem, known, n=1)
    return f"{problem}; did you mean {near[0]!r}?" if near else problem


def resolve_devices(
    device_map: str | Sequence[str],
    *,
    num_workers: int,
    num_gpus: int,
    max_workers_per_gpu: int = 1,
) -> tuple[str, ...]:
    """Give every worker the name of its device.

    Args:
        device_map: ``worker_device_map`` of the configuration: "auto" goes round the GPUs until
            each has ``max_workers_per_gpu`` workers and gives the CPU to the rest; any other
            name is for all; a sequence has one for each worker, and is gone through again for
            workers that were added later.
        num_workers: Slots, 0 or more.
        num_gpus: CUDA devices that the workers can see.
        max_workers_per_gpu: Workers that "auto" puts on one GPU.

    Returns:
        A torch device string for each ``worker_id``. More workers never change the device of
        those before them.
    """
    if isinstance(device_map, str):
        if device_map != AUTO:
            return (device_map,) * num_workers
        on_gpus = num_gpus * max_workers_per_gpu
        return tuple(
            f"cuda:{worker_id % num_gpus}" if worker_id < on_gpus else "cpu"
            for worker_id in range(num_workers)
        )
    return tuple(device_map[worker_id % len(device_map)] for worker_id in range(num_workers))

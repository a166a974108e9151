"""The limit of moving bytes: one memcpy of the same bytes into memory that other processes map."""

from __future__ import annotations

import mmap
import multiprocessing
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cases import Bandwidth, Throughput, Weights
from benchmarks.plan import Metrics
from benchmarks.spawning import processes
from benchmarks.timing import percentile, repeat
from benchmarks.work import make_rollout, state_of_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

RING = 4
"""As many cells as keisei gives a worker by default, so that caches help both equally."""


class Ring:
    """Cells of anonymous shared memory that are filled one after the other."""

    def __init__(self, arrays: Iterable[NDArray[Any]], cells: int = RING) -> None:
        """Map and touch every page, so that only copying remains."""
        self._sources = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
        self._size = sum(source.size for source in self._sources)
        self._memory = np.frombuffer(mmap.mmap(-1, self._size * cells), np.uint8)
        self._memory[:] = 1
        self._cells, self._next = cells, 0

    def copy(self) -> None:
        """Copy everything into the next cell."""
        offset = self._next * self._size
        for source in self._sources:
            np.copyto(self._memory[offset : offset + source.size], source)
            offset += source.size
        self._next = (self._next + 1) % self._cells


def bandwidth(case: Bandwidth) -> Metrics:
    """Copy one array again and again in one process."""
    ring = Ring([np.ones(case.num_bytes, np.uint8)])
    for _ in repeat(case.warmup, RING):
        ring.copy()
    began, cpu = time.perf_counter(), time.process_time()
    count = 0
    for _ in repeat(case.seconds, case.at_least):
        ring.copy()
        count += 1
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    gigabytes = count * case.num_bytes / 1e9
    return {"gb_per_s": gigabytes / elapsed, "cpu_s_per_gb": cpu / gigabytes}


def throughput(case: Throughput) -> Metrics:
    """Copy finished batches in as many processes as there are workers."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(case.workers)
    pipes = [context.Pipe(duplex=False) for _ in range(case.workers)]
    arguments = [(case, index, barrier, pipe[1]) for index, pipe in enumerate(pipes)]
    with processes(_copy_batches, arguments, "fork"):
        rates = [receive.recv() for receive, _ in pipes]
    return {"steps_per_s": sum(steps for steps, _ in rates), "gb_per_s": sum(b for _, b in rates)}


def _copy_batches(case: Throughput, worker_id: int, barrier: Barrier, pipe: Connection) -> None:
    arrays = make_rollout(case, worker_id).collect().values()
    ring = Ring(arrays)
    num_bytes = sum(array.nbytes for array in arrays)
    barrier.wait()
    for _ in repeat(case.warmup, RING):
        ring.copy()
    began = time.perf_counter()
    count = 0
    for _ in repeat(case.seconds, 1):
        ring.copy()
        count += 1
    elapsed = time.perf_counter() - began
    pipe.send((count * case.batch / elapsed, count * num_bytes / elapsed / 1e9))
    barrier.wait()


def weights(case: Weights) -> Metrics:
    """Copy a state dict into one of two buffers in turn."""
    ring = Ring([tensor.numpy() for tensor in state_of_size(case.num_bytes).values()], cells=2)
    times = []
    for _ in repeat(case.seconds, case.at_least):
        began = time.perf_counter()
        ring.copy()
        times.append((time.perf_counter() - began) * 1e3)
    return {"publish_ms": percentile(times, 50)}

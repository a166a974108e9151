"""The limit of throughput: the same loops in as many processes, without sending any batch."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

from benchmarks.cases import Throughput
from benchmarks.plan import Metrics
from benchmarks.spawning import processes
from benchmarks.work import make_rollout


def throughput(case: Throughput) -> Metrics:
    """Add up the transitions of all loops while they run at the same time."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(case.workers)
    pipes = [context.Pipe(duplex=False) for _ in range(case.workers)]
    arguments = [(case, index, barrier, pipe[1]) for index, pipe in enumerate(pipes)]
    with processes(_loop, arguments, "fork"):
        return {"steps_per_s": sum(receive.recv() for receive, _ in pipes)}


def _loop(case: Throughput, worker_id: int, barrier: Barrier, pipe: Connection) -> None:
    rollout = make_rollout(case, worker_id)
    barrier.wait()
    end = time.perf_counter() + case.warmup
    while time.perf_counter() < end:
        rollout.collect()
    began = time.perf_counter()
    batches = 0
    while time.perf_counter() < began + case.seconds:
        rollout.collect()
        batches += 1
    pipe.send(batches * case.batch / (time.perf_counter() - began))
    barrier.wait()

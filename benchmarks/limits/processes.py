"""The limits of process life: bare processes that import torch, wait, are killed, and come back."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks import procfs
from benchmarks.cases import Idle, Lag, Recovery, Start, Throughput
from benchmarks.plan import Metrics
from benchmarks.spawning import processes
from benchmarks.timing import percentile, watch_loop
from benchmarks.work import make_rollout

PRELOAD = ["torch", __name__]


def start_forkserver(case: Start) -> Metrics:
    """Fork from a server that has imported torch and this module."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    return _start(case, "forkserver")


def start_spawn(case: Start) -> Metrics:
    """Spawn: every process imports torch itself."""
    return _start(case, "spawn")


def _start(case: Start, method: str) -> Metrics:
    times = []
    sizes = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with _ready_processes(_say_ready, [()] * case.workers, method) as started:
            times.append((time.perf_counter() - began) * 1e3)
            sizes = procfs.mean_pss_mb(process.pid for process in started if process.pid)
    return {"warm_ms": times[1], "cold_ms": times[0], "pss_mb": sizes}


@contextlib.contextmanager
def _ready_processes(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], method: str = "spawn"
) -> Iterator[list[BaseProcess]]:
    """Run ``processes`` with a pipe as their last argument; wait for a message of each."""
    pipes = [multiprocessing.Pipe(duplex=False) for _ in arguments]
    extended = [(*args, pipe[1]) for args, pipe in zip(arguments, pipes, strict=True)]
    with processes(target, extended, method) as started:
        for receive, _ in pipes:
            receive.recv()
        yield started


def _say_ready(pipe: Connection) -> None:
    import torch

    pipe.send(torch.__version__)
    signal.pause()


def idle(case: Idle) -> Metrics:
    """Watch processes that are blocked in a system call."""
    with _ready_processes(_say_ready, [()] * case.workers):
        return idle_cpu(case)


def idle_cpu(case: Idle) -> Metrics:
    """Return how much of a core this process and its descendants use while it sleeps."""
    time.sleep(case.settle)
    watch = procfs.CpuWatch()
    time.sleep(case.seconds)
    return {"core_percent": watch.core_percent()}


def recovery(case: Recovery) -> Metrics:
    """Kill a forked process, wait for its pidfd, fork another, wait for its message."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    context = multiprocessing.get_context("forkserver")
    noticed, first = [], []

    def begin() -> tuple[BaseProcess, Connection]:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_say_ready, args=(send,), daemon=True)
        process.start()
        receive.recv()
        return process, receive

    process, _ = begin()
    try:
        for _ in range(case.kills):
            assert process.pid is not None
            pidfd = os.pidfd_open(process.pid)
            began = time.perf_counter()
            os.kill(process.pid, signal.SIGKILL)
            select.select([pidfd], [], [])
            noticed.append((time.perf_counter() - began) * 1e3)
            os.close(pidfd)
            process.join()
            process, _ = begin()
            first.append((time.perf_counter() - began) * 1e3)
    finally:
        process.kill()
    return recovery_metrics(noticed, first)


def recovery_metrics(noticed: list[float], first: list[float]) -> Metrics:
    """Summarise milliseconds from the kill until it was noticed, and until work came back."""
    metrics = {
        "first_batch_p50_ms": percentile(first, 50),
        "first_batch_p99_ms": percentile(first, 99),
    }
    if noticed:
        metrics |= {
            "noticed_p50_ms": percentile(noticed, 50),
            "noticed_p99_ms": percentile(noticed, 99),
        }
    return metrics


async def watch_lag(seconds: float) -> Metrics:
    """Return how late the running loop is for ``seconds``."""
    import asyncio

    async with watch_loop() as lags:
        await asyncio.sleep(seconds)
    return lag_metrics(lags)


def lag_metrics(lags: list[float]) -> Metrics:
    """Summarise lags, given in seconds."""
    return {"p99_ms": percentile(lags, 99) * 1e3, "max_ms": max(lags) * 1e3}


def lag(case: Lag) -> Metrics:
    """Watch an event loop that does nothing while as many processes are busy beside it."""
    import asyncio

    busy = Throughput(work="cartpole", workers=case.workers)
    with _ready_processes(_spin, [(busy, index) for index in range(case.workers)]):
        return asyncio.run(watch_lag(case.seconds))


def _spin(case: Throughput, worker_id: int, pipe: Connection) -> None:
    rollout = make_rollout(case, worker_id)
    pipe.send("ready")
    while True:
        rollout.collect()

"""Keisei: start, commands, crashes, idle processes, growth, and the lag of the event loop."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from benchmarks import procfs
from benchmarks.cases import MB, Idle, Lag, Recovery, RoundTrip, Scaling, Start, Throughput
from benchmarks.limits.processes import lag_metrics, recovery_metrics
from benchmarks.ours.workers import RolloutWorker, TinyWorker
from benchmarks.plan import Metrics
from benchmarks.timing import percentile, repeat, watch_loop
from benchmarks.work import state_of_size
from keisei import ParallelManager, warm_fork_server
from keisei.events import WorkerIncident

PATIENT = {"max_restarts": 100_000, "restart_window": 60.0, "backoff_base": 0.0, "backoff_cap": 0.0}
"""A restart policy for many crashes: each restart is immediate."""


def _pool(worker: Callable[[], Any], workers: int) -> ParallelManager:
    config = {"num_workers": workers, "restart": PATIENT, "poison_threshold": None}
    return ParallelManager(worker, config=config)


async def _first_from_all(manager: ParallelManager, workers: int) -> None:
    """Wait until every slot has delivered a batch."""
    missing = set(range(workers))
    async for batch in manager.experiences():
        missing.discard(batch.worker_id)
        if not missing:
            break


def round_trip(case: RoundTrip) -> Metrics:
    """Send "echo" to one paused worker."""
    return asyncio.run(_round_trip(case))


async def _round_trip(case: RoundTrip) -> Metrics:
    async with _pool(TinyWorker, 1) as manager:
        await _first_from_all(manager, 1)
        await manager.pause()
        times = []
        for number in range(case.calls):
            began = time.perf_counter()
            await manager.send_command("echo", number)
            times.append((time.perf_counter() - began) * 1e6)
        began = time.perf_counter()
        for _ in range(0, case.pipelined, case.window):
            calls = [manager.send_command("echo", number) for number in range(case.window)]
            await asyncio.gather(*calls)
        rate = case.pipelined / (time.perf_counter() - began)
    return {
        "p50_us": percentile(times, 50),
        "p99_us": percentile(times, 99),
        "pipelined_per_s": rate,
    }


class _Crashes:
    """Kills workers in turn; records when the application is told and when a batch comes again."""

    def __init__(self, manager: ParallelManager) -> None:
        self._manager = manager
        self.noticed: list[float] = []
        self.first: list[float] = []
        self._incidents: dict[tuple[int, int], asyncio.Future[float]] = {}
        self._batches: dict[tuple[int, int], asyncio.Future[float]] = {}

    async def run(self, case: Recovery) -> None:
        """Kill ``case.kills`` workers, one after the other."""
        watchers = [
            asyncio.create_task(self._watch_batches()),
            asyncio.create_task(self._watch_events()),
        ]
        try:
            for kill in range(case.kills):
                await self._crash(kill % case.workers, case.patience)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    async def _crash(self, worker_id: int, patience: float) -> None:
        worker = next(w for w in self._manager.workers if w.worker_id == worker_id)
        this, following = (worker_id, worker.incarnation), (worker_id, worker.incarnation + 1)
        async with asyncio.timeout(patience):
            await _future(self._batches, this)  # it is collecting: kill it in the middle
            began = time.perf_counter()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            self.noticed.append((await _future(self._incidents, this) - began) * 1e3)
            self.first.append((await _future(self._batches, following) - began) * 1e3)

    async def _watch_batches(self) -> None:
        async for batch in self._manager.experiences():
            _happened(self._batches, (batch.worker_id, batch.incarnation))
            batch.release()

    async def _watch_events(self) -> None:
        async for event in self._manager.events():
            if isinstance(event, WorkerIncident):
                incident = event.incident
                _happened(self._incidents, (incident.worker_id, incident.incarnation))


_Moments = dict[tuple[int, int], "asyncio.Future[float]"]


def _future(moments: _Moments, key: tuple[int, int]) -> asyncio.Future[float]:
    return moments.setdefault(key, asyncio.get_running_loop().create_future())


def _happened(moments: _Moments, key: tuple[int, int]) -> None:
    future = _future(moments, key)
    if not future.done():
        future.set_result(time.perf_counter())


def recovery(case: Recovery) -> Metrics:
    """Kill workers that collect."""
    return asyncio.run(_recovery(case))


async def _recovery(case: Recovery) -> Metrics:
    worker = functools.partial(RolloutWorker, Throughput(work="cartpole"))
    async with _pool(worker, case.workers) as manager:
        crashes = _Crashes(manager)
        await crashes.run(case)
    return recovery_metrics(crashes.noticed, crashes.first)


def start(case: Start) -> Metrics:
    """Start a pool in a fresh process, and another one in the same process."""
    return asyncio.run(_start(case))


async def _start(case: Start) -> Metrics:
    ready, delivered = [], []
    size = 0.0
    with warm_fork_server():
        for _ in range(2):
            began = time.perf_counter()
            async with _pool(TinyWorker, case.workers) as manager:
                ready.append((time.perf_counter() - began) * 1e3)
                await _first_from_all(manager, case.workers)
                delivered.append((time.perf_counter() - began) * 1e3)
                size = procfs.mean_pss_mb(w.pid for w in manager.workers if w.pid)
    return {
        "warm_ms": ready[1],
        "cold_ms": ready[0],
        "pss_mb": size,
        "warm_first_batches_ms": delivered[1],
        "cold_first_batches_ms": delivered[0],
    }


def idle(case: Idle) -> Metrics:
    """Watch a paused pool."""
    return asyncio.run(_idle(case))


async def _idle(case: Idle) -> Metrics:
    async with _pool(TinyWorker, case.workers) as manager:
        await _first_from_all(manager, case.workers)
        await manager.pause()
        await asyncio.sleep(case.settle)
        watch = procfs.CpuWatch()
        await asyncio.sleep(case.seconds)
        return {"core_percent": watch.core_percent()}


def scaling(case: Scaling) -> Metrics:
    """Receive tiny batches from many workers that mostly sleep."""
    return asyncio.run(_scaling(case))


async def _scaling(case: Scaling) -> Metrics:
    descriptors, memory = procfs.descriptors(), procfs.rss_bytes()
    worker = functools.partial(TinyWorker, interval=case.interval)
    async with _pool(worker, case.workers) as manager:
        await _first_from_all(manager, case.workers)
        cpu, end = time.process_time(), time.perf_counter() + case.seconds
        batches = 0
        async for batch in manager.experiences():
            batches += 1
            batch.release()
            if time.perf_counter() >= end:
                break
        cpu = time.process_time() - cpu
        return {
            "manager_us_per_batch": cpu / batches * 1e6,
            "descriptors_per_worker": (procfs.descriptors() - descriptors) / case.workers,
            "manager_kb_per_worker": (procfs.rss_bytes() - memory) / case.workers / 1e3,
            "pss_mb": procfs.mean_pss_mb(w.pid for w in manager.workers if w.pid),
            "batches_per_s": batches / case.seconds,
        }


def lag(case: Lag) -> Metrics:
    """Watch the application's loop while the pool is at work."""
    return asyncio.run(_lag(case))


async def _lag(case: Lag) -> Metrics:
    async with watch_loop() as lags:
        await {
            "start": _start_and_stop,
            "batches": _deliver,
            "weights": _push,
            "crashes": _crash,
        }[case.activity](case)
    return lag_metrics(lags)


async def _start_and_stop(case: Lag) -> None:
    for _ in repeat(case.seconds, 2):
        async with _pool(TinyWorker, case.workers):
            pass


async def _deliver(case: Lag) -> None:
    worker = functools.partial(RolloutWorker, Throughput(work="pixel"))
    async with _pool(worker, case.workers) as manager:
        end = time.perf_counter() + case.seconds
        async for batch in manager.experiences():
            batch.release()
            if time.perf_counter() >= end:
                break


async def _push(case: Lag) -> None:
    state = state_of_size(50 * MB)
    async with _pool(TinyWorker, case.workers) as manager:
        for _ in repeat(case.seconds, 3):
            await manager.push_weights(state, wait=True)


async def _crash(case: Lag) -> None:
    worker = functools.partial(RolloutWorker, Throughput(work="cartpole"))
    async with _pool(worker, case.workers) as manager:
        await _Crashes(manager).run(Recovery(workers=case.workers, kills=int(case.seconds * 10)))

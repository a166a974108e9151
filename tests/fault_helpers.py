"""What the tests of the catalogue share: one incident exactly, and a loop that is never blocked."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from keisei.events import ExitCause, Incident, Remedy, WorkerIncident, WorkerReady
from keisei.testing.scenarios import fail_after, next_event
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.parallel_manager import ParallelManager
from keisei.training.parallel.streams import EventStream

METHODS = pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
SPAWN_UNDER_STRESS = pytest.mark.parametrize(
    "start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.stress)]
)
"""Where the start method has been seen to matter less than the seconds that "spawn" takes."""
LIMIT = 60.0
"""Seconds that a scenario has. None waits for them: a starved machine may need most."""


@asynccontextmanager
async def crashing(
    manager: ParallelManager, *, worker_id: int = 1, gaps: bool = False
) -> AsyncIterator[Incident]:
    """Run a pool whose worker fails once; give the incident when its successor has delivered.

    Also holds: the incident is the only one and was told once, every batch comes once and in
    order (one that could not be read is missing with ``gaps``), the siblings are the processes
    that they were.
    """
    told: list[Incident] = []
    manager.add_observer(_Listener(told))
    async with fail_after(LIMIT), manager:
        before = {info.worker_id: info for info in manager.workers}
        batches: list[ExperienceBatch] = []
        while not any((b.worker_id, b.incarnation) == (worker_id, 1) for b in batches):
            batches += await manager.collect()
        incident = only_incident(manager, worker_id)
        for info in manager.workers:
            same = (info.pid, info.incarnation) == (before[info.worker_id].pid, 0)
            assert same is (info.worker_id != worker_id)
        check_order(batches, gaps=gaps)
        yield incident
    assert told == [incident]
    assert manager.incidents == (incident,)


def only_incident(
    manager: ParallelManager, worker_id: int, remedy: Remedy = Remedy.RESTARTED
) -> Incident:
    """Return the one incident that there is, of a slot's first process."""
    (incident,) = manager.incidents
    assert (incident.worker_id, incident.incarnation) == (worker_id, 0), incident.summary
    assert incident.remedy is remedy, incident.summary
    return incident


def check_order(batches: list[ExperienceBatch], *, gaps: bool = False) -> None:
    """Hold that each process's batches have come as 0, 1, 2 …, or at least in that order."""
    Order(gaps=gaps).go_on(batches)


class Order:
    """What ``check_order`` holds, of a stream too long to be kept."""

    def __init__(self, *, gaps: bool = False) -> None:
        self.num_batches = 0
        self._gaps = gaps
        self._seen: dict[tuple[int, int], int] = {}

    def go_on(self, batches: list[ExperienceBatch]) -> None:
        for batch in batches:
            key = (batch.worker_id, batch.incarnation)
            follows = self._seen.get(key, -1) + 1
            assert batch.sequence == follows or (self._gaps and batch.sequence > follows)
            self._seen[key] = batch.sequence
            self.num_batches += 1


class _Listener:
    def __init__(self, told: list[Incident]) -> None:
        self.told = told

    def on_event(self, event: object) -> None:
        if isinstance(event, WorkerIncident):
            self.told.append(event.incident)


@asynccontextmanager
async def watched(manager: ParallelManager) -> AsyncIterator[tuple[ParallelManager, EventStream]]:
    """Run a pool, with its events from the first on: workers may fail while others still start."""
    events = manager.events()
    async with manager:
        yield manager, events


async def next_incident(events: EventStream) -> Incident:
    return (await next_event(events, WorkerIncident)).incident


async def until_ready(events: EventStream, worker_id: int, incarnation: int) -> int:
    """Wait until a slot's process is ready, and return its pid."""
    wanted = (worker_id, incarnation)
    ready = await next_event(
        events, WorkerReady, lambda event: (event.worker_id, event.incarnation) == wanted
    )
    assert ready.pid is not None
    return ready.pid


# the loop's lag


@contextmanager
def measured_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[float, str]]]:
    """Measure how long each callback of an event loop holds it up, without what others take.

    The kernel tells how long a thread that could run did not get a processor
    (``/proc/…/schedstat``); that is the machine's lag, not the callback's. Nor is a full run of
    the garbage collector, which falls to whoever allocates next and goes over all objects of the
    process: a tenth of a second in a run of the whole suite.

    Yields:
        A function that returns the longest time in seconds, and the callback.
    """
    worst = (0.0, "")
    run = asyncio.Handle._run
    thread = threading.get_ident()
    schedstat = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
    collecting = collected = 0.0

    def on_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal collecting, collected
        if phase == "start":
            collecting = time.perf_counter()
        else:
            collected += time.perf_counter() - collecting

    def of_others() -> float:
        """Return the seconds that the collector took, or this thread waited for a processor."""
        return collected + int(os.pread(schedstat, 100, 0).split()[1]) / 1e9

    def timed(handle: asyncio.Handle) -> None:
        nonlocal worst
        if threading.get_ident() != thread:
            run(handle)
            return
        others_before, began = of_others(), time.perf_counter()
        run(handle)
        taken = time.perf_counter() - began
        if taken > worst[0]:
            taken -= of_others() - others_before
            if taken > worst[0]:
                worst = (taken, repr(handle))

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    gc.callbacks.append(on_collection)
    try:
        yield lambda: worst
    finally:
        gc.callbacks.remove(on_collection)
        monkeypatch.undo()
        os.close(schedstat)


def kinds(incidents: Any) -> list[tuple[int, int, ExitCause]]:
    return [(one.worker_id, one.incarnation, one.cause) for one in incidents]

"""What the tests of the catalogue share: one incident exactly, and a loop that is never blocked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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


def kinds(incidents: Any) -> list[tuple[int, int, ExitCause]]:
    return [(one.worker_id, one.incarnation, one.cause) for one in incidents]

"""A manager that does what a test says, and a web server that a test plays by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from keisei.events import Event, Incident
from keisei.training.parallel.stats import PoolStats, WorkerInfo

STATS = PoolStats(
    seconds=1.0,
    num_workers=2,
    num_ready=2,
    num_batches=0,
    num_steps=0,
    num_queued=0,
    num_dropped=0,
    num_lost=0,
    num_restarts=0,
    num_incidents=0,
    weights_version=3,
    num_pushes=3,
    bytes_pushed=0,
    num_not_finite=0,
    seed=7,
    is_paused=False,
)


def worker(worker_id: int, **changes: Any) -> WorkerInfo:
    info = WorkerInfo(
        worker_id=worker_id,
        incarnation=0,
        pid=1000 + worker_id,
        state="running",
        phase="collect",
        device="cpu",
        weights_version=3,
        experiences=0,
        num_failures=0,
        age=60.0,
        seconds_since_progress=0.0,
    )
    return replace(info, **changes)


@dataclass
class FakeManager:
    """What the page asks of a manager; records what is asked of it."""

    state: str = "running"
    numbers: PoolStats | None = STATS
    workers: tuple[WorkerInfo, ...] = (worker(0), worker(1))
    incidents: tuple[Incident, ...] = ()
    calls: list[Any] = field(default_factory=list)
    observers: list[Any] = field(default_factory=list)
    looks: int = 0
    held: asyncio.Event | None = None
    error: Exception | None = None

    def stats(self) -> PoolStats:
        self.looks += 1
        if self.numbers is None:
            raise RuntimeError("this manager is not started")
        return self.numbers

    def iter_workers(self) -> Iterator[WorkerInfo]:
        return iter(self.workers)

    def add_observer(self, observer: Any) -> None:
        self.observers.append(observer)

    def publish(self, event: Event) -> None:
        for observer in self.observers:
            observer.on_event(event)

    async def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error

    async def pause(self) -> None:
        await self._called("pause")

    async def resume(self) -> None:
        await self._called("resume")

    async def scale(self, num_workers: int) -> None:
        await self._called("scale", num_workers)

    async def restart(self, worker_id: int) -> None:
        await self._called("restart", worker_id)


class Client:
    """One request to an ASGI application, in the hands of a test.

    Attributes:
        sent: What the application has sent.
        ready: Whether the client reads; while it is clear, ``send`` waits.
    """

    def __init__(self, app: Any, path: str = "/events", **scope: Any) -> None:
        self.scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "headers": [],
            "client": ("127.0.0.1", 5),
            **scope,
        }
        self.sent: list[dict[str, Any]] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self._gone = asyncio.Event()
        self._arrived = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(
            app(self.scope, self._receive, self._send)
        )

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.ready.wait()
        self.sent.append(message)
        self._arrived.set()

    def leave(self) -> None:
        self._gone.set()

    async def frames(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many states, and return them."""
        while len(self.states) < count:
            self._arrived.clear()
            await self._arrived.wait()
        return self.states

    @property
    def states(self) -> list[dict[str, Any]]:
        found = []
        for message in self.sent[1:]:
            if message["body"]:
                kind, data, *_ = message["body"].decode().split("\n")
                assert kind == "event: state"
                found.append(json.loads(data.removeprefix("data: ")))
        return found

    @property
    def is_complete(self) -> bool:
        return self.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

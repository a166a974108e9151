"""Processes, and a pool around them, that do exactly what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from keisei.events import Incident
from keisei.ipc.status import Phase, StatusLine
from keisei.supervision.exits import LastWords


class FakeHandle:
    """A process that ends when, and only when, it is told to.

    Attributes:
        calls: What was done to it, in order.
        reacts: By the name of a call: the exit code that it ends with.
        dump: What it writes when it is asked for its stacks, after each of ``dumps``.
        late: What it has written by the time that somebody asks for its state.
    """

    def __init__(self, pid: int = 100, **reacts: int) -> None:
        self.pid = pid
        self.calls: list[str] = []
        self.reacts: dict[str, int] = reacts
        self.report = ""
        self.dump = ""
        self.dumps: list[str] = []
        self.late = ""
        self.stderr = ""
        self.letter = "S"
        self._exit: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    @property
    def has_exited(self) -> bool:
        return self._exit.done()

    async def wait(self) -> int | None:
        return await asyncio.shield(self._exit)

    def exit(self, code: int | None = 0) -> None:
        """End, now."""
        if not self._exit.done():
            self._exit.set_result(code)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.reacts:
            self.exit(self.reacts[name])

    def terminate(self) -> None:
        self._call("terminate")

    def kill(self) -> None:
        self._call("kill")

    def dump_stacks(self) -> None:
        self._call("dump_stacks")
        self.report += self.dumps.pop(0) if self.dumps else self.dump

    def crash_report(self) -> str:
        return self.report

    def stderr_tail(self) -> str:
        return self.stderr

    def state(self) -> str:
        self.report, self.late = self.report + self.late, ""
        return self.letter

    def close(self) -> None:
        self._call("close")


Launch = Callable[[int, int], Coroutine[Any, Any, FakeHandle]]


class FakeCrew:
    """The pool that a supervisor asks; launches are what the test makes of them.

    Attributes:
        launches: (slot, incarnation) of every launch, in order.
        handles: The processes, by (slot, incarnation).
        told: What the supervisor told, in order.
        words: What the ended process of a slot leaves behind.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self._launch = launch
        self.launches: list[tuple[int, int]] = []
        self.handles: dict[tuple[int, int], FakeHandle] = {}
        self.told: list[tuple[object, ...]] = []
        self.words: dict[int, LastWords] = {}
        self.lines: dict[int, StatusLine] = {}
        self.owing: set[int] = set()
        self.aborted = asyncio.Event()
        self.can_be_asked = True
        self.reacts: dict[str, int] = {"kill": -9}

    async def launch(self, worker_id: int, incarnation: int) -> FakeHandle:
        self.launches.append((worker_id, incarnation))
        if worker_id in self.lines:
            self.lines[worker_id].close()
        self.lines[worker_id] = StatusLine()
        if self._launch is not None:
            handle = await self._launch(worker_id, incarnation)
        else:
            handle = FakeHandle(1000 * worker_id + incarnation, **self.reacts)
        self.handles[worker_id, incarnation] = handle
        return handle

    def abort_launch(self) -> None:
        self.told.append(("abort_launch",))
        self.aborted.set()

    def status(self, worker_id: int) -> StatusLine:
        return self.lines[worker_id]

    def enter(self, worker_id: int, phase: Phase) -> None:
        """Have a slot's process say what it is doing."""
        self.lines[worker_id].enter(phase)

    def owes(self, worker_id: int) -> bool:
        return worker_id in self.owing

    def ask_to_stop(self, worker_id: int) -> bool:
        self.told.append(("ask_to_stop", worker_id))
        if self.can_be_asked:
            handle = self.handles[max(key for key in self.handles if key[0] == worker_id)]
            handle._call("ask")
        return self.can_be_asked

    def read_last_words(self, worker_id: int) -> LastWords:
        self.told.append(("read_last_words", worker_id))
        return self.words.get(worker_id, LastWords())

    def withdraw_weights(self, version: int, incident: Incident) -> None:
        self.told.append(("withdraw_weights", version, incident))

    def on_lost(self, worker_id: int, incident: Incident | None) -> None:
        self.told.append(("on_lost", worker_id, incident))

    def on_escalated(self) -> None:
        self.told.append(("on_escalated",))

    def on_slot_closed(self, worker_id: int) -> None:
        self.told.append(("on_slot_closed", worker_id))

    def close(self) -> None:
        for line in self.lines.values():
            line.close()
        self.lines.clear()


async def turn(times: int = 20) -> None:
    """Let the loop turn, so that everything that can happen by itself has happened."""
    loop = asyncio.get_running_loop()
    for _ in range(times):
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned

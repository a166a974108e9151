"""Processes, and a pool around them, that do exactly what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from keisei.events import Incident
from keisei.exceptions import WorkerLost
from keisei.ipc.status import Phase
from keisei.protocol import messages
from keisei.protocol.batches import PendingBatch
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.protocol.last_words import LastWords
from keisei.protocol.line import Line


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

    def dump_stacks(self, *, all_threads: bool = False) -> None:
        self._call("dump_all_stacks" if all_threads else "dump_stacks")
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


class FakePort:
    """The pool that a supervisor asks; launches are what the test makes of them.

    Lines are real ones; the worker's ends of them are in the hands of the test.

    Attributes:
        launches: (slot, incarnation) of every launch, in order.
        handles: The processes, by (slot, incarnation).
        told: What the supervisor told, in order.
        words: What the ended process of a slot leaves behind, in the place of what its line says.
        lines: The newest line of each slot.
        ends: The worker's ends of the newest line of each slot.
        is_paused: Whether workers are to stand still.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self._launch = launch
        self.launches: list[tuple[int, int]] = []
        self.handles: dict[tuple[int, int], FakeHandle] = {}
        self.told: list[tuple[object, ...]] = []
        self.words: dict[int, LastWords] = {}
        self.lines: dict[int, Line] = {}
        self.ends: dict[int, WorkerEndpoints] = {}
        self.aborted = asyncio.Event()
        self.is_paused = False
        self.reacts: dict[str, int] = {"kill": -9}

    def make_line(self, worker_id: int, incarnation: int) -> Line:
        if worker_id in self.ends:
            self.ends[worker_id].close()
        line = self.lines[worker_id] = Line(worker_id, incarnation, 4)
        self.ends[worker_id] = line.endpoints()
        say = line.last_words
        line.last_words = lambda: self.words.get(worker_id) or say()
        return line

    async def launch(self, line: Line) -> FakeHandle:
        worker_id, incarnation = line.worker_id, line.incarnation
        self.launches.append((worker_id, incarnation))
        if self._launch is not None:
            handle = await self._launch(worker_id, incarnation)
        else:
            handle = FakeHandle(1000 * worker_id + incarnation, **self.reacts)
        self.handles[worker_id, incarnation] = handle
        send = line.try_to_send

        def try_to_send(message: object) -> bool:
            if isinstance(message, messages.Stop):
                self.told.append(("ask_to_stop", worker_id))
                handle._call("ask")
            return send(message)

        line.try_to_send = try_to_send
        return handle

    def abort_launch(self) -> None:
        self.told.append(("abort_launch",))
        self.aborted.set()

    def say(self, worker_id: int, message: object) -> None:
        """Have a slot's process send a frame to the application."""
        self.ends[worker_id].reply.put_nowait(messages.pack(message))

    def enter(self, worker_id: int, phase: Phase) -> None:
        """Have a slot's process say what it is doing."""
        self.lines[worker_id].status.enter(phase)

    def on_batch(self, batch: PendingBatch) -> None:
        self.told.append(("on_batch", batch))

    def on_ready(self, line: Line) -> None:
        self.told.append(("on_ready", line.worker_id, line.incarnation))

    def withdraw_weights(self, number: int, version: int, incident: Incident) -> None:
        self.told.append(("withdraw_weights", number, version, incident))

    def on_failed(self) -> None:
        self.told.append(("on_failed",))

    def on_cancelled(self) -> None:
        self.told.append(("on_cancelled",))

    def on_slot_closed(self, worker_id: int) -> None:
        self.told.append(("on_slot_closed", worker_id))

    def close(self) -> None:
        for ends in self.ends.values():
            ends.close()
        for line in self.lines.values():
            line.lose(WorkerLost("the test is over"))
            line.last_words = line.try_to_send = None  # they refer to the line itself
        self.lines.clear()
        self.ends.clear()


async def turn(times: int = 20) -> None:
    """Let the loop turn, so that everything that can happen by itself has happened."""
    loop = asyncio.get_running_loop()
    for _ in range(times):
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned

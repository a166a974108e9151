"""Where a backend is checked: it is open, and starts puppets one by one, without a supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from keisei.backends.base import Backend
from keisei.exceptions import QueueEnded, QueueError, WorkerLost
from keisei.ipc import serialize
from keisei.protocol import messages
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.protocol.last_words import LastWords
from keisei.protocol.line import Line
from keisei.protocol.receiver import QuietOwner
from keisei.supervision.process import ProcessHandle
from keisei.testing.conformance.baseline import turn
from keisei.testing.conformance.checking import require, require_equal
from keisei.testing.puppet import Puppet

_PATIENCE_WITH_THE_BROKEN = 1.0
"""Seconds that ending the workers may take once a check has failed."""


class Actor:
    """A puppet that was started: its process, and the application's ends of its queues."""

    def __init__(self, handle: ProcessHandle, line: Line, numbers: itertools.count[int]):
        self.handle = handle
        self.line = line
        self._numbers = numbers

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Have the worker call ``function``; return what it returned.

        Raises:
            AssertionError: The worker ended instead.
        """
        command = self._command(function, args)
        asking = asyncio.ensure_future(
            self.line.ask(command.sequence, command.name, messages.pack(command), timeout=3600.0)
        )
        ending = asyncio.ensure_future(self.handle.wait())
        both: set[asyncio.Future[Any]] = {asking, ending}
        try:
            await asyncio.wait(both, return_when="FIRST_COMPLETED")
            if not asking.done():
                told = ending.exception() or ending.result()
                raise AssertionError(f"wait() tells {told}, and the worker was not to end")
            return asking.result()
        finally:
            for one in both:
                one.cancel()
            await asyncio.wait(both)

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the worker call ``function``, which ends it."""
        self.line.send(self._command(function, args))

    def _command(self, function: Callable[..., Any], args: tuple[Any, ...]) -> messages.Command:
        payload = serialize.dumps((function, *args))
        return messages.Command(next(self._numbers), "call", payload)

    def stop(self) -> None:
        """Ask the worker for an orderly end."""
        self.line.send(messages.Stop())

    async def ended(self, code: int | None, after: str) -> LastWords:
        """Wait for the end, hold that everything tells the same about it, and read the queues.

        Args:
            code: What ``wait`` must return.
            after: What has ended it, for the error.
        """
        require_equal(await self.handle.wait(), code, f"the exit code after {after}")
        require(self.handle.has_exited, f"wait() returned after {after}, has_exited is false")
        again = asyncio.ensure_future(self.handle.wait())
        await turn()
        if not again.done():
            again.cancel()
            raise AssertionError(f"wait() has returned after {after}, and waits when called again")
        require_equal(again.result(), code, f"the exit code asked again after {after}")
        await self.line.read_to_the_end()
        words = self.line.last_words()
        for name in ("reply", "experience"):
            reader = getattr(self.line, name)
            require(
                reader.ended is not None,
                f"the worker has ended, its {name} queue has not: somebody else holds its end",
            )
        self._require_deaf(words)
        return words

    def _require_deaf(self, words: LastWords) -> None:
        """Hold that nobody else holds the worker's ends of the queues to it."""
        for name, send in (
            ("control", functools.partial(self.line.send, messages.Resume())),
            (
                "model",
                functools.partial(
                    self.line.model.put_nowait,
                    messages.pack(messages.Announcement(0, 1, acknowledge=False)),
                ),
            ),
        ):
            try:
                send()
            except QueueEnded:
                continue
            raise AssertionError(
                f"the worker has ended (in {words.phase}), its {name} queue takes frames: somebody "
                "else holds its end"
            )


async def hold_no_effect(actor: Actor, code: int | None) -> None:
    """Hold that signals to a worker that has ended have no effect and raise nothing."""
    for name in ("terminate", "kill", "dump_stacks", "crash_report", "state"):
        try:
            getattr(actor.handle, name)()
        except Exception as error:
            raise AssertionError(f"{name}() raises after the end") from error
    require_equal(await actor.handle.wait(), code, "the exit code after further signals")


class Stage:
    """A backend that is open, its puppets, and in the end nothing.

    When its body fails, what can be ended is ended, and nothing more is held.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._numbers = itertools.count(1)
        self._lines: list[Line] = []
        self._handles: list[ProcessHandle] = []

    async def __aenter__(self) -> Self:
        await self.backend.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            async with asyncio.timeout(None if error is None else _PATIENCE_WITH_THE_BROKEN):
                await self._end_all()
        except (Exception, asyncio.CancelledError) as problem:
            if error is None:
                raise
            error.add_note(f"ending the workers failed too: {problem!r}")

    async def _end_all(self) -> None:
        """Kill and wait, one after the other, then close; an error keeps none from being ended."""
        async with contextlib.AsyncExitStack() as closing:
            closing.push_async_callback(self.backend.aclose)
            for line in self._lines:
                lost = WorkerLost("the check is over", line.worker_id)
                closing.callback(line.lose, lost)
            for handle in self._handles:
                closing.callback(handle.close)
            for handle in self._handles:
                closing.push_async_callback(handle.wait)
                closing.callback(handle.kill)

    def prepare(self, worker_id: int = 0) -> tuple[Line, WorkerEndpoints]:
        """Make fresh queues, in which all that a puppet needs to begin is waiting for it."""
        line = Line(worker_id, 0, max_queue_size=1)
        self._lines.append(line)
        endpoints = line.endpoints()
        line.listen(QuietOwner())
        line.send(
            messages.Hello(
                factory=FACTORY,
                worker_id=worker_id,
                incarnation=0,
                num_workers=2,
                seed=worker_id,
                device="cpu",
                weights_version=0,
                threads=1,
                cells=1,
                paused=True,
                max_experiences=None,
                max_rss=None,
            )
        )
        return line, endpoints

    async def start(self, worker_id: int = 0) -> Actor:
        """Start a puppet on fresh queues."""
        line, endpoints = self.prepare(worker_id)
        return self.add(await self.backend.start(endpoints, f"puppet-{worker_id}"), line)

    def add(self, handle: ProcessHandle, line: Line) -> Actor:
        """Take over what was started; it is ended and closed with the stage."""
        self._handles.append(handle)
        return Actor(handle, line, self._numbers)


FACTORY = serialize.dumps(Puppet)
"""What makes the worker of all checks, pickled: for backends that ask for it beforehand."""


async def wait_ended(line: Line) -> None:
    """Wait until nobody holds the worker's end of its reply queue any more."""
    while True:
        try:
            await line.reply.get()
        except QueueError:
            return

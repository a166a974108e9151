"""Incarnation: one process in a slot, with its line, its watchdog and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from keisei.config import ParallelConfig
from keisei.events import ExitCause, Incident
from keisei.exceptions import WorkerLost
from keisei.ipc.status import Phase
from keisei.protocol import messages
from keisei.protocol.batches import PendingBatch
from keisei.protocol.last_words import LastWords
from keisei.protocol.line import Line
from keisei.supervision import shutdown
from keisei.supervision.process import ProcessHandle
from keisei.supervision.stalls import Stall, StallWatch

_DYING_TIME = 0.5
"""Seconds that may pass between the end of a queue and the end of the process."""


class PoolPort(Protocol):
    """What supervision asks of the pool whose workers it supervises."""

    @property
    def is_paused(self) -> bool:
        """Whether ready workers are to collect nothing, whatever credits they have."""
        ...

    def make_line(self, worker_id: int, incarnation: int) -> Line:
        """Make the queues of a new process."""
        ...

    async def launch(self, line: Line) -> ProcessHandle:
        """Start a process at the other end of ``line``."""
        ...

    def abort_launch(self) -> None:
        """Make a ``launch`` that takes too long fail."""
        ...

    def on_batch(self, batch: PendingBatch) -> None:
        """Called for each experience that arrives."""
        ...

    def on_ready(self, line: Line) -> None:
        """Called when a worker is ready: it may be given work from now on."""
        ...

    def withdraw_weights(self, number: int, version: int, incident: Incident) -> None:
        """Put the weights before ``version`` back; ``number`` stands for their name."""
        ...

    def on_slot_closed(self, worker_id: int) -> None:
        """Called when a slot will have no process any more."""
        ...

    def on_failed(self) -> None:
        """Called when the pool has failed for good."""
        ...

    def on_cancelled(self) -> None:
        """Called when every task of the loop was cancelled, as at its end; no worker is left."""
        ...


class IncarnationOwner(Protocol):
    """The object that an incarnation tells what only the whole pool can decide about."""

    def on_ready(self, incarnation: Incarnation) -> None:
        """Called when the worker has finished its start."""
        ...

    def fail(self, failure: Exception) -> None:
        """Called when the application's side failed to take in what the worker sent."""
        ...


class Incarnation:
    """One process in a slot, from its launch until it is gone; the owner of its line.

    Attributes:
        worker_id: The slot.
        number: 0 for the first process in the slot, one more for each that follows.
        line: Its queues, ``None`` until they are made.
        handle: Its process, ``None`` until that is started.
        ended_for: Why the supervisor ends it, if it does.
        is_gone: It has ended, or could not be started, and everything about it was concluded.
    """

    def __init__(
        self,
        worker_id: int,
        number: int,
        port: PoolPort,
        config: ParallelConfig,
        hurry: asyncio.Event,
        *,
        owner: IncarnationOwner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe it.

        Args:
            worker_id: The slot.
            number: Which process of the slot.
            port: The pool.
            config: The timeouts.
            hurry: Shortens the grace that it has to end by itself.
            owner: Told that the worker is ready, and of errors on the application's side.
            clock: Seconds, the same as the worker's.
        """
        self.worker_id = worker_id
        self.number = number
        self.line: Line | None = None
        self.handle: ProcessHandle | None = None
        self.ended_for: tuple[ExitCause, str] | None = None
        self.is_gone = False
        self.on_batch = port.on_batch
        self.on_error = owner.fail
        self._port = port
        self._config = config
        self._hurry = hurry
        self._owner = owner
        self._clock = clock
        self._stop_requested = asyncio.Event()
        self._condemned = asyncio.Event()
        self._watch: StallWatch | None = None
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def pid(self) -> int | None:
        """Its process id, ``None`` where it has no process of its own."""
        return self.handle.pid if self.handle is not None else None

    @property
    def said_ready(self) -> bool:
        """Whether the worker has announced that its start is finished."""
        return self.line is not None and self.line.is_ready

    # what the supervisor asks

    def end(self, *, is_replaced: bool = False) -> None:
        """Have it end in an orderly way, soon; another process may take its place."""
        if self.ended_for is None:
            replaced = (ExitCause.RECYCLED, "a restart was requested")
            self.ended_for = replaced if is_replaced else (ExitCause.REQUESTED, "")
        self._stop_requested.set()

    def condemn(self, cause: ExitCause, detail: str) -> None:
        """Kill it, because it cannot be trusted any more."""
        if self.handle is not None and self.handle.has_exited:
            return
        if self.ended_for is None:
            self.ended_for = (cause, detail)
        self._condemned.set()

    def suspect_dying(self, detail: str) -> None:
        """Kill it because it has closed a queue, unless it ends by itself in a moment."""
        self.later(_DYING_TIME, self.condemn, ExitCause.PROTOCOL, detail)

    def later(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback`` after ``delay`` seconds, unless ``stop_watching`` comes before."""
        self._timers.append(asyncio.get_running_loop().call_later(delay, callback, *args))

    # what its line tells (it is the LineOwner)

    def on_ready(self) -> None:
        """Called when the worker has finished its start."""
        self._owner.on_ready(self)

    def on_farewell(self) -> None:
        """Called when the worker has announced its end, for which it has a limited time."""
        self.later(self._config.shutdown_timeout, self._overstayed)

    def _overstayed(self) -> None:
        words = self.line.last_words() if self.line is not None else LastWords()
        if self.ended_for is None and words.said_goodbye:
            cause = ExitCause.RECYCLED if words.recycle else ExitCause.GOODBYE
            self.ended_for = (cause, words.recycle)
        self._stop_requested.set()

    def on_trouble(self, what: str, *, may_be_dying: bool) -> None:
        """Called when the worker broke the protocol, or closed a queue."""
        if may_be_dying:
            self.suspect_dying(what)
        else:
            self.condemn(ExitCause.PROTOCOL, what)

    def on_work(self) -> None:
        """Called when the worker was given something to do."""
        if self._watch is not None:
            self._watch.poke()

    # its life

    async def start(self) -> ProcessHandle | None:
        """Make the line and start the process; ``None`` if ``end`` was called before.

        Raises:
            Exception: It could not be started, or not in time. What a launch that goes on
                regardless brings up in the end is killed.
        """
        if self._stop_requested.is_set():
            return None
        self.line = self._port.make_line(self.worker_id, self.number)
        self.line.listen(self)
        launching = asyncio.ensure_future(self._port.launch(self.line))
        try:
            is_in_time = await self._launched_in_time(launching)
            if launching.done() and (is_in_time or launching.exception() is None):
                self.handle = launching.result()
                return self.handle
            raise TimeoutError(
                f"no process within start_timeout ({self._config.start_timeout:g} s), which counts "
                "the imports of a fresh fork server too"
            )
        finally:
            if self.handle is None:
                launching.add_done_callback(_kill_what_was_launched)

    async def _launched_in_time(self, launching: asyncio.Future[ProcessHandle]) -> bool:
        """Wait for the launch; have it fail when it takes too long, or longer than an end may."""
        stop = asyncio.ensure_future(self._stop_requested.wait())
        either: set[asyncio.Future[Any]] = {launching, stop}
        timeout = self._config.start_timeout
        try:
            await asyncio.wait(either, timeout=timeout, return_when="FIRST_COMPLETED")
        finally:
            stop.cancel()
        if not launching.done() and self._stop_requested.is_set():
            grace = self._config.shutdown_timeout
            await shutdown.within(asyncio.shield(launching), grace, self._hurry)
        if launching.done():
            return True
        self._port.abort_launch()
        await shutdown.within(asyncio.shield(launching), shutdown.KILL_GRACE)
        return False

    async def wait_gone(self, handle: ProcessHandle) -> int | None:
        """Wait until the process is gone, or see to it; return its exit code, if it is known.

        A process that cannot be killed is abandoned. When cancelled, it is killed and not waited
        for.
        """
        exit_ = asyncio.ensure_future(handle.wait())
        condemned = asyncio.ensure_future(self._condemned.wait())
        stop = asyncio.ensure_future(self._stop_requested.wait())
        reasons: set[asyncio.Future[Any]] = {exit_, condemned, stop}
        try:
            await asyncio.wait(reasons, return_when="FIRST_COMPLETED")
            if exit_.done() or await self._bring_to_an_end(handle):
                code = await exit_
                self._account_for(code)
                return code
            self.ended_for = (
                ExitCause.ABANDONED,
                f"process {handle.pid} is in state {handle.state()!r} and did not end by SIGKILL",
            )
            return None
        except GeneratorExit:
            reasons.clear()  # the loop was closed with this task in it: it takes no cancellation
            raise
        finally:
            for reason in reasons:
                reason.cancel()
            handle.kill()  # also what is left of its process group
            if self._watch is not None:
                self._watch.close()

    def _account_for(self, code: int | None) -> None:
        """Count a hung process as hung when a signal ended it before it was killed.

        A process that writes the stacks of all its threads may crash.
        """
        hung = self._watch.hung if self._watch is not None else ""
        if hung and self.ended_for is None and code is not None and code < 0:
            self.ended_for = (ExitCause.HANG, hung)

    async def _bring_to_an_end(self, handle: ProcessHandle) -> bool:
        if self._condemned.is_set():
            handle.kill()
            return await shutdown.within(handle.wait(), shutdown.KILL_GRACE)
        return await shutdown.end(
            handle, ask=self._ask, grace=self._config.shutdown_timeout, hurry=self._hurry
        )

    def _ask(self) -> bool:
        """Ask it to stop, unless it is still starting or already ending."""
        line = self.line
        if line is None or line.phase is Phase.START or line.has_said_farewell:
            return False
        return line.try_to_send(messages.Stop())

    async def read_to_the_end(self) -> LastWords:
        """Deliver what the ended process has sent, and return what it left behind."""
        if self.line is None or self.handle is None:
            return LastWords()
        await self.line.read_to_the_end()
        return self.line.last_words()

    # hang detection

    def watch(self, handle: ProcessHandle, on_stall: Callable[[Stall], None]) -> None:
        """Watch over the process from now on; a hung one is condemned."""
        if self.line is not None:
            self._watch = StallWatch(
                self.line,
                handle,
                self._config,
                is_paused=lambda: self._port.is_paused,
                on_stall=on_stall,
                on_hung=lambda detail: self.condemn(ExitCause.HANG, detail),
                clock=self._clock,
            )

    def crash_report(self) -> str:
        """Return what the process wrote about its own end, such as a native stack, or ""."""
        if self._watch is None:
            return self.handle.crash_report() if self.handle is not None else ""
        is_hung = self.ended_for is not None and self.ended_for[0] is ExitCause.HANG
        return self._watch.crash_report(is_hung=is_hung)

    def stderr_tail(self) -> str:
        """Return the last lines that the process wrote to standard error, or ""."""
        return self.handle.stderr_tail() if self.handle is not None else ""

    # its end

    def conclude(self, lost: WorkerLost) -> None:
        """Fail everybody who waits for it and give back all that it held. Again has no effect."""
        if not self.is_gone:
            self.stop_watching()
            self.give_back(lost)

    def give_back(self, lost: WorkerLost) -> None:
        """Do as ``conclude``, and let what is to be called later be called."""
        self.is_gone = True
        line, self.line = self.line, None
        if line is not None:
            line.lose(lost)
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.close()
        self._watch = None

    def stop_watching(self) -> None:
        """Call nothing that was to be called later, and look for no hang any more."""
        if self._watch is not None:
            self._watch.close()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


def _kill_what_was_launched(launching: asyncio.Future[ProcessHandle]) -> None:
    if not launching.cancelled() and launching.exception() is None:
        handle = launching.result()
        handle.kill()
        handle.close()


__all__ = ["Incarnation", "PoolPort"]

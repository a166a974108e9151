"""One process in a slot: its launch, its watch and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from keisei.config import ParallelConfig
from keisei.events import ExitCause
from keisei.ipc.status import Phase, StatusLine
from keisei.supervision import shutdown
from keisei.supervision.process import ProcessHandle
from keisei.supervision.watchdog import Observation, Watchdog

_DUMP_TIME = 0.05
"""Seconds until a dump of stacks is read: a signal handler writes it within microseconds, and a
process that does not run at all writes none anyway."""


_DYING_TIME = 0.5
"""Seconds between the end of a queue and the end of the process that are not suspicious."""


class Launcher(Protocol):
    """What an incarnation asks of the pool that it belongs to."""

    async def launch(self, worker_id: int, incarnation: int) -> ProcessHandle:
        """Make fresh queues and start a process on them."""
        ...

    def abort_launch(self) -> None:
        """Make a ``launch`` that takes too long fail."""
        ...

    def status(self, worker_id: int) -> StatusLine:
        """Return the line on which the slot's process says what it is doing."""
        ...

    def owes(self, worker_id: int) -> bool:
        """Return whether the slot's process has been given something to do."""
        ...

    def ask_to_stop(self, worker_id: int) -> bool:
        """Send the stop frame; return whether it could be sent."""
        ...


@dataclass(frozen=True, slots=True)
class Stall:
    """Half of a deadline passed without progress."""

    phase: str
    seconds: float
    stacks: str


class Incarnation:
    """One process in a slot, from its launch until it is gone.

    Attributes:
        worker_id: The slot.
        incarnation: Its number.
        handle: Its process, ``None`` until that is started.
        is_ready: It has finished its start.
        ended_for: Why the supervisor ends it, if it does.
    """

    def __init__(
        self,
        worker_id: int,
        incarnation: int,
        launcher: Launcher,
        config: ParallelConfig,
        hurry: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe it; ``hurry`` shortens the grace that it has to end by itself."""
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.handle: ProcessHandle | None = None
        self.is_ready = False
        self.ended_for: tuple[ExitCause, str] | None = None
        self._launcher = launcher
        self._config = config
        self._hurry = hurry
        self._clock = clock
        self._stop_requested = asyncio.Event()
        self._condemned = asyncio.Event()
        self._watchdog: Watchdog | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._stacks = ""
        self._dumped = ""
        self._before_stall = ""

    @property
    def pid(self) -> int | None:
        """Its process id, ``None`` where it has no process of its own."""
        return self.handle.pid if self.handle is not None else None

    # what the supervisor asks

    def end(self) -> None:
        """Have it end in an orderly way, soon."""
        if self.ended_for is None:
            self.ended_for = (ExitCause.REQUESTED, "")
        self._stop_requested.set()

    def condemn(self, cause: ExitCause, detail: str) -> None:
        """Kill it, because it cannot be trusted any more."""
        if self.handle is not None and self.handle.has_exited:
            return
        if self.ended_for is None:
            self.ended_for = (cause, detail)
        self._condemned.set()

    def doubt(self, detail: str) -> None:
        """Kill it because it has closed a queue, unless it turns out to be dying."""
        self._later(_DYING_TIME, self.condemn, ExitCause.PROTOCOL, detail)

    def _later(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay, callback, *args))

    def expect_progress(self) -> None:
        """Hear that it was given something to do."""
        if self._watchdog is not None:
            self._watchdog.poke()

    # its life

    async def start(self) -> ProcessHandle | None:
        """Start the process and return it; ``None`` if ``end`` was called before.

        Raises:
            Exception: It could not be started, or not in time. What a launch that goes on
                regardless brings up in the end is killed.
        """
        if self._stop_requested.is_set():
            return None
        launching = asyncio.ensure_future(self._launcher.launch(self.worker_id, self.incarnation))
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
        self._launcher.abort_launch()
        await shutdown.within(asyncio.shield(launching), shutdown.KILL_GRACE)
        return False

    async def wait_gone(self, handle: ProcessHandle) -> int | None:
        """Wait until the process is gone, or see to it; return its exit code, if it is known.

        One that cannot be killed is abandoned. When cancelled, it is killed and not waited for.
        """
        exit_ = asyncio.ensure_future(handle.wait())
        condemned = asyncio.ensure_future(self._condemned.wait())
        stop = asyncio.ensure_future(self._stop_requested.wait())
        reasons: set[asyncio.Future[Any]] = {exit_, condemned, stop}
        try:
            await asyncio.wait(reasons, return_when="FIRST_COMPLETED")
            if exit_.done() or await self._bring_to_an_end(handle):
                return await exit_
            self.ended_for = (
                ExitCause.ABANDONED,
                f"process {handle.pid} is in state {handle.state()!r} and did not end by SIGKILL",
            )
            return None
        finally:
            for reason in reasons:
                reason.cancel()
            handle.kill()  # also what is left of its process group
            if self._watchdog is not None:
                self._watchdog.close()

    async def _bring_to_an_end(self, handle: ProcessHandle) -> bool:
        if self._condemned.is_set():
            handle.kill()
            return await shutdown.within(handle.wait(), shutdown.KILL_GRACE)
        return await shutdown.end(
            handle, ask=self._ask, grace=self._config.shutdown_timeout, hurry=self._hurry
        )

    def _ask(self) -> bool:
        """Ask it to stop, unless it is still starting and would not hear of it."""
        is_starting = self._launcher.status(self.worker_id).phase is Phase.START
        return not is_starting and self._launcher.ask_to_stop(self.worker_id)

    # hang detection

    def watch(self, handle: ProcessHandle, on_stall: Callable[[Stall], None]) -> None:
        """Watch over the process from now on; a hung one is condemned."""
        status = self._launcher.status(self.worker_id)
        started = self._clock()

        def observe() -> Observation:
            if not self.is_ready:
                since = status.since if status.phase is Phase.START else 0.0
                return Observation(True, max(started, since), self._config.start_timeout)
            phase = status.phase
            is_idle = phase in (Phase.IDLE, Phase.TEARDOWN)
            owes = self._launcher.owes(self.worker_id) or not is_idle
            return Observation(owes, status.since, self._deadline(phase), is_idle)

        def suspect(stale: float) -> None:
            phase = status.phase.name.lower()
            self._stacks, self._before_stall = "", handle.crash_report()
            self._dump(handle, lambda: on_stall(Stall(phase, stale, self._stacks)))

        def hung(stale: float) -> None:
            state = handle.state()
            detail = f"no progress in {status.phase.name.lower()} for {stale:.1f} s"
            detail = f"{detail}, process state {state!r}" if state else detail
            self._dump(handle, lambda: self.condemn(ExitCause.HANG, detail))

        self._watchdog = Watchdog(observe, on_suspect=suspect, on_hung=hung, clock=self._clock)
        self._watchdog.poke()

    def _deadline(self, phase: Phase) -> float:
        """Return the seconds without progress that make a ready worker hung."""
        if phase in (Phase.COMMAND, Phase.LOAD_WEIGHTS):
            return max(self._config.collect_timeout, self._config.command_timeout)
        return self._config.collect_timeout

    def _dump(self, handle: ProcessHandle, then: Callable[[], None]) -> None:
        """Have all its stacks written, keep them, and go on unless it has ended meanwhile."""
        before = handle.crash_report()
        handle.dump_stacks()

        def take() -> None:
            if not handle.has_exited:
                self._dumped = handle.crash_report()
                # One that is stopped or in the kernel writes none: the earlier ones are the last.
                self._stacks = self._dumped.removeprefix(before) or self._stacks
                then()

        self._later(_DUMP_TIME, take)

    def crash_report(self) -> str:
        """Return what the process wrote about its own end, such as a native stack, or "".

        Of the dumps that were asked of it only the last of the stall that it was killed for
        counts: a stall that it overcame is not why it ended.
        """
        if self.handle is None:
            return ""
        if self.ended_for is not None and self.ended_for[0] is ExitCause.HANG:
            # A starved one may have written late: later than it was looked for.
            return self._stacks or self.handle.crash_report().removeprefix(self._before_stall)
        return self.handle.crash_report().removeprefix(self._dumped)

    def stderr_tail(self) -> str:
        """Return the last lines that the process wrote to standard error, or ""."""
        return self.handle.stderr_tail() if self.handle is not None else ""

    def close(self) -> None:
        """Give back what the process's handle holds, and forget its status line."""
        self._watchdog = None
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self.handle is not None:
            self.handle.close()


def _kill_what_was_launched(launching: asyncio.Future[ProcessHandle]) -> None:
    if not launching.cancelled() and launching.exception() is None:
        handle = launching.result()
        handle.kill()
        handle.close()


__all__ = ["Incarnation", "Launcher", "Stall"]

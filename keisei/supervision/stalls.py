"""StallWatch: notices that a process has stopped moving, and keeps the stacks that it wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from keisei.config import ParallelConfig
from keisei.ipc.status import Phase
from keisei.protocol.line import Line
from keisei.supervision.process import ProcessHandle
from keisei.supervision.watchdog import Observation, Watchdog

_DUMP_TIME = 0.05
"""Seconds until a dump of stacks is read: a signal handler writes it within microseconds, and a
process that does not run at all writes none anyway."""

_STOPPED = frozenset("Tt")
"""States of a process that a signal, or a debugger, has stopped."""


@dataclass(frozen=True, slots=True)
class Stall:
    """A worker has not moved: for half of its deadline, or since a signal has stopped it."""

    phase: str
    seconds: float
    stacks: str = ""
    state: str = ""


class StallWatch:
    """Watches one process, from its launch until it is gone.

    Attributes:
        hung: How it has hung, once a deadline has passed, or "".
    """

    def __init__(
        self,
        line: Line,
        handle: ProcessHandle,
        config: ParallelConfig,
        *,
        is_paused: Callable[[], bool],
        on_stall: Callable[[Stall], None],
        on_hung: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """Watch from now on.

        Args:
            line: Tells what the worker has been given to do, and what it is doing.
            handle: The process.
            config: The deadlines.
            is_paused: Tells whether ready workers are to collect nothing.
            on_stall: Called when half of a deadline has passed without progress, and when the
                process is found to be stopped.
            on_hung: Called once, with what is known, when a deadline has passed.
            clock: Seconds, the same as the worker's.
        """
        self._line = line
        self._handle = handle
        self._config = config
        self._is_paused = is_paused
        self._on_stall = on_stall
        self._on_hung = on_hung
        self._taking: asyncio.TimerHandle | None = None
        self._started = clock()
        self.hung = ""
        self._stacks = ""
        self._dumped = ""
        self._before_stall = ""
        self._is_stopped = False
        self._watchdog = Watchdog(
            self._observe,
            on_look=self._look,
            on_suspect=self._suspect,
            on_hung=self._hung,
            clock=clock,
        )
        self.poke = self._watchdog.poke
        self.poke()

    def close(self) -> None:
        """Watch no longer; what was written stays readable as long as the process's handle is."""
        self._watchdog.close()
        if self._taking is not None:
            self._taking.cancel()

    def _observe(self) -> Observation:
        line, status = self._line, self._line.status
        phase = status.phase
        if not line.is_ready:
            since = status.since if phase is Phase.START else 0.0
            return Observation(True, max(self._started, since), self._config.start_timeout)
        is_idle = phase in (Phase.IDLE, Phase.TEARDOWN)
        may_collect = line.outstanding > 0 and not self._is_paused()
        owes = may_collect or line.has_requests or not is_idle
        return Observation(owes, status.since, self._deadline(phase), is_idle)

    def _deadline(self, phase: Phase) -> float:
        """Return the seconds without progress that make a ready worker hung."""
        if phase in (Phase.COMMAND, Phase.CONFIGURE, Phase.LOAD_WEIGHTS):
            return max(self._config.collect_timeout, self._config.command_timeout)
        return self._config.collect_timeout

    def _phase(self) -> str:
        return self._line.phase.name.lower()

    def _look(self, stale: float) -> None:
        """Tell, once, that a signal has stopped the process."""
        was_stopped, state = self._is_stopped, self._handle.state()
        self._is_stopped = state in _STOPPED
        if self._is_stopped and not was_stopped:
            self._on_stall(Stall(self._phase(), stale, state=state))

    def _suspect(self, stale: float) -> None:
        phase = self._phase()
        self._stacks, self._before_stall = "", self._handle.crash_report()
        self._dump(
            lambda: self._on_stall(Stall(phase, stale, self._stacks, self._handle.state())),
            all_threads=False,  # it may only be slow, and must not be harmed
        )

    def _hung(self, stale: float) -> None:
        state = self._handle.state()
        detail = f"no progress in {self._phase()} for {stale:.1f} s"
        detail = f"{detail}, process state {state!r}" if state else detail
        self.hung = detail
        self._dump(lambda: self._on_hung(detail), all_threads=True)

    def _dump(self, then: Callable[[], None], *, all_threads: bool) -> None:
        """Have its stacks written, keep them, and go on unless it has ended meanwhile."""
        before = self._handle.crash_report()
        self._handle.dump_stacks(all_threads=all_threads)

        def take() -> None:
            if not self._handle.has_exited:
                self._dumped = self._handle.crash_report()
                # A process that is stopped or in the kernel writes none: earlier ones count then.
                self._stacks = self._dumped.removeprefix(before) or self._stacks
                then()

        self._taking = asyncio.get_running_loop().call_later(_DUMP_TIME, take)

    def crash_report(self, *, is_hung: bool) -> str:
        """Return what the process wrote about its own end, such as a native stack, or "".

        Of the dumps that were asked of it only the last of the stall that it was killed for
        counts (``is_hung``): a stall that it overcame is not why it ended.
        """
        report = self._handle.crash_report()
        if is_hung:
            # A starved process may have written late: later than it was looked for.
            return self._stacks or report.removeprefix(self._before_stall)
        return report.removeprefix(self._dumped)


__all__ = ["Stall", "StallWatch"]

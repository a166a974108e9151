"""Hang detection by progress: is a worker that owes something still moving?

A timer runs only while something is owed; a paused or waiting worker costs nothing. Time that
the supervisor itself lost (a suspended or starved application) is not held against a worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple


class Observation(NamedTuple):
    """The facts about a worker at one moment.

    Attributes:
        owes: It has something to do.
        since: When it last moved.
        deadline: Seconds without progress that make it hung.
        is_idle: It is between two things, and has not begun the next.
    """

    owes: bool
    since: float
    deadline: float
    is_idle: bool = False


class Staleness(NamedTuple):
    """Seconds without progress, and when to look again."""

    stale: float
    is_suspect: bool
    is_hung: bool
    next_look: float


FIRST_LOOK = 1.0
"""Seconds without progress after which a worker is looked at for the first time."""


def judge(since: float, now: float, deadline: float, lag: float) -> Staleness:
    """Decide about a worker that owes something; pure.

    Looks come after a second, two, four …, besides those at half of the deadline and at its end:
    so a worker that was stopped is noticed within twice the time that it has stood still.

    Args:
        since: When it last moved, or began to owe, whichever is later.
        now: The present, on the same clock.
        deadline: Seconds without progress that make it hung; half of them make it suspect.
        lag: Seconds since ``since`` in which the supervisor itself did not run.
    """
    stale = max(0.0, now - since - lag)
    goal = deadline if stale >= deadline / 2 else deadline / 2
    goal = min(goal, max(FIRST_LOOK, 2 * stale))
    return Staleness(
        stale=stale,
        is_suspect=stale >= deadline / 2,
        is_hung=stale >= deadline,
        next_look=max(goal - stale, 0.001),
    )


class Watchdog:
    """Watches one incarnation."""

    def __init__(
        self,
        observe: Callable[[], Observation],
        *,
        on_look: Callable[[float], None],
        on_suspect: Callable[[float], None],
        on_hung: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to watch at the first ``poke``.

        Args:
            observe: Tells what the worker owes and when it last moved.
            on_look: Called at each look that finds no progress for a second or more, with the
                seconds without progress.
            on_suspect: Called once per stall, with the seconds without progress.
            on_hung: Called once, with the seconds without progress.
            clock: Seconds, the same as the worker's.
        """
        self._observe = observe
        self._on_look = on_look
        self._on_suspect = on_suspect
        self._on_hung = on_hung
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._base = 0.0
        self._lag = 0.0
        self._due = 0.0
        self._suspected = False

    def poke(self) -> None:
        """Say that the worker has been given something to do.

        One that had done everything before begins to owe now. One that is busy, or has not moved
        since it was given something, has owed all along: no number of pokes keeps it alive.
        """
        now, seen = self._clock(), self._observe()
        if self._timer is None or (seen.is_idle and seen.since > self._base):
            self._begin_to_count(now)
        look_at = max(now, self._base + min(FIRST_LOOK, seen.deadline / 2))
        if self._timer is None or look_at < self._due:
            self.close()
            self._arm(look_at - now)

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_to_count(self, base: float) -> None:
        self._base, self._lag, self._suspected = base, 0.0, False

    def _arm(self, delay: float) -> None:
        self._due = self._clock() + delay
        self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._clock()
        seen = self._observe()
        if not seen.owes:
            return
        if seen.since > self._base:
            self._begin_to_count(seen.since)
        self._lag += max(0.0, now - max(self._due, self._base))
        found = judge(self._base, now, seen.deadline, self._lag)
        if found.is_hung:
            self._on_hung(found.stale)
            return
        if found.stale >= FIRST_LOOK:
            self._on_look(found.stale)
        if found.is_suspect and not self._suspected:
            self._suspected = True
            self._on_suspect(found.stale)
        self._arm(found.next_look)

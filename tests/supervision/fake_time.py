"""Time in the hands of a test: a clock, and an event loop's timers on it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timer:
    """What ``call_later`` returns."""

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeTime:
    """A clock that only the test moves; in the place of a running loop it has its timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        """Tell the time."""
        return self.now

    def call_later(self, delay: float, callback: Callable[..., object], *args: object) -> Timer:
        timer = Timer(self.now + delay, lambda: callback(*args))
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    @property
    def num_timers(self) -> int:
        """Timers that are set."""
        return sum(not timer.is_cancelled for _, _, timer in self._timers)

    def pass_by(self, seconds: float) -> None:
        """Let time pass while the process runs: every timer fires when it is due."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            if not timer.is_cancelled:
                timer.callback()
        self.now = max(self.now, end)

    def suspend(self, seconds: float) -> None:
        """Let time pass while the process does not run: timers that were due fire at its end."""
        self.now += seconds
        self.pass_by(0.0)

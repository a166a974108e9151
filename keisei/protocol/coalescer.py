"""For how long a worker's queue may be left alone: what costs is to be woken up for each frame."""

from __future__ import annotations

import math

TICK = 0.001
"""Seconds. Looks at several queues fall on the same ticks, which are as fine as timers are."""
LONGEST = 0.004
"""Seconds that an experience may have to wait until it is looked at."""
WORTHWHILE = 3
"""Experiences that a rest is expected to bring, at least."""


class Coalescer:
    """How fast one worker delivers, by the last two looks at its queue.

    A frame that wakes a sleeping process up costs its sender ten times one that does not, and the
    process that is woken several times what it does about the frame. So the queue of a worker that
    delivers every millisecond, and has work for a while, is looked at in ticks: several
    frames are read at once and none of them wakes anybody. Network drivers do the same (Salim et
    al., "Beyond Softnet", 2001).
    """

    def __init__(self) -> None:
        self._looked = -math.inf
        self._interval = math.inf

    def next_look(self, now: float, count: int, outstanding: int) -> float | None:
        """Return when to look at the queue again, or ``None`` for when something arrives.

        Args:
            now: Seconds, on the clock that the result is on too.
            count: Experiences that this look has found.
            outstanding: Experiences that the worker has yet to deliver without hearing from us.
                The look comes when it has delivered half of them.
        """
        if not count:
            return None
        before, self._interval = self._interval, (now - self._looked) / count
        self._looked = now
        interval = max(before, self._interval)
        # Half of its work: a worker that ran dry would lose more than anybody saves.
        rest = min(interval * outstanding / 2, LONGEST) if outstanding else 0.0
        if rest < WORTHWHILE * interval:
            return None
        look_at = math.floor((now + rest) / TICK) * TICK
        return look_at if look_at - now >= TICK / 2 else None

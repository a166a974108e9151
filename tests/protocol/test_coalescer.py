"""Coalescer: when a worker's queue is looked at again."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from keisei.protocol.coalescer import LONGEST, TICK, Coalescer


def after_steady(interval: float, outstanding: int, *, looks: int = 3) -> float | None:
    """Return how long to rest when looks at each experience found one every ``interval``."""
    coalescer = Coalescer()
    rests = []
    for number in range(looks):
        now = 100 + number * interval
        look_at = coalescer.next_look(now, 1, outstanding)
        rests.append(None if look_at is None else look_at - now)
    return rests[-1]


def test_a_busy_worker_with_work_is_left_alone():
    """For half of the time that it has work, up to the longest rest, and a tick less at most."""
    for milliseconds, outstanding in ((0.4, 8), (0.5, 8), (1, 8), (1, 16), (1.3, 6)):
        work = min(outstanding * milliseconds * 1e-3 / 2, LONGEST)
        rest = after_steady(milliseconds * 1e-3, outstanding)
        assert rest is not None
        assert max(work - TICK, TICK / 2) - 1e-9 <= rest <= work + 1e-9


def test_looks_at_several_workers_coincide():
    """Whenever two workers were looked at last, the next look is on a tick of the same clock."""
    for start in (0.0, 0.0003, 0.0007):
        coalescer = Coalescer()
        looks = [coalescer.next_look(100 + start + 0.001 * number, 1, 8) for number in range(4)]
        assert looks[-1] is not None
        assert abs(looks[-1] / TICK - round(looks[-1] / TICK)) < 1e-6


def test_nobody_rests_where_frames_come_one_at_a_time():
    """Slow workers, those that will be out of credits, and such that keep the loop busy anyway."""
    assert after_steady(1.1 * LONGEST / 3, 100) is None
    assert after_steady(0.001, 1) is None
    assert after_steady(0.001, 5) is None
    assert after_steady(0.001, 0) is None
    assert after_steady(0.00005, 4) is None


def test_a_pace_is_known_after_two_looks():
    """Not before, and not after a pause either."""
    coalescer = Coalescer()
    assert coalescer.next_look(100.000, 1, 8) is None
    assert coalescer.next_look(100.001, 1, 8) is None
    assert coalescer.next_look(100.002, 1, 8) is not None
    assert coalescer.next_look(105.000, 1, 8) is None
    assert coalescer.next_look(105.001, 1, 8) is None
    assert coalescer.next_look(105.002, 1, 8) is not None


def test_a_look_that_finds_nothing_ends_the_rest():
    """The next experience is announced, however regularly they came before."""
    coalescer = Coalescer()
    for number in range(5):
        coalescer.next_look(100 + 0.001 * number, 1, 8)
    assert coalescer.next_look(100.008, 0, 8) is None


@given(
    st.lists(
        st.tuples(st.floats(0, 0.01), st.integers(0, 50), st.integers(0, 50)),
        max_size=30,
    )
)
def test_no_worker_waits_for_a_look(looks):
    """A rest ends before half of the work is done, is never too long, and is worth a timer."""
    coalescer = Coalescer()
    times = itertools.accumulate((step for step, _, _ in looks), initial=100.0)
    last, intervals = -math.inf, []
    for now, (_, count, outstanding) in zip(itertools.islice(times, 1, None), looks, strict=True):
        if count:
            intervals.append((now - last) / count)
            last = now
        look_at = coalescer.next_look(now, count, outstanding)
        if look_at is not None:
            assert count
            half = max(intervals[-2:]) * outstanding / 2
            assert TICK / 2 <= look_at - now <= min(half, LONGEST) + 1e-9

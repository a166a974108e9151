"""Hang detection by progress, with a clock and timers that only the test moves."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keisei.supervision.watchdog import Observation, Staleness, Watchdog, judge
from supervision.fake_time import FakeTime

DEADLINE = 10.0
SECONDS = st.floats(0, 1e6)


class Watched:
    """A worker as the watchdog sees it, and what the watchdog said about it."""

    def __init__(self, time: FakeTime) -> None:
        self.time = time
        self.owes = True
        self.is_idle = False
        self.since = 0.0
        self.deadline = DEADLINE
        self.looks = 0
        self.looked: list[float] = []
        self.suspected: list[float] = []
        self.hung: list[float] = []
        self.watchdog = Watchdog(
            self.observe,
            on_look=self.looked.append,
            on_suspect=self.suspected.append,
            on_hung=self.hung.append,
            clock=time,
        )

    def observe(self) -> Observation:
        self.looks += 1
        return Observation(self.owes, self.since, self.deadline, self.is_idle)

    def move(self) -> None:
        self.since = self.time.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: fake)
    return fake


@pytest.fixture
def watched(time: FakeTime) -> Watched:
    return Watched(time)


# judge


@pytest.mark.parametrize(
    ("stale", "expected"),
    [
        (0.0, Staleness(0.0, False, False, 1.0)),
        (1.0, Staleness(1.0, False, False, 1.0)),
        (1.5, Staleness(1.5, False, False, 1.5)),
        (4.0, Staleness(4.0, False, False, 1.0)),
        (5.0, Staleness(5.0, True, False, 5.0)),
        (9.0, Staleness(9.0, True, False, 1.0)),
        (9.9999, Staleness(9.9999, True, False, 0.001)),
        (10.0, Staleness(10.0, True, True, 0.001)),
        (50.0, Staleness(50.0, True, True, 0.001)),
    ],
)
def test_a_judgement(stale, expected):
    """Half of the deadline makes a worker suspect, all of it hung; looks come at 1, 2, 4 … too."""
    found = judge(since=100.0, now=100.0 + stale, deadline=DEADLINE, lag=0.0)
    assert found == pytest.approx(expected)


def test_lag_is_not_held_against_the_worker():
    """Seconds in which the supervisor did not run do not count."""
    found = judge(since=100.0, now=3710.0, deadline=DEADLINE, lag=3606.0)
    assert found == pytest.approx(Staleness(4.0, False, False, 1.0))


@given(since=SECONDS, ahead=SECONDS, deadline=st.floats(0.01, 1e6), lag=SECONDS)
def test_judgements_make_sense(since, ahead, deadline, lag):
    """Staleness is never negative, the hung are suspect, and there is always a next look."""
    now = since + ahead
    found = judge(since, now, deadline, lag)
    assert 0.0 <= found.stale <= now - since
    assert found.is_suspect or not found.is_hung
    assert 0.001 <= found.next_look <= max(deadline, 0.001)


# the watchdog


def test_idle_costs_nothing(time, watched):
    """No timer runs before the first duty, nor after a look at a worker that owes nothing."""
    assert time.num_timers == 0
    watched.watchdog.poke()
    assert time.num_timers == 1
    watched.owes = False
    time.pass_by(DEADLINE)
    assert time.num_timers == 0
    looks = watched.looks
    time.pass_by(1e6)
    assert watched.looks == looks
    assert watched.suspected == watched.hung == []


def test_a_stall_is_found_on_time(time, watched):
    """At half of the deadline the worker is suspect, once, and at the deadline it is hung, once."""
    watched.watchdog.poke()
    time.pass_by(4.99)
    assert watched.suspected == []
    time.pass_by(0.02)
    assert watched.suspected == pytest.approx([5.0])
    time.pass_by(4.98)
    assert watched.hung == []
    time.pass_by(0.02)
    assert watched.hung == pytest.approx([10.0])
    time.pass_by(1e6)
    assert len(watched.suspected) == len(watched.hung) == 1
    assert time.num_timers == 0


@pytest.mark.parametrize("moved_at", [0.5, 2.5, 4.9, 5.1, 9.9])
def test_a_stall_counts_from_the_last_move(time, watched, moved_at):
    """It is found between the deadline and a moment more, counted from when it last moved."""
    watched.watchdog.poke()
    time.pass_by(moved_at)
    watched.move()
    time.pass_by(DEADLINE - 0.001)
    assert watched.hung == []
    time.pass_by(0.003)
    assert watched.hung == pytest.approx([DEADLINE], abs=0.003)


@pytest.mark.parametrize("pace", [0.01, 0.99])
def test_slow_but_moving_is_never_killed(time, watched, pace):
    """A worker that moves once within each deadline lives for ever."""
    watched.watchdog.poke()
    for _ in range(200):
        time.pass_by(DEADLINE * pace)
        watched.move()
    assert watched.hung == []


@given(gaps=st.lists(st.floats(0.0, 9.98), max_size=30), pokes=st.lists(st.floats(0.0, 9.98)))
def test_no_pattern_of_moves_and_pokes_kills_who_moves_in_time(gaps, pokes):
    """However its moves and duties fall between the looks, who moves in time is not hung."""
    time = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "get_running_loop", lambda: time)
        watched = Watched(time)
        watched.watchdog.poke()
        for index, gap in enumerate(gaps):
            before = pokes[index] if index < len(pokes) else gap
            time.pass_by(min(before, gap))
            watched.is_idle = index % 2 == 0
            watched.watchdog.poke()
            time.pass_by(gap - min(before, gap))
            watched.move()
        assert watched.hung == []
        time.pass_by(DEADLINE + 0.01)
        assert len(watched.hung) == 1


def test_each_stall_is_suspected_once(time, watched):
    """A worker that stalls, moves and stalls again is suspected twice."""
    watched.watchdog.poke()
    time.pass_by(9.0)
    watched.move()
    time.pass_by(9.0)
    assert watched.suspected == pytest.approx([5.0, 5.0])
    assert watched.hung == []


@pytest.mark.parametrize("moved_before", [None, 0.0, 1.0])
def test_a_suspended_supervisor_kills_nobody(time, watched, moved_before):
    """A look that is an hour late holds the hour against nobody, wherever the last move was."""
    watched.watchdog.poke()
    if moved_before is not None:
        time.pass_by(2.0)
        watched.move()
        time.pass_by(moved_before)
    time.suspend(3600.0)
    assert watched.hung == []
    time.pass_by(4.0)
    watched.move()
    time.pass_by(4.0)
    assert watched.hung == []


def test_a_worker_that_moved_during_the_suspension_lives(time, watched):
    """What passed since a move within the suspension does not count either."""
    watched.watchdog.poke()
    time.now += 1800.0
    watched.move()
    time.suspend(1800.0)
    assert watched.hung == []


def test_a_stall_is_found_in_spite_of_a_suspension(time, watched):
    """With the lost time taken out, the worker has one deadline and no more."""
    watched.watchdog.poke()
    time.suspend(3600.0)  # the first look, after a second, comes an hour late
    time.pass_by(8.99)
    assert watched.hung == []
    time.pass_by(0.02)
    assert watched.hung == pytest.approx([10.0], abs=0.01)


def test_a_poke_while_suspended_forgets_no_lag(time, watched):
    """A duty that is given before the late look leaves the lost hour lost."""
    watched.watchdog.poke()
    time.now += 3600.0
    watched.watchdog.poke()
    time.pass_by(0.0)
    assert watched.hung == []


def test_a_new_duty_of_an_idle_worker_begins_a_new_deadline(time, watched):
    """What it did long ago, between two looks, is not when it began to owe."""
    watched.watchdog.poke()
    time.pass_by(0.1)
    watched.move()
    watched.is_idle = True
    watched.owes = False
    time.pass_by(4.8)
    watched.owes = True
    watched.watchdog.poke()
    time.pass_by(9.99)
    assert watched.hung == []
    time.pass_by(0.02)
    assert watched.hung == pytest.approx([10.0], abs=0.01)


@pytest.mark.parametrize("is_idle", [False, True])
def test_pokes_do_not_keep_a_hung_worker_alive(time, watched, is_idle):
    """More and more to do for a worker that does not move is no sign of life."""
    watched.is_idle = is_idle
    watched.watchdog.poke()
    for _ in range(101):
        time.pass_by(0.1)
        watched.watchdog.poke()
    assert len(watched.hung) >= 1
    assert watched.hung[0] == pytest.approx(10.0, abs=0.11)


def test_pokes_do_not_keep_a_worker_alive_that_hangs_after_a_move(time, watched):
    """A move that was seen already is not seen anew by every poke."""
    watched.watchdog.poke()
    time.pass_by(1.0)
    watched.move()
    watched.is_idle = True
    time.pass_by(4.5)
    for _ in range(70):
        watched.watchdog.poke()
        time.pass_by(0.1)
    assert watched.hung == pytest.approx([10.0], abs=0.11)


def test_a_shorter_deadline_counts_from_the_poke_on(time, watched):
    """A timer that was set for a long phase does not delay what a short one needs."""
    watched.deadline = 60.0
    watched.watchdog.poke()
    time.pass_by(1.0)
    watched.move()
    watched.deadline = 2.0
    watched.watchdog.poke()
    time.pass_by(1.99)
    assert watched.hung == []
    time.pass_by(0.02)
    assert watched.hung == pytest.approx([2.0], abs=0.02)


def test_a_longer_deadline_counts_at_once(time, watched):
    """A worker that has entered a long phase has its time for it."""
    watched.watchdog.poke()
    watched.deadline = 60.0
    time.pass_by(59.9)
    assert watched.hung == []
    time.pass_by(0.2)
    assert watched.hung == pytest.approx([60.0])


def test_a_poke_arms_again(time, watched):
    """After a rest the next duty is watched like the first."""
    watched.watchdog.poke()
    watched.owes = False
    time.pass_by(100.0)
    watched.owes = True
    watched.watchdog.poke()
    time.pass_by(9.99)
    assert watched.hung == []
    time.pass_by(0.02)
    assert watched.hung == pytest.approx([10.0])


def test_there_is_one_timer_at_most(time, watched):
    """Pokes do not pile timers up."""
    for _ in range(10):
        watched.watchdog.poke()
        time.pass_by(0.1)
    assert time.num_timers == 1


def test_closing_ends_the_watch(time, watched):
    """A closed watchdog says nothing more; closing twice is allowed."""
    watched.watchdog.poke()
    watched.watchdog.close()
    watched.watchdog.close()
    assert time.num_timers == 0
    time.pass_by(1e6)
    assert watched.suspected == watched.hung == []


def test_a_worker_that_stands_still_is_looked_at_soon(time, watched):
    """After one second, two, four … of a stall, so that a stopped process is noticed early."""
    watched.deadline = 300.0
    watched.watchdog.poke()
    time.pass_by(149.0)
    assert watched.looked == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    assert watched.suspected == []
    watched.move()
    time.pass_by(3.5)
    assert len(watched.looked) <= 10
    assert watched.looked[-1] <= 3.5

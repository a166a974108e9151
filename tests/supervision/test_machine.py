"""The pure state machine of the pool: who is started, restarted, given up or ended, and when."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keisei.config import RestartPolicy
from keisei.events import ExitCause
from keisei.supervision.machine import (
    Action,
    Added,
    Due,
    End,
    Escalate,
    Event,
    Exited,
    GiveUp,
    Readied,
    Removed,
    Replaced,
    Schedule,
    Spawn,
    Stopping,
    Withdraw,
    step,
)
from keisei.supervision.slots import SlotStatus, SlotTable

FAILURES = [cause for cause in ExitCause if cause.is_failure]
NON_FAILURES = [cause for cause in ExitCause if not cause.is_failure]
NO_BACKOFF = {"backoff_base": 0.0, "backoff_cap": 0.0}


class Drive:
    """A pool in the hands of a test: it says what happens, and when."""

    def __init__(self, slots: int = 1, *, policy: dict[str, float] | None = None, **pool) -> None:
        self.pool = SlotTable(policy=RestartPolicy(**(policy or {})), **pool)
        self.now = 0.0
        for worker_id in range(slots):
            self.tell(Added(worker_id))

    def tell(self, happening: Event) -> list[Action]:
        self.pool, actions = step(self.pool, happening, self.now)
        return actions

    def status(self, worker_id: int = 0) -> SlotStatus:
        return self.pool.slots[worker_id].status

    def incarnation(self, worker_id: int = 0) -> int:
        return self.pool.slots[worker_id].incarnation

    def ready(self, *worker_ids: int) -> None:
        for worker_id in worker_ids or (0,):
            assert self.tell(Readied(worker_id, self.incarnation(worker_id))) == []

    def fail(
        self, worker_id: int = 0, cause: ExitCause = ExitCause.SIGNAL, **exit_
    ) -> list[Action]:
        return self.tell(Exited(worker_id, self.incarnation(worker_id), cause, **exit_))

    def fail_until_it_ends(self, worker_id: int = 0) -> int:
        """Let a slot fail, become ready and fail again; return how often it was started anew."""
        for restarts in range(1000):
            actions = self.fail(worker_id)
            if Spawn(worker_id, self.incarnation(worker_id), is_restart=True) not in actions:
                return restarts
            self.ready(worker_id)
        raise AssertionError("it never ended")


# one slot's life


def test_a_new_slot_is_started():
    """A slot that is added gets incarnation 0 at once."""
    drive = Drive(0)
    assert drive.tell(Added(3)) == [Spawn(3, 0)]
    assert drive.status(3) is SlotStatus.STARTING


def test_a_ready_process_is_running():
    """Readiness needs no action, and is remembered with its time."""
    drive = Drive()
    drive.now = 5.0
    assert drive.tell(Readied(0, 0)) == []
    assert drive.status() is SlotStatus.RUNNING
    assert drive.pool.slots[0].ready_since == 5.0


@pytest.mark.parametrize("cause", FAILURES)
def test_the_first_restart_is_immediate(cause):
    """After one failure of any kind the next incarnation starts at once, and it counts."""
    drive = Drive()
    drive.ready()
    assert drive.fail(cause=cause, jitter=0.9) == [Spawn(0, 1, is_restart=True)]
    assert drive.pool.failures == (0.0,)


@pytest.mark.parametrize("cause", NON_FAILURES)
@pytest.mark.parametrize("was_ready", [False, True])
def test_an_end_that_is_no_failure_is_made_good_without_counting(cause, was_ready):
    """A recycled worker has a successor at once however often, against a policy of no restarts."""
    drive = Drive(policy={"max_restarts": 0})
    for incarnation in range(1, 20):
        if was_ready:
            drive.ready()
        assert drive.fail(cause=cause) == [Spawn(0, incarnation, is_restart=True)]
    assert drive.pool.failures == ()
    assert drive.pool.slots[0].in_a_row == 0


def test_a_removed_slot_is_ended_and_stays_empty():
    """Removal asks once for the end, and the exit, of whatever kind, starts nobody."""
    drive = Drive()
    drive.ready()
    assert drive.tell(Removed(0)) == [End(0)]
    assert drive.status() is SlotStatus.ENDING
    assert drive.tell(Removed(0)) == []
    assert drive.fail() == []
    assert drive.status() is SlotStatus.STOPPED
    assert drive.pool.failures == ()


def test_a_slot_is_removed_while_it_starts():
    """A starting process is ended too, and its late readiness changes nothing."""
    drive = Drive()
    assert drive.tell(Removed(0)) == [End(0)]
    drive.ready()
    assert drive.status() is SlotStatus.ENDING


def test_a_slot_without_a_process_is_removed_at_once():
    """Neither a slot that waits nor one in its back-off has a process to end."""
    drive = Drive(2, policy={"max_concurrent_starts": 1})
    assert drive.status(1) is SlotStatus.WAITING
    assert drive.tell(Removed(1)) == []
    assert drive.status(1) is SlotStatus.STOPPED
    drive.fail(0)
    drive.fail(0, jitter=0.5)
    assert drive.status(0) is SlotStatus.BACKOFF
    assert drive.tell(Removed(0)) == []
    assert drive.status(0) is SlotStatus.STOPPED
    assert drive.tell(Due(0, 1)) == []


def test_a_slot_that_is_added_again_goes_on_counting_its_incarnations():
    """A slot starts afresh, but no incarnation comes twice, and it is no restart."""
    drive = Drive(degrade=True, min_workers=0, policy={"max_restarts": 0})
    assert drive.fail() == [GiveUp(0)]
    assert drive.tell(Added(0)) == [Spawn(0, 1)]
    assert drive.pool.slots[0].failures == ()


def test_a_slot_that_is_added_again_while_it_ends_waits_for_the_end():
    """The next process starts only when the old one is gone, so there are never two."""
    drive = Drive()
    drive.ready()
    drive.tell(Removed(0))
    assert drive.tell(Added(0)) == []
    assert drive.status() is SlotStatus.ENDING
    assert drive.fail(cause=ExitCause.REQUESTED) == [Spawn(0, 1)]
    assert not drive.pool.slots[0].is_wanted_again


def test_the_last_word_about_a_slot_that_ends_counts():
    """Added and removed again while it ends, it stays empty."""
    drive = Drive()
    drive.tell(Removed(0))
    drive.tell(Added(0))
    assert drive.tell(Removed(0)) == []
    assert drive.fail(cause=ExitCause.REQUESTED) == []
    assert drive.status() is SlotStatus.STOPPED


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_process_is_replaced_on_request(is_ready):
    """It is asked once to end, and whatever its end is like, its successor is no failure."""
    drive = Drive(policy={"max_restarts": 0})
    if is_ready:
        drive.ready()
    assert drive.tell(Replaced(0)) == [End(0, is_replaced=True)]
    assert drive.status() is SlotStatus.ENDING
    assert drive.tell(Replaced(0)) == []
    assert drive.tell(Added(0)) == []
    assert drive.fail(cause=ExitCause.SIGNAL) == [Spawn(0, 1, is_restart=True)]
    assert drive.pool.failures == drive.pool.slots[0].failures == ()
    drive.ready()
    assert drive.tell(Replaced(0)) == [End(0, is_replaced=True)]


def test_a_replacement_keeps_the_failures_of_before():
    """A restart on request does not lengthen the budget of a slot that fails."""
    drive = Drive(degrade=True, min_workers=0, policy={"max_restarts": 1})
    drive.fail()
    drive.ready()
    drive.tell(Replaced(0))
    assert drive.fail(cause=ExitCause.RECYCLED) == [Spawn(0, 2, is_restart=True)]
    drive.ready()
    assert drive.fail() == [GiveUp(0)]


@pytest.mark.parametrize("last", [Removed(0), Stopping()])
def test_a_slot_that_is_being_replaced_may_be_removed(last):
    """The last word counts: nothing is started in it any more."""
    drive = Drive()
    drive.ready()
    drive.tell(Replaced(0))
    assert drive.tell(last) == []
    assert drive.fail(cause=ExitCause.RECYCLED) == []
    assert drive.status() is SlotStatus.STOPPED


def test_a_slot_in_its_back_off_is_replaced_at_once():
    """The restart that was to come later comes now, and its timer starts no second one."""
    drive = Drive()
    drive.fail()
    drive.fail(jitter=0.5)
    assert drive.status() is SlotStatus.BACKOFF
    assert drive.tell(Replaced(0)) == [Spawn(0, 2, is_restart=True)]
    assert drive.tell(Due(0, 1)) == []
    assert drive.incarnation() == 2


def test_a_slot_that_was_given_up_is_filled_again_on_request():
    """It starts afresh, with the next incarnation and no failures."""
    drive = Drive(degrade=True, min_workers=0, policy={"max_restarts": 0})
    assert drive.fail() == [GiveUp(0)]
    assert drive.tell(Replaced(0)) == [Spawn(0, 1)]
    assert drive.pool.slots[0].failures == ()


@pytest.mark.parametrize("unknown", [Replaced(9), Replaced(1)])
def test_a_replacement_of_what_has_no_process_yet_changes_nothing(unknown):
    """A slot that waits for its start, or does not exist, is left as it is."""
    drive = Drive(2, policy={"max_concurrent_starts": 1})
    before = drive.pool
    assert drive.tell(unknown) == []
    assert drive.pool == before


@pytest.mark.parametrize("prepare", ["starting", "running", "backoff", "waiting"])
def test_adding_a_slot_that_lives_changes_nothing(prepare):
    """No second process is started for a slot that has one, or will have one."""
    drive = Drive(policy={"max_concurrent_starts": 1})
    if prepare == "running":
        drive.ready()
    if prepare == "backoff":
        drive.fail()
        drive.fail(jitter=0.5)
    worker_id = 0
    if prepare == "waiting":
        drive.tell(Added(1))
        worker_id = 1
    assert drive.status(worker_id) == prepare
    before = drive.pool
    assert drive.tell(Added(worker_id)) == []
    assert drive.pool == before


@pytest.mark.parametrize(
    "happening",
    [
        Readied(0, 1),
        Readied(0, 3),
        Readied(9, 2),
        Exited(0, 1, ExitCause.SIGNAL),
        Exited(0, 3, ExitCause.SIGNAL),
        Exited(9, 0, ExitCause.SIGNAL),
        Due(0, 1),
        Due(0, 2),
        Due(9, 0),
        Removed(9),
    ],
)
@pytest.mark.parametrize("is_ready", [False, True])
def test_what_is_not_about_the_newest_process_changes_nothing(happening, is_ready):
    """Another incarnation, an unknown slot, a timer that nobody set: all are ignored."""
    drive = Drive(policy=NO_BACKOFF)
    drive.fail()
    drive.fail()
    if is_ready:
        drive.ready()
    before = drive.pool
    assert drive.incarnation() == 2
    assert drive.tell(happening) == []
    assert drive.pool == before


def test_an_exit_is_heard_once():
    """The same exit told again neither counts nor starts another process."""
    drive = Drive()
    drive.ready()
    drive.fail()
    before = drive.pool
    assert drive.tell(Exited(0, 0, ExitCause.SIGNAL)) == []
    assert drive.pool == before


# simultaneous starts


def test_no_more_start_at_once_than_the_policy_allows():
    """The lowest slots start first, and each that is ready or gone makes room for the next."""
    drive = Drive(5, policy={"max_concurrent_starts": 2, **NO_BACKOFF})
    statuses = [drive.status(worker_id) for worker_id in range(5)]
    assert statuses == ["starting", "starting", "waiting", "waiting", "waiting"]
    assert drive.tell(Readied(1, 0)) == [Spawn(2, 0)]
    assert drive.fail(0) == [Spawn(0, 1, is_restart=True)]
    assert drive.tell(Readied(0, 1)) == [Spawn(3, 0)]
    assert drive.tell(Removed(3)) == [End(3), Spawn(4, 0)]


# intensity


@pytest.mark.parametrize("max_restarts", [0, 1, 3, 10])
def test_the_intensity_is_exact(max_restarts):
    """So many failures are made good, and one more escalates."""
    drive = Drive(policy={"max_restarts": max_restarts, **NO_BACKOFF})
    drive.ready()
    assert drive.fail_until_it_ends() == max_restarts
    assert drive.status() is SlotStatus.GIVEN_UP
    assert drive.pool.is_stopping


def test_the_escalation_says_why():
    """The reason names the numbers and the keys of the configuration."""
    drive = Drive(policy={"max_restarts": 0, "restart_window": 2.5})
    drive.ready()
    assert drive.fail() == [
        Escalate(0, "more than 0 failures in 2.5 s (restart.max_restarts, restart.restart_window)")
    ]


def test_the_intensity_is_of_the_whole_pool():
    """Failures of different slots add up where the pool is to stop as one."""
    drive = Drive(3, policy={"max_restarts": 2, **NO_BACKOFF})
    drive.ready(0, 1, 2)
    assert drive.fail(0) == [Spawn(0, 1, is_restart=True)]
    assert drive.fail(1) == [Spawn(1, 1, is_restart=True)]
    assert [type(action) for action in drive.fail(2)] == [Escalate]


@pytest.mark.parametrize(("later", "escalates"), [(9.999, True), (10.0, False)])
def test_the_window_slides(later, escalates):
    """A failure is forgotten exactly when the window has passed it by."""
    drive = Drive(policy={"max_restarts": 1, "restart_window": 10.0, **NO_BACKOFF})
    drive.ready()
    drive.fail()
    drive.now = later
    actions = drive.fail()
    assert any(isinstance(action, Escalate) for action in actions) is escalates


def test_the_budget_replenishes():
    """One crash an hour is made good for ever, with a budget of one a minute."""
    drive = Drive(policy={"max_restarts": 1, "restart_window": 60.0})
    for hour in range(1000):
        drive.ready()
        drive.now += 3600.0
        assert drive.fail(jitter=0.9) == [Spawn(0, hour + 1, is_restart=True)]
    assert len(drive.pool.failures) == 1
    assert len(drive.pool.slots[0].failures) == 1


# back-off


def test_the_back_off_grows_to_its_cap():
    """Nothing, then base · 2^(n-2) up to the cap, all of it at full jitter."""
    policy = {"backoff_base": 0.5, "backoff_cap": 3.0, "max_restarts": 100}
    drive = Drive(policy=policy)
    delays = []
    for _ in range(7):
        actions = drive.fail(jitter=1.0)
        delays.append(sum(a.delay for a in actions if isinstance(a, Schedule)))
        drive.tell(Due(0, drive.incarnation()))
    assert delays == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("jitter", [0.25, 0.5, 0.999])
def test_the_jitter_is_full(jitter):
    """The wait is uniform between nothing and its ceiling."""
    drive = Drive(policy={"backoff_base": 8.0, "backoff_cap": 8.0})
    drive.fail()
    assert drive.fail(jitter=jitter) == [Schedule(0, 1, 8.0 * jitter)]
    assert drive.status() is SlotStatus.BACKOFF
    assert drive.tell(Due(0, 1)) == [Spawn(0, 2, is_restart=True)]


def test_a_long_row_of_failures_does_not_overflow():
    """The exponent has a bound of its own."""
    drive = Drive(policy={"max_restarts": 10**6, "backoff_cap": 10.0})
    for _ in range(3000):
        actions = drive.fail(jitter=1.0)
        drive.tell(Due(0, drive.incarnation()))
    assert actions == [Schedule(0, 2999, 10.0)]


@pytest.mark.parametrize(("healthy_for", "delay"), [(29.9, 4.0), (30.0, 0.0)])
def test_proven_health_resets_the_row(healthy_for, delay):
    """After ``reset_after`` seconds of being ready the next failure is a first one again."""
    policy = {"backoff_base": 4.0, "reset_after": 30.0, "restart_window": 1e6}
    drive = Drive(policy=policy)
    drive.fail()
    drive.now = 100.0
    drive.ready()
    drive.now += healthy_for
    actions = drive.fail(jitter=1.0)
    assert sum(a.delay for a in actions if isinstance(a, Schedule)) == delay


def test_a_long_start_is_no_health():
    """Time that passed before a process was ready does not reset the row."""
    drive = Drive(policy={"backoff_base": 4.0, "reset_after": 30.0})
    drive.fail()
    drive.now = 1000.0
    assert drive.fail(jitter=1.0) == [Schedule(0, 1, 4.0)]


def test_a_slot_in_back_off_holds_up_nobody():
    """While one slot waits, its place among the starting ones is free."""
    drive = Drive(2, policy={"max_concurrent_starts": 1})
    drive.fail(0)
    actions = drive.fail(0, jitter=0.5)
    assert actions[1:] == [Spawn(1, 0)]


# a start that raises


def test_a_first_start_that_raises_escalates_at_once():
    """An exception in the first start is not tried again, and nobody else is started."""
    drive = Drive(3, policy={"max_concurrent_starts": 1})
    actions = drive.fail(0, ExitCause.START_FAILED, raised=True)
    assert actions == [Escalate(0, "its first start failed")]
    assert drive.status(1) is SlotStatus.WAITING
    assert drive.tell(Stopping()) == []
    assert drive.status(1) is SlotStatus.STOPPED


def test_a_first_start_that_is_refused_is_tried_again():
    """What the system refuses now it may grant later."""
    drive = Drive()
    assert drive.fail(0, ExitCause.START_FAILED) == [Spawn(0, 1, is_restart=True)]


def test_once_complete_a_start_that_raises_is_tried_again():
    """It has worked before, so the policy decides as about any failure."""
    drive = Drive(2)
    drive.ready(0, 1)
    drive.fail(0)
    assert drive.fail(0, ExitCause.START_FAILED, raised=True, jitter=0.5) == [Schedule(0, 1, 0.05)]


def test_a_first_experience_that_raises_escalates_at_once():
    """The mistake is in the program, also where slots may be given up."""
    for pool in ({}, {"degrade": True}):
        drive = Drive(2, **pool)
        drive.ready(0, 1)
        actions = drive.fail(1, ExitCause.USER_ERROR, raised_at_first=True)
        assert actions == [Escalate(1, "its first experience failed")]


def test_the_first_experience_of_a_later_process_or_slot_is_tried_again():
    """The pool has worked before, so the policy decides as about any failure."""
    drive = Drive(1)
    drive.ready(0)
    drive.fail(0)
    drive.ready(0)
    actions = drive.fail(0, ExitCause.USER_ERROR, raised_at_first=True, jitter=0.5)
    assert actions == [Schedule(0, 1, 0.05)]
    drive.tell(Added(1))
    drive.ready(1)
    assert drive.fail(1, ExitCause.USER_ERROR, raised_at_first=True) == [
        Spawn(1, 1, is_restart=True)
    ]


def test_a_pool_is_complete_when_all_that_live_are_running():
    """Slots that are gone do not count, but one that still starts does."""
    drive = Drive(3)
    drive.ready(0)
    assert not drive.pool.was_complete
    drive.tell(Removed(1))
    drive.fail(1, ExitCause.REQUESTED)
    drive.ready(2)
    assert drive.pool.was_complete


# giving up


def test_a_bad_slot_is_given_up_and_the_others_go_on():
    """With ``degrade`` each slot has a budget of its own, and the pool shrinks to its minimum."""
    drive = Drive(3, policy={"max_restarts": 1, **NO_BACKOFF}, degrade=True, min_workers=2)
    drive.ready(0, 1, 2)
    assert drive.fail(1) == [Spawn(1, 1, is_restart=True)]
    assert drive.fail(0) == [Spawn(0, 1, is_restart=True)]
    assert drive.fail(2) == [Spawn(2, 1, is_restart=True)]
    assert drive.fail(1) == [GiveUp(1)]
    assert drive.status(1) is SlotStatus.GIVEN_UP
    assert drive.pool.num_alive == 2
    assert not drive.pool.is_stopping


def test_fewer_slots_than_the_minimum_escalate():
    """The slot that makes them too few is given up, and the pool stops."""
    drive = Drive(2, policy={"max_restarts": 0}, degrade=True, min_workers=2)
    drive.ready(0, 1)
    assert drive.fail(0) == [
        GiveUp(0),
        Escalate(0, "fewer than min_workers (2) slots are left"),
    ]
    assert drive.tell(Stopping()) == [End(1)]


def test_a_slot_that_was_given_up_stays_so():
    """Neither removal nor the end of the pool changes what became of it."""
    drive = Drive(2, policy={"max_restarts": 0}, degrade=True)
    drive.fail(0)
    drive.tell(Removed(0))
    drive.tell(Stopping())
    assert drive.status(0) is SlotStatus.GIVEN_UP


# poison


def poisoned(threshold: int | None = 3, slots: int = 6, **policy) -> Drive:
    drive = Drive(
        slots, policy={"max_restarts": 1000, **NO_BACKOFF, **policy}, poison_threshold=threshold
    )
    drive.ready(*range(slots))
    return drive


def blame(drive: Drive, deaths: Iterable[tuple[int, int]]) -> list[Action]:
    """Let slots fail on versions; return what was decided beyond starting them again."""
    found = []
    for worker_id, version in deaths:
        actions = drive.fail(worker_id, version=version)
        found += [action for action in actions if not isinstance(action, Spawn)]
        drive.ready(worker_id)
    return found


def test_a_version_that_kills_enough_slots_is_withdrawn_once():
    """Three distinct slots are enough, and those that still die of it change nothing more."""
    drive = poisoned()
    assert blame(drive, [(0, 5), (1, 5)]) == []
    assert blame(drive, [(2, 5)]) == [Withdraw(5)]
    assert blame(drive, [(3, 5), (4, 5), (5, 5)]) == []
    assert blame(drive, [(0, 7), (1, 7), (2, 7)]) == [Withdraw(7)]


def test_one_bad_slot_is_not_bad_weights():
    """Distinct slots are counted, not deaths."""
    assert blame(poisoned(), [(0, 5)] * 10 + [(1, 5)] * 10) == []


def test_only_the_newest_version_is_blamed():
    """A newer one begins a count of its own, and a straggler on an older one disturbs nothing."""
    drive = poisoned()
    assert blame(drive, [(0, 5), (1, 5), (2, 6), (3, 6), (4, 5)]) == []
    assert blame(drive, [(5, 6)]) == [Withdraw(6)]


@pytest.mark.parametrize("version", [0, 1])
def test_there_is_nothing_before_the_first_version(version):
    """No weights, or the first ones, cannot be withdrawn."""
    assert blame(poisoned(), [(n, version) for n in range(6)]) == []


def test_without_a_threshold_nothing_is_withdrawn():
    """``None`` switches the judgement off."""
    assert blame(poisoned(None), [(n, 5) for n in range(6)]) == []


def test_a_withdrawal_starts_the_slot_again_at_once():
    """With the cause removed there is neither a back-off nor an escalation."""
    drive = poisoned(2, 2, max_restarts=1, backoff_base=5.0, backoff_cap=5.0)
    drive.fail(0, version=5)
    assert drive.fail(1, version=5) == [Withdraw(5), Spawn(1, 1, is_restart=True)]


# the end


def test_stopping_ends_every_process_and_starts_none():
    """Each process is asked once, each slot without one is done, and exits start nobody."""
    drive = Drive(4, policy={"max_concurrent_starts": 2})
    drive.tell(Readied(0, 0))
    drive.fail(1)
    drive.fail(1, jitter=0.5)
    statuses = [drive.status(worker_id) for worker_id in range(4)]
    assert statuses == ["running", "backoff", "starting", "starting"]
    assert drive.tell(Stopping()) == [End(0), End(2), End(3)]
    assert drive.tell(Stopping()) == []
    assert drive.fail(0) == drive.fail(2) == drive.fail(3, ExitCause.REQUESTED) == []
    assert drive.tell(Due(1, 1)) == drive.tell(Added(7)) == drive.tell(Added(0)) == []
    assert {slot.status for slot in drive.pool.slots.values()} == {SlotStatus.STOPPED}


def test_a_slot_that_was_wanted_again_stops_with_the_pool():
    """Stopping forgets that a slot was to be filled again."""
    drive = Drive()
    drive.tell(Removed(0))
    drive.tell(Added(0))
    assert drive.tell(Stopping()) == []
    assert drive.fail(cause=ExitCause.REQUESTED) == []
    assert drive.status() is SlotStatus.STOPPED


# any order of events


class AnyOrder(RuleBasedStateMachine):
    """Says anything at any time, and holds the machine to its specification with a model."""

    @initialize(
        max_restarts=st.integers(0, 4),
        starts=st.integers(1, 3),
        degrade=st.booleans(),
        min_workers=st.integers(1, 3),
        threshold=st.none() | st.integers(2, 3),
    )
    def make(self, max_restarts, starts, degrade, min_workers, threshold):
        self.policy = RestartPolicy(
            max_restarts=max_restarts,
            restart_window=10.0,
            backoff_base=1.0,
            backoff_cap=4.0,
            reset_after=5.0,
            max_concurrent_starts=starts,
        )
        self.pool = SlotTable(
            policy=self.policy,
            degrade=degrade,
            min_workers=min_workers,
            poison_threshold=threshold,
        )
        self.now = 0.0
        # The model: what a supervisor would know that obeys.
        self.processes: dict[int, int] = {}
        self.starting: set[int] = set()
        self.ending: set[int] = set()
        self.newest: dict[int, int] = {}
        self.timers: dict[int, int] = {}
        self.failures: dict[int, list[float]] = {}
        self.all_failures: list[float] = []
        self.in_a_row: dict[int, int] = {}
        self.ready_at: dict[int, float] = {}
        self.is_over = False
        self.original: set[int] = set()
        self.was_complete = False
        self.withdrawn: list[int] = []
        self.replaced: set[int] = set()

    def tell(self, happening: Event) -> list[Action]:
        self.pool, actions = step(self.pool, happening, self.now)
        for action in actions:
            match action:
                case Spawn(worker_id, incarnation):
                    assert not self.is_over, "a start after the end"
                    assert worker_id not in self.processes, "two processes of a slot"
                    assert worker_id not in self.timers, "a start during the back-off"
                    assert incarnation == self.newest.get(worker_id, -1) + 1
                    self.newest[worker_id] = self.processes[worker_id] = incarnation
                    self.starting.add(worker_id)
                case End(worker_id):
                    assert worker_id in self.processes
                    assert worker_id not in self.ending, "asked twice"
                    self.ending.add(worker_id)
                    self.starting.discard(worker_id)
                case Schedule(worker_id, incarnation, delay):
                    assert worker_id not in self.processes
                    assert worker_id not in self.timers
                    assert incarnation == self.newest[worker_id]
                    assert 0 < delay < self.policy.backoff_cap
                    self.timers[worker_id] = incarnation
                case Escalate():
                    self.is_over = True
                case Withdraw(version):
                    assert version not in self.withdrawn
                    self.withdrawn.append(version)
        return actions

    workers = st.integers(0, 3)

    @rule(worker_id=workers)
    def replace(self, worker_id):
        slot = self.pool.slots.get(worker_id)
        if slot is not None and slot.status.is_terminal:
            self.failures[worker_id] = []
            self.in_a_row[worker_id] = 0
            self.original.discard(worker_id)
        self.timers.pop(worker_id, None)
        if slot is not None and worker_id in self.processes and worker_id not in self.ending:
            self.replaced.add(worker_id)
        self.tell(Replaced(worker_id))
        if slot is not None and not self.is_over:
            assert not self.pool.slots[worker_id].status.is_terminal

    @rule(worker_id=workers)
    def add(self, worker_id):
        slot = self.pool.slots.get(worker_id)
        if slot is None and not self.was_complete:
            self.original.add(worker_id)
        elif slot is not None and slot.status.is_terminal:
            self.original.discard(worker_id)
        is_leaving = worker_id in self.ending - self.replaced
        if slot is None or slot.status.is_terminal or is_leaving:
            self.failures[worker_id] = []
            self.in_a_row[worker_id] = 0
        self.tell(Added(worker_id))
        if not self.is_over:
            assert not self.pool.slots[worker_id].status.is_terminal

    @rule(worker_id=workers)
    def remove(self, worker_id):
        self.tell(Removed(worker_id))
        self.timers.pop(worker_id, None)
        self.replaced.discard(worker_id)
        if worker_id in self.pool.slots:
            slot = self.pool.slots[worker_id]
            assert slot.status is SlotStatus.ENDING or slot.status.is_terminal

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def ready(self, data):
        worker_id = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.discard(worker_id)
        self.ready_at[worker_id] = self.now
        self.tell(Readied(worker_id, self.processes[worker_id]))
        assert self.pool.slots[worker_id].status is SlotStatus.RUNNING
        living = [slot for slot in self.pool.slots.values() if not slot.status.is_terminal]
        # A spawn that this readiness made room for comes after the pool was complete, or not.
        others = {key for key in self.processes if key not in self.ending | self.starting}
        self.was_complete |= len(others) == len(living) and not self.timers

    @precondition(lambda self: self.processes)
    @rule(
        data=st.data(),
        cause=st.sampled_from(ExitCause),
        jitter=st.floats(0.01, 0.99),
        version=st.integers(0, 4),
        raised=st.booleans(),
        at_first=st.booleans(),
    )
    def exit(self, data, cause, jitter, version, raised, at_first):
        worker_id = data.draw(st.sampled_from(sorted(self.processes)))
        incarnation = self.processes.pop(worker_id)
        was_ending = worker_id in self.ending
        was_over = self.is_over
        ready_at = self.ready_at.pop(worker_id, None)
        self.starting.discard(worker_id)
        self.ending.discard(worker_id)
        was_replaced = worker_id in self.replaced
        self.replaced.discard(worker_id)
        actions = self.tell(
            Exited(worker_id, incarnation, cause, jitter, version, raised, raised_at_first=at_first)
        )
        escalated = any(isinstance(action, Escalate) for action in actions)
        gave_up = GiveUp(worker_id) in actions
        delays = [action.delay for action in actions if isinstance(action, Schedule)]
        if was_ending or was_over or not cause.is_failure:
            assert not escalated
            assert not gave_up
            assert delays == []
            if was_replaced and not was_over:
                assert self.pool.slots[worker_id].failures == tuple(self.failures[worker_id])
            return
        is_healthy = ready_at is not None and self.now - ready_at >= self.policy.reset_after
        self.in_a_row[worker_id] = 1 if is_healthy else self.in_a_row[worker_id] + 1
        self.failures[worker_id].append(self.now)
        self.all_failures.append(self.now)
        own, everybodys = self.recent(self.failures[worker_id]), self.recent(self.all_failures)
        withdrew = any(isinstance(action, Withdraw) for action in actions)
        first_raised = (raised and not self.was_complete) or (
            at_first and incarnation == 0 and worker_id in self.original
        )
        too_often = (own if self.pool.degrade else everybodys) > self.policy.max_restarts
        too_few = self.pool.num_alive < self.pool.min_workers
        if withdrew:
            assert not escalated
            assert not gave_up
        elif first_raised:
            assert escalated
        elif self.pool.degrade:
            assert gave_up is too_often
            assert escalated is (too_often and too_few)
        else:
            assert escalated is too_often
        if not (escalated or gave_up or withdrew):
            row = self.in_a_row[worker_id]
            ceiling = min(4.0, 1.0 * 2 ** (row - 2)) if row > 1 else 0.0
            assert delays == ([ceiling * jitter] if ceiling else [])

    def recent(self, times: list[float]) -> int:
        return sum(self.now - time < self.policy.restart_window for time in times)

    @precondition(lambda self: self.timers)
    @rule(data=st.data())
    def due(self, data):
        worker_id = data.draw(st.sampled_from(sorted(self.timers)))
        incarnation = self.timers.pop(worker_id)
        self.tell(Due(worker_id, incarnation))
        if not self.is_over:
            assert self.pool.slots[worker_id].status in (SlotStatus.WAITING, SlotStatus.STARTING)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 9.9, 10.0, 60.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(worker_id=workers, back=st.integers(1, 3), kind=st.sampled_from([Readied, Due, Exited]))
    def something_stale(self, worker_id, back, kind):
        incarnation = self.newest.get(worker_id, -1) - back
        extra = (ExitCause.SIGNAL,) if kind is Exited else ()
        before = self.pool
        assert self.tell(kind(worker_id, incarnation, *extra)) == []
        assert self.pool == before

    @rule()
    def stop(self):
        self.is_over = True
        self.tell(Stopping())
        self.timers.clear()

    @invariant()
    def it_knows_who_has_a_process(self):
        if not hasattr(self, "pool"):
            return
        having = {key for key, slot in self.pool.slots.items() if slot.status.has_process}
        assert having == set(self.processes)
        assert len(self.starting) <= self.policy.max_concurrent_starts

    @invariant()
    def nobody_waits_in_vain(self):
        """A slot waits only for a place to start, or for its timer."""
        if not hasattr(self, "pool") or self.is_over:
            return
        for worker_id, slot in self.pool.slots.items():
            if slot.status is SlotStatus.WAITING:
                assert len(self.starting) == self.policy.max_concurrent_starts
            assert (slot.status is SlotStatus.BACKOFF) == (worker_id in self.timers)

    def teardown(self):
        """Stopped, and with every exit delivered, every slot is done."""
        if not hasattr(self, "pool"):
            return
        self.stop()
        for worker_id, incarnation in list(self.processes.items()):
            assert self.tell(Exited(worker_id, incarnation, ExitCause.SIGNAL)) == []
        assert all(slot.status.is_terminal for slot in self.pool.slots.values())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True
)

"""The pure state machine of the pool: (state, event) → (state, actions). No I/O, no clock.

It decides who is started, restarted, given up or ended, and when the whole pool must stop. The
supervisor feeds it what happened, with the time of it, and carries out what it returns.

::

    WAITING ──Spawn──▶ STARTING ──Ready──▶ RUNNING ──End──▶ ENDING
       ▲                  │                   │               │
       │     exit         ▼                   ▼               ▼
    BACKOFF ◀─── (policy decides on a failure) ───▶ GIVEN_UP / STOPPED
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from keisei.config import RestartPolicy
from keisei.events import ExitCause


class SlotStatus(enum.StrEnum):
    """Where a slot is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    ENDING = "ending"
    STOPPED = "stopped"
    GIVEN_UP = "given up"

    @property
    def is_terminal(self) -> bool:
        """Whether the slot will have no process any more."""
        return self in (SlotStatus.STOPPED, SlotStatus.GIVEN_UP)

    @property
    def has_process(self) -> bool:
        """Whether a process of the slot exists, or is being made."""
        return self in (SlotStatus.STARTING, SlotStatus.RUNNING, SlotStatus.ENDING)


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot.

    Attributes:
        status: Where it is.
        incarnation: The number of its newest process; -1 before the first.
        failures: When it failed, within the restart window.
        in_a_row: Failures since its health was last proven.
        ready_since: When its process became ready; ``None`` while it is not.
        is_restart: Its next process takes the place of one that ended by itself.
        is_wanted_again: It was added again while its process was being ended; the next one
            starts when that is gone.
    """

    status: SlotStatus = SlotStatus.WAITING
    incarnation: int = -1
    failures: tuple[float, ...] = ()
    in_a_row: int = 0
    ready_since: float | None = None
    is_restart: bool = False
    is_wanted_again: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """The whole state.

    Attributes:
        policy: The restart policy.
        min_workers: With ``degrade``: fewer slots than this escalate.
        degrade: Give a slot up when it fails too often, instead of escalating.
        poison_threshold: Distinct slots that must fail on a weights version; ``None`` never.
        slots: By worker id.
        failures: When any slot failed, within the restart window.
        was_complete: Every slot has been running at the same time once.
        is_stopping: No process is started any more.
        blamed_version: The newest weights version that may be to blame for a failure.
        blamed_by: Slots that failed on it.
        withdrawn: The newest version that was withdrawn.
    """

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    min_workers: int = 1
    degrade: bool = False
    poison_threshold: int | None = None
    slots: Mapping[int, Slot] = field(default_factory=lambda: MappingProxyType({}))
    failures: tuple[float, ...] = ()
    was_complete: bool = False
    is_stopping: bool = False
    blamed_version: int = 0
    blamed_by: frozenset[int] = frozenset()
    withdrawn: int = 0

    def with_slot(self, worker_id: int, slot: Slot) -> Pool:
        """Return a pool in which one slot is replaced."""
        return replace(self, slots=MappingProxyType({**self.slots, worker_id: slot}))

    @property
    def num_alive(self) -> int:
        """Slots that are not given up or stopped."""
        return sum(not slot.status.is_terminal for slot in self.slots.values())


# what happened


@dataclass(frozen=True, slots=True)
class Added:
    """A slot was added; one that was removed, given up or stopped may be added again."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class Readied:
    """A process finished its start."""

    worker_id: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A process ended, or could not be started.

    ``jitter`` is uniform in [0, 1). ``version`` is the weights version that may be to blame, 0
    for none. ``raised`` tells that a start failed by an exception of the user's code, which a
    second try would only repeat.
    """

    worker_id: int
    incarnation: int
    cause: ExitCause
    jitter: float = 0.0
    version: int = 0
    raised: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """A slot's back-off is over."""

    worker_id: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A slot is no longer wanted."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """The whole pool is to stop."""


Happening = Added | Readied | Exited | Due | Removed | Stopping

# what to do


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process; ``is_restart`` if it takes the place of one that ended by itself."""

    worker_id: int
    incarnation: int
    is_restart: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """Say ``Due`` after ``delay`` seconds."""

    worker_id: int
    incarnation: int
    delay: float


@dataclass(frozen=True, slots=True)
class End:
    """End a slot's process in an orderly way."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave a slot empty for good."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class Escalate:
    """Stop the pool, say ``Stopping``: a failure is beyond the policy."""

    worker_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Replace a weights version that kills its workers by the one before."""

    version: int


Action = Spawn | Schedule | End | GiveUp | Escalate | Withdraw


def step(pool: Pool, happening: Happening, now: float) -> tuple[Pool, list[Action]]:
    """Return the next state and what to do about ``happening``.

    Args:
        pool: The present state.
        happening: What happened. One about a process that is not the slot's newest, or about a
            slot that has ended, changes nothing.
        now: When, in seconds of any clock that never goes back.
    """
    actions: list[Action] = []
    match happening:
        case Added(worker_id):
            pool = _added(pool, worker_id)
        case Readied(worker_id, incarnation):
            slot = _current(pool, worker_id, incarnation, SlotStatus.STARTING)
            if slot is not None:
                slot = replace(slot, status=SlotStatus.RUNNING, ready_since=now)
                pool = pool.with_slot(worker_id, slot)
                complete = all(
                    slot.status is SlotStatus.RUNNING or slot.status.is_terminal
                    for slot in pool.slots.values()
                )
                pool = replace(pool, was_complete=pool.was_complete or complete)
        case Exited():
            pool, actions = _exited(pool, happening, now)
        case Due(worker_id, incarnation):
            slot = _current(pool, worker_id, incarnation, SlotStatus.BACKOFF)
            if slot is not None:
                pool = pool.with_slot(worker_id, replace(slot, status=SlotStatus.WAITING))
        case Removed(worker_id):
            if worker_id in pool.slots:
                pool, actions = _end(pool, worker_id)
        case Stopping():
            pool = replace(pool, is_stopping=True)
            for worker_id in pool.slots:
                pool, more = _end(pool, worker_id)
                actions += more
    pool, spawns = _fill(pool)
    return pool, actions + spawns


def _current(pool: Pool, worker_id: int, incarnation: int, status: SlotStatus) -> Slot | None:
    slot = pool.slots.get(worker_id)
    if slot is None or slot.incarnation != incarnation or slot.status is not status:
        return None
    return slot


def _added(pool: Pool, worker_id: int) -> Pool:
    slot = pool.slots.get(worker_id)
    if pool.is_stopping:
        return pool
    if slot is None:
        return pool.with_slot(worker_id, Slot())
    if slot.status.is_terminal:
        return pool.with_slot(worker_id, Slot(incarnation=slot.incarnation))
    if slot.status is SlotStatus.ENDING:
        return pool.with_slot(worker_id, replace(slot, is_wanted_again=True))
    return pool


def _fill(pool: Pool) -> tuple[Pool, list[Action]]:
    """Start waiting slots, lowest first, as far as the limit on simultaneous starts allows."""
    if pool.is_stopping:
        return pool, []
    starting = sum(slot.status is SlotStatus.STARTING for slot in pool.slots.values())
    actions: list[Action] = []
    for worker_id in sorted(pool.slots):
        slot = pool.slots[worker_id]
        if starting >= pool.policy.max_concurrent_starts:
            break
        if slot.status is SlotStatus.WAITING:
            incarnation = slot.incarnation + 1
            actions.append(Spawn(worker_id, incarnation, is_restart=slot.is_restart))
            slot = replace(
                slot,
                status=SlotStatus.STARTING,
                incarnation=incarnation,
                ready_since=None,
                is_restart=True,
            )
            pool = pool.with_slot(worker_id, slot)
            starting += 1
    return pool, actions


def _end(pool: Pool, worker_id: int) -> tuple[Pool, list[Action]]:
    """Bring one slot towards its end."""
    slot = replace(pool.slots[worker_id], is_wanted_again=False)
    actions: list[Action] = []
    if slot.status in (SlotStatus.STARTING, SlotStatus.RUNNING):
        slot = replace(slot, status=SlotStatus.ENDING)
        actions.append(End(worker_id))
    elif slot.status in (SlotStatus.WAITING, SlotStatus.BACKOFF):
        slot = replace(slot, status=SlotStatus.STOPPED)
    return pool.with_slot(worker_id, slot), actions


def _exited(pool: Pool, exit_: Exited, now: float) -> tuple[Pool, list[Action]]:
    worker_id = exit_.worker_id
    slot = pool.slots.get(worker_id)
    if slot is None or slot.incarnation != exit_.incarnation or not slot.status.has_process:
        return pool, []
    if slot.status is SlotStatus.ENDING or pool.is_stopping:
        pool = pool.with_slot(worker_id, replace(slot, status=SlotStatus.STOPPED))
        return (_added(pool, worker_id) if slot.is_wanted_again else pool), []
    if not exit_.cause.is_failure:
        # Nobody asked it to end for good: a recycled worker, or one that said goodbye by itself.
        return pool.with_slot(worker_id, replace(slot, status=SlotStatus.WAITING)), []
    return _failed(pool, slot, exit_, now)


def _failed(pool: Pool, slot: Slot, exit_: Exited, now: float) -> tuple[Pool, list[Action]]:
    policy, worker_id = pool.policy, exit_.worker_id
    healthy = slot.ready_since is not None and now - slot.ready_since >= policy.reset_after
    in_a_row = 1 if healthy else slot.in_a_row + 1
    recent = _recent(slot.failures, now, policy.restart_window)
    slot = replace(slot, failures=(*recent, now), in_a_row=in_a_row, ready_since=None)
    pool = replace(
        pool.with_slot(worker_id, slot),
        failures=(*_recent(pool.failures, now, policy.restart_window), now),
    )
    pool, poison = _poisoned(pool, exit_)
    if poison:
        return _retry(pool, slot, exit_, delay=0.0, actions=poison)
    if exit_.raised and not pool.was_complete:
        return _escalated(pool, worker_id, "its first start failed")
    if not pool.degrade and len(pool.failures) > policy.max_restarts:
        reason = (
            f"more than {policy.max_restarts} failures in {policy.restart_window:g} s "
            "(restart.max_restarts, restart.restart_window)"
        )
        return _escalated(pool, worker_id, reason)
    if pool.degrade and len(slot.failures) > policy.max_restarts:
        return _given_up(pool, worker_id)
    return _retry(pool, slot, exit_, _backoff(policy, in_a_row, exit_.jitter), [])


def _retry(
    pool: Pool, slot: Slot, exit_: Exited, delay: float, actions: list[Action]
) -> tuple[Pool, list[Action]]:
    if delay <= 0:
        return pool.with_slot(exit_.worker_id, replace(slot, status=SlotStatus.WAITING)), actions
    pool = pool.with_slot(exit_.worker_id, replace(slot, status=SlotStatus.BACKOFF))
    return pool, [*actions, Schedule(exit_.worker_id, exit_.incarnation, delay)]


def _given_up(pool: Pool, worker_id: int) -> tuple[Pool, list[Action]]:
    slot = replace(pool.slots[worker_id], status=SlotStatus.GIVEN_UP)
    pool = pool.with_slot(worker_id, slot)
    if pool.num_alive >= pool.min_workers:
        return pool, [GiveUp(worker_id)]
    reason = f"fewer than min_workers ({pool.min_workers}) slots are left"
    pool, actions = _escalated(pool, worker_id, reason)
    return pool, [GiveUp(worker_id), *actions]


def _escalated(pool: Pool, worker_id: int, reason: str) -> tuple[Pool, list[Action]]:
    slot = replace(pool.slots[worker_id], status=SlotStatus.GIVEN_UP)
    pool = replace(pool.with_slot(worker_id, slot), is_stopping=True)
    return pool, [Escalate(worker_id, reason)]


def _recent(times: tuple[float, ...], now: float, window: float) -> tuple[float, ...]:
    return tuple(time for time in times if now - time < window)


def _backoff(policy: RestartPolicy, in_a_row: int, jitter: float) -> float:
    """Return the wait before a restart, in seconds: none at first, then exponential, full jitter.

    Full jitter spreads the restarts of slots that failed together over the whole interval
    (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """
    if in_a_row <= 1:
        return 0.0
    ceiling = min(policy.backoff_cap, policy.backoff_base * 2.0 ** min(in_a_row - 2, 64))
    return ceiling * jitter


def _poisoned(pool: Pool, exit_: Exited) -> tuple[Pool, list[Action]]:
    """Count the distinct slots that failed on one version; withdraw it when they are too many."""
    threshold, version = pool.poison_threshold, exit_.version
    is_known = version <= pool.withdrawn or version < pool.blamed_version
    if threshold is None or version <= 1 or is_known:
        return pool, []  # nothing is before version 1, and only the newest can be withdrawn
    others = pool.blamed_by if version == pool.blamed_version else frozenset()
    pool = replace(pool, blamed_version=version, blamed_by=others | {exit_.worker_id})
    if len(pool.blamed_by) < threshold:
        return pool, []
    return replace(pool, withdrawn=version), [Withdraw(version)]

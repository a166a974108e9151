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

from dataclasses import dataclass, replace

from keisei.config import RestartPolicy
from keisei.events import ExitCause
from keisei.supervision.slots import Blame, Slot, SlotStatus, SlotTable

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
    for none; ``weights`` stands for their name. ``raised`` tells that a start failed by an
    exception of the user's code, which a second try would only repeat; ``raised_at_first`` tells
    the same of the first experience.
    """

    worker_id: int
    incarnation: int
    cause: ExitCause
    jitter: float = 0.0
    version: int = 0
    raised: bool = False
    weights: int = 0
    raised_at_first: bool = False


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
class Replaced:
    """A new process is wanted in a slot; one that was given up or stopped is filled again."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """The whole pool is to stop."""


Event = Added | Readied | Exited | Due | Removed | Replaced | Stopping

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
    """End a slot's process in an orderly way; ``is_replaced`` if another takes its place."""

    worker_id: int
    is_replaced: bool = False


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
    """Replace a version of weights that kills its workers by the one before."""

    version: int
    weights: int = 0


FIRST_EXPERIENCE = "its first experience failed"
"""The reason of an escalation: the mistake is in the program, as where the first start fails."""

Action = Spawn | Schedule | End | GiveUp | Escalate | Withdraw


def step(table: SlotTable, event: Event, now: float) -> tuple[SlotTable, list[Action]]:
    """Return the next state and what to do about ``event``.

    Args:
        table: The present state.
        event: What happened. One about a process that is not the slot's newest, or about a
            slot that has ended, changes nothing.
        now: When, in seconds of any clock that never goes back.
    """
    actions: list[Action] = []
    match event:
        case Added(worker_id):
            table = _added(table, worker_id)
        case Readied(worker_id, incarnation):
            slot = _current(table, worker_id, incarnation, SlotStatus.STARTING)
            if slot is not None:
                slot = replace(slot, status=SlotStatus.RUNNING, ready_since=now)
                table = table.with_slot(worker_id, slot)
                complete = all(
                    slot.status is SlotStatus.RUNNING or slot.status.is_terminal
                    for slot in table.slots.values()
                )
                table = replace(table, was_complete=table.was_complete or complete)
        case Exited():
            table, actions = _exited(table, event, now)
        case Due(worker_id, incarnation):
            slot = _current(table, worker_id, incarnation, SlotStatus.BACKOFF)
            if slot is not None:
                table = table.with_slot(worker_id, replace(slot, status=SlotStatus.WAITING))
        case Removed(worker_id):
            if worker_id in table.slots:
                table, actions = _end(table, worker_id)
        case Replaced(worker_id):
            if worker_id in table.slots:
                table, actions = _replaced(table, worker_id)
        case Stopping():
            table = replace(table, is_stopping=True)
            for worker_id in table.slots:
                table, more = _end(table, worker_id)
                actions += more
    table, spawns = _fill(table)
    return table, actions + spawns


def _current(table: SlotTable, worker_id: int, incarnation: int, status: SlotStatus) -> Slot | None:
    slot = table.slots.get(worker_id)
    if slot is None or slot.incarnation != incarnation or slot.status is not status:
        return None
    return slot


def _added(table: SlotTable, worker_id: int) -> SlotTable:
    slot = table.slots.get(worker_id)
    if table.is_stopping:
        return table
    if slot is None:
        return table.with_slot(worker_id, Slot(is_original=not table.was_complete))
    if slot.status.is_terminal:
        return table.with_slot(worker_id, Slot(incarnation=slot.incarnation))
    if slot.status is SlotStatus.ENDING and not slot.is_replaced:
        return table.with_slot(worker_id, replace(slot, is_wanted_again=True))
    return table


def _replaced(table: SlotTable, worker_id: int) -> tuple[SlotTable, list[Action]]:
    slot = table.slots[worker_id]
    if table.is_stopping:
        return table, []
    if slot.status in (SlotStatus.STARTING, SlotStatus.RUNNING):
        slot = replace(slot, status=SlotStatus.ENDING, is_replaced=True)
        return table.with_slot(worker_id, slot), [End(worker_id, is_replaced=True)]
    if slot.status is SlotStatus.BACKOFF:  # its timer says ``Due`` to a slot that waits no more
        return table.with_slot(worker_id, replace(slot, status=SlotStatus.WAITING)), []
    return _added(table, worker_id) if slot.status.is_terminal else table, []


def _fill(table: SlotTable) -> tuple[SlotTable, list[Action]]:
    """Start waiting slots, lowest first, as far as the limit on simultaneous starts allows."""
    if table.is_stopping:
        return table, []
    starting = sum(slot.status is SlotStatus.STARTING for slot in table.slots.values())
    actions: list[Action] = []
    for worker_id in sorted(table.slots):
        slot = table.slots[worker_id]
        if starting >= table.policy.max_concurrent_starts:
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
            table = table.with_slot(worker_id, slot)
            starting += 1
    return table, actions


def _end(table: SlotTable, worker_id: int) -> tuple[SlotTable, list[Action]]:
    """Bring one slot towards its end."""
    slot = replace(table.slots[worker_id], is_wanted_again=False, is_replaced=False)
    actions: list[Action] = []
    if slot.status in (SlotStatus.STARTING, SlotStatus.RUNNING):
        slot = replace(slot, status=SlotStatus.ENDING)
        actions.append(End(worker_id))
    elif slot.status in (SlotStatus.WAITING, SlotStatus.BACKOFF):
        slot = replace(slot, status=SlotStatus.STOPPED)
    return table.with_slot(worker_id, slot), actions


def _exited(table: SlotTable, exit_: Exited, now: float) -> tuple[SlotTable, list[Action]]:
    worker_id = exit_.worker_id
    slot = table.slots.get(worker_id)
    if slot is None or slot.incarnation != exit_.incarnation or not slot.status.has_process:
        return table, []
    if slot.is_replaced and not table.is_stopping:
        slot = replace(slot, status=SlotStatus.WAITING, ready_since=None, is_replaced=False)
        return table.with_slot(worker_id, slot), []
    if slot.status is SlotStatus.ENDING or table.is_stopping:
        table = table.with_slot(worker_id, replace(slot, status=SlotStatus.STOPPED))
        return (_added(table, worker_id) if slot.is_wanted_again else table), []
    if not exit_.cause.is_failure:
        # Its slot stays: the worker was recycled, or ended by itself in an orderly way.
        return table.with_slot(worker_id, replace(slot, status=SlotStatus.WAITING)), []
    return _failed(table, slot, exit_, now)


def _failed(
    table: SlotTable, slot: Slot, exit_: Exited, now: float
) -> tuple[SlotTable, list[Action]]:
    policy, worker_id = table.policy, exit_.worker_id
    healthy = slot.ready_since is not None and now - slot.ready_since >= policy.reset_after
    in_a_row = 1 if healthy else slot.in_a_row + 1
    recent = _recent(slot.failures, now, policy.restart_window)
    slot = replace(slot, failures=(*recent, now), in_a_row=in_a_row, ready_since=None)
    table = replace(
        table.with_slot(worker_id, slot),
        failures=(*_recent(table.failures, now, policy.restart_window), now),
    )
    table, poison = _poisoned(table, exit_)
    if poison:
        return _retry(table, slot, exit_, delay=0.0, actions=poison)
    if exit_.raised and not table.was_complete:
        return _escalated(table, worker_id, "its first start failed")
    if exit_.raised_at_first and slot.is_original and slot.incarnation == 0:
        return _escalated(table, worker_id, FIRST_EXPERIENCE)
    if not table.degrade and len(table.failures) > table.max_failures:
        reason = (
            f"more than {table.max_failures} failures in {policy.restart_window:g} s "
            "(restart.max_restarts, restart.restart_window)"
        )
        return _escalated(table, worker_id, reason)
    if table.degrade and len(slot.failures) > policy.max_restarts:
        return _given_up(table, worker_id)
    return _retry(table, slot, exit_, _backoff(policy, in_a_row, exit_.jitter), [])


def _retry(
    table: SlotTable, slot: Slot, exit_: Exited, delay: float, actions: list[Action]
) -> tuple[SlotTable, list[Action]]:
    if delay <= 0:
        return table.with_slot(exit_.worker_id, replace(slot, status=SlotStatus.WAITING)), actions
    table = table.with_slot(exit_.worker_id, replace(slot, status=SlotStatus.BACKOFF))
    return table, [*actions, Schedule(exit_.worker_id, exit_.incarnation, delay)]


def _given_up(table: SlotTable, worker_id: int) -> tuple[SlotTable, list[Action]]:
    slot = replace(table.slots[worker_id], status=SlotStatus.GIVEN_UP)
    table = table.with_slot(worker_id, slot)
    if table.num_alive >= table.min_workers:
        return table, [GiveUp(worker_id)]
    reason = f"fewer than min_workers ({table.min_workers}) slots are left"
    table, actions = _escalated(table, worker_id, reason)
    return table, [GiveUp(worker_id), *actions]


def _escalated(table: SlotTable, worker_id: int, reason: str) -> tuple[SlotTable, list[Action]]:
    slot = replace(table.slots[worker_id], status=SlotStatus.GIVEN_UP)
    table = replace(table.with_slot(worker_id, slot), is_stopping=True)
    return table, [Escalate(worker_id, reason)]


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


def _poisoned(table: SlotTable, exit_: Exited) -> tuple[SlotTable, list[Action]]:
    """Count the distinct slots that failed on one version; withdraw it when they are too many."""
    threshold, version = table.poison_threshold, exit_.version
    known = table.blame.get(exit_.weights, Blame())
    is_known = version <= known.withdrawn or version < known.version
    if threshold is None or version <= 1 or is_known:
        return table, []  # nothing is before version 1, and only the newest can be withdrawn
    others = known.by if version == known.version else frozenset()
    blame = replace(known, version=version, by=others | {exit_.worker_id})
    if len(blame.by) < threshold:
        return table.with_blame(exit_.weights, blame), []
    blame = replace(blame, withdrawn=version)
    return table.with_blame(exit_.weights, blame), [Withdraw(version, exit_.weights)]

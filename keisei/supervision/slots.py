"""The state of a pool's slots, as the pure machine sees and changes it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from keisei.config import RestartPolicy

_SLOTS_OF_A_BUDGET = 8
"""Slots that share one budget of ``max_restarts``."""


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
        is_original: It was there before the pool was complete for the first time.
        is_wanted_again: It was added again while its process was being ended; the next one
            starts when that is gone.
        is_replaced: Its process is being ended on request, and the next one takes its place.
    """

    status: SlotStatus = SlotStatus.WAITING
    incarnation: int = -1
    failures: tuple[float, ...] = ()
    in_a_row: int = 0
    ready_since: float | None = None
    is_restart: bool = False
    is_original: bool = False
    is_wanted_again: bool = False
    is_replaced: bool = False


@dataclass(frozen=True, slots=True)
class Blame:
    """Which slots failed on the weights of one name.

    Attributes:
        version: The newest version that may be to blame for a failure; 0 is none.
        by: Slots that failed on it.
        withdrawn: The newest version that was withdrawn; 0 is none.
    """

    version: int = 0
    by: frozenset[int] = frozenset()
    withdrawn: int = 0


@dataclass(frozen=True, slots=True)
class SlotTable:
    """The state of every slot and of the pool as a whole.

    Attributes:
        policy: The restart policy.
        min_workers: With ``degrade``: fewer slots than this escalate.
        degrade: Give a slot up when it fails too often, instead of escalating.
        poison_threshold: Distinct slots that must fail on a weights version; ``None`` never.
        slots: By worker id.
        failures: When any slot failed, within the restart window.
        was_complete: Every slot has been running at the same time once.
        is_stopping: No process is started any more.
        blame: What is known about the weights of each name, by the name's number.
    """

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    min_workers: int = 1
    degrade: bool = False
    poison_threshold: int | None = None
    slots: Mapping[int, Slot] = field(default_factory=lambda: MappingProxyType({}))
    failures: tuple[float, ...] = ()
    was_complete: bool = False
    is_stopping: bool = False
    blame: Mapping[int, Blame] = field(default_factory=lambda: MappingProxyType({}))

    def with_slot(self, worker_id: int, slot: Slot) -> SlotTable:
        """Return a table in which one slot is replaced."""
        return replace(self, slots=MappingProxyType({**self.slots, worker_id: slot}))

    def with_blame(self, weights: int, blame: Blame) -> SlotTable:
        """Return a table in which what is known about weights is replaced."""
        return replace(self, blame=MappingProxyType({**self.blame, weights: blame}))

    @property
    def num_alive(self) -> int:
        """Slots that are not given up or stopped."""
        return sum(not slot.status.is_terminal for slot in self.slots.values())

    @property
    def max_failures(self) -> int:
        """Failures in the restart window that the whole pool survives.

        ``max_restarts`` is meant for up to eight slots and grows with their number beyond: one
        cause, such as a sweep of the out-of-memory killer, may end many workers of a large pool.
        """
        num_slots = sum(slot.status is not SlotStatus.STOPPED for slot in self.slots.values())
        return self.policy.max_restarts * max(num_slots, _SLOTS_OF_A_BUDGET) // (_SLOTS_OF_A_BUDGET)

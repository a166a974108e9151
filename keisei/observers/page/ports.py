"""What the page asks of the manager whose pool it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from keisei.events import Incident
from keisei.observers import Observer


class SlotInfo(Protocol):
    """One slot, as in ``manager.workers``."""

    @property
    def worker_id(self) -> int: ...  # noqa: D102 - as in WorkerInfo, which has the words
    @property
    def incarnation(self) -> int: ...  # noqa: D102
    @property
    def pid(self) -> int | None: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def phase(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def weights_version(self) -> int: ...  # noqa: D102
    @property
    def experiences(self) -> int: ...  # noqa: D102
    @property
    def num_failures(self) -> int: ...  # noqa: D102
    @property
    def age(self) -> float: ...  # noqa: D102
    @property
    def seconds_since_progress(self) -> float: ...  # noqa: D102


class PoolNumbers(Protocol):
    """The pool in numbers, as in ``manager.stats()``."""

    @property
    def seconds(self) -> float: ...  # noqa: D102 - as in PoolStats, which has the words
    @property
    def num_workers(self) -> int: ...  # noqa: D102
    @property
    def num_ready(self) -> int: ...  # noqa: D102
    @property
    def num_batches(self) -> int: ...  # noqa: D102
    @property
    def num_steps(self) -> int: ...  # noqa: D102
    @property
    def num_queued(self) -> int: ...  # noqa: D102
    @property
    def num_dropped(self) -> int: ...  # noqa: D102
    @property
    def num_lost(self) -> int: ...  # noqa: D102
    @property
    def num_restarts(self) -> int: ...  # noqa: D102
    @property
    def num_incidents(self) -> int: ...  # noqa: D102
    @property
    def weights_version(self) -> int: ...  # noqa: D102
    @property
    def is_paused(self) -> bool: ...  # noqa: D102


class ShownManager(Protocol):
    """A ``ParallelManager``, as far as the page uses one."""

    @property
    def state(self) -> str:
        """Where it is in its life."""
        ...

    def iter_workers(self) -> Iterator[SlotInfo]:
        """Iterate over the slots; there is none before the start."""
        ...

    @property
    def incidents(self) -> Sequence[Incident]:
        """Every failure so far, oldest first."""
        ...

    def stats(self) -> PoolNumbers:
        """Return the pool in numbers; raises RuntimeError if it was never started."""
        ...

    def add_observer(self, observer: Observer) -> None:
        """Pass events on."""
        ...

    async def pause(self) -> None:
        """Have every worker stand still."""
        ...

    async def resume(self) -> None:
        """Let workers collect again."""
        ...

    async def scale(self, num_workers: int) -> None:
        """Change the number of slots."""
        ...

    async def restart(self, worker_id: int) -> None:
        """Replace one worker's process."""
        ...

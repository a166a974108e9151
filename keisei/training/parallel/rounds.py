"""Round: in sync mode every live worker collects exactly one experience."""

from __future__ import annotations

from collections.abc import Iterable

from keisei.protocol.batches import PendingBatch


class Round:
    """The workers of one round, and the experiences that have arrived from each."""

    def __init__(self, worker_ids: Iterable[int]) -> None:
        self._arrived: dict[int, PendingBatch | None] = dict.fromkeys(worker_ids)

    def awaits(self, worker_id: int) -> bool:
        """Return whether the slot still has to deliver its experience."""
        return self._arrived.get(worker_id, ...) is None

    def has(self, worker_id: int) -> bool:
        """Return whether the slot takes part."""
        return worker_id in self._arrived

    def put(self, batch: PendingBatch) -> None:
        """Take in a worker's experience."""
        self._arrived[batch.worker_id] = batch

    def leave_out(self, worker_id: int) -> None:
        """Await nothing of a slot that will have no process any more."""
        del self._arrived[worker_id]

    @property
    def is_complete(self) -> bool:
        """Whether every slot has delivered."""
        return None not in self._arrived.values()

    def batches(self) -> list[PendingBatch]:
        """Return the experiences that have arrived, ordered by worker."""
        return [batch for _, batch in sorted(self._arrived.items()) if batch is not None]

"""Sizing: how many workers a manager has, and fresh processes for them on request."""

from __future__ import annotations

from keisei.events import PoolScaled
from keisei.training.parallel.configuring import Configuring


class Sizing(Configuring):
    """Changes the number of slots, and the process in a slot, of a pool that is running."""

    async def scale(self, num_workers: int) -> None:
        """Change the number of slots, and return when all are ready or gone.

        Slots are added and removed at the upper end. A worker that is removed finishes the
        experience that it is collecting; what it has delivered stays queued. When cancelled, the
        change goes on by itself.

        Raises:
            ValueError: ``num_workers`` is not positive.
            Exception: Whatever a callable of ``settings`` raises for a new slot; nothing has
                changed then.
            PoolExhausted: The restart policy was exceeded.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; a pool needs at least one worker")
        await pool.resize(num_workers)
        if pool.num_workers == num_workers:
            self._hub.publish(PoolScaled(num_workers))

    async def restart(self, worker_id: int) -> None:
        """Have a new process take the place of a worker's, and return when it is ready.

        The present process finishes the experience that it is collecting, within
        ``shutdown_timeout``, and tears down; what it has delivered stays queued. It is no failure:
        the restart policy does not count it, and observers hear of it as "recycled". A slot in
        its back-off is started at once, and one that was given up is filled again. When cancelled,
        the restart goes on by itself.

        Args:
            worker_id: The slot.

        Raises:
            ValueError: There is no such slot.
            WorkerLost: The slot was given up, removed or stopped before a new worker was ready.
            PoolExhausted: The restart policy was exceeded.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        if worker_id not in range(pool.num_workers):
            raise ValueError(
                f"worker_id is {worker_id}; this pool has the workers 0 to {pool.num_workers - 1}"
            )
        await pool.restart(worker_id)

"""ManagedWeights: what a manager does with weights."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any

import anyio.lowlevel

from keisei.training.parallel.lifecycle import Lifecycle
from keisei.training.parallel.model_sync import ModelSynchronizer
from keisei.training.parallel.snapshots import PreparedModel
from keisei.training.parallel.weights_source import WeightsSource
from keisei.worker import MAIN


class ManagedWeights(Lifecycle):
    """A manager that publishes weights to the workers of its pool."""

    async def push_weights(
        self,
        weights: WeightsSource,
        name: str = MAIN,
        *,
        wait: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Publish weights of a name to all workers and return their version, 1 for the first.

        They are copied once into shared memory, whatever the number of workers; each worker takes
        the newest version before its next experience. In sync mode a round that is being
        collected is waited for, and none begins meanwhile; while the pool is paused a round is not
        waited for, and workers that have not begun it collect with this version. When cancelled,
        the version is either published or not.

        Each name has a layout, memory and versions of its own. A worker takes those that it has a
        model for (``Worker.models``), and any others when it asks (``WorkerContext.weights``).

        Args:
            weights: A module, a state dict with dense tensors on any device, or a snapshot;
                copied.
            name: "main", or any other text of up to 200 characters.
            wait: Also wait until every live worker has applied this version or a newer one, or
                knows of it where it has no model of that name.
            timeout: Seconds for ``wait``; ``None`` takes ``command_timeout``.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights of this
                name, or they are "main" and a worker has neither a ``model`` nor its own
                ``load_weights``; the message names them. Nothing was published.
            PoisonedWeights: An earlier version of this name killed its workers and was withdrawn;
                raised once, and nothing was published.
            CommandTimeout: A worker has not applied them in time; they are published.
            ManagerStateError: The manager is not running.
        """
        pool = self._usable()
        await self._hold_rounds(pool)
        try:
            version = await pool.synchronizer.push(weights, name)
        finally:
            pool.flow.release_rounds()
        if wait:
            limit = self.config.command_timeout if timeout is None else timeout
            ready = list(pool.ready)
            await pool.synchronizer.wait_applied(version, ready, timeout=limit, name=name)
            pool.synchronizer.raise_if_withdrawn(name)
        else:
            await anyio.lowlevel.checkpoint()  # who pushes in a loop must let the event loop turn
        return version

    def drop_weights(self, name: str) -> Awaitable[None]:
        """Drop the weights of a name, at once; what is returned may be awaited or not.

        Their memory is given back. Workers that were filled with them, or have asked for them,
        keep what they have; those that ask later get an error. Weights may be pushed under the
        name again, of any layout, and their versions go on from there. Without "main", workers
        that start have no weights until the next push.

        Raises:
            WeightsError: There are none of that name; the message lists the names.
            ManagerStateError: The manager is not running.
        """
        self._usable().synchronizer.drop(name)
        return _Done()

    async def snapshot(self, name: str = MAIN) -> PreparedModel:
        """Return a snapshot of the newest weights of a name.

        It may be stored, or sent to another machine. It is compressed with
        ``compression_enabled`` and made in a thread. ``push_weights`` takes it, and
        ``ModelSynchronizer.restore_model_from_sync`` copies it into a model.

        Raises:
            WeightsError: None were pushed yet; the message lists the names.
            ManagerStateError: The manager is not running.
        """
        return await self._usable().synchronizer.snapshot(name)

    @property
    def synchronizer(self) -> ModelSynchronizer:
        """The owner of the pool's weights: when they are due, their counts, and snapshots."""
        return self._started(any_loop=True).synchronizer

    @property
    def weights_version(self) -> int:
        """The newest version of the weights "main"; 0 is none."""
        return self._pool.synchronizer.version if self._pool is not None else 0

    @property
    def weights_versions(self) -> dict[str, int]:
        """The newest version of each name that has weights."""
        return self._pool.synchronizer.versions if self._pool is not None else {}


class _Done:
    """What is done already; to await it lets the event loop turn."""

    def __await__(self) -> Generator[Any, None, None]:
        return anyio.lowlevel.checkpoint().__await__()

"""ModelSynchronizer: the owner of weights, from the learner's tensors to the workers' models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from keisei.exceptions import CommandTimeout, ConfigurationError, PoisonedWeights, WeightsError
from keisei.ipc.threads import to_the_end
from keisei.naming import public
from keisei.protocol.line import Line
from keisei.training.parallel import snapshots
from keisei.training.parallel.named_weights import NamedWeights
from keisei.training.parallel.published import PublishedWeights, Pushed
from keisei.training.parallel.snapshots import PackedTensor, PreparedModel, SyncMetadata
from keisei.training.parallel.weights_source import WeightsSource, state_of
from keisei.worker import MAIN

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SyncStats:
    """The counts of a ``ModelSynchronizer``.

    Attributes:
        sync_interval: Steps between two synchronizations.
        compression_enabled: Whether snapshots are compressed.
        last_sync_step: The step of the last completed synchronization; 0 before the first.
        syncs_completed: Completed synchronizations.
        models_prepared: Snapshots made; the version of the newest.
        original_bytes: Bytes of all these snapshots before compression.
        compressed_bytes: Bytes of all these snapshots.
        ratio: ``original_bytes / compressed_bytes``; 1 before the first byte.
        num_pushes: Weights pushed to workers.
        bytes_pushed: Their bytes.
        num_not_finite: Pushes that held NaN or infinity, where that is checked.
    """

    sync_interval: int
    compression_enabled: bool
    last_sync_step: int
    syncs_completed: int
    models_prepared: int
    original_bytes: int
    compressed_bytes: int
    ratio: float
    num_pushes: int = 0
    bytes_pushed: int = 0
    num_not_finite: int = 0


def _ignore(name: str, version: int, num_bytes: int) -> None:
    """Stand in where nobody needs to hear of a push."""


@public
class ModelSynchronizer:
    """Owns weights: when they are due, their versions, what workers see of them, and snapshots.

    A pool has one. ``push`` copies tensors once into memory that all workers share and gives them
    a version, 1 for the first; every worker takes the newest before its next experience. Weights
    have names, each with a layout and versions of its own; those without one are "main".
    Alone, without workers, it makes and applies snapshots.

    Args:
        sync_interval: Steps, of whatever the caller counts, between two synchronizations.
        compression_enabled: Whether snapshots are compressed, without loss. Weights in shared
            memory never are.
        check_finite: Count the pushes that hold NaN or infinity.
        lines: The workers' lines, by worker id; always as they are now.
        on_pushed: Called in the event loop with the name, number and bytes of each new version.
        clock: Time of day in seconds, for the timestamp of a snapshot.

    Attributes:
        newest_version: A function that returns ``version``, for whoever asks at every batch.
        newest_named: A function that returns name and newest version for the number of weights.

    Raises:
        ConfigurationError: If ``sync_interval`` is below 1.
    """

    def __init__(
        self,
        sync_interval: int = 100,
        compression_enabled: bool = False,
        *,
        check_finite: bool = False,
        lines: Mapping[int, Line] = MappingProxyType({}),
        on_pushed: Callable[[str, int, int], None] = _ignore,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if sync_interval < 1:
            raise ConfigurationError([f"sync_interval = {sync_interval}: must be at least 1"])
        self.sync_interval = sync_interval
        self.compression_enabled = compression_enabled
        self._lines = lines
        self._on_pushed = on_pushed
        self._clock = clock
        self._weights = NamedWeights(lines, check_finite=check_finite, on_pushed=self._published)
        self._poisoned: dict[str, PoisonedWeights] = {}
        self.newest_version = self._weights.main.newest_version
        self.newest_named = self._weights.newest_of
        self._last_sync_step = 0
        self._syncs_completed = 0
        self._models_prepared = 0
        self._original_bytes = 0
        self._compressed_bytes = 0
        self._num_pushes = 0
        self._bytes_pushed = 0
        self._num_not_finite = 0

    # when

    @property
    def last_sync_step(self) -> int:
        """The step of the last completed synchronization; 0 before the first."""
        return self._last_sync_step

    def should_sync(self, step: int) -> bool:
        """Return whether ``sync_interval`` steps or more have passed since the last one."""
        return step - self._last_sync_step >= self.sync_interval

    def mark_sync_completed(self, step: int) -> None:
        """Count the next interval from ``step``.

        Raises:
            ValueError: If ``step`` lies before the last one.
        """
        if step < self._last_sync_step:
            raise ValueError(f"step {step} lies before the last sync, at {self._last_sync_step}")
        self._last_sync_step = step
        self._syncs_completed += 1

    # to the workers

    @property
    def version(self) -> int:
        """The newest version of "main"; 0 is none."""
        return self.newest_version()

    def version_of(self, name: str) -> int:
        """Return the newest version of a name, also after it was dropped; 0 is none."""
        return self._weights.version_of(name)

    @property
    def versions(self) -> dict[str, int]:
        """The newest version of each name that has weights, "main" first."""
        return {name: self.version_of(name) for name in self._weights.names}

    async def push(self, weights: WeightsSource, name: str = MAIN) -> int:
        """Publish weights under a name to all workers and return their version.

        Names and layout are checked, the tensors are copied once, the version is published,
        counted and told. When cancelled, all of that is done or nothing.

        Args:
            weights: A module, a state dict with dense tensors on any device, or a snapshot; it
                is copied and may be changed afterwards.
            name: "main", or any other text; each name has a layout and versions of its own.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights of this
                name, or a worker has nothing to load those of "main" into; or they were dropped
                meanwhile. Nothing was published.
            PoisonedWeights: An earlier version of this name killed its workers and was withdrawn;
                raised once, and nothing was published.
            OSError: There is no memory or no descriptor for the first weights.
        """
        published = self._weights.find_or_add(name)
        self.raise_if_withdrawn(name)
        state = state_of(weights)
        if published is self._weights.main and not published.has_memory:
            self._check_takers()
        return await published.publish(state)

    def drop(self, name: str) -> None:
        """Give the memory of a name back: no worker finds weights under it from now on.

        Models that were filled with them keep what they have, and so does whoever asked for them.
        Weights may be pushed under the name again, of any layout; their versions go on.

        Raises:
            WeightsError: There are none of that name; the message lists the names.
        """
        self._weights.drop(name)
        self._poisoned.pop(name, None)

    def _check_takers(self) -> None:
        """Refuse the first weights where a worker could do nothing with them."""
        deaf = sorted(key for key, line in self._lines.items() if line.takes_weights is False)
        if deaf:
            raise WeightsError(
                f"workers {deaf} cannot take weights: in setup() assign the network to self.model, "
                "or define load_weights(weights, version)"
            )

    def introduce(self, line: Line) -> bool:
        """Tell a new worker which weights there are and where; return whether it is to wait."""
        self._weights.introduce(line)
        return self._weights.is_introducing

    def _published(self, weights: PublishedWeights, pushed: Pushed) -> None:
        self._num_pushes += 1
        self._bytes_pushed += pushed.num_bytes
        self._num_not_finite += not pushed.is_finite
        self._on_pushed(weights.name, pushed.version, pushed.num_bytes)

    async def wait_applied(
        self,
        version: int,
        worker_ids: Iterable[int] | None = None,
        *,
        timeout: float,
        name: str = MAIN,
    ) -> None:
        """Wait until workers have taken ``version`` or a newer one; the dead are left out.

        A worker that has no model of this name has taken them when it knows of them.

        Args:
            version: The version that they are to have.
            worker_ids: For whom to wait; ``None`` for all.
            timeout: Seconds.
            name: Of which weights.

        Raises:
            CommandTimeout: A worker has not done so in time.
        """
        chosen = self._lines if worker_ids is None else dict.fromkeys(worker_ids)
        lines = [self._lines[worker_id] for worker_id in chosen]
        number = self._weights.find_or_add(name).number
        expected = {line.ask_for_version(number, version): line for line in lines}
        if not expected:
            return
        try:
            _, late = await asyncio.wait(expected, timeout=timeout)
        finally:
            for applied in expected:
                applied.cancel()
        what = _called(name)
        for applied, line in expected.items():
            if applied in late:
                raise CommandTimeout(
                    f"worker {line.worker_id} has not applied {what} version {version} within "
                    f"{timeout:g} s; it is in {line.phase.name.lower()}",
                    line.worker_id,
                    line.incarnation,
                )
            applied.exception()  # of a worker that was lost: its successor takes the newest

    def withdraw(self, version: int, why: str, number: int = 0) -> None:
        """Publish the weights before ``version`` again, as a new version.

        Nothing is done where newer ones came, or where there are none before them. The next push
        of the name raises ``PoisonedWeights``, with ``why`` in its message.

        Args:
            version: The version that killed workers.
            why: How, in one line.
            number: Stands for the name of the weights.
        """
        weights = self._weights.numbered(number)
        if weights.newest_version() != version or not weights.can_revert:
            return
        replacement = weights.revert()
        what = _called(weights.name)
        self._poisoned[weights.name] = PoisonedWeights(
            f"{what} version {version} was withdrawn after the workers that applied it failed; "
            f"version {replacement} holds the previous weights again; last: {why}",
            version,
            replacement,
        )

    def raise_if_withdrawn(self, name: str = MAIN) -> None:
        """Raise, once, that a version of a name was withdrawn."""
        poisoned = self._poisoned.pop(name, None)
        if poisoned is not None:
            raise poisoned

    def close(self) -> None:
        """Give the shared memory back."""
        self._weights.close()

    # snapshots

    async def snapshot(self, name: str = MAIN) -> PreparedModel:
        """Return a snapshot of the newest weights of a name that were pushed, made in a thread.

        Raises:
            WeightsError: None were pushed yet; the message lists the names.
        """
        tensors = await self._weights.find(name).newest()
        return await to_the_end(lambda: self._prepared(tensors))

    def prepare_model_for_sync(self, model: torch.nn.Module) -> PreparedModel:
        """Take a snapshot of ``model``: parameters and persistent buffers, bit for bit.

        Args:
            model: On any device; it is not changed, and may be changed afterwards.

        Raises:
            WeightsError: If an entry of the state dict is no dense tensor with data.
        """
        state = model.state_dict()
        snapshots.check_entries(state)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return self._prepared(snapshots.cpu_copies(state), total_parameters=parameters)

    def prepare(self, weights: Mapping[str, torch.Tensor]) -> PreparedModel:
        """Return a snapshot of weights, copied; see ``prepare_model_for_sync``."""
        return self._prepared(snapshots.cpu_copies(weights))

    def _prepared(
        self, tensors: Mapping[str, torch.Tensor], total_parameters: int | None = None
    ) -> PreparedModel:
        """Make a snapshot of tensors that become its own."""
        original_bytes = compressed_bytes = sum(tensor.nbytes for tensor in tensors.values())
        data: dict[str, torch.Tensor | PackedTensor] = dict(tensors)
        if self.compression_enabled:
            packed = {name: snapshots.pack(tensor) for name, tensor in tensors.items()}
            compressed_bytes = sum(len(entry.payload) for entry in packed.values())
            data = dict(packed)
        if total_parameters is None:
            total_parameters = sum(tensor.numel() for tensor in tensors.values())
        self._models_prepared += 1
        self._original_bytes += original_bytes
        self._compressed_bytes += compressed_bytes
        metadata = SyncMetadata(
            version=self._models_prepared,
            timestamp=self._clock(),
            total_parameters=total_parameters,
            compressed=self.compression_enabled,
            original_bytes=original_bytes,
            compressed_bytes=compressed_bytes,
            ratio=snapshots.ratio_of(original_bytes, compressed_bytes),
        )
        return PreparedModel(model_data=data, metadata=metadata)

    def restore_model_from_sync(self, prepared: PreparedModel, model: torch.nn.Module) -> None:
        """Copy a snapshot into ``model``, on whatever device it is.

        Everything is checked before the first copy: after an error the model is as it was.

        Raises:
            WeightsError: If names, shapes or dtypes differ from the model's, or a payload is
                damaged; every such name is in the message.
        """
        weights, damaged = snapshots.unpack_all(prepared.model_data)
        problems = damaged + snapshots.differences(
            weights, model.state_dict(), known=prepared.model_data
        )
        if problems:
            raise WeightsError("the snapshot does not fit the model: " + "; ".join(problems))
        model.load_state_dict(weights)

    def get_sync_stats(self) -> SyncStats:
        """Return the counts so far."""
        return SyncStats(
            sync_interval=self.sync_interval,
            compression_enabled=self.compression_enabled,
            last_sync_step=self._last_sync_step,
            syncs_completed=self._syncs_completed,
            models_prepared=self._models_prepared,
            original_bytes=self._original_bytes,
            compressed_bytes=self._compressed_bytes,
            ratio=snapshots.ratio_of(self._original_bytes, self._compressed_bytes),
            num_pushes=self._num_pushes,
            bytes_pushed=self._bytes_pushed,
            num_not_finite=self._num_not_finite,
        )


def _called(name: str) -> str:
    """Return how a message calls the weights of a name, before the word "version"."""
    return "weights" if name == MAIN else f"weights {name!r},"


__all__ = ["ModelSynchronizer", "SyncStats"]

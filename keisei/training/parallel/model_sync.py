"""ModelSynchronizer: when weights are due, and snapshots of them that can be stored or sent.

The pool itself moves weights through shared memory and needs none of this. A snapshot is for what
lies beyond it: a file, a socket, a pool on another machine.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from keisei.exceptions import ConfigurationError, WeightsError
from keisei.naming import public

# Level 1: trained weights are close to noise, and the higher levels take many times as long for
# one or two percent.
_LEVEL = 1


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The bytes of one tensor.

    Attributes:
        payload: Its elements, row by row, in the byte order of this machine; in zlib's format if
            ``compressed``.
        dtype: The name of its dtype, such as "bfloat16".
        shape: Its shape; () is a tensor without dimensions.
        compressed: False where compression would have made it larger.
    """

    payload: bytes
    dtype: str
    shape: tuple[int, ...]
    compressed: bool


@dataclass(frozen=True, slots=True)
class SyncMetadata:
    """What is known about a snapshot.

    Attributes:
        version: 1, 2, 3 …: the number of this snapshot among those of its synchronizer.
        timestamp: When it was made, by the synchronizer's clock, in seconds.
        total_parameters: Elements of all parameters of the model; a shared parameter counts once,
            buffers do not count.
        compressed: Whether compression was enabled.
        original_bytes: Bytes of all entries of the state dict.
        compressed_bytes: Bytes of all payloads; ``original_bytes`` without compression.
        ratio: ``original_bytes / compressed_bytes``, at least 1; 1 for a model without a byte.
    """

    version: int
    timestamp: float
    total_parameters: int
    compressed: bool
    original_bytes: int
    compressed_bytes: int
    ratio: float


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A snapshot of a model's state dict, which shares no memory with the model.

    Attributes:
        model_data: For each name a ``PackedTensor`` with compression, and without it a tensor on
            the CPU, which ``push_weights`` takes as it is. Compressed snapshots hold no tensor and
            can be pickled.
        metadata: See ``SyncMetadata``.
    """

    model_data: Mapping[str, torch.Tensor | PackedTensor]
    metadata: SyncMetadata


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
    """

    sync_interval: int
    compression_enabled: bool
    last_sync_step: int
    syncs_completed: int
    models_prepared: int
    original_bytes: int
    compressed_bytes: int
    ratio: float


@public
class ModelSynchronizer:
    """Says when weights are due, and makes and applies snapshots of a model.

    Args:
        sync_interval: Steps, of whatever the caller counts, between two synchronizations.
        compression_enabled: Whether snapshots are compressed, without loss.
        clock: Time of day in seconds, for the timestamp of a snapshot.

    Raises:
        ConfigurationError: If ``sync_interval`` is below 1.
    """

    def __init__(
        self,
        sync_interval: int = 100,
        compression_enabled: bool = False,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if sync_interval < 1:
            raise ConfigurationError([f"sync_interval = {sync_interval}: must be at least 1"])
        self.sync_interval = sync_interval
        self.compression_enabled = compression_enabled
        self._clock = clock
        self._last_sync_step = 0
        self._syncs_completed = 0
        self._models_prepared = 0
        self._original_bytes = 0
        self._compressed_bytes = 0

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

    def prepare_model_for_sync(self, model: torch.nn.Module) -> PreparedModel:
        """Take a snapshot of ``model``: parameters and persistent buffers, bit for bit.

        Args:
            model: On any device; it is not changed, and may be changed afterwards.

        Raises:
            WeightsError: If an entry of the state dict is no dense tensor with data.
        """
        state = model.state_dict()
        _check_entries(state)
        tensors = {name: _cpu_copy(tensor) for name, tensor in state.items()}
        original_bytes = compressed_bytes = sum(tensor.nbytes for tensor in tensors.values())
        data: dict[str, torch.Tensor | PackedTensor] = dict(tensors)
        if self.compression_enabled:
            packed = {name: _pack(tensor) for name, tensor in tensors.items()}
            compressed_bytes = sum(len(entry.payload) for entry in packed.values())
            data = dict(packed)
        self._models_prepared += 1
        self._original_bytes += original_bytes
        self._compressed_bytes += compressed_bytes
        metadata = SyncMetadata(
            version=self._models_prepared,
            timestamp=self._clock(),
            total_parameters=sum(parameter.numel() for parameter in model.parameters()),
            compressed=self.compression_enabled,
            original_bytes=original_bytes,
            compressed_bytes=compressed_bytes,
            ratio=_ratio(original_bytes, compressed_bytes),
        )
        return PreparedModel(model_data=data, metadata=metadata)

    def restore_model_from_sync(self, prepared: PreparedModel, model: torch.nn.Module) -> None:
        """Copy a snapshot into ``model``, on whatever device it is.

        Everything is checked before the first copy: after an error the model is as it was.

        Raises:
            WeightsError: If names, shapes or dtypes differ from the model's, or a payload is
                damaged; every such name is in the message.
        """
        weights, damaged = _unpack_all(prepared.model_data)
        problems = damaged + _differences(weights, model.state_dict(), known=prepared.model_data)
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
            ratio=_ratio(self._original_bytes, self._compressed_bytes),
        )


def _ratio(original_bytes: int, compressed_bytes: int) -> float:
    return original_bytes / compressed_bytes if compressed_bytes else 1.0


def _check_entries(state: Mapping[str, object]) -> None:
    """Refuse what is not a dense tensor with data, such as a module's extra state."""
    problems = []
    for name, entry in state.items():
        if not isinstance(entry, torch.Tensor):
            problems.append(f"{name} is a {type(entry).__name__}, not a tensor")
        elif is_lazy(entry):
            problems.append(f"{name} is lazy and has no shape yet; run the model once")
        elif entry.layout is not torch.strided or entry.is_quantized:
            problems.append(f"{name} is not a dense tensor")
        elif entry.is_meta:
            problems.append(f"{name} is on the meta device and has no data")
    if problems:
        raise WeightsError("the model cannot be prepared: " + "; ".join(problems))


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy ``tensor`` into memory of its own, row by row, on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _pack(tensor: torch.Tensor) -> PackedTensor:
    """Compress a contiguous tensor on the CPU, unless that would make it larger."""
    raw = bytearray(tensor.nbytes)
    if raw:
        # By way of uint8: NumPy, the usual way to a tensor's bytes, knows no bfloat16.
        flat = tensor.reshape(-1).view(torch.uint8)
        torch.frombuffer(raw, dtype=torch.uint8).copy_(flat)
    squeezed = zlib.compress(raw, _LEVEL)
    compressed = len(squeezed) < len(raw)
    return PackedTensor(
        payload=squeezed if compressed else bytes(raw),
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        compressed=compressed,
    )


def _unpack(entry: PackedTensor) -> torch.Tensor:
    """Undo ``_pack``.

    Raises:
        ValueError: If the payload is damaged.
    """
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {entry.dtype!r}")
    try:
        raw = bytearray(zlib.decompress(entry.payload) if entry.compressed else entry.payload)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    expected = math.prod(entry.shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(f"{len(raw)} bytes instead of {expected}")
    if not raw:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(entry.shape)


def _unpack_all(
    data: Mapping[str, torch.Tensor | PackedTensor],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors that could be unpacked and a line for each that could not."""
    weights: dict[str, torch.Tensor] = {}
    damaged: list[str] = []
    for name, entry in data.items():
        if isinstance(entry, torch.Tensor):
            weights[name] = entry
            continue
        try:
            weights[name] = _unpack(entry)
        except ValueError as error:
            damaged.append(f"{name} is damaged ({error})")
    return weights, damaged


def _differences(
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    *,
    known: Mapping[str, object],
) -> list[str]:
    """Return a line for each way in which ``weights`` do not fit ``state``.

    Args:
        weights: The tensors of a snapshot.
        state: The state dict of the model that is to take them.
        known: All names of the snapshot, also those of damaged tensors.
    """
    _check_entries(state)
    missing = [name for name in state if name not in known]
    unexpected = [name for name in known if name not in state]
    problems = []
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    for name, tensor in weights.items():
        if name in state and _form(tensor) != _form(state[name]):
            problems.append(f"{name} is {_form(tensor)}, the model has {_form(state[name])}")
    return problems


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

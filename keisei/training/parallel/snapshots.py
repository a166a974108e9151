"""Snapshots of a model's weights that can be stored or sent beyond this machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from keisei.exceptions import WeightsError

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


def ratio_of(original_bytes: int, compressed_bytes: int) -> float:
    """Return how many bytes became one; 1 before the first byte."""
    return original_bytes / compressed_bytes if compressed_bytes else 1.0


def check_entries(state: Mapping[str, object]) -> None:
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


def cpu_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy each tensor into memory of its own, row by row, on the CPU."""
    return {name: _cpu_copy(tensor) for name, tensor in tensors.items()}


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


def pack(tensor: torch.Tensor) -> PackedTensor:
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
    """Undo ``pack``.

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


def unpack_all(
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


def differences(
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
    check_entries(state)
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

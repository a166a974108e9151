"""Turn values into frames and back, without torch's own tensor sharing.

torch pickles a tensor through a queue as a descriptor that needs a living producer. Here a
tensor inside a value travels as plain bytes, so a frame stays readable after its sender died.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

from keisei.exceptions import SerializationError
from keisei.ipc import failures

PROTOCOL = pickle.HIGHEST_PROTOCOL
LARGE = 1 << 20
"""Bytes above which pickling is worth a thread, to keep an event loop responsive."""


def _rebuild_tensor(raw: bytearray, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    kind = getattr(torch, dtype)
    if not raw:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(raw, dtype=torch.uint8).view(kind).view(shape)


def _rebuild_parameter(data: Any, requires_grad: bool) -> Any:
    import torch

    return torch.nn.Parameter(data, requires_grad)


class _Pickler(pickle.Pickler):
    """Tensors as bytes; everything else as usual."""

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(obj, torch.Tensor):
            return NotImplemented
        if type(obj) is torch.nn.Parameter:
            return _rebuild_parameter, (obj.detach(), obj.requires_grad)
        if obj.layout is not torch.strided or obj.is_quantized:
            raise SerializationError(f"a {obj.layout} tensor cannot travel; make it dense first")
        dense = obj.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        raw = bytearray(dense.numel() * dense.element_size())
        if raw:
            torch.frombuffer(raw, dtype=torch.uint8).copy_(dense.reshape(-1).view(torch.uint8))
        return _rebuild_tensor, (raw, str(dense.dtype).removeprefix("torch."), tuple(dense.shape))


_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
"""Types of which nothing inside could be a tensor."""


def dumps(value: Any, what: str = "value") -> bytes:
    """Pickle ``value``, tensors as plain bytes.

    Args:
        value: Anything picklable. Tensors of any device and dtype are copied; they arrive on
            the CPU, contiguous and without a graph. Parameters stay parameters.
        what: Names the value in the error.

    Raises:
        SerializationError: If it cannot be pickled, whatever its ``__reduce__`` raised.
    """
    if type(value) in _PLAIN:
        return pickle.dumps(value, PROTOCOL)
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, PROTOCOL).dump(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = failures.summary(error)
        raise SerializationError(f"{what} cannot be pickled ({reason})") from error
    return buffer.getvalue()


def loads(data: bytes | bytearray | memoryview, what: str = "value") -> Any:
    """Undo ``dumps``.

    Raises:
        SerializationError: If it cannot be rebuilt here.
    """
    try:
        return pickle.loads(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = failures.summary(error)
        raise SerializationError(f"{what} cannot be unpickled ({reason})") from error


def estimated_size(value: Any, depth: int = 4) -> int:
    """Return about how many bytes ``value`` pickles to, looking ``depth`` containers deep."""
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(value, (bytes, bytearray, str, memoryview)):
        return len(value)
    if depth and isinstance(value, dict):
        return sum(estimated_size(item, depth - 1) for item in value.values())
    if depth and isinstance(value, (list, tuple, set)):
        return 8 * len(value) + sum(estimated_size(item, depth - 1) for item in value)
    return 64

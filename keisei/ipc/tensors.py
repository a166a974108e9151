"""Which values can lie in shared memory: dense tensors that have values, and NumPy arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from keisei.ipc import nested


def special_kind(tensor: torch.Tensor) -> str:
    """Return what keeps a tensor from being copied element by element, or ""."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    return "meta" if tensor.is_meta else ""


def signature_of(data: Mapping[str, Any]) -> list[tuple[str, Any, Any]] | None:
    """Return the names, dtypes and shapes of an experience; ``None`` if it must be checked."""
    if type(data) is not dict or not data:
        return None
    signature = []
    for name, value in data.items():
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_nested or value.is_meta:
                return None
        elif type(value).__module__ != "numpy":
            return None
        signature.append((name, value.dtype, value.shape))
    return signature


def check(data: Mapping[str, Any]) -> None:
    """Look whether an experience can lie in shared memory.

    Raises:
        TypeError: It cannot; names the key and the type.
    """
    if not isinstance(data, Mapping):
        raise TypeError(
            f"an experience must be a mapping of names to tensors or arrays, not {_kind(data)}"
        )
    if not data:
        raise TypeError("an experience must hold at least one tensor; this mapping is empty")
    numpy = sys.modules.get("numpy")
    for name, value in data.items():
        if not isinstance(name, str):
            nested.refuse_key(name)
        if isinstance(value, torch.Tensor):
            kind = special_kind(value)
            if kind == "meta":
                raise TypeError(f"experience[{name!r}] is on the meta device and has no values")
            if kind:
                raise TypeError(f"experience[{name!r}] is a {kind} tensor; make it dense")
        elif numpy is None or not isinstance(value, numpy.ndarray):
            raise TypeError(
                f"experience[{name!r}] is {_kind(value)}; give a torch tensor or a NumPy array "
                "(small values of other kinds travel in Experience.info)"
            )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def torch_dtype(name: str, dtype: Any) -> torch.dtype:
    """Return the torch dtype of ``experience[name]``, whose own dtype may be NumPy's.

    Raises:
        TypeError: torch has no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        empty = sys.modules["numpy"].empty(0, dtype.newbyteorder("="))
        return torch.from_numpy(empty).dtype
    except TypeError as error:
        raise TypeError(
            f"experience[{name!r}] is an array of dtype {dtype}, which torch has not; "
            "convert it first"
        ) from error

"""Where named tensors lie in a stretch of bytes, and how two such layouts differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from keisei.ipc.memory import round_up
from keisei.ipc.wire import ALIGNMENT

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    # torch.frombuffer ends the process by SIGSEGV where it is asked for quantized tensors.
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.qint", "torch.quint"))
}
"""The dtypes of tensors that can lie in shared memory, by name."""


class Field(NamedTuple):
    """One tensor: its name, torch dtype by name, shape, and place in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Layout(NamedTuple):
    """Tensors one behind the other, each aligned to 64 bytes."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, described: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Layout:
        """Lay out tensors that are described by name, dtype and shape."""
        fields, offset = [], 0
        for name, dtype, shape in described:
            nbytes = math.prod(shape) * dtype.itemsize
            fields.append(Field(name, dtype_name(dtype), tuple(shape), offset, nbytes))
            offset = round_up(offset + nbytes, ALIGNMENT)
        return cls(tuple(fields), max(offset, ALIGNMENT))

    def views(self, buffer: Any, base: int = 0) -> dict[str, torch.Tensor]:
        """Return tensors that alias ``buffer``, as ``Views`` makes them."""
        return Views(self).on(buffer, base)

    def differences(self, other: Layout) -> list[str]:
        """Return one line for each way in which ``other`` does not fit this layout."""
        mine = {field.name: field for field in self.fields}
        theirs = {field.name: field for field in other.fields}
        lines = []
        missing = [name for name in mine if name not in theirs]
        unexpected = [name for name in theirs if name not in mine]
        if missing:
            lines.append(f"missing keys: {', '.join(missing)}")
        if unexpected:
            lines.append(f"unexpected keys: {', '.join(unexpected)}")
        for name, field in mine.items():
            given = theirs.get(name)
            if given is None:
                continue
            if given.shape != field.shape:
                lines.append(f"{name}: shape {list(given.shape)} instead of {list(field.shape)}")
            if given.dtype != field.dtype:
                lines.append(f"{name}: dtype {given.dtype} instead of {field.dtype}")
        return lines


class Views:
    """Makes the tensors of one layout, on one buffer after another."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._fields = [self._prepared(field) for field in layout.fields]

    @staticmethod
    def _prepared(field: Field) -> tuple[str, torch.dtype, int, int, tuple[int, ...]]:
        dtype = DTYPES[field.dtype]
        return field.name, dtype, field.nbytes // dtype.itemsize, field.offset, field.shape

    def on(self, buffer: Any, base: int = 0) -> dict[str, torch.Tensor]:
        """Return tensors that alias ``buffer``, a writable buffer, from byte ``base`` on.

        They keep ``buffer`` alive. A tensor without elements aliases nothing.
        """
        views = {}
        for name, dtype, count, offset, shape in self._fields:
            if count:
                flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=base + offset)
                views[name] = flat if len(shape) == 1 else flat.view(shape)
            else:
                views[name] = torch.empty(shape, dtype=dtype)
        return views


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which ``torch`` knows ``dtype``, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def describe(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Lay out the tensors of a mapping, in its order."""
    return Layout.of((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


__all__ = ["ALIGNMENT", "DTYPES", "Field", "Layout", "Views", "describe", "dtype_name"]

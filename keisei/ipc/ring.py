"""Experiences in shared memory: written once by a worker, read in place by the application.

A worker owns segments of anonymous shared memory, each with slots of one size. Slot states live
in the segment itself, one byte each: the worker sets BUSY when it writes, the application sets
FREE when the last tensor on the slot is gone. Neither ever waits for the other: a worker that
finds no free slot makes another segment. How far it runs ahead is bounded by credits, not here.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from keisei.ipc import memory
from keisei.ipc.layout import Layout, dtype_name
from keisei.ipc.memory import PAGE, round_up

FREE, BUSY = 0, 1
_HEADROOM = 5 / 4
_FREE_STATE = bytes([FREE])
_STATES = PAGE


class Place(NamedTuple):
    """Where one experience lies: what the frame about it says."""

    segment: int
    slot: int
    stride: int
    layout: Layout


class _Segment:
    """The worker's side of one segment."""

    def __init__(self, number: int, slots: int, stride: int) -> None:
        self.number = number
        self.slots = slots
        self.stride = stride
        self.fd, self.map = memory.create(_STATES + slots * stride, "keisei-experience")
        self.views: dict[int, tuple[Layout, list[Any], list[Any]]] = {}
        self.told = False

    def free_slot(self) -> int:
        """Return a free slot, or -1."""
        return self.map.find(_FREE_STATE, 0, self.slots)


class RingWriter:
    """The worker's side: copies each experience once, into a free slot."""

    def __init__(self, slots: int) -> None:
        """Start with segments of ``slots`` slots; memory is made at the first experience."""
        self._slots = min(slots, _STATES)
        self._segments: list[_Segment] = []
        self._next_number = 0
        self._signature: list[tuple[str, Any, Any]] = []
        self._layout = Layout((), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory held."""
        return sum(len(segment.map) for segment in self._segments)

    def write(self, data: Mapping[str, Any]) -> tuple[Place, list[int]]:
        """Copy ``data`` into a free slot.

        Args:
            data: Names to dense tensors on any device, or NumPy arrays.

        Returns:
            The place, and the descriptor of a new segment, which ``told`` closes once sent.

        Raises:
            TypeError: Something in ``data`` cannot be shared; names the key and the type.
            OSError: There is no memory for another segment.
        """
        signature = [(name, value.dtype, value.shape) for name, value in _checked(data)]
        if signature != self._signature:
            self._layout = Layout.of(
                (name, _torch_dtype(name, dtype), tuple(shape)) for name, dtype, shape in signature
            )
            self._signature = signature
        segment, slot = self._claim(self._layout.nbytes)
        _, tensors, arrays = self._views(segment, slot)
        for target, array, value in zip(tensors, arrays, data.values(), strict=True):
            if isinstance(value, torch.Tensor):
                target.copy_(value.detach())
            elif array is not None:
                array[...] = value
        segment.map[slot] = BUSY
        place = Place(segment.number, slot, segment.stride, self._layout)
        return place, [] if segment.told else [segment.fd]

    def told(self) -> None:
        """Close the descriptors of segments that the application knows by now."""
        for segment in self._segments:
            if not segment.told:
                segment.told = True
                os.close(segment.fd)

    def close(self) -> None:
        """Let go of the memory; the application keeps what it has mapped."""
        self.told()
        self._segments.clear()

    def _claim(self, nbytes: int) -> tuple[_Segment, int]:
        """Find a free slot, newest segment first; drop segments too small that are free."""
        fitting = [segment for segment in self._segments if segment.stride >= nbytes]
        for segment in reversed(fitting):
            slot = segment.free_slot()
            if slot >= 0:
                return segment, slot
        self._segments = [
            segment
            for segment in self._segments
            if segment.stride >= nbytes or BUSY in segment.map[: segment.slots]
        ]
        held = sum(segment.slots for segment in fitting)
        segment = self._grow(nbytes, max(self._slots, held) if held else self._slots)
        return segment, 0

    def _grow(self, nbytes: int, slots: int) -> _Segment:
        grown = nbytes if not self._segments else int(nbytes * _HEADROOM)
        if self._segments and self._segments[-1].stride >= nbytes:
            grown = self._segments[-1].stride
        stride = round_up(grown, PAGE if grown >= PAGE else 64)
        segment = _Segment(self._next_number, min(slots, _STATES), stride)
        self._next_number += 1
        self._segments.append(segment)
        return segment

    def _views(self, segment: _Segment, slot: int) -> tuple[Layout, list[Any], list[Any]]:
        cached = segment.views.get(slot)
        if cached is None or cached[0] is not self._layout:
            tensors = list(
                self._layout.views(segment.map, _STATES + slot * segment.stride).values()
            )
            has_numpy = "numpy" in sys.modules
            arrays = [_array(view) if has_numpy else None for view in tensors]
            cached = segment.views[slot] = (self._layout, tensors, arrays)
        return cached


class RingReader:
    """The application's side: wraps slots as tensors, without a copy."""

    def __init__(self) -> None:
        self._maps: dict[int, Any] = {}

    def add(self, segment: int, fd: int) -> None:
        """Map a segment that a frame brought; takes ``fd`` over."""
        self._maps[segment] = memory.attach(fd)

    def slot(self, place: Place) -> ctypes.Array[Any]:
        """Return a buffer on the slot; the slot is free again when nothing refers to it.

        Every tensor built on the buffer keeps it alive. Safe to drop in any thread.
        """
        shared = self._maps[place.segment]
        buffer = _buffer_type(place.stride).from_buffer(
            shared, _STATES + place.slot * place.stride
        )
        weakref.finalize(buffer, shared.__setitem__, place.slot, FREE).atexit = False
        return buffer

    def close(self) -> None:
        """Forget the segments; each stays mapped while a tensor on it lives."""
        self._maps.clear()


@lru_cache(maxsize=64)
def _buffer_type(nbytes: int) -> Any:
    """Return a ctypes array type that can be weakly referenced."""
    return type("SlotBuffer", (ctypes.c_ubyte * nbytes,), {})


def _array(view: torch.Tensor) -> Any:
    """Return ``view`` as a NumPy array, or ``None`` for dtypes that NumPy has not."""
    try:
        return view.numpy()
    except TypeError:
        return None


def _checked(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not isinstance(data, Mapping):
        raise TypeError(
            f"an experience must be a mapping of names to tensors or arrays, not {_kind(data)}"
        )
    if not data:
        raise TypeError("an experience must hold at least one tensor; this mapping is empty")
    numpy = sys.modules.get("numpy")
    for name, value in data.items():
        if not isinstance(name, str):
            raise TypeError(f"experience keys must be strings, not {name!r} ({_kind(name)})")
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized:
                raise TypeError(f"experience[{name!r}] is a {value.layout} tensor; make it dense")
            if value.device.type == "meta":
                raise TypeError(f"experience[{name!r}] is on the meta device and has no values")
        elif numpy is None or not isinstance(value, numpy.ndarray):
            raise TypeError(
                f"experience[{name!r}] is {_kind(value)}; give a torch tensor or a NumPy array "
                "(small values of other kinds travel in Experience.info)"
            )
    return list(data.items())


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _torch_dtype(name: str, dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    kind = getattr(torch, {"bool": "bool"}.get(dtype.name, dtype.name), None)
    if not isinstance(kind, torch.dtype):
        raise TypeError(
            f"experience[{name!r}] is an array of dtype {dtype}, which torch has not; "
            "convert it first"
        )
    return kind


__all__ = ["BUSY", "FREE", "Place", "RingReader", "RingWriter", "dtype_name"]

"""Experiences in shared memory: written once by a worker, read in place by the application.

A worker owns segments of anonymous shared memory, each with slots of one size. Slot states live
in the segment itself, one byte each: the worker sets BUSY when it writes, the application sets
FREE when the last tensor on the slot is gone. Neither ever waits for the other: a worker that
finds no free slot makes another segment. How far it runs ahead is bounded by credits, not here.
A segment whose slots have become too small is RETIRED once all of them are free, and the
application lets go of it too.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from keisei.ipc import memory
from keisei.ipc.layout import ALIGNMENT, Layout
from keisei.ipc.memory import PAGE, round_up

FREE, BUSY = 0, 1
_HEADROOM = 5 / 4
_FREE_STATE = bytes([FREE])
_STATES = PAGE
_MAX_SLOTS = _STATES - 1
_RETIRED = _MAX_SLOTS
"""The last byte of the states' page says whether the segment is retired."""


class Place(NamedTuple):
    """Where one experience lies, and as what."""

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
        self.targets: dict[int, tuple[Layout, list[tuple[torch.Tensor, Any]]]] = {}
        self.told = False

    def free_slot(self) -> int:
        """Return a free slot, or -1."""
        return self.map.find(_FREE_STATE, 0, self.slots)

    def retire(self) -> bool:
        """Tell the application that nothing will come here any more; not while it holds a slot."""
        if BUSY in self.map[: self.slots]:
            return False
        self.map[_RETIRED] = 1
        return True


class RingWriter:
    """The worker's side: copies each experience once, into a free slot."""

    def __init__(self, slots: int) -> None:
        """Start with segments of ``slots`` slots; memory is made at the first experience."""
        self._slots = min(slots, _MAX_SLOTS)
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
        signature = _signature(data)
        if signature is None or signature != self._signature:
            _check(data)
            self._signature = [(name, value.dtype, value.shape) for name, value in data.items()]
            self._layout = Layout.of(
                (name, _torch_dtype(name, dtype), tuple(shape))
                for name, dtype, shape in self._signature
            )
        segment, slot = self._claim(self._layout.nbytes)
        for (tensor, array), (name, value) in zip(
            self._targets(segment, slot), data.items(), strict=True
        ):
            if array is None:
                _copy(tensor, name, value)
            else:
                array[...] = value  # NumPy's copy: it knows strides and byte orders of any kind
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
        if len(fitting) < len(self._segments):
            self._segments = [
                segment
                for segment in self._segments
                if segment.stride >= nbytes or not segment.retire()
            ]
        for segment in reversed(fitting):
            slot = segment.free_slot()
            if slot >= 0:
                return segment, slot
        return self._grow(nbytes, max(self._slots, sum(segment.slots for segment in fitting))), 0

    def _grow(self, nbytes: int, slots: int) -> _Segment:
        if self._segments and self._segments[-1].stride >= nbytes:
            stride = self._segments[-1].stride
        else:
            # The first experience tells the size; a larger one says that sizes vary.
            grown = int(nbytes * _HEADROOM) if self._next_number else nbytes
            stride = round_up(grown, PAGE if grown >= PAGE else ALIGNMENT)
        segment = _Segment(self._next_number, min(slots, _MAX_SLOTS), stride)
        self._next_number += 1
        self._segments.append(segment)
        return segment

    def _targets(self, segment: _Segment, slot: int) -> list[tuple[torch.Tensor, Any]]:
        """Return the tensors of a slot, and as arrays those that arrays will be copied to."""
        cached = segment.targets.get(slot)
        if cached is None or cached[0] is not self._layout:
            views = self._layout.views(segment.map, _STATES + slot * segment.stride).values()
            targets = [
                (view, None if isinstance(dtype, torch.dtype) else view.numpy())
                for view, (_, dtype, _) in zip(views, self._signature, strict=True)
            ]
            cached = segment.targets[slot] = (self._layout, targets)
        return cached[1]


class RingReader:
    """The application's side: wraps slots as tensors, without a copy."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}

    def add(self, segment: int, fd: int) -> None:
        """Map a segment that a frame brought; takes ``fd`` over."""
        self._maps[segment] = memory.attach(fd)

    def check(self, place: Place) -> None:
        """Look whether a place that a frame names is one that was shared.

        Raises:
            IndexError: It is not.
        """
        segment, slot, stride, layout = place
        shared = self._maps.get(segment)
        fits = 0 <= slot < _MAX_SLOTS and layout.nbytes <= stride
        if shared is None or not fits or _STATES + (slot + 1) * stride > len(shared):
            raise IndexError(f"slot {slot} of segment {segment} was never shared")

    def slot(self, place: Place) -> ctypes.Array[Any]:
        """Return a buffer on the slot; the slot is free again when nothing refers to it.

        Every tensor built on the buffer keeps it alive. Safe to drop in any thread.
        """
        number, slot, stride, _ = place
        shared = self._maps[number]
        if len(self._maps) > 1:
            self._maps = {
                other: segment
                for other, segment in self._maps.items()
                if other == number or not segment[_RETIRED]
            }
        free = functools.partial(shared.__setitem__, slot, FREE)
        return memory.part(shared, _STATES + slot * stride, stride, free)

    def close(self) -> None:
        """Forget the segments; each stays mapped while a tensor on it lives."""
        self._maps.clear()


def _copy(target: torch.Tensor, name: str, value: torch.Tensor) -> None:
    try:
        target.copy_(value.detach() if value.requires_grad else value)
    except NotImplementedError as error:
        raise TypeError(
            f"experience[{name!r}] is a {value.dtype} tensor, which torch cannot copy"
        ) from error


def _signature(data: Mapping[str, Any]) -> list[tuple[str, Any, Any]] | None:
    """Return names, dtypes and shapes; ``None`` where anything is not as usual."""
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


def _check(data: Mapping[str, Any]) -> None:
    """Refuse what cannot be shared."""
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
            kind = _special_kind(value)
            if kind:
                raise TypeError(f"experience[{name!r}] is a {kind} tensor; make it dense")
            if value.is_meta:
                raise TypeError(f"experience[{name!r}] is on the meta device and has no values")
        elif numpy is None or not isinstance(value, numpy.ndarray):
            raise TypeError(
                f"experience[{name!r}] is {_kind(value)}; give a torch tensor or a NumPy array "
                "(small values of other kinds travel in Experience.info)"
            )


def _special_kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantized"
    return "" if tensor.layout is torch.strided else str(tensor.layout)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _torch_dtype(name: str, dtype: Any) -> torch.dtype:
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


__all__ = ["BUSY", "FREE", "Place", "RingReader", "RingWriter"]

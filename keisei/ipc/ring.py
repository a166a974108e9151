"""Experiences in shared memory: written once by a worker, read in place by the application.

A worker owns segments of anonymous shared memory, each with cells of one size. The states of cells
live in the segment itself, one byte each: the worker sets BUSY when it writes, the application sets
FREE when the last tensor on the cell is gone. Neither ever waits for the other: a worker that finds
no free cell makes another segment. How far it runs ahead is bounded by credits, not here. A segment
whose cells have become too small is RETIRED once all of them are free, and the application lets go
of it too.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from keisei.ipc import memory, nested, tensors
from keisei.ipc.layout import ALIGNMENT, Layout
from keisei.ipc.memory import PAGE, NotShared, round_up

FREE, BUSY = 0, 1
_HEADROOM = 5 / 4
_FREE_STATE = bytes([FREE])
_STATES = PAGE
MAX_CELLS = _STATES - 1
_RETIRED = MAX_CELLS
"""The last byte of the states' page says whether the segment is retired."""


class CellRef(NamedTuple):
    """Where one experience lies, and as what.

    Attributes:
        segment: The segment's number, counted by its worker.
        segment_nbytes: Its size.
        cell: The cell's number in the segment.
        stride: Bytes of each of its cells.
        layout: The tensors in the cell.
    """

    segment: int
    segment_nbytes: int
    cell: int
    stride: int
    layout: Layout


class _Segment:
    """The worker's side of one segment."""

    def __init__(self, number: int, cells: int, stride: int) -> None:
        self.number = number
        self.cells = cells
        self.stride = stride
        self.fd, self.map = memory.create(_STATES + cells * stride, "keisei-experience")
        self.targets: dict[int, tuple[Layout, list[tuple[torch.Tensor, Any]]]] = {}
        self.told = False

    def free_cell(self) -> int:
        """Return a free cell, or -1."""
        return self.map.find(_FREE_STATE, 0, self.cells)

    def retire(self) -> bool:
        """Tell the application that nothing will come here any more; not while it holds a cell."""
        if BUSY in self.map[: self.cells]:
            return False
        self.map[_RETIRED] = 1
        return True


class RingWriter:
    """The worker's side: copies each experience once, into a free cell."""

    def __init__(self, cells: int) -> None:
        """Start with segments of ``cells`` cells; memory is made at the first experience."""
        self._cells = min(cells, MAX_CELLS)
        self._segments: list[_Segment] = []
        self._next_number = 0
        self._signature: list[tuple[str, Any, Any]] = []
        self._layout = Layout((), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory held."""
        return sum(len(segment.map) for segment in self._segments)

    def write(self, data: Mapping[str, Any]) -> tuple[CellRef, list[int]]:
        """Copy ``data`` into a free cell.

        Args:
            data: Names to dense tensors on any device, or NumPy arrays, or mappings of these,
                which are flattened (``nested.flatten``).

        Returns:
            The cell, and the descriptor of a new segment, which ``told`` closes once sent.

        Raises:
            TypeError: Something in ``data`` cannot be shared; names the key and the type.
            OSError: There is no memory for another segment.
        """
        signature = tensors.signature_of(data)
        if signature is None:
            data = nested.flatten(data)
            signature = tensors.signature_of(data)
        if signature is None or signature != self._signature:
            tensors.check(data)
            self._signature = [(name, value.dtype, value.shape) for name, value in data.items()]
            self._layout = Layout.of(
                (name, tensors.torch_dtype(name, dtype), tuple(shape))
                for name, dtype, shape in self._signature
            )
        segment, cell = self._claim(self._layout.nbytes)
        for (tensor, array), (name, value) in zip(
            self._targets(segment, cell), data.items(), strict=True
        ):
            if array is None:
                _copy(tensor, name, value)
            else:
                array[...] = value  # NumPy's copy: it knows strides and byte orders of any kind
        segment.map[cell] = BUSY
        ref = CellRef(segment.number, len(segment.map), cell, segment.stride, self._layout)
        return ref, [] if segment.told else [segment.fd]

    def told(self) -> None:
        """Close the descriptors of segments that the application knows by now."""
        for segment in self._segments:
            if not segment.told:
                segment.told = True
                os.close(segment.fd)

    def close(self) -> None:
        """Unmap the memory at once; the application keeps what it has mapped."""
        self.told()
        self._segments.clear()

    def _claim(self, nbytes: int) -> tuple[_Segment, int]:
        """Find a free cell, newest segment first; drop segments too small that are free."""
        fitting = [segment for segment in self._segments if segment.stride >= nbytes]
        if len(fitting) < len(self._segments):
            self._segments = [
                segment
                for segment in self._segments
                if segment.stride >= nbytes or not segment.retire()
            ]
        for segment in reversed(fitting):
            cell = segment.free_cell()
            if cell >= 0:
                return segment, cell
        return self._grow(nbytes, max(self._cells, sum(segment.cells for segment in fitting))), 0

    def _grow(self, nbytes: int, cells: int) -> _Segment:
        if self._segments and self._segments[-1].stride >= nbytes:
            stride = self._segments[-1].stride
        else:
            # The first experience tells the size; a larger one says that sizes vary.
            grown = int(nbytes * _HEADROOM) if self._next_number else nbytes
            stride = round_up(grown, PAGE if grown >= PAGE else ALIGNMENT)
        segment = _Segment(self._next_number, min(cells, MAX_CELLS), stride)
        self._next_number += 1
        self._segments.append(segment)
        return segment

    def _targets(self, segment: _Segment, cell: int) -> list[tuple[torch.Tensor, Any]]:
        """Return the tensors of a cell, and as arrays those that arrays will be copied to."""
        cached = segment.targets.get(cell)
        if cached is None or cached[0] is not self._layout:
            views = self._layout.views(segment.map, _STATES + cell * segment.stride).values()
            targets = [
                (view, None if isinstance(dtype, torch.dtype) else view.numpy())
                for view, (_, dtype, _) in zip(views, self._signature, strict=True)
            ]
            cached = segment.targets[cell] = (self._layout, targets)
        return cached[1]


class SharedSegment:
    """The application's side of one segment.

    Attributes:
        map: The memory.
        stride: Bytes of each cell, fixed by the frame that brought the segment.
        held: The cells on which something lives here. What a worker writes into the states does
            not count: it cannot have a cell delivered twice.
    """

    def __init__(self, fd: int, ref: CellRef) -> None:
        """Map a segment that came with a frame; takes ``fd`` over.

        Raises:
            NotShared: It is not what the frame says.
            OSError: It cannot be mapped.
        """
        self._region = memory.Region(memory.attach(fd, ref.segment_nbytes))
        self.map = self._region.map
        self.stride = ref.stride
        self.held: set[int] = set()

    def check(self, ref: CellRef) -> None:
        """Look whether a cell that a frame names is there and nothing is left of what it held.

        Raises:
            NotShared: It is not.
        """
        if ref.stride != self.stride or ref.stride <= 0 or ref.stride % ALIGNMENT:
            raise NotShared(f"cells of {ref.stride} bytes in a segment with cells of {self.stride}")
        if ref.layout.nbytes > ref.stride:
            raise NotShared(f"tensors of {ref.layout.nbytes} bytes in a cell of {ref.stride}")
        end = _STATES + (ref.cell + 1) * ref.stride
        if not 0 <= ref.cell < MAX_CELLS or end > len(self.map):
            raise NotShared(f"cell {ref.cell} of segment {ref.segment} does not exist")
        if ref.cell in self.held:
            raise NotShared(f"cell {ref.cell} of segment {ref.segment} is in use")

    def take(self, cell: int) -> ctypes.Array[Any]:
        """Return a buffer on a cell; the cell is free again when nothing refers to it.

        Every tensor built on the buffer keeps it alive. Safe to drop in any thread.
        """
        self.held.add(cell)
        free = functools.partial(_free, self.held, self.map, cell)
        return memory.part(self._region, _STATES + cell * self.stride, self.stride, free)


def _free(held: set[int], states: mmap.mmap, cell: int) -> None:
    held.discard(cell)  # first: as soon as the cell is free its worker may send it again
    states[cell] = FREE


class RingReader:
    """The application's side: wraps cells as tensors, without a copy."""

    def __init__(self) -> None:
        self._segments: dict[int, SharedSegment] = {}

    def find(self, ref: CellRef, fd: int | None) -> SharedSegment:
        """Return the segment of a cell that a frame names, checked; nothing changes here.

        Args:
            ref: The cell.
            fd: The segment's descriptor, taken over, if the frame brought one.

        Raises:
            NotShared: There is no such segment or cell, or the cell is in use.
            OSError: The segment cannot be mapped.
        """
        if fd is None:
            segment = self._segments.get(ref.segment)
            if segment is None:
                raise NotShared(f"segment {ref.segment} was never shared")
        else:
            segment = SharedSegment(fd, ref)
            if ref.segment in self._segments:
                raise NotShared(f"segment {ref.segment} was shared before")
        segment.check(ref)
        return segment

    def take(self, ref: CellRef, segment: SharedSegment) -> ctypes.Array[Any]:
        """Return a buffer on a cell that was found, as ``SharedSegment.take``."""
        if self._segments.get(ref.segment) is not segment:
            self._segments[ref.segment] = segment
        if len(self._segments) > 1:
            self._segments = {
                number: other
                for number, other in self._segments.items()
                if number == ref.segment or not other.map[_RETIRED]
            }
        return segment.take(ref.cell)

    def close(self) -> None:
        """Unmap the segments at once; each stays mapped while a tensor on it lives."""
        self._segments.clear()


def _copy(target: torch.Tensor, name: str, value: torch.Tensor) -> None:
    try:
        target.copy_(value.detach() if value.requires_grad else value)
    except NotImplementedError as error:
        raise TypeError(
            f"experience[{name!r}] is a {value.dtype} tensor, which torch cannot copy"
        ) from error


__all__ = ["BUSY", "FREE", "CellRef", "RingReader", "RingWriter", "SharedSegment"]

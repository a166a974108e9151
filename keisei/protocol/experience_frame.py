"""The frame about one experience, which is on every batch's path and has a form of its own."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from keisei.ipc.layout import Layout
from keisei.ipc.wire import Payload
from keisei.protocol import codec
from keisei.protocol.codec import INT, LAYOUT, PAIRS, Bytes

_FIXED = struct.Struct("<BBHIqqqqqq")
"""Number, flags, cell and segment; sequence, version, stride, segment's size, steps and seed."""
_HAS_LAYOUT, _HAS_INFO, _HAS_NAMED, _HAS_SETTINGS = 1, 2, 4, 8
_FLAGS = _HAS_LAYOUT | _HAS_INFO | _HAS_NAMED | _HAS_SETTINGS


class ExperienceFrame(NamedTuple):
    """One experience lies in shared memory, in a cell of ``stride`` bytes.

    A new segment comes with its descriptor, and ``segment_nbytes`` is its size; else that is 0.
    ``layout`` is ``None`` where it is that of the frame before: it would be most of the frame.
    ``info`` is pickled, ``None`` if empty. ``named`` are the numbers and versions of the other
    weights that the worker had; ``None`` where they are those of the frame before.
    """

    sequence: int
    version: int
    segment: int
    segment_nbytes: int
    cell: int
    stride: int
    layout: Layout | None
    num_steps: int
    info: Payload | None
    seed: int
    named: tuple[tuple[int, int], ...] | None = None
    settings_version: int = 0


def pack_experience(message: ExperienceFrame, kind: int) -> Payload:
    """Return the frame of a message; ``kind`` is the number of its kind.

    Raises:
        ValueError: A field does not fit.
    """
    sequence, version, segment, segment_nbytes, cell, stride, layout, steps = message[:8]
    info, seed, named, settings = message[8:]
    if min(sequence, version, stride, segment_nbytes, steps, seed, settings) < 0:
        raise ValueError("a number is negative")
    flags = (_HAS_LAYOUT if layout is not None else 0) | (_HAS_INFO if info is not None else 0)
    flags |= _HAS_NAMED if named is not None else 0
    flags |= _HAS_SETTINGS if settings else 0
    head = _FIXED.pack(
        kind, flags, cell, segment, sequence, version, stride, segment_nbytes, steps, seed
    )
    if not flags:
        return head
    out = bytearray(head)
    if settings:
        INT.write(out, settings)
    if layout is not None:
        LAYOUT.write(out, layout)
    if named is not None:
        PAIRS.write(out, named)
    return bytes(out) if info is None else codec.write_payload(out, info)


def read_experience(frame: Bytes) -> tuple[Any, int, int]:
    """Return the message in a frame, where it ends, and how many descriptors it comes with."""
    fixed = _FIXED.unpack_from(frame)
    _, flags, cell, segment, sequence, version, stride, segment_nbytes, steps, seed = fixed
    if min(fixed) < 0 or flags > _FLAGS:
        raise ValueError("a number is out of range")
    at, layout, info, named, settings = _FIXED.size, None, None, None, 0
    if flags & _HAS_SETTINGS:
        settings, at = INT.read(frame, at)
    if flags & _HAS_LAYOUT:
        layout, at = LAYOUT.read(frame, at)
    if flags & _HAS_NAMED:
        named, at = PAIRS.read(frame, at)
    if flags & _HAS_INFO:
        info, at = codec.read_payload(frame, at)
    message = ExperienceFrame(
        sequence,
        version,
        segment,
        segment_nbytes,
        cell,
        stride,
        layout,
        steps,
        info,
        seed,
        named,
        settings,
    )
    return message, at, int(segment_nbytes > 0)

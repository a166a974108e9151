"""How the fields of messages lie in a frame: fixed binary forms, and every reader is total.

A reader takes a frame and a position and returns the value and the position behind it. Whatever
the bytes are, it raises one of ``MALFORMED`` or returns a value of the right type and range.
Numbers are below 2**63, so that they fit wherever they go.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Generic, TypeVar

from keisei.ipc import wire
from keisei.ipc.layout import DTYPES, Layout

T = TypeVar("T")
Bytes = bytes | bytearray | memoryview

MALFORMED = (struct.error, ValueError, LookupError, OverflowError)
"""What readers raise; UnicodeDecodeError is a ValueError."""

MAX_INT = (1 << 63) - 1
MAX_DIMS = 64
"""Dimensions of a tensor; torch and NumPy have no more."""

_INT = struct.Struct("<q")
_TEXT = struct.Struct("<I")
_PAIR = struct.Struct("<qq")
_FIELD = struct.Struct("<HBB")
"""Of a field of a layout: the lengths of its name and its dtype's, and its dimensions."""
_DIMS = [struct.Struct(f"<{count}q") for count in range(MAX_DIMS + 1)]
_ALIGNED = 1 << 12
"""Bytes from which on a payload begins at a multiple of 64, for the buffers inside it."""
_REMEMBERED = 1 << 12
"""Bytes of a layout up to which it is looked up instead of read again."""


class Coder(Generic[T]):
    """How the values of one type are written and read."""

    def write(self, out: bytearray, value: T) -> None:
        """Append ``value``; raises ``ValueError`` or ``struct.error`` if it does not fit."""
        raise NotImplementedError

    def read(self, frame: Bytes, at: int) -> tuple[T, int]:
        """Return the value at ``at`` and the position behind it."""
        raise NotImplementedError


class _Int(Coder[int]):
    def write(self, out: bytearray, value: int) -> None:
        if value < 0:
            raise ValueError(f"{value} is negative")
        out += _INT.pack(value)

    def read(self, frame: Bytes, at: int) -> tuple[int, int]:
        (value,) = _INT.unpack_from(frame, at)
        if value < 0:
            raise ValueError("a number is out of range")
        return value, at + _INT.size


class _Bool(Coder[bool]):
    def write(self, out: bytearray, value: bool) -> None:
        out.append(bool(value))

    def read(self, frame: Bytes, at: int) -> tuple[bool, int]:
        byte = frame[at]
        if byte > 1:
            raise ValueError("a truth value is neither 0 nor 1")
        return byte == 1, at + 1


class _Optional(Coder[T | None]):
    def __init__(self, coder: Coder[T]) -> None:
        self._coder = coder

    def write(self, out: bytearray, value: T | None) -> None:
        BOOL.write(out, value is not None)
        if value is not None:
            self._coder.write(out, value)

    def read(self, frame: Bytes, at: int) -> tuple[T | None, int]:
        is_there, at = BOOL.read(frame, at)
        return self._coder.read(frame, at) if is_there else (None, at)


class _Text(Coder[str]):
    """UTF-8; lone surrogates, which Python's strings may have, included."""

    def write(self, out: bytearray, value: str) -> None:
        raw = value.encode("utf-8", "surrogatepass")
        out += _TEXT.pack(len(raw))
        out += raw

    def read(self, frame: Bytes, at: int) -> tuple[str, int]:
        (nbytes,) = _TEXT.unpack_from(frame, at)
        at += _TEXT.size
        return str(cut(frame, at, nbytes), "utf-8", "surrogatepass"), at + nbytes


class _Layout(Coder[Layout]):
    """Names, dtypes and shapes; where the tensors lie follows from them, so it cannot be wrong."""

    def write(self, out: bytearray, value: Layout) -> None:
        body = bytearray()
        for name, dtype, shape, _, _ in value.fields:
            raw = name.encode("utf-8", "surrogatepass")
            body += _FIELD.pack(len(raw), len(dtype), len(shape))
            body += raw + dtype.encode()
            body += _DIMS[len(shape)].pack(*shape)
        out += _TEXT.pack(len(body))
        out += body

    def read(self, frame: Bytes, at: int) -> tuple[Layout, int]:
        (nbytes,) = _TEXT.unpack_from(frame, at)
        at += _TEXT.size
        raw = bytes(cut(frame, at, nbytes))
        read = _read_layout if nbytes > _REMEMBERED else _remembered_layout
        return read(raw), at + nbytes


class _Pairs(Coder[tuple[tuple[int, int], ...]]):
    """Pairs of numbers."""

    def write(self, out: bytearray, value: tuple[tuple[int, int], ...]) -> None:
        out += _TEXT.pack(len(value))
        for pair in value:
            if min(pair) < 0:
                raise ValueError("a number is negative")
            out += _PAIR.pack(*pair)

    def read(self, frame: Bytes, at: int) -> tuple[tuple[tuple[int, int], ...], int]:
        (count,) = _TEXT.unpack_from(frame, at)
        at += _TEXT.size
        body = cut(frame, at, count * _PAIR.size)
        pairs = tuple((first, second) for first, second in _PAIR.iter_unpack(body))
        if min(map(min, pairs), default=0) < 0:
            raise ValueError("a number is out of range")
        return pairs, at + len(body)


class _Entries(Coder[tuple[tuple[str, int], ...]]):
    """Names, each with a number of bytes."""

    def write(self, out: bytearray, value: tuple[tuple[str, int], ...]) -> None:
        body = bytearray()
        for name, nbytes in value:
            TEXT.write(body, name)
            INT.write(body, nbytes)
        out += _TEXT.pack(len(body))
        out += body

    def read(self, frame: Bytes, at: int) -> tuple[tuple[tuple[str, int], ...], int]:
        (body_nbytes,) = _TEXT.unpack_from(frame, at)
        at += _TEXT.size
        body = cut(frame, at, body_nbytes)
        entries, inside = [], 0
        while inside < len(body):
            name, inside = TEXT.read(body, inside)
            nbytes, inside = INT.read(body, inside)
            entries.append((name, nbytes))
        return tuple(entries), at + body_nbytes


def _read_layout(raw: bytes) -> Layout:
    described, at = {}, 0
    while at < len(raw):
        name_nbytes, dtype_nbytes, num_dims = _FIELD.unpack_from(raw, at)
        at += _FIELD.size
        name = str(cut(raw, at, name_nbytes), "utf-8", "surrogatepass")
        at += name_nbytes
        dtype = DTYPES[str(cut(raw, at, dtype_nbytes), "ascii")]
        at += dtype_nbytes
        shape = _DIMS[num_dims].unpack_from(raw, at)
        at += _DIMS[num_dims].size
        # torch keeps strides of tensors without elements too, so those must not overflow either.
        if min(shape, default=0) < 0 or math.prod(filter(None, shape)) > MAX_INT // dtype.itemsize:
            raise ValueError(f"a tensor of shape {shape} cannot be")
        if name in described:
            raise ValueError(f"{name!r} is there twice")
        described[name] = dtype, shape
    layout = Layout.of((name, dtype, shape) for name, (dtype, shape) in described.items())
    if layout.nbytes > MAX_INT:
        raise ValueError("the tensors are too large together")
    return layout


_remembered_layout = lru_cache(maxsize=128)(_read_layout)

INT, BOOL, TEXT, LAYOUT = _Int(), _Bool(), _Text(), _Layout()
PAIRS, ENTRIES = _Pairs(), _Entries()
OPTIONAL_INT = _Optional(INT)


def cut(frame: Bytes, at: int, nbytes: int) -> Bytes:
    """Return ``nbytes`` bytes of a frame; raises ``ValueError`` where it is shorter."""
    if nbytes > len(frame) - at:
        raise ValueError("it is cut")
    return frame[at : at + nbytes]


def write_payload(out: bytearray, payload: wire.Payload) -> wire.Payload:
    """Return the frame of ``out`` and ``payload``, which comes last; a large one is not copied."""
    nbytes = len(payload) if isinstance(payload, bytes) else wire.nbytes_of(payload)
    out += _INT.pack(nbytes)
    if nbytes < _ALIGNED:
        out += b"".join(payload) if isinstance(payload, tuple) else payload
        return bytes(out)
    out += wire.padding(len(out))
    return (bytes(out), *payload) if isinstance(payload, tuple) else (bytes(out), payload)


def read_payload(frame: Bytes, at: int) -> tuple[memoryview, int]:
    """Return a view of the payload at ``at`` and the position behind it."""
    (nbytes,) = _INT.unpack_from(frame, at)
    at += _INT.size
    if nbytes >= _ALIGNED:
        at += -at % wire.ALIGNMENT
    if not 0 <= nbytes <= len(frame) - at:
        raise ValueError("it is cut")
    return memoryview(frame)[at : at + nbytes], at + nbytes

"""Picklers for values with tensors: small values as one pickle, large ones with buffers beside it.

The buffers of tensors and arrays, and large ``bytes``, are copied once when they are packed, go to
the socket as they are, and arrive as views of the frame. What must be copied is copied by torch or
NumPy, which let other threads run, or a piece at a time. Between the objects of a value, and
between stretches of a pickle, Python code runs, where the interpreter lets another thread go on.
So in a thread neither packing nor unpacking holds an event loop up. Exceptions are a single string
of hundreds of megabytes, which Python encodes in one go, and what a ``__reduce__`` does itself.

A large value is: ``_HEAD``, the length of each buffer, the buffers, each aligned to 64 bytes, and
the pickle. A pickle begins with byte 0x80, ``_HEAD`` with another one.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import sys
from collections.abc import Iterator
from typing import Any

from keisei.ipc import wire

PROTOCOL = 5
LARGE_MARK = b"\x01"
_HEAD = struct.Struct("<cxxxIQ")
"""The mark, how many buffers there are, and the pickle's length."""
_LENGTH = struct.Struct("<Q")
_BESIDE = 1 << 14
"""Bytes from which on a buffer lies beside the pickle."""
_PIECE = 1 << 20
"""Bytes that are copied before another thread may run."""
_STRETCH = 1 << 17
"""Bytes of a pickle that are read before another thread may run."""

_WRITABLE, _READ_ONLY, _BYTES, _BYTEARRAY, _STR = range(5)
"""What a buffer arrives as: a view of the frame, or an object of one of three types."""
_KINDS: dict[type, int] = {bytes: _BYTES, bytearray: _BYTEARRAY, str: _STR}


class _Packed:
    """A buffer that was made for the frame; it goes there as it is and arrives as a view."""

    __slots__ = ("view",)

    def __init__(self, room: mmap.mmap) -> None:
        self.view = memoryview(room)


class Pickler(pickle.Pickler):
    """Tensors as bytes inside the pickle; everything else as usual."""

    def reducer_override(self, obj: Any) -> Any:
        """Say how a tensor is packed."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(obj, torch.Tensor):
            return NotImplemented
        if type(obj) is torch.nn.Parameter:
            return _rebuild_parameter, (obj.detach(), obj.requires_grad)
        if obj.is_nested or obj.is_quantized or obj.layout is not torch.strided:
            raise TypeError(f"a {obj.layout} tensor cannot travel; make it dense first")
        room = self._room(obj.numel() * obj.element_size())
        if len(room):
            torch.frombuffer(room, dtype=obj.dtype).view(obj.shape).copy_(obj.detach())
        packed = room if isinstance(room, bytearray) else _Packed(room)
        return _rebuild_tensor, (packed, str(obj.dtype).removeprefix("torch."), tuple(obj.shape))

    def _room(self, nbytes: int) -> bytearray | mmap.mmap:
        return bytearray(nbytes)


class _LargePickler(Pickler):
    """Large buffers beside the pickle.

    ``persistent_id`` is asked about every object, and is how buffers of any kind are taken out.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, PROTOCOL)
        self.buffers: list[wire.Part] = []
        self._known: dict[int, tuple[int, int]] = {}
        self._kept: list[Any] = []

    def reducer_override(self, obj: Any) -> Any:
        """Say how a tensor or an array is packed."""
        numpy = sys.modules.get("numpy")
        if (
            numpy is not None
            and type(obj) is numpy.ndarray
            and obj.nbytes >= _BESIDE
            and not obj.dtype.hasobject
        ):
            order = "F" if obj.flags.fnc else "C"
            room = _room(obj.nbytes)
            numpy.copyto(numpy.ndarray(obj.shape, obj.dtype, room, order=order), obj)
            return numpy.ndarray, (obj.shape, obj.dtype, _Packed(room), 0, None, order)
        return super().reducer_override(obj)

    def _room(self, nbytes: int) -> bytearray | mmap.mmap:
        return _room(nbytes) if nbytes >= _BESIDE else bytearray(nbytes)

    def persistent_id(self, obj: Any) -> tuple[int, int] | None:
        """Return what a buffer arrives as, and its number; ``None`` leaves it in the pickle."""
        kind = type(obj)
        if kind is _Packed:
            return self._beside(_WRITABLE, obj.view)
        if kind is pickle.PickleBuffer:
            raw = obj.raw()
            if raw.nbytes < _BESIDE:
                return None
            return self._beside(_READ_ONLY if raw.readonly else _WRITABLE, _copy_of(raw))
        if kind not in _KINDS or len(obj) < _BESIDE:
            return None
        known = self._known.get(id(obj))
        if known is None:
            known = self._known[id(obj)] = self._beside(_KINDS[kind], _part_of(obj))
            self._kept.append(obj)  # its id stands for it as long as it lives
        return known

    def _beside(self, kind: int, part: wire.Part) -> tuple[int, int]:
        self.buffers.append(part)
        return kind, len(self.buffers) - 1


class _LargeUnpickler(pickle.Unpickler):
    """Puts the buffers back that lie beside a pickle."""

    def __init__(self, stream: Any, buffers: list[memoryview]) -> None:
        super().__init__(stream)
        self._buffers = buffers
        self._made: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        """Return the object in whose place ``persistent_id`` has left ``pid``."""
        kind, number = pid
        made = self._made.get(number)
        if made is None:
            made = self._made[number] = _object_of(kind, self._buffers[number])
        return made


class _Stretches(io.RawIOBase):
    """A pickle as a file, which is read a stretch at a time."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._rest = view

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill ``target`` as far as there is something; other threads may run meanwhile."""
        piece = self._rest[: len(target)]
        target[: len(piece)] = piece
        self._rest = self._rest[len(piece) :]
        return len(piece)


def dump(value: Any) -> bytes:
    """Return ``value`` as one pickle."""
    stream = io.BytesIO()
    Pickler(stream, PROTOCOL).dump(value)
    return stream.getvalue()


def dump_large(value: Any) -> wire.Payload:
    """Return ``value`` as one pickle, or in parts if it has large buffers."""
    stream = io.BytesIO()
    pickler = _LargePickler(stream)
    pickler.dump(value)
    pickled, buffers = stream.getvalue(), pickler.buffers
    if not buffers:
        return pickled
    lengths = [wire.nbytes_of(part) for part in buffers]
    head = _HEAD.pack(LARGE_MARK, len(buffers), len(pickled))
    head += b"".join(map(_LENGTH.pack, lengths))
    parts: list[wire.Part] = [head + wire.padding(len(head))]
    for part, length in zip(buffers, lengths, strict=True):
        parts.append(part)
        if pad := wire.padding(length):
            parts.append(pad)
    return (*parts, pickled)


def load_large(data: memoryview) -> Any:
    """Return the value in a frame of any size.

    Raises:
        pickle.UnpicklingError: The frame is cut, or says something impossible.
    """
    buffers: list[memoryview] = []
    if data[:1] == LARGE_MARK:
        if data.readonly:
            data = _copy_of(data)
        *buffers, data = _split(data)
    stream = io.BufferedReader(_Stretches(data), _STRETCH)
    return _LargeUnpickler(stream, buffers).load()


def _split(data: memoryview) -> Iterator[memoryview]:
    """Yield the buffers of a large value, and then its pickle."""
    if len(data) < _HEAD.size:
        raise pickle.UnpicklingError("a large value is cut in its head")
    _, count, pickle_nbytes = _HEAD.unpack_from(data)
    at = _HEAD.size + count * _LENGTH.size
    if at > len(data):
        raise pickle.UnpicklingError(f"a large value of {len(data)} bytes has {count} buffers")
    lengths = [length for (length,) in _LENGTH.iter_unpack(data[_HEAD.size : at])]
    for length in (*lengths, pickle_nbytes):
        at += -at % wire.ALIGNMENT
        if length > len(data) - at:
            raise pickle.UnpicklingError("a large value is cut")
        yield data[at : at + length]
        at += length
    if at != len(data):
        raise pickle.UnpicklingError("something follows on a large value")


def _room(nbytes: int) -> mmap.mmap:
    """Return memory that is not cleared at once, as a bytearray would be."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _pieces(view: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(view), _PIECE):
        yield view[at : at + _PIECE]


def _copy_of(source: memoryview) -> memoryview:
    """Copy a piece at a time, so that the source may change afterwards."""
    copy = memoryview(_room(len(source)))
    at = 0
    for piece in _pieces(source):
        copy[at : at + len(piece)] = piece
        at += len(piece)
    return copy


def _part_of(obj: bytes | bytearray | str) -> wire.Part:
    if isinstance(obj, str):
        return obj.encode("utf-8", "surrogatepass")
    return _copy_of(memoryview(obj)) if isinstance(obj, bytearray) else obj


def _object_of(kind: int, view: memoryview) -> Any:
    """Make the object that a buffer arrives as."""
    if kind == _BYTES:
        stream = io.BytesIO()
        for piece in _pieces(view):
            stream.write(piece)
        return stream.getvalue()
    if kind == _BYTEARRAY:
        array = bytearray()
        for piece in _pieces(view):
            array += piece
        return array
    if kind == _STR:
        return str(view, "utf-8", "surrogatepass")
    return view if kind == _WRITABLE else view.toreadonly()


def _rebuild_tensor(raw: bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    kind = getattr(torch, dtype)
    if not len(raw):
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(raw, dtype=kind).view(shape)


def _rebuild_parameter(data: Any, requires_grad: bool) -> Any:
    import torch

    return torch.nn.Parameter(data, requires_grad)


__all__ = ["LARGE_MARK", "PROTOCOL", "dump", "dump_large", "load_large"]

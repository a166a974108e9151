"""Values of any kind as what JSON has: for events and figures that leave the process."""

from __future__ import annotations

import contextlib
import enum
import math
import reprlib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from typing import Any

_DEPTH = 8
"""Levels of nesting that are followed; what lies deeper is told by its ``repr``."""


def jsonable(value: object, depth: int = _DEPTH) -> Any:
    """Return ``value`` as ``None``, bool, int, float, str, list and dict, which JSON has.

    NaN and infinity, which JSON does not have, become ``None``; an enumeration's member its value;
    an exception "Type: message"; tuples, sets and the like lists; bytes text; the keys of mappings
    text. Text can be encoded as UTF-8: lone surrogates are escaped. Any other object is told by
    its ``repr``, shortened. Raises nothing, whatever the value's own code does.

    Args:
        value: Anything; it is not changed.
        depth: Levels of nesting that are followed.
    """
    try:
        return _plain(value, depth)
    except Exception:  # noqa: BLE001 - code of the value's class has failed; its name is left
        return f"<{type(value).__qualname__}>"


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is int:
        return value
    if isinstance(value, enum.Enum):
        return jsonable(value.value, depth - 1) if depth > 0 else _text(value.name)
    if isinstance(value, str | bytes | bytearray | memoryview):
        return _text(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, BaseException):
        return _text(f"{kind.__qualname__}: {value}" if str(value) else kind.__qualname__)
    if depth <= 0:
        return _text(reprlib.repr(value))
    return _container(value, depth - 1)


def _container(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        return {_key(key): jsonable(one, depth) for key, one in value.items()}
    if isinstance(value, list | tuple | AbstractSet | range):
        items: Iterable[Any] = value
        return [jsonable(one, depth) for one in items]
    if getattr(value, "shape", None) == ():  # of NumPy's own bool, or a tensor with one number
        return jsonable(value.item(), depth)
    to_dict = getattr(type(value), "to_dict", None)
    if callable(to_dict):  # an incident
        return jsonable(to_dict(value), depth)
    return _text(reprlib.repr(value))


def _key(key: object) -> str:
    plain = key.value if isinstance(key, enum.Enum) else key
    with contextlib.suppress(Exception):  # code of the key's class
        return _text(str(plain))
    return f"<{type(key).__qualname__}>"


def _text(text: str | bytes | bytearray | memoryview) -> str:
    raw = str.encode(text, "utf-8", "backslashreplace") if isinstance(text, str) else bytes(text)
    return raw.decode("utf-8", "backslashreplace")

"""Tell at a glance whether a value may be packed in an event loop, or is worth a thread."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from typing import Any

LARGE = 1 << 16
"""Bytes of a frame above which it is packed and unpacked in a thread: even where they are nothing
but small objects, fewer take a few milliseconds at most."""
MANY = 1000
"""Objects above which a value is packed in a thread, however small they are."""

_FIXED = frozenset({type(None), bool, float, complex, type(...), range, slice})
_TEXT = (str, bytes, bytearray, memoryview)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
"""Kinds of values that are pickled as a name, or not at all."""


def is_large(value: Any) -> bool:
    """Return whether ``value`` has more than ``LARGE`` bytes or more than ``MANY`` objects.

    Looks at no more than ``MANY`` of them, and into the attributes of objects of any class. An
    object that cannot even be looked at counts as large.
    """
    if type(value) in _FIXED:
        return False
    try:
        return _exceeds(value, LARGE, MANY)
    except Exception:  # noqa: BLE001 - a property of the value raised; pickling it tells more
        return True


def _exceeds(value: Any, nbytes: int, count: int) -> bool:
    """Return whether ``value`` needs more than ``nbytes`` or ``count``."""
    pending = [value]
    while pending:
        item = pending.pop()
        count -= 1
        kind = type(item)
        if kind in _FIXED:
            nbytes -= 8
        elif kind is int:
            nbytes -= 8 + (item.bit_length() >> 3)
        elif isinstance(item, _TEXT):
            nbytes -= item.nbytes if isinstance(item, memoryview) else len(item)
        else:
            nbytes -= 16
            parts = _parts_of(item)
            if isinstance(parts, int):
                nbytes -= parts
            else:
                pending.extend(parts)
        if nbytes < 0 or count < len(pending):
            return True
    return False


def _parts_of(item: Any) -> int | list[Any]:
    """Return the bytes of a buffer, or what lies in any other object."""
    if isinstance(item, dict):
        parts = [] if len(item) > MANY else [*item.keys(), *item.values()]
        return parts if len(item) <= MANY else LARGE
    if isinstance(item, _SEQUENCES):
        return list(item) if len(item) <= MANY else LARGE
    if isinstance(item, _BY_NAME):
        return 0
    nbytes = getattr(item, "nbytes", None)
    if isinstance(nbytes, int):
        has_objects = getattr(getattr(item, "dtype", None), "hasobject", False) is True
        return LARGE if has_objects else nbytes
    parts = list(getattr(item, "__dict__", {}).values())
    for cls in type(item).__mro__:
        slots = vars(cls).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        parts += [getattr(item, name, None) for name in names if name != "__dict__"]
    if isinstance(item, BaseException):
        parts += item.args
    elif isinstance(item, functools.partial):
        parts += [item.func, item.args, item.keywords]
    return parts or sys.getsizeof(item, 64)

"""Public classes and functions carry the name of the module that users import them from.

``keisei.ParallelManager`` is defined elsewhere; its repr, its pickles and the tracebacks of the
public errors say ``keisei`` all the same, so that modules can be rearranged without a trace. The
module in which a name is defined stays importable, and so does every pickle that names it.
"""

from __future__ import annotations

import contextlib
import sys
import typing
from typing import Any, TypeVar

T = TypeVar("T")

PUBLIC = "keisei"
_homes: dict[str, str] = {}


def public(value: T) -> T:
    """Have a class or function carry ``keisei`` as its module; a decorator, the outermost one.

    Python's ``inspect`` looks for the source of a class in the file of its module. It finds the
    source of methods and functions, but not of the class as a whole: ``home_of`` tells its module.
    """
    named: Any = value
    _homes[named.__qualname__] = named.__module__
    if isinstance(value, type):
        _resolve_annotations(value)
        with contextlib.suppress(AttributeError):
            # A line number of the other file, by which Python 3.13 would show a wrong source.
            del named.__firstlineno__
    named.__module__ = PUBLIC
    return value


def home_of(value: object) -> str:
    """Return the module in which a class or function is defined, for documentation tools."""
    module = getattr(value, "__module__", None) or ""
    return _homes.get(getattr(value, "__qualname__", ""), module) if module == PUBLIC else module


def _resolve_annotations(kind: type) -> None:
    """Replace annotations that are text, which tools would look up in the public module.

    Where they need a name that only a type checker imports, such as torch, they become references
    that are looked up in the defining module when they are resolved.
    """
    names = vars(sys.modules[kind.__module__])
    resolved: dict[str, Any] = {}
    for name, given in kind.__annotations__.items():
        # That of a NamedTuple is a reference already, which knows no module.
        annotation = given.__forward_arg__ if isinstance(given, typing.ForwardRef) else given
        probe = type("Probe", (), {"__annotations__": {name: annotation}})
        try:
            resolved |= typing.get_type_hints(probe, names, include_extras=True)
        except NameError:
            resolved[name] = typing.ForwardRef(
                annotation, is_argument=False, module=kind.__module__, is_class=True
            )
    if resolved:
        kind.__annotations__ = resolved

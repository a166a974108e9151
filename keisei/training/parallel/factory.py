"""Check a worker factory where it is given, and pickle it before any process starts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from keisei.backends.preload import modules_named_in
from keisei.exceptions import SerializationError
from keisei.ipc import serialize
from keisei.training.parallel import by_value
from keisei.training.parallel.registrations import with_registrations
from keisei.worker import Worker

_REMEDY = (
    "define the worker class at the top level of a module, and give its arguments with "
    "functools.partial"
)


def pickle_factory(factory: Callable[[], Worker], *, for_processes: bool = True) -> bytes:
    """Return ``factory``, pickled.

    What workers can import is sent by name. The code of what they cannot, such as a class of a
    notebook's cell, is sent itself; environments that this process alone has registered with
    Gymnasium, and that an argument names, are taken along.

    Args:
        factory: What makes a worker.
        for_processes: It is unpickled in other processes, not in this one.

    Raises:
        SerializationError: It cannot be sent to a process; names the object and the remedy.
        TypeError: It is not callable, or an instance of a worker instead of a way to make one.
    """
    if isinstance(factory, Worker):
        raise TypeError(
            f"worker is an instance of {type(factory).__qualname__}; give the class itself, or a "
            "functools.partial of it: each process makes its own"
        )
    if not callable(factory):
        raise TypeError(f"worker is {factory!r}; give a class or another callable")
    name = f"the worker factory {_describe(factory)}"
    part = _unpicklable_part(factory)
    if part is not None:
        raise SerializationError(f"{name} cannot be sent to a process: {part}; {_REMEDY}")
    taken = with_registrations(factory)
    try:
        pickled = serialize.dumps_whole(taken, name)
    except SerializationError as error:
        if not by_value.names_without_a_home(_modules_of(factory)):
            raise SerializationError(f"{error}; {_REMEDY}") from error
        return by_value.dumps(taken, name)
    if for_processes:
        homeless = by_value.names_without_a_home(modules_named_in(pickled))
        if homeless:
            return by_value.dumps(taken, name, homeless)
    return pickled


def _modules_of(factory: Any) -> set[str]:
    """Return the modules of the classes and functions in a factory."""
    parts = [factory]
    if isinstance(factory, functools.partial):
        parts = [factory.func, *factory.args, *factory.keywords.values()]
    return {str(getattr(part, "__module__", "")) for part in parts}


def _unpicklable_part(value: Any) -> str | None:
    """Name the lambda or local object inside ``value``, if that is what it is."""
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            if (found := _unpicklable_part(part)) is not None:
                return found
        return None
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return None
    where = f"{value.__module__}.{value.__qualname__}"
    if "<lambda>" in value.__qualname__:
        return f"{where} is a lambda"
    if "<locals>" in value.__qualname__:
        return f"{where} is defined inside a function"
    return None


def _describe(factory: Any) -> str:
    if isinstance(factory, functools.partial):
        return f"functools.partial({_describe(factory.func)}, …)"
    return getattr(factory, "__qualname__", None) or repr(factory)

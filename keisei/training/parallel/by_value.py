"""Pickles what workers cannot import: classes of a notebook's cell, or of what was typed or piped.

``cloudpickle`` sends their code itself; what can be imported is still sent by name.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from keisei.backends import mainscript
from keisei.exceptions import SerializationError
from keisei.ipc import failures

_PROTOCOL = 5


def names_without_a_home(modules: Iterable[str]) -> list[str]:
    """Return those modules that another process cannot import: the main one, or made on the way."""
    return sorted(name for name in modules if _has_no_home(name))


def _has_no_home(name: str) -> bool:
    if name == "__main__":
        return bool(mainscript.why_not_importable())
    module = sys.modules.get(name)
    if module is None or name in sys.builtin_module_names:
        return False
    if getattr(module, "__spec__", None) is not None or getattr(module, "__file__", None):
        return False
    parent = name.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    return importlib.machinery.PathFinder.find_spec(name, path) is None


def dumps(value: Any, name: str, modules: Iterable[str] = ()) -> bytes:
    """Return ``value`` as one pickle that holds the code of what has no module to import.

    Args:
        value: A worker factory.
        name: What it is, for errors.
        modules: Modules, beside the main one, whose code is sent.

    Raises:
        SerializationError: Something in it cannot be pickled even so, or cloudpickle is missing.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise SerializationError(
            f"{name} cannot be sent: its class or an argument is defined where worker processes "
            f"cannot import it ({mainscript.why_not_importable() or 'its module has no file'}); "
            'pip install "keisei[notebook]" brings cloudpickle, which sends its code, or define '
            "it in a module of its own, a .py file, and import it from there"
        ) from error
    with _by_value(cloudpickle, modules):
        try:
            pickled: bytes = cloudpickle.dumps(value, protocol=_PROTOCOL)
        except Exception as error:
            raise SerializationError(
                f"{name} cannot be sent: its code refers to something that cannot be pickled "
                f"({failures.summary(error)}); refer to it less, or define the class in a module "
                "of its own, a .py file, and import it from there"
            ) from error
    return pickled


class _by_value:  # noqa: N801 - a context manager
    def __init__(self, cloudpickle: Any, modules: Iterable[str]) -> None:
        self._cloudpickle = cloudpickle
        self._modules = list(self._found(modules))

    @staticmethod
    def _found(modules: Iterable[str]) -> Iterator[Any]:
        for name in modules:
            if name != "__main__" and name in sys.modules:
                yield sys.modules[name]

    def __enter__(self) -> None:
        for module in self._modules:
            self._cloudpickle.register_pickle_by_value(module)

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            self._cloudpickle.unregister_pickle_by_value(module)


__all__ = ["dumps", "names_without_a_home"]

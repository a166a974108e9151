"""Gymnasium environments that only the application has registered, taken along to the workers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from keisei.worker import Worker


class Registered:
    """A worker factory that registers environments before it makes the worker.

    Args:
        factory: Makes the worker.
        specs: Gymnasium's descriptions of the environments.
    """

    def __init__(self, factory: Callable[[], Worker], specs: tuple[Any, ...]) -> None:
        self.factory = factory
        self.specs = specs
        self.__qualname__ = getattr(factory, "__qualname__", "") or repr(factory)

    def __call__(self) -> Worker:
        """Register what this process does not know, and return a worker."""
        import gymnasium

        for spec in self.specs:
            gymnasium.registry.setdefault(spec.id, spec)
        return self.factory()


def with_registrations(factory: Callable[[], Worker]) -> Callable[[], Worker]:
    """Return ``factory``, or one that registers the environments that it names first.

    They are those among the arguments of a ``functools.partial`` that this process has registered
    and that Gymnasium does not register by itself. Costs nothing where Gymnasium is not loaded.
    """
    gymnasium = sys.modules.get("gymnasium")
    registry = getattr(gymnasium, "registry", None)
    if not isinstance(registry, dict):
        return factory
    found = [registry[name] for name in _texts(factory) if name in registry]
    specs = tuple(spec for spec in found if not _is_gymnasiums_own(spec))
    return Registered(factory, specs) if specs else factory


def _texts(factory: Any) -> Iterator[str]:
    if isinstance(factory, functools.partial):
        yield from _texts(factory.func)
        for value in (*factory.args, *factory.keywords.values()):
            if isinstance(value, str):
                yield value


def _is_gymnasiums_own(spec: Any) -> bool:
    entry = getattr(spec, "entry_point", None)
    return isinstance(entry, str) and entry.startswith("gymnasium.")

"""Random generators that modules hold: each worker's process gives them a state of its own.

A module that a fork server has imported is the same in every worker, and so would be all that its
generators draw. A module that a worker imports itself may seed its generator with a constant. So
every generator that a module, a class of it, or a container or object at its top level holds is
seeded from the worker's seed and the place where it was found: it differs per worker and per
incarnation, and repeats itself under the seed of the pool. The global generators of ``random``,
NumPy and torch are not among them; they are seeded by themselves.
"""

from __future__ import annotations

import collections
import functools
import gc
import hashlib
import os
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_LEFT_ALONE = frozenset({"keisei", "torch", "numpy", "__main__"}) | sys.stdlib_module_names
"""Packages whose only generators are the global ones. A worker's main script has another name."""
_PLAIN = frozenset(
    {type(None), bool, int, float, str, bytes, types.ModuleType, types.BuiltinFunctionType}
)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_WRAPPERS = (functools.partial, staticmethod, classmethod, types.MethodType, types.SimpleNamespace)
_DEPTH = 4
"""Classes, containers, objects and functions inside one another that are looked into."""
_MOST = 10_000
"""Elements of one container that are looked at."""

Seeder = Callable[[Any, int], object]


class Known:
    """The state before a fork: generators by where they are, and the modules."""

    generators: Mapping[str, Any] = {}
    modules: frozenset[str] = frozenset()


def remember() -> None:
    """Find the generators of all modules that are imported now, for those who are forked later."""
    Known.generators = {**Known.generators, **found_in(sys.modules.keys() - Known.modules)}
    Known.modules = frozenset(sys.modules)


def forget(modules: frozenset[str]) -> None:
    """Forget modules that are about to be imported anew."""
    Known.generators = found_in(Known.modules - modules) if Known.generators else {}
    Known.modules -= modules


def refresh() -> None:
    """Give NumPy's global generator, and what was remembered, a state from the system.

    Called in a forked process, which then draws like a fresh interpreter while it imports.
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    if Known.generators:
        seed(int.from_bytes(os.urandom(8), "little"))


def seed(number: int) -> None:
    """Seed every generator that a module of this process holds.

    Raises:
        TypeError: One of them cannot be seeded; names where it is.
    """
    seeders = _seeders()
    new = found_in(sys.modules.keys() - Known.modules)
    for path, one in {**Known.generators, **new}.items():
        digest = hashlib.blake2b(f"{number}:{path}".encode(), digest_size=8).digest()
        own = int.from_bytes(digest, "little")
        try:
            for kind, seeder in seeders.items():
                if issubclass(type(one), kind):
                    seeder(one, own)
        except Exception as error:
            raise TypeError(
                f"the random generator {path}, a {type(one).__qualname__}, cannot be seeded, so it "
                "may draw the same in every worker; make it in setup(), from context.seed"
            ) from error


def found_in(modules: Iterable[str]) -> dict[str, Any]:
    """Return the generators that modules hold, by where they are; each of them once."""
    kinds = tuple(_seeders())
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name in sorted(modules):
        module = sys.modules.get(name)
        if isinstance(module, types.ModuleType) and name.partition(".")[0] not in _LEFT_ALONE:
            found.update(_Search(name, kinds, seen).inside(name, vars(module), _DEPTH))
    return found


class _Search:
    """Looks for generators in one module, without running code of what it looks at."""

    def __init__(self, module: str, kinds: tuple[type, ...], seen: set[int]) -> None:
        self._module = module
        self._kinds = kinds
        self._seen = seen

    def inside(self, path: str, values: Any, depth: int) -> Iterator[tuple[str, Any]]:
        """Find the generators in a mapping, or in a sequence."""
        is_mapping = issubclass(type(values), (dict, types.MappingProxyType))
        items = list(values.items()) if is_mapping else list(enumerate(values))
        for key, value in items[:_MOST]:
            if type(value) in _PLAIN or id(value) in self._seen:
                continue
            where = f"{path}.{key}" if type(key) is str else f"{path}[{key!r:.40}]"
            if issubclass(type(value), self._kinds):
                self._seen.add(id(value))
                yield where, value
            elif depth:
                more = self._contents(value)
                if more is not None:
                    self._seen.add(id(value))
                    yield from self.inside(where, more, depth - 1)

    def _contents(self, value: Any) -> Any:
        """Return what there is to look into, ``None`` if that is another module's, or nothing."""
        kind = type(value)
        if issubclass(kind, type):
            return type.__getattribute__(value, "__dict__") if self._is_ours(value) else None
        if kind is types.FunctionType:
            return _kept_by(value) if self._is_ours(value) else None
        if kind in (dict, *_SEQUENCES):
            return value
        if issubclass(kind, _WRAPPERS) or not _is_left_alone(kind.__module__):
            return gc.get_referents(value) if gc.is_tracked(value) else None
        return None

    def _is_ours(self, value: Any) -> bool:
        return getattr(value, "__module__", None) == self._module


def _is_left_alone(module: object) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in _LEFT_ALONE


def _kept_by(function: types.FunctionType) -> list[Any]:
    """Return what a function keeps between its calls: defaults, and variables around it."""
    kept = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            kept.append(cell.cell_contents)
        except ValueError:
            continue
    return [*kept, *vars(function).values()]


def _seeders() -> dict[type, Seeder]:
    """Return the kinds of generators there are, with what seeds one; imports none of them."""
    found: dict[type, Seeder] = {random.Random: lambda one, number: one.seed(number)}
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random is not None:
        found[numpy_random.BitGenerator] = _begin_anew
        found[numpy_random.Generator] = lambda one, number: _begin_anew(one.bit_generator, number)
        found[numpy_random.RandomState] = _seed_random_state
    if torch is not None:
        found[torch.Generator] = lambda one, number: one.manual_seed(number)
    return found


def _begin_anew(bits: Any, number: int) -> None:
    """Give a bit generator of NumPy a new seed sequence, in place: others hold it too."""
    type(bits).__init__(bits, number)


def _seed_random_state(one: Any, number: int) -> None:
    state = one.get_state(legacy=False)
    _begin_anew(one._bit_generator, number)  # noqa: SLF001 - it has no public name
    fresh = one._bit_generator.state  # noqa: SLF001 - as above
    one.set_state({**state, **fresh, "has_gauss": 0, "gauss": 0.0})

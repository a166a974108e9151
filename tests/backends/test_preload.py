"""What the fork server imports before it forks, from the pickle of a worker's factory."""

from __future__ import annotations

import functools
import pickle
import sys
import types

import pytest

import backend_workers
import pool_workers
from keisei.backends.preload import default_preload, modules_named_in
from keisei.ipc import serialize


class Nested:
    """Has a class inside, whose name is longer than one word."""

    class Inner:
        """Is inside."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_modules_of_a_class_are_named(protocol):
    """Every protocol names the module of a class in its own way, and it is found."""
    assert modules_named_in(pickle.dumps(backend_workers.Obedient, protocol)) == {"backend_workers"}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("factory", "modules"),
    [
        (
            functools.partial(backend_workers.Busy, "os.path", "json"),
            {"functools", "backend_workers"},
        ),
        (
            functools.partial(backend_workers.Explosive, backend_workers.segfault),
            {"functools", "backend_workers"},
        ),
        (
            functools.partial(
                backend_workers.Explosive,
                functools.partial(pool_workers.Counting, gate=pool_workers.Returning),
            ),
            {"functools", "backend_workers", "pool_workers"},
        ),
    ],
)
def test_the_modules_of_a_partial_are_named(factory, modules, protocol):
    """All functions and arguments count, repeated modules too, and no string beside them."""
    found = modules_named_in(pickle.dumps(factory, protocol))
    assert found - {"builtins", "__builtin__", "copyreg", "copy_reg"} == modules


def test_what_a_manager_sends_is_understood():
    """The library's own pickles are read like any other."""
    data = serialize.dumps(functools.partial(backend_workers.Busy, "a", "b"))
    assert modules_named_in(data) == {"functools", "backend_workers"}


def test_a_nested_class_is_of_its_module():
    """Names with dots are names, not modules."""
    assert modules_named_in(pickle.dumps(Nested.Inner)) == {__name__}


def test_nothing_is_unpickled():
    """Looking runs no code of the pickle."""
    factory = backend_workers.Explosive(functools.partial(sys.exit, 3))
    assert "sys" in modules_named_in(pickle.dumps(factory))


def test_the_workers_own_modules_are_preloaded():
    """In alphabetical order; what is always there is left out."""
    assert default_preload({"pool_workers", "builtins", "backend_workers"}) == (
        "backend_workers",
        "pool_workers",
    )


def test_what_the_main_script_imported_is_preloaded(monkeypatch):
    """Its modules, and those of its imported classes and functions; not the script itself."""

    class Treacherous:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("working outside of a context")

    main = types.ModuleType("__main__")
    main.json_alias = __import__("json")
    main.Counting = pool_workers.Counting
    main.dumps = pickle.dumps
    main.instance = pool_workers.Returning(1)
    main.of_its_own = type("Own", (), {"__module__": "__main__"})
    main.treacherous = Treacherous()
    main.gone = types.ModuleType("a_module_that_is_not_imported")
    monkeypatch.setitem(sys.modules, "__main__", main)
    found = default_preload({"__main__", "functools"})
    assert found == tuple(sorted({"functools", "json", "pool_workers", "_pickle", __name__}))


def test_a_worker_of_a_module_does_not_ask_the_main_script(monkeypatch):
    """Who keeps workers in modules of their own pays for nothing that the script imports."""
    main = types.ModuleType("__main__")
    main.json = __import__("json")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert default_preload({"backend_workers"}) == ("backend_workers",)

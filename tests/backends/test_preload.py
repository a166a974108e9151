"""What the fork server imports before it forks, from the pickle of a worker's factory."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import pickle
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import backend_workers
import pool_workers
from keisei.backends.preload import default_preload, modules_named_in
from keisei.child.installed import is_installed
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


# what is preloaded


@pytest.fixture
def make_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a maker of modules that are imported from a folder: the user's, or a library's."""
    folders = {"own": tmp_path / "own", "installed": tmp_path / "lib" / "site-packages"}
    for folder in folders.values():
        folder.mkdir(parents=True)
        monkeypatch.syspath_prepend(str(folder))

    def make(name: str, text: str = "", *, where: str = "own") -> None:
        path = folders[where].joinpath(*name.split("."))
        path.parent.mkdir(exist_ok=True)
        file = path / "__init__.py" if text == "package" else path.with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text("" if text == "package" else textwrap.dedent(text), encoding="utf-8")
        importlib.invalidate_caches()
        importlib.import_module(name)

    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_only_installed_modules_are_preloaded(make_module):
    """What the worker's module imports from libraries, by any form of import; not itself."""
    for name in ("lib_a", "lib_b", "lib_c"):
        make_module(name, "package", where="installed")
    make_module("lib_a.part", where="installed")
    make_module("lib_b.part", "value = 1", where="installed")
    make_module(
        "own_worker",
        """
        import json, lib_a.part as p
        from lib_b.part import value
        class Worker:
            from lib_c import __name__ as there
        """,
    )
    assert default_preload({"own_worker", "builtins"}) == (
        "json",
        "lib_a",
        "lib_a.part",
        "lib_b",
        "lib_b.part",
        "lib_c",
    )


def test_the_users_modules_are_followed(make_module):
    """What they import through one another is preloaded, relative imports and circles too."""
    make_module("lib_a", where="installed")
    make_module("lib_b", where="installed")
    make_module("own", "package")
    make_module("own.inner", "package")
    make_module("own.helper", "import lib_b, own.inner")
    make_module("own.inner.later", "import lib_a")
    make_module("own.inner.envs", "from .. import helper\nfrom . import later\nimport own.helper")
    assert default_preload({"own.inner.envs"}) == ("lib_a", "lib_b")


def test_what_only_the_application_imports_is_not_preloaded(make_module):
    """Imports for types, in functions and under the script's guard do not run in a worker."""
    for name in ("lib_a", "lib_b", "lib_c", "lib_d"):
        make_module(name, where="installed")
    make_module(
        "own_worker",
        """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import lib_a
        else:
            import lib_d
        if __name__ == "__main__":
            import lib_b
        def serve():
            import lib_c
        try:
            import no_such_library
        except ImportError:
            pass
        """,
    )
    assert default_preload({"own_worker"}) == ("lib_d", "typing")


def test_a_link_out_of_a_library_is_the_users_own(make_module, tmp_path):
    """So is every editable installation: its files are elsewhere."""
    make_module("elsewhere")
    link = tmp_path / "lib" / "site-packages" / "linked.py"
    link.symlink_to(tmp_path / "own" / "elsewhere.py")
    importlib.invalidate_caches()
    importlib.import_module("linked")
    assert not is_installed("linked")
    assert default_preload({"linked"}) == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("json", True), ("sys", True), ("torch.nn", True), ("keisei.worker", True), (__name__, False)],
)
def test_the_library_itself_counts_as_installed(name, expected):
    """As do the standard library and all that lies in a folder for packages."""
    importlib.import_module(name)
    assert is_installed(name) is expected


def test_a_module_that_does_not_parse_any_more_is_left_to_the_worker(make_module, tmp_path):
    """It may be in the middle of an edit."""
    make_module("own_worker", "import json")
    (tmp_path / "own" / "own_worker.py").write_text("import (", encoding="utf-8")
    assert default_preload({"own_worker"}) == ()


def test_what_a_main_without_a_file_has_imported_is_preloaded(monkeypatch):
    """The modules of what it holds, asked so that no code of theirs runs."""

    class Treacherous:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("working outside of a context")

    main = types.ModuleType("__main__")
    main.json_alias = __import__("json")
    main.Counting = pool_workers.Counting
    main.dumps = pickle.dumps
    main.instance = pool_workers.Returning(1)
    main.treacherous = Treacherous()
    main.gone = types.ModuleType("a_module_that_is_not_imported")
    monkeypatch.setitem(sys.modules, "__main__", main)
    found = default_preload({"__main__", "functools"})
    assert {"_pickle", "functools", "json", "torch"} <= set(found)
    assert not {"__main__", "pool_workers", "a_module_that_is_not_imported"} & set(found)


def test_what_a_main_script_imports_is_preloaded(monkeypatch, make_module, tmp_path):
    """It is read like any module of the user's."""
    make_module("lib_a", where="installed")
    make_module("lib_b", where="installed")
    script = tmp_path / "script.py"
    script.write_text(
        "import lib_a\nif __name__ == '__main__':\n    import lib_b\n", encoding="utf-8"
    )
    main = types.ModuleType("__main__")
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", str(script))
    main.lib_b = sys.modules["lib_b"]
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert default_preload({"__main__"}) == ("lib_a",)

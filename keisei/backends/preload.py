"""What a fork server imports before it forks: torch, the library, what the worker's modules use."""

from __future__ import annotations

import ast
import os
import pickletools
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from functools import lru_cache

from keisei.child.installed import is_installed
from keisei.naming import home_of

OWN_MODULES = ("torch", "keisei.backends.process", "keisei.child.runtime")
_NEVER = {"__main__", "__mp_main__", "builtins"}
_parsing = threading.Lock()
os.register_at_fork(
    before=_parsing.acquire, after_in_parent=_parsing.release, after_in_child=_parsing.release
)


def modules_named_in(pickled: bytes) -> set[str]:
    """Return the modules that unpickling would import, without unpickling."""
    modules: set[str] = set()
    memo: dict[object, object] = {}
    pushed: list[object] = [None, None]
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = pushed[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                pushed.append(memo.get(argument))
            case "GLOBAL":
                modules.add(str(argument).partition(" ")[0])
                pushed.append(None)
            case "STACK_GLOBAL":
                modules.add(str(pushed[-2]))
                pushed.append(None)
            case _:
                pushed.append(argument)
    return modules


def default_preload(modules: set[str]) -> tuple[str, ...]:
    """Return the installed modules that workers will use, to be imported before forking.

    They are those among ``modules``, and those that the user's own modules import, directly or
    through one another. The user's own are imported by each worker itself.
    """
    chosen: set[str] = set()
    seen: set[str] = set()
    left = set(modules)
    while left - seen:
        name = (left - seen).pop()
        seen.add(name)
        if name != "__main__" and is_installed(name):
            chosen.add(name)
        elif (module := sys.modules.get(name)) is not None:
            left |= _imported_by(module)
    return tuple(sorted(chosen - _NEVER))


def _imported_by(module: types.ModuleType) -> set[str]:
    """Return the modules that ``module`` imports when it is imported, of those that are loaded."""
    source = _source_of(module)
    if source is None:
        values = list(vars(module).values())
        return {name for name in map(_module_of, values) if name in sys.modules}
    package = getattr(module, "__package__", None) or ""
    found = {part for name in _imports(source, package) for part in _with_parents(name)}
    return {name for name in found if name in sys.modules}


def _source_of(module: types.ModuleType) -> str | None:
    """Return the source as it is on disk, which is what a worker will import."""
    name, loader = getattr(module, "__name__", ""), getattr(module, "__loader__", None)
    try:
        source = loader.get_source(name) if loader is not None else None
    except Exception:  # noqa: BLE001 - a loader of any kind; what it cannot tell is not preloaded
        return None
    return source if isinstance(source, str) else None


def _imports(source: str, package: str) -> frozenset[str]:
    with _parsing:  # starts happen in several threads, and one of them is enough to parse
        return _parsed_imports(source, package)


@lru_cache(maxsize=256)
def _parsed_imports(source: str, package: str) -> frozenset[str]:
    try:
        tree = _parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return frozenset()  # the worker will tell
    return frozenset(_names(tree.body, package))


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SystemError:
        # Before Python 3.13 two threads that parse at a time disturb each other's count of the
        # depth; the other one is the application's.
        return ast.parse(source)


def _names(body: Iterable[ast.AST], package: str) -> Iterator[str]:
    """Find the imports that run at import: none inside functions or behind a guard."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = [*parents, node.module] if node.level else [node.module]
            base = ".".join(part for part in start if part)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.If) and _is_guard(node.test):
            yield from _names(node.orelse, package)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            yield from _names(ast.iter_child_nodes(node), package)


def _is_guard(test: ast.expr) -> bool:
    return any(name in ast.unparse(test) for name in ("TYPE_CHECKING", "__name__"))


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _module_of(value: object) -> str:
    """Return the module that ``value`` is or comes from; asks only what cannot run its code."""
    kind = type(value)  # a proxy may answer for another class, by code of its own
    if issubclass(kind, types.ModuleType):
        return str(vars(value).get("__name__", ""))
    if issubclass(kind, (type, types.FunctionType, types.BuiltinFunctionType)):
        return home_of(value)
    return home_of(kind)

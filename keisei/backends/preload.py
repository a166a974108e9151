"""What a fork server had best import before it forks: torch, our own, the worker's modules."""

from __future__ import annotations

import pickletools
import sys
import types

from keisei.naming import home_of

OWN_MODULES = ("torch", "keisei.backends.process", "keisei.child.runtime")
_NEVER = {"__main__", "__mp_main__", "builtins"}


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
    """Return what is worth importing before forking: the worker's modules.

    For a worker in the main script: the modules that the script has imported, since the script
    itself cannot be preloaded.
    """
    chosen = set(modules)
    if "__main__" in modules:
        values = list(vars(sys.modules["__main__"]).values())
        chosen |= {name for name in map(_module_of, values) if name in sys.modules}
    return tuple(sorted(chosen - _NEVER))


def _module_of(value: object) -> str:
    """Return the module that ``value`` is or comes from; asks only what cannot run its code."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return home_of(value)
    return home_of(type(value))

"""The application's main script, which a worker imports if its class lives there."""

from __future__ import annotations

import os
import sys
import types
from multiprocessing import process as mp_process
from pathlib import Path


def original_dir() -> str:
    """Return where the application was started: what "" in its path, and its script, refer to."""
    return mp_process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]


def description() -> dict[str, str]:
    """Return how a process imports the main script, as multiprocessing has it; empty: it cannot."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return {} if _is_entry(spec.name) else {"init_main_from_name": spec.name}
    path = _path(main)
    return {} if path is None else {"init_main_from_path": path}


def why_not_importable() -> str:
    """Return why a process cannot import the main script, "" if it can."""
    if description():
        return ""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        where = getattr(spec, "origin", None) or spec.name
        return f"{where} is what a package, folder or archive runs, and is not for import"
    return "it is no file but was typed or piped into an interpreter or a notebook"


def _is_entry(name: str) -> bool:
    """Return whether a module is the ``__main__.py`` of a package, folder or archive."""
    return name == "__main__" or name.endswith(".__main__")


def _path(main: types.ModuleType) -> str | None:
    file = getattr(main, "__file__", None)
    if file is None:
        return None
    path = os.path.normpath(Path(original_dir(), file))
    return path if Path(path).is_file() else None


def is_being_imported() -> bool:
    """Return whether this process is a worker that is importing the application's main script."""
    return getattr(mp_process.current_process(), "_inheriting", False)

"""The application's main script, which a worker imports if its class lives there."""

from __future__ import annotations

import os
import sys
from multiprocessing import process as mp_process
from pathlib import Path


def original_dir() -> str:
    """Return where the application was started: what "" in its path, and its script, refer to."""
    return mp_process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]


def description() -> dict[str, str]:
    """Return how a process imports the main script, in multiprocessing's words; empty: it cannot.

    multiprocessing imports no ``__main__.py`` of a package, folder or archive; what was typed or
    piped into an interpreter has no file.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        name: str = spec.name
        is_entry = name == "__main__" or name.endswith(".__main__")
        return {} if is_entry else {"init_main_from_name": name}
    path = getattr(main, "__file__", None)
    if path is None:
        return {}
    found = os.path.normpath(Path(original_dir(), path))
    return {"init_main_from_path": found} if Path(found).is_file() else {}


def is_being_imported() -> bool:
    """Return whether this process is a worker that is importing the application's main script."""
    return getattr(mp_process.current_process(), "_inheriting", False)

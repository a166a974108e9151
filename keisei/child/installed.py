"""Which modules come from installed packages, and which are the user's own.

What is installed stays as it is while an application runs, so a fork server may import it once for
all workers. The user's own modules are edited, reloaded, and make things that each process is to
have of its own: each worker imports them itself. A package that is installed "editable" is the
user's own, since its files are.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

_OURS = "keisei"
_NAMES = {"site-packages", "dist-packages"}


def is_installed(name: str) -> bool:
    """Return whether an imported module is the standard library's or an installed package's."""
    root = name.partition(".")[0]
    if root == _OURS or root in sys.stdlib_module_names:
        return True
    path = file_of(name)
    return path is not None and _is_in_a_library(path)


def file_of(name: str) -> str | None:
    """Return the file that an imported module was read from, ``None`` if there is none."""
    path = getattr(sys.modules.get(name), "__file__", None)
    return path if isinstance(path, str) else None


@lru_cache(maxsize=4096)
def _is_in_a_library(path: str) -> bool:
    real = Path(path).resolve()  # a link out of a library is an editable installation too
    return bool(_NAMES.intersection(real.parts)) or not _folders().isdisjoint(real.parents)


@lru_cache(maxsize=1)
def _folders() -> frozenset[Path]:
    known = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    known += [*site.getsitepackages(), site.getusersitepackages()]
    return frozenset(Path(folder).resolve() for folder in known if folder)

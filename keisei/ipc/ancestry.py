"""Names for what must lie in a folder: they say which processes it belongs to.

Such an entry is told apart from a stranger's even after its maker has ended, as the name has the
maker's whole ancestry.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_FIRST = 1
_MARK = re.compile(r"-by-(\d+(?:\.\d+)*)-")


def prefix(name: str) -> str:
    """Return ``name`` followed by the pids of this process and its ancestors, for ``tempfile``."""
    return f"{name}-by-{'.'.join(map(str, ancestry()))}-"


def belongs_to(name: str, pid: int) -> bool | None:
    """Return whether an entry was made by a process, or by a descendant that it had then.

    Returns:
        ``None`` where the name does not say who has made it.
    """
    found = _MARK.search(name)
    return None if found is None else str(pid) in found[1].split(".")


def ancestry() -> list[int]:
    """Return the pids of this process and its ancestors, without the system's first process.

    Where there is no ``/proc``, these are this process and its parent.
    """
    own, parent = os.getpid(), os.getppid()
    pids = [own]
    while parent > _FIRST and parent not in pids:
        pids.append(parent)
        parent = parent_of(parent)
    return pids


def parent_of(pid: int) -> int:
    """Return the pid of a process's parent, 0 if it has ended or there is no ``/proc``."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0

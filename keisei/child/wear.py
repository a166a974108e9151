"""When a worker wants a successor: it has collected enough, or holds too much memory."""

from __future__ import annotations

import resource
from pathlib import Path

from keisei.child.delivery import peak_memory

_STATM = Path("/proc/self/statm")


def worn_out(committed: int, max_experiences: int | None, max_rss: int | None) -> str:
    """Return why a successor shall take over, or ""; never before the first experience.

    Args:
        committed: Experiences that were collected.
        max_experiences: So many are enough.
        max_rss: Bytes of the process's own memory that are too many.
    """
    if committed == 0:
        return ""
    if max_experiences is not None and committed >= max_experiences:
        return f"it collected {committed} experiences"
    if max_rss is not None and (own := own_memory()) > max_rss:
        return f"its own memory is {own / 2**20:.0f} MiB"
    return ""


def own_memory() -> int:
    """Return the bytes in memory that this process does not share, the peak where unknown.

    Shared pages, such as experiences that the application keeps, and files such as the code of
    libraries, are no memory that a successor would give back.
    """
    try:
        words = _STATM.read_bytes().split()
    except OSError:
        return peak_memory()
    resident, shared = int(words[1]), int(words[2])
    return (resident - shared) * resource.getpagesize()

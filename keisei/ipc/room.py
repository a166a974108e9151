"""How much memory this process may still take, as the kernel and its control groups tell.

Shared memory that is reserved counts against no limit of its own: a kernel that runs out of memory
meanwhile ends processes that have nothing to do with it. So a large request is compared first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")
_NO_LIMIT = 1 << 60
"""Version 1 writes the largest number that it has where there is no limit."""


def available() -> int | None:
    """Return the bytes that can be taken now, ``None`` where the system does not tell.

    The least of the kernel's ``MemAvailable`` with free swap, and of what the limits of the
    process's control group (both versions) leave beside memory that is not a cache of files.
    """
    rooms = [*_of_the_system(), *_of_the_group()]
    return min(rooms) if rooms else None


def _of_the_system() -> Iterator[int]:
    facts = _table(_MEMORY)
    if "MemAvailable:" in facts:
        yield 1024 * (facts["MemAvailable:"] + facts.get("SwapFree:", 0))


def _of_the_group() -> Iterator[int]:
    for line in _text(_GROUPS).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            folders = [_V2 / path.strip("/"), _V2]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folders = [_V1 / path.strip("/"), _V1]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, used, cache = names
        for folder in folders:  # in a container the group's own folder may be the root
            most = _number(folder / limit)
            if most is None or most >= _NO_LIMIT:
                continue
            taken = _number(folder / used)
            if taken is not None:
                yield max(0, most - taken + _table(folder / "memory.stat").get(cache, 0))


def _table(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    rows = [line.split() for line in _text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

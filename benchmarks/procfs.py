"""Figures about running processes, read from /proc: processor time, memory, descriptors, trees."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
_NANOSECONDS = 1e9


def descendants(root: int | None = None) -> list[int]:
    """Return the living children of ``root`` (default: this process), their children, and so on."""
    root = root if root is not None else os.getpid()
    parents = {
        int(entry.name): parent
        for entry in PROC.iterdir()
        if entry.name.isdigit() and (parent := _parent(int(entry.name))) is not None
    }
    found: set[int] = set()
    while more := {p for p, parent in parents.items() if parent in found | {root}} - found:
        found |= more
    return sorted(found)


def tree(root: int | None = None) -> list[int]:
    """Return ``root`` (default: this process) and its descendants."""
    root = root if root is not None else os.getpid()
    return [root, *descendants(root)]


def children(parent: int | None = None) -> list[int]:
    """Return the living children of ``parent`` (default: this process)."""
    parent = parent if parent is not None else os.getpid()
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _parent(pid) == parent]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that the living threads of ``pids`` have used."""
    return sum(_cpu_seconds(pid) for pid in pids)


class CpuWatch:
    """How much of a core this process and its present descendants use from now on.

    This process is read last at the beginning and first at the end, so that reading the others
    costs nothing within the watch.
    """

    def __init__(self) -> None:
        """Begin."""
        self._pids = tree()
        self._before = cpu_seconds(reversed(self._pids))
        self._began = time.perf_counter()

    def core_percent(self) -> float:
        """Return the share of one core used so far, in percent."""
        used, elapsed = cpu_seconds(self._pids), time.perf_counter() - self._began
        return 100 * (used - self._before) / elapsed


def pss_bytes(pid: int) -> int:
    """Return the proportional set size: each shared page counts by its share among its users."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"no Pss for process {pid}")


def rss_bytes(pid: int | None = None) -> int:
    """Return the resident set size."""
    statm = (PROC / str(pid if pid is not None else os.getpid()) / "statm").read_text()
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mean_pss_mb(pids: Iterable[int]) -> float:
    """Return the mean proportional set size in MB (10^6 bytes)."""
    sizes = [pss_bytes(pid) for pid in pids]
    return sum(sizes) / max(1, len(sizes)) / 1e6


def descriptors(pid: int | None = None) -> int:
    """Return the number of open file descriptors."""
    return len(list((PROC / str(pid if pid is not None else os.getpid()) / "fd").iterdir()))


def _cpu_seconds(pid: int) -> float:
    """Sum the scheduler's nanoseconds: the ticks of ``stat`` are too coarse for idle processes."""
    total = 0
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except (OSError, IndexError):
        return total / _NANOSECONDS
    return total / _NANOSECONDS


def _parent(pid: int) -> int | None:
    """Return the parent's number; ``None`` for a process that is gone or waits to be reaped."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[1])

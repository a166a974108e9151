"""What this process holds, as a value, and a check that no more is left than before.

::

    with check_no_leaks():
        asyncio.run(main())

Things are compared by kind and number, not by identity: a fork server that was started anew in
the place of another is no leak, a second one is.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import select
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from keisei.backends.forkserver import server
from keisei.backends.lifeline import lifeline
from keisei.ipc import ancestry
from keisei.ipc.kernel import has_pidfd

_PATIENCE = 2.0
"""Seconds that children which are ending have, such as the processes of a killed worker."""
_LOOK = 0.01
"""Seconds between two looks at a process, where the kernel has no pidfds."""
_PROC = Path("/proc")
_OURS = "keisei*"


@dataclass(frozen=True, slots=True)
class Resources:
    """What this process holds at one moment, each as kind → number.

    What the system does not tell (children and descriptors, where there is no ``/proc``) is empty.

    Attributes:
        children: Living processes and zombies that descend from this one, and processes that are
            tied to its life although their parents have gone.
        descriptors: Open files, by what they refer to.
        threads: Python threads.
        tasks: Unfinished asyncio tasks of the running loop, without the current one.
        files: Entries of /dev/shm and the directory for temporary files that are named by keisei,
            unless their name, their owner or who has them open says that they are a stranger's.
    """

    children: Counter[str]
    descriptors: Counter[str]
    threads: Counter[str]
    tasks: Counter[str]
    files: Counter[str]

    @classmethod
    def now(cls) -> Resources:
        """Take stock."""
        lifeline.read_end()  # made once for a process, at the latest by the look at children
        return cls(
            children=Counter(_describe_process(pid) for pid in children()),
            descriptors=Counter(_descriptors()),
            threads=Counter(_without_number(thread.name) for thread in threading.enumerate()),
            tasks=Counter(_tasks()),
            files=Counter(_files()),
        )

    def beyond(self, before: Resources) -> list[str]:
        """Return one line for each kind of thing of which there is more than before."""
        lines = []
        for field in fields(self):
            more = getattr(self, field.name) - getattr(before, field.name)
            lines += [f"{number} × {field.name}: {kind}" for kind, number in sorted(more.items())]
        return lines


@contextmanager
def check_no_leaks() -> Iterator[None]:
    """Check that the body leaves no more behind than there was before.

    Nothing is checked if the body raises.

    Raises:
        AssertionError: Something was left; every kind of thing is listed.
    """
    before = Resources.now()
    yield
    left = left_since(before)
    if left:
        raise AssertionError("\n  - ".join(["something was left behind:", *left]))


def left_since(before: Resources) -> list[str]:
    """Return one line for each kind of thing that was left behind since ``before``.

    What only waits for the garbage collector is collected, and children that are ending are given
    two seconds.
    """
    if not Resources.now().beyond(before):
        return []
    gc.collect()
    if (Resources.now().children - before.children).total() > 0:
        _wait_for_ends(children())
    return Resources.now().beyond(before)


def children() -> list[int]:
    """Return the pids of all processes that descend from this one or are tied to its life."""
    processes = dict(_processes())
    own_start = processes[os.getpid()].start if processes else 0
    found = {os.getpid()}
    while more := {pid for pid, one in processes.items() if one.parent in found} - found:
        found |= more
    younger = {pid for pid, one in processes.items() if one.start >= own_start}
    found |= {pid for pid in younger - found if _is_tied_to_us(pid)}
    return sorted(found - {os.getpid()})


class _Process(NamedTuple):
    parent: int
    start: int


def _processes() -> Iterator[tuple[int, _Process]]:
    for entry in _PROC.glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_bytes()
        except OSError:
            continue  # it has ended in between
        words = stat.rpartition(b")")[2].split()
        yield int(entry.name), _Process(parent=int(words[1]), start=int(words[19]))


def _is_tied_to_us(pid: int) -> bool:
    """Return whether a process holds the other end of our lifeline."""
    ours = f"pipe:[{os.fstat(lifeline.read_end()).st_ino}]"
    return any(target == ours for target in _targets(pid))


def _targets(pid: int | str) -> Iterator[str]:
    try:
        links = list((_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return  # another user's, or it has ended
    for link in links:
        try:
            yield str(link.readlink())
        except OSError:
            continue  # closed in between


def _describe_process(pid: int) -> str:
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        head, _, rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")
    except OSError:
        return "a process that is ending"
    if rest.split()[0] == "Z":
        return "a zombie"
    # One that is just becoming another program has no command line for a moment.
    return _without_number(command.strip()[:120] or head.partition("(")[2])


def _descriptors() -> list[str]:
    return [re.sub(r":\[\d+\]", "", target) for target in _targets("self")]


def _without_number(text: str) -> str:
    return re.sub(r"\d+", "…", text)


def _tasks() -> list[str]:
    try:
        current = asyncio.current_task()
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return []  # no loop is running
    return [getattr(task.get_coro(), "__qualname__", "?") for task in tasks - {current}]


def _files() -> list[str]:
    folders = {Path("/dev/shm"), Path(tempfile.gettempdir())}  # noqa: S108 - it is looked at only
    found = [path for folder in folders for path in folder.glob(_OURS)]
    return [str(path) for path in found if not _is_a_strangers(path)]


def _is_a_strangers(path: Path) -> bool:
    """Return whether something was made by neither this process nor a descendant of it.

    The names that the library gives tell that. Of any other entry of this user's it is known only
    while a process that is no descendant has it open.
    """
    belongs = ancestry.belongs_to(path.name, os.getpid())
    if belongs is not None:
        return not belongs
    try:
        if path.lstat().st_uid != os.getuid():
            return True
    except OSError:
        return True  # it has just gone
    ours = {os.getpid(), *children()}
    others = [pid for pid, _ in _processes() if pid not in ours]
    return any(target == str(path) for pid in others for target in _targets(pid))


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or waits to be reaped; for systems with ``/proc``."""
    try:
        state = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return True
    return state == b"Z"


def _wait_for_ends(pids: list[int]) -> None:
    deadline = time.monotonic() + _PATIENCE
    for pid in pids:
        if pid == server.pid:
            continue
        if not has_pidfd():
            while not has_ended(pid) and time.monotonic() < deadline:
                select.select([], [], [], _LOOK)
            continue
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        finally:
            os.close(fd)

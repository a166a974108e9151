"""Names say which processes an entry of a folder belongs to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keisei.ipc import ancestry


def test_the_ancestry_goes_from_this_process_to_the_first():
    """Each is the parent of the one before; the system's first process is everybody's."""
    pids = ancestry.ancestry()
    assert pids[:1] == [os.getpid()]
    assert 1 not in pids
    assert [ancestry.parent_of(pid) for pid in pids[:-1]] == pids[1:]
    assert ancestry.parent_of(pids[-1]) <= 1


def test_the_name_of_a_grandchild_says_it_is_ours():
    """It belongs to its maker and each of its ancestors, to nobody else."""
    inner = "from keisei.ipc import ancestry; print(ancestry.prefix('x'))"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    done = subprocess.run([sys.executable, "-c", outer], stdout=subprocess.PIPE, check=True)
    name = done.stdout.decode().strip()
    maker, its_parent, *others = map(int, name.removeprefix("x-by-").rstrip("-").split("."))
    assert others == ancestry.ancestry()
    for pid in (maker, its_parent, os.getpid()):
        assert ancestry.belongs_to(f"{name}abc", pid) is True


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keisei-by-12.34-ab", True),
        ("keisei-by-34-", True),
        ("keisei-by-3.4-ab", False),
        ("keisei-by-340-ab", False),
        ("keisei-34-ab", None),
        ("keisei-by-ab", None),
        ("keisei-by-34", None),
    ],
)
def test_a_name_belongs_to_whom_it_names(name, expected):
    """To process 34, not to it, or to nobody that is known."""
    assert ancestry.belongs_to(name, 34) is expected


def test_without_proc_there_is_the_parent(monkeypatch):
    """A process that has ended, or cannot be looked at, has no parent that is known."""

    def read_bytes(path):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert ancestry.parent_of(os.getpid()) == 0
    assert ancestry.ancestry() == [os.getpid(), os.getppid()]

"""The first and last things that run in a new process."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import keisei
from child_workers import Orphaning
from keisei.child.process import adopt_orphans, flush, is_cut, reap
from keisei.testing.scenarios import fail_after

ROOT = Path(keisei.__file__).parent.parent
PATIENCE = 30

TIED = """
    import ctypes, os, sys
    sys.path.insert(0, {root!r})
    from keisei.child import process

    if {fallback}:
        process._F_SETSIG = 99999  # no such operation: the kernel cannot be asked
    process.lead_own_group()
    process.tie_to({lifeline})
    print("tied", flush=True)
    {then}
"""


def tied(lifeline: int, then: str, *fds: int, fallback: bool = False) -> subprocess.Popen[str]:
    """Start a process that is tied to a pipe, and then does something."""
    program = TIED.format(root=str(ROOT), lifeline=lifeline, then=then, fallback=fallback)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        pass_fds=[lifeline, *fds],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("then", "fallback"),
    [
        ("ctypes.PyDLL(None).pause()", False),
        ("while True: pass", False),
        ("while True: pass", True),
    ],
)
def test_a_tied_process_ends_with_the_pipe(then, fallback):
    """The kernel kills it whatever it is doing; where it cannot be asked, a thread does."""
    read_end, write_end = os.pipe()
    with tied(read_end, then, fallback=fallback) as process:
        assert process.stdout.readline() == "tied\n"
        assert process.poll() is None
        os.close(write_end)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    os.close(read_end)


def test_its_whole_group_ends_with_it():
    """What it has started ends too, and holds nothing of the lifeline to do so."""
    read_end, write_end = os.pipe()
    ours, theirs = os.pipe()
    pause = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    then = f"os.execv({sys.executable!r}, {pause}) if os.fork() == 0 else os.wait()"
    with tied(read_end, then, theirs) as process:
        assert process.stdout.readline() == "tied\n"
        os.close(theirs)
        os.close(write_end)
        assert process.wait(PATIENCE) == -signal.SIGKILL
        assert select.select([ours], [], [], PATIENCE)[0], "its child is still alive"
    os.close(ours)
    os.close(read_end)


def test_a_process_that_comes_too_late_leaves_at_once():
    """When the application has gone before the process is tied to it, it exits by itself."""
    read_end, write_end = os.pipe()
    os.close(write_end)
    with tied(read_end, "while True: pass") as process:
        assert process.stdout.read() == ""
        assert process.wait(PATIENCE) == 1
    os.close(read_end)


def test_an_open_pipe_is_not_cut():
    """Nothing is ever written to a lifeline, and only its end is a cut."""
    read_end, write_end = os.pipe()
    assert not is_cut(read_end)
    os.close(write_end)
    assert is_cut(read_end)
    os.close(read_end)


LEADER = """
import os, signal, sys
os.setpgid(0, 0)
if os.fork() == 0:
    os.write(1, b"+")
    signal.pause()
os.read(0, 1)
os._exit(5)
"""


@pytest.mark.parametrize("which", ["this one", "any"])
def test_reaping_ends_what_is_left_of_the_group(which):
    """The number of the group is its own until the leader is reaped, and that is when it ends."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", LEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        os.read(process.stdout.fileno(), 1)
        if which == "this one":
            assert reap(process.pid) == (0, 0)
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        pid, status = reap(process.pid if which == "this one" else None)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert (pid, process.returncode) == (process.pid, 5)
        assert select.select([process.stdout], [], [], PATIENCE)[0]
        assert process.stdout.read() == b"", "its child is still alive"


def test_there_may_be_nobody_to_reap():
    """A process that was reaped already is an error, for the caller to make sense of."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        process.wait(PATIENCE)
        with pytest.raises(ChildProcessError):
            reap(process.pid)


def test_a_wait_for_one_process_blocks_until_it_ends():
    """With no flag it is waited for, in a thread, and its code returned."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
    ) as process:
        found: list[tuple[int, int]] = []
        thread = threading.Thread(target=lambda: found.append(reap(process.pid, 0)))
        thread.start()
        process.stdin.write(b"\n")
        process.stdin.close()
        thread.join(PATIENCE)
        assert found == [(process.pid, 0)]
        process.returncode = 0


@pytest.mark.parametrize("broken", ["missing", "closed"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_cannot_be_flushed_do_not_matter(monkeypatch, tmp_path, name, broken):
    """What is in the buffer of the other standard stream is written all the same."""
    other = {"stdout": "stderr", "stderr": "stdout"}[name]
    closed = (tmp_path / "closed").open("w")
    closed.close()
    monkeypatch.setattr(sys, name, None if broken == "missing" else closed)
    with (tmp_path / "other").open("w") as stream:
        monkeypatch.setattr(sys, other, stream)
        stream.write("the last words")
        flush()
        assert (tmp_path / "other").read_text(encoding="utf-8") == "the last words"


async def test_a_worker_adopts_the_orphans_of_its_children(make_manager):
    """A process whose parent ends, and that has left session and group, is the worker's child."""
    async with fail_after(PATIENCE), make_manager(Orphaning, num_workers=1) as manager:
        assert await manager.send_command("whose is it") == {0: True}


def test_where_orphans_cannot_be_adopted_nothing_happens(monkeypatch):
    """A system without such a call, or one that refuses it, leaves them to init."""

    class Without:
        def __init__(self, name: object) -> None:
            """There is no function in it."""

    monkeypatch.setattr(ctypes, "CDLL", Without)
    assert not adopt_orphans()

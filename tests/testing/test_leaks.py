"""The leak check finds every kind of thing that can be left, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from keisei.backends.lifeline import lifeline
from keisei.ipc import memory
from keisei.testing.leaks import Resources, check_no_leaks, children, has_ended

WAIT = "import sys; sys.stdin.read()"


def start(program=WAIT, **options):
    """Start a Python process that ends when its standard input is closed."""
    command = [sys.executable, "-S", "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
    while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
        os.sched_yield()  # it is not quite the new program yet
    return process


def end(process):
    process.stdin.close()
    process.wait(30)


def test_nothing_left_is_nothing_found():
    """What is given back in the body leaves no trace."""
    with check_no_leaks():
        end(start())
        os.close(os.dup(1))
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()


def test_a_child_process_is_found():
    """A child that lives is listed with its command."""
    before = Resources.now()
    process = start()
    (line, *_) = Resources.now().beyond(before)
    end(process)
    assert line.startswith("1 × children: ")
    assert "sys.stdin.read()" in line


def test_a_grandchild_is_found():
    """Processes are looked for through all generations."""
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {WAIT!r}])"
    before = set(children())
    process = start(program, stdout=subprocess.PIPE)
    try:
        while len(set(children()) - before) < 2:
            assert process.poll() is None
        assert process.pid in children()
    finally:
        process.stdout.close()
        end(process)
    assert set(children()) == before


def test_a_zombie_is_found():
    """A child that has ended and was not waited for is a leak as well."""
    before = Resources.now()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert Resources.now().beyond(before) == ["1 × children: a zombie"]
    os.waitpid(pid, 0)
    assert Resources.now().beyond(before) == []


def test_an_orphan_that_is_tied_to_us_is_found():
    """A process whose parent has gone is ours as long as it holds our lifeline."""
    end_of_line = lifeline.read_end()
    program = "import os, sys\nif os.fork(): os._exit(0)\nsys.stdin.read()"
    before = children()
    process = start(program, pass_fds=[end_of_line])
    process.wait(30)
    (orphan,) = set(children()) - set(before)
    process.stdin.close()
    os.kill(orphan, signal.SIGKILL)
    with check_no_leaks():
        pass


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_a_descriptor_is_found(kind):
    """Each open descriptor counts, by what it refers to."""
    before = Resources.now()
    if kind == "pipe":
        fds = os.pipe()
        expected = ["2 × descriptors: pipe"]
    elif kind == "file":
        fds = [os.open(__file__, os.O_RDONLY)]
        expected = [f"1 × descriptors: {Path(__file__).resolve()}"]
    else:
        fds = [socket.socket().detach()]
        expected = ["1 × descriptors: socket"]
    assert Resources.now().beyond(before) == expected
    for fd in fds:
        os.close(fd)
    assert Resources.now().beyond(before) == []


def test_a_thread_is_found():
    """A Python thread that runs counts, by its name."""
    go_on = threading.Event()
    before = Resources.now()
    thread = threading.Thread(target=go_on.wait, name="worker-12")
    thread.start()
    assert Resources.now().beyond(before) == ["1 × threads: worker-…"]
    go_on.set()
    thread.join()


async def test_a_task_is_found():
    """An unfinished task of the running loop counts, by its coroutine."""
    before = Resources.now()
    task = asyncio.create_task(asyncio.Event().wait())
    assert Resources.now().beyond(before) == ["1 × tasks: Event.wait"]
    task.cancel()
    await asyncio.wait([task])
    assert Resources.now().beyond(before) == []


def test_a_file_of_ours_is_found():
    """An entry named by keisei, where temporary things lie, counts."""
    before = Resources.now()
    with tempfile.NamedTemporaryFile(prefix="keisei-") as file:
        lines = Resources.now().beyond(before)
        assert f"1 × files: {file.name}" in lines
    assert Resources.now().beyond(before) == []


STRANGER = """
import os, sys, tempfile
before = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == before:
    os.sched_yield()
from keisei.ipc import ancestry
prefix = ancestry.prefix("keisei-x") if sys.argv[1] == "named" else "keisei-x"
file = tempfile.NamedTemporaryFile(prefix=prefix)
print(os.getpid(), file.name, flush=True)
sys.stdin.read()
"""
"""A process whose parent has gone, as any other program of this machine, makes a file."""


@pytest.mark.parametrize("how", ["named", "open"])
def test_a_file_of_a_stranger_is_not_found(how):
    """Its name says whose it is, also when its maker has ended; any other is its opener's."""
    command = [sys.executable, "-c", STRANGER, how]
    with check_no_leaks():
        before = Resources.now()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process.wait(30)
        pid, _, name = process.stdout.readline().strip().partition(" ")
        assert Path(name).exists()
        assert Resources.now().files == before.files
        if how == "named":
            os.kill(int(pid), signal.SIGKILL)
            while not has_ended(int(pid)):
                os.sched_yield()
            assert Path(name).exists()
            assert Resources.now().files == before.files
            Path(name).unlink()
        process.stdin.close()
        process.stdout.read()
        process.stdout.close()
    assert not Path(name).exists()


@pytest.mark.parametrize("ends", [False, True])
def test_a_file_of_a_descendant_is_found(ends):
    """Also when its maker, and the process that has started it, have ended."""
    program = (
        "import os, sys, tempfile\n"
        "from keisei.ipc import ancestry\n"
        "if os.fork(): os.wait(); sys.stdin.read(); os._exit(0)\n"
        "print(tempfile.mkdtemp(prefix=ancestry.prefix('keisei-x')), flush=True)\n"
        "os._exit(0)\n"
    )
    before = Resources.now()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        name = process.stdout.readline().strip()
        if ends:
            process.stdin.close()
            process.wait(30)
        found = Resources.now().files - before.files
    Path(name).rmdir()
    assert found == {name: 1}


def test_everything_left_is_listed_in_the_error():
    """The error of the check has a line for each kind of thing."""
    fds = []

    @check_no_leaks()
    def leave_some():
        fds.extend([*os.pipe(), os.open(__file__, os.O_RDONLY)])

    with pytest.raises(AssertionError) as caught:
        leave_some()
    assert str(caught.value).splitlines() == [
        "something was left behind:",
        f"  - 1 × descriptors: {Path(__file__).resolve()}",
        "  - 2 × descriptors: pipe",
    ]
    for fd in fds:
        os.close(fd)


def test_an_error_of_the_body_is_not_hidden():
    """Nothing is checked when the body has failed by itself."""
    fds = []

    @check_no_leaks()
    def fail():
        fds.extend(os.pipe())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for fd in fds:
        os.close(fd)


def test_one_in_the_place_of_another_is_no_leak():
    """Numbers count, not identities."""
    process = start()
    with check_no_leaks():
        end(process)
        process = start()
    end(process)


def test_what_only_waits_for_the_garbage_collector_is_no_leak():
    """Things in a cycle are collected before anybody is blamed."""
    with check_no_leaks():
        fd, shared = memory.create(1)
        os.close(fd)
        cycle = [shared]
        cycle.append(cycle)
        del cycle, shared


def test_the_fixture_fails_the_test_that_leaks(tmp_path):
    """The pytest plugin needs nothing but pytest, and blames the right tests."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["keisei.testing.pytest_plugin"]')
    (tmp_path / "test_leaking.py").write_text(
        "import asyncio, os, pytest\n"
        "pytestmark = pytest.mark.usefixtures('no_leaks')\n"
        "def test_clean(): pass\n"
        "def test_leaking(): os.dup(1)\n"
        "def test_unheard():\n"
        "    async def main():\n"
        "        asyncio.get_running_loop().call_soon(int, 'x')\n"
        "    asyncio.run(main())\n"
    )
    result = subprocess.run(
        [
            *[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
            *["-p", "no:asyncio", "-p", "no:anyio", str(tmp_path)],
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert "3 passed, 2 errors" in result.stdout
    assert "ERROR test_leaking.py::test_leaking - Failed: left behind: 1 × desc" in result.stdout
    assert "ERROR test_leaking.py::test_unheard - Failed: left behind: Exception" in result.stdout

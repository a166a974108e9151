"""Workers for the tests of the backends; child processes, and applications in them, import this."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from keisei.testing.failpoints import Gate
from keisei.worker import Worker, WorkerContext


class Obedient(Worker):
    """Does what it is told: the command "call" calls a function of the test's choice."""

    def collect(self) -> dict[str, torch.Tensor]:
        return {"pid": torch.tensor([os.getpid()])}

    def on_command(self, command: str, data: Any) -> Any:
        if command != "call":
            return super().on_command(command, data)
        function, *args = data
        return function(*args)


class Busy(Worker):
    """Holds the writing end of a pipe, says so by a byte, and is then busy in one of many ways.

    Args:
        fifo: Path of the named pipe; the tests read its end when the process is gone.
        activity: What it is busy with.
    """

    def __init__(self, fifo: str, activity: str) -> None:
        self.fifo = fifo
        self.activity = activity

    def setup(self, context: WorkerContext) -> None:
        if self.activity == "starting":
            take_hold(self.fifo)
            threading.Event().wait()
        starts: dict[str, Callable[[str], int]] = {
            "grandchild": start_grandchild,
            "session": start_in_a_session,
            "daemon": fork_twice,
            "copy": fork_in_c,
        }
        if self.activity in starts:
            starts[self.activity](self.fifo)

    def collect(self) -> dict[str, torch.Tensor]:
        if self.activity in ("python", "native"):
            take_hold(self.fifo)
        if self.activity == "native":
            hold_the_gil()
        while self.activity == "python":
            pass
        return {"x": torch.ones(1)}

    def on_command(self, command: str, data: Any) -> Any:
        return take_hold(self.fifo)


def take_hold(fifo: str) -> int:
    """Open the writing end of a named pipe, for good, and write one byte."""
    fd = os.open(fifo, os.O_WRONLY)
    os.write(fd, b"+")
    return fd


def start_grandchild(fifo: str) -> int:
    """Start a process that holds the writing end of a named pipe, which this one does not."""
    fd = take_hold(fifo)
    program = "import signal; signal.pause()"
    child = subprocess.Popen([sys.executable, "-S", "-c", program], pass_fds=[fd])
    os.close(fd)
    child.returncode = 0  # nobody waits for it, and it does not complain
    return child.pid


WAITS = "import signal; signal.pause()"
HAS_A_CHILD = (
    "import subprocess, sys; "
    "subprocess.Popen([sys.executable, '-S', '-c', {program!r}], pass_fds=[{fd}], "
    "start_new_session=True).wait()"
)


def start_in_a_session(fifo: str, depth: int = 1) -> int:
    """Start a process in a session of its own that holds a named pipe; or a child of it does."""
    fd = take_hold(fifo)
    program = WAITS
    for _ in range(depth - 1):
        program = HAS_A_CHILD.format(program=program, fd=fd)
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", program], pass_fds=[fd], start_new_session=True
    )
    os.close(fd)
    child.returncode = 0  # nothing waits for it, and it does not complain
    return child.pid


def start_in_sessions_of_sessions(fifo: str) -> int:
    """Start a process whose child's child holds a named pipe, each in a session of its own."""
    return start_in_a_session(fifo, 3)


def fork_twice(fifo: str) -> int:
    """Start a daemon by the book: its parent is a child that has ended."""
    fd = take_hold(fifo)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            signal.pause()
        os.write(tell, pid.to_bytes(4, "little"))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(fd)
    pid = int.from_bytes(os.read(told, 4), "little")
    os.close(told)
    os.close(tell)
    return pid


def fork_in_c(fifo: str) -> int:
    """Fork without Python's knowledge; the process leaves the group and keeps every descriptor."""
    fd = take_hold(fifo)
    libc = ctypes.PyDLL(None)
    pid: int = libc.fork()
    if pid == 0:
        libc.setsid()
        hold_the_gil()
    os.close(fd)
    return pid


def parent_of(pid: int) -> int:
    """Tell the parent of a process, 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


TRACKS = """
# multiprocessing.resource_tracker
import os
os.read({end}, 1)
open({path!r}, "x").close()
if {hangs}:
    os.open({fifo!r}, os.O_RDONLY)
"""


def start_a_tracker(fifo: str, path: str, hangs: bool) -> int:
    """Start what looks like multiprocessing's tracker: it tidies up when this process has ended."""
    fd = take_hold(fifo)
    end, self_end = os.pipe()
    never = f"{fifo}-never"
    os.mkfifo(never)
    program = TRACKS.format(end=end, path=path, hangs=hangs, fifo=never)
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", program], pass_fds=[fd, end], start_new_session=True
    )
    os.close(fd)
    os.set_inheritable(self_end, False)
    child.returncode = 0
    return child.pid


def hold_the_gil() -> None:
    """Stay in C and keep the interpreter's lock."""
    while True:
        ctypes.PyDLL(None).pause()


def segfault() -> None:
    """Read from address 0, in a function that the native stack shows."""
    ctypes.string_at(0)


def abort() -> None:
    """Call ``abort`` of the C library."""
    ctypes.CDLL(None).abort()


def die(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)
    signal.pause()


def surroundings(*names: str) -> dict[str, Any]:
    """Tell what surrounds this process: variables, to Python and to C, the folder, the path."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    try:
        folder = str(Path.cwd())
    except FileNotFoundError:
        folder = "gone"
    return {
        "python": [os.environ.get(name) for name in names],
        "c": [libc.getenv(name.encode()) for name in names],
        "folder": folder,
        "inode": Path("/proc/self/cwd").stat().st_ino,
        "path": sys.path,
        "bytecode": (sys.dont_write_bytecode, sys.pycache_prefix),
        "zone": time.tzname[0],
    }


def facts() -> dict[str, Any]:
    """Tell what a worker's process is like."""
    parent = multiprocessing.parent_process()
    return {
        "group": os.getpgrp() - os.getpid(),
        "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "name": multiprocessing.current_process().name,
        "parent is alive": parent is not None and parent.is_alive(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
        "path": sys.path,
        "folder": str(Path.cwd()),
        "stdin": str(Path("/proc/self/fd/0").readlink()),
    }


def descriptors() -> list[str]:
    """Return what this process has open, by kind."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()).partition(":")[0])
    return sorted(found)


class Explosive:
    """Ends the process that unpickles it."""

    def __init__(self, how: Callable[[], object]) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how, ()

    def __call__(self) -> Worker:
        raise AssertionError("it was unpickled")


class HangsInSetup(Worker):
    """Never comes up, and ends only when somebody ends it."""

    def setup(self, context: WorkerContext) -> None:
        threading.Event().wait()

    def collect(self) -> dict[str, torch.Tensor]:
        raise AssertionError("it never comes up")


@contextlib.contextmanager
def busy_threads() -> Iterator[None]:
    """Have threads whose frames come and go all the time."""
    stop = threading.Event()
    spinning = [threading.Thread(target=_spin, args=(stop,)) for _ in range(2)]
    for thread in spinning:
        thread.start()
    yield
    stop.set()
    for thread in spinning:
        thread.join()


def _spin(stop: threading.Event) -> None:
    while not stop.is_set():
        threading.Event().wait(1e-6)


def stand_amid_threads(gate: Gate) -> str:
    with busy_threads():
        gate.hold()
    return "sound"

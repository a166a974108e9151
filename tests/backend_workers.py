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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
        if self.activity == "grandchild":
            start_grandchild(self.fifo)

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

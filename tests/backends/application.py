"""Applications in processes of their own, which the tests may kill, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from process_ends import end_of

TESTS = Path(__file__).parent.parent
START = 90.0
"""Seconds that an application has to come up; never waited for where all is well."""
GONE = 2.0
"""Seconds within which everything is gone: what the library promises."""


class Fifo:
    """The reading end of a named pipe whose writing end a process holds as long as it lives."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait_held(self) -> None:
        """Wait until a process holds the other end and has said so."""
        assert wait_readable(self._fd, START), f"nobody holds {self.path.name}"
        assert os.read(self._fd, 1) == b"+"

    def wait_gone(self, deadline: float) -> None:
        """Wait until every process that held the other end is dead."""
        said = b"what a process said that took the place of another one"
        while said:
            gone = wait_readable(self._fd, deadline - time.monotonic())
            assert gone, f"{self.path.name} is still alive"
            said = os.read(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)


def wait_readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, 1000 * seconds)))


class Application:
    """A program that runs as the main script of an interpreter.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, folder: Path, program: str, *args: str) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._fifos: dict[str, Fifo] = {}
        self._before = shared_files()
        script = folder / "application.py"
        script.write_text(textwrap.dedent(program), encoding="utf-8")
        known = os.environ.get("PYTHONPATH")
        self._stderr = (folder / "stderr").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "TMPDIR": str(self.temporary),
                "PYTHONPATH": os.pathsep.join([str(TESTS), *([known] if known else [])]),
            },
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()
        self._stderr.close()
        for fifo in self._fifos.values():
            fifo.close()

    def fifo(self, name: str) -> Fifo:
        """Make a named pipe in the application's folder."""
        self._fifos[name] = Fifo(self.folder / name)
        return self._fifos[name]

    def say(self, order: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """Read a line of JSON from its standard output."""
        assert self._process.stdout is not None
        assert wait_readable(self._process.stdout.fileno(), START), "it says nothing"
        line = self._process.stdout.readline()
        assert line, self.stderr()
        return json.loads(line)

    def kill(self) -> None:
        """Kill it, and return when it is dead."""
        self._process.kill()
        self._process.wait(START)

    def wait(self) -> int:
        """Wait for its end by itself, and return its exit code."""
        return self._process.wait(START)

    def stderr(self) -> str:
        """Return what it has written to its standard error."""
        self._stderr.seek(0)
        return self._stderr.read()

    def wait_all_gone(self, pidfds: list[int]) -> None:
        """Hold that what the application had is gone in time, now that it has ended itself.

        Args:
            pidfds: Of processes that hold no named pipe; closed here.
        """
        deadline = time.monotonic() + GONE
        for pidfd in pidfds:
            has_ended = wait_readable(pidfd, deadline - time.monotonic())
            os.close(pidfd)
            assert has_ended, "a process is still alive"
        for fifo in self._fifos.values():
            fifo.wait_gone(deadline)
        assert list(self.temporary.iterdir()) == []
        new = shared_files() - self._before
        assert [name for name in new if "keisei" in name or "torch" in name] == []


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def open_pidfds(pids: list[int]) -> list[int]:
    """Open what becomes readable when the processes end; they need not be our children."""
    return [end_of(pid) for pid in pids]

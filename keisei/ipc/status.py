"""One page of shared memory per process in which a worker says what it is doing.

The worker writes, the supervisor reads, nobody waits. What it says outlives the worker, so an
incident can tell what was lost.
"""

from __future__ import annotations

import enum
import os
import time

from keisei.ipc import memory


class Phase(enum.IntEnum):
    """What a worker's main loop is doing."""

    START = 0
    IDLE = 1
    LOAD_WEIGHTS = 2
    COLLECT = 3
    COMMAND = 4
    TEARDOWN = 5


_PHASE, _PROGRESS, _SINCE, _VERSION, _BEGUN, _COMMITTED, _RSS, _COMMANDS = range(8)


class StatusLine:
    """A worker's line.

    ``since`` is CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Map the line behind ``fd``, which is taken over, or make a new one."""
        if fd is None:
            self.fd, shared = memory.create(memory.PAGE, "keisei-status")
        else:
            self.fd, shared = -1, memory.attach(fd)
        self._words = memoryview(shared).cast("Q")

    def enter(self, phase: Phase) -> None:
        """Begin ``phase``; counts as progress."""
        words = self._words
        words[_SINCE] = time.monotonic_ns()
        words[_PHASE] = phase
        words[_PROGRESS] += 1

    def progress(self) -> None:
        """Say that the current phase is moving."""
        words = self._words
        words[_SINCE] = time.monotonic_ns()
        words[_PROGRESS] += 1

    @property
    def phase(self) -> Phase:
        """What the main loop is doing."""
        return Phase(self._words[_PHASE])

    @property
    def progress_count(self) -> int:
        """How often the main loop has moved."""
        return self._words[_PROGRESS]

    @property
    def since(self) -> float:
        """When it last moved, in seconds of ``time.monotonic()``; 0 is never."""
        return self._words[_SINCE] / 1e9

    @property
    def version(self) -> int:
        """The weights version that it has applied, or began to apply."""
        return self._words[_VERSION]

    @version.setter
    def version(self, version: int) -> None:
        self._words[_VERSION] = version

    @property
    def begun(self) -> int:
        """Experiences that it has begun."""
        return self._words[_BEGUN]

    @begun.setter
    def begun(self, count: int) -> None:
        self._words[_BEGUN] = count

    @property
    def committed(self) -> int:
        """Experiences whose frame it has sent, or is about to send."""
        return self._words[_COMMITTED]

    @committed.setter
    def committed(self, count: int) -> None:
        self._words[_COMMITTED] = count

    @property
    def rss(self) -> int:
        """Its peak resident memory in bytes, as of the last experience."""
        return self._words[_RSS]

    @rss.setter
    def rss(self, nbytes: int) -> None:
        self._words[_RSS] = nbytes

    @property
    def command(self) -> int:
        """The sequence number of the last command that it took up; 0 is none."""
        return self._words[_COMMANDS]

    @command.setter
    def command(self, sequence: int) -> None:
        self._words[_COMMANDS] = sequence

    def close(self) -> None:
        """Close the descriptor of a line that was made here; what it says stays readable."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

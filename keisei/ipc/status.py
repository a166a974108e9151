"""One page of shared memory per process in which a worker says what it is doing.

The worker writes, the application reads, neither waits. What it says outlives the worker, so an
incident can tell what was lost. Every read is total: the page may hold anything, and each read
returns a phase, a time in the past or a number in range.
"""

from __future__ import annotations

import enum
import os
import time

from keisei.ipc import memory


class Phase(enum.IntEnum):
    """What a worker's main loop is doing.

    ``UNKNOWN`` is what the page says where it holds none of the others.
    """

    START = 0
    IDLE = 1
    LOAD_WEIGHTS = 2
    COLLECT = 3
    COMMAND = 4
    CONFIGURE = 5
    TEARDOWN = 6
    UNKNOWN = 7


_PHASE, _PROGRESS, _SINCE, _VERSION, _BEGUN, _COMMITTED, _RSS, _COMMANDS = range(8)
_SUSPECT, _SUSPECT_VERSION = 8, 9
_NUM_WORDS = 10
_PHASES = tuple(Phase)
_WORD = (1 << 64) - 1
MAX_COUNT = (1 << 63) - 1
"""The largest count that is believed; numbers of this size fit wherever they are told."""
MAX_BYTES = 1 << 56
"""The largest memory that is believed: more than any processor can address."""


class StatusLine:
    """A worker's line.

    The application makes it and sees to its size, so a worker can write nonsense there and nothing
    worse. ``since`` is CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Map the line behind ``fd``, which is taken over, or make a new one.

        Raises:
            OSError: There is no memory for it.
            NotShared: There is no line behind ``fd``.
        """
        if fd is None:
            self.fd, shared = memory.create(memory.PAGE, "keisei-status")
        else:
            self.fd, shared = -1, memory.attach(fd, memory.PAGE)
        self._words: memoryview[int] | list[int] = memoryview(shared).cast("Q")

    def enter(self, phase: Phase) -> None:
        """Begin ``phase``; counts as progress."""
        words = self._words
        words[_SINCE] = time.monotonic_ns()
        words[_PHASE] = phase
        words[_PROGRESS] = (words[_PROGRESS] + 1) & _WORD

    def progress(self) -> None:
        """Say that the current phase is moving."""
        words = self._words
        words[_SINCE] = time.monotonic_ns()
        words[_PROGRESS] = (words[_PROGRESS] + 1) & _WORD

    @property
    def phase(self) -> Phase:
        """What the main loop is doing."""
        word = self._words[_PHASE]
        return _PHASES[word] if word < len(_PHASES) else Phase.UNKNOWN

    @property
    def progress_count(self) -> int:
        """How often the main loop has moved; only a difference says anything."""
        return self._words[_PROGRESS]

    @property
    def since(self) -> float:
        """When it last moved, in seconds of ``time.monotonic()`` and not after it; 0 is never."""
        return min(self._words[_SINCE] / 1e9, time.monotonic())

    @property
    def version(self) -> int:
        """The weights version that it has applied, or began to apply."""
        return min(self._words[_VERSION], MAX_COUNT)

    @version.setter
    def version(self, version: int) -> None:
        self._words[_VERSION] = version

    @property
    def suspected(self) -> tuple[int, int]:
        """The number and version of the weights that a failure is to be blamed on."""
        words = self._words
        return min(words[_SUSPECT], MAX_COUNT), min(words[_SUSPECT_VERSION], MAX_COUNT)

    def suspect(self, number: int, version: int) -> None:
        """Say which weights a failure is to be blamed on."""
        self._words[_SUSPECT_VERSION] = 0
        self._words[_SUSPECT] = number
        self._words[_SUSPECT_VERSION] = version

    @property
    def begun(self) -> int:
        """Experiences that it has begun."""
        return min(self._words[_BEGUN], MAX_COUNT)

    @begun.setter
    def begun(self, count: int) -> None:
        self._words[_BEGUN] = count

    @property
    def committed(self) -> int:
        """Experiences whose frame it has sent, or is about to send."""
        return min(self._words[_COMMITTED], MAX_COUNT)

    @committed.setter
    def committed(self, count: int) -> None:
        self._words[_COMMITTED] = count

    @property
    def rss(self) -> int:
        """Its peak resident memory in bytes, as of the last experience."""
        return min(self._words[_RSS], MAX_BYTES)

    @rss.setter
    def rss(self, nbytes: int) -> None:
        self._words[_RSS] = nbytes

    @property
    def command(self) -> int:
        """The sequence number of the last command that it took up; 0 is none."""
        return min(self._words[_COMMANDS], MAX_COUNT)

    @command.setter
    def command(self, sequence: int) -> None:
        self._words[_COMMANDS] = sequence

    def close(self) -> None:
        """Close the descriptor and unmap the page; what it says at this moment stays readable."""
        self._words = list(self._words[:_NUM_WORDS])
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

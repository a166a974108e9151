"""StatusLine: what a worker says, seen by another process, also after the worker's death."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipc_helpers
from ipc_helpers import open_fds, process
from keisei.ipc import kernel, memory
from keisei.ipc.memory import PAGE, NotShared
from keisei.ipc.status import MAX_BYTES, MAX_COUNT, Phase, StatusLine


@contextmanager
def a_line():
    line = StatusLine()
    yield line
    line.close()


def test_a_new_line_says_nothing_yet():
    """Everything starts at 0, which is the phase START."""
    with a_line() as status:
        assert status.phase is Phase.START
        assert (status.progress_count, status.since, status.version) == (0, 0.0, 0)
        assert (status.begun, status.committed, status.rss, status.command) == (0, 0, 0, 0)


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_is_seen_at_the_other_end(phase):
    """Entering a phase counts as progress and notes the time, for whoever maps the line."""
    with a_line() as status:
        other = StatusLine(os.dup(status.fd))
        before = time.monotonic()
        status.enter(phase)
        after = time.monotonic()
        assert other.phase is phase
        assert other.progress_count == 1
        assert before <= other.since <= after


def test_progress_moves_the_count_and_the_time_only():
    """Progress within a phase leaves the phase as it is."""
    with a_line() as status:
        status.enter(Phase.COLLECT)
        entered = status.since
        for _ in range(3):
            status.progress()
        assert (status.phase, status.progress_count) == (Phase.COLLECT, 4)
        assert entered <= status.since <= time.monotonic()


@pytest.mark.parametrize("name", ["version", "begun", "committed", "rss", "command"])
def test_each_number_is_a_word_of_its_own(name):
    """A large number is seen at the other end and touches no other one."""
    with a_line() as status:
        other = StatusLine(os.dup(status.fd))
        names = {"version", "begun", "committed", "rss", "command"}
        setattr(status, name, 2**55 + 5)
        assert {one: getattr(other, one) for one in names} == {
            one: 2**55 + 5 if one == name else 0 for one in names
        }
        assert (other.phase, other.progress_count, other.since) == (Phase.START, 0, 0.0)


def test_what_a_worker_said_outlives_it():
    """After SIGKILL in the middle of a phase all that the process said can be read."""
    with a_line() as status:
        with process(ipc_helpers.report_and_die, os.dup(status.fd)) as child:
            assert child.wait(60) == -9
        assert status.phase is Phase.COLLECT
        assert status.progress_count == 3
        assert 0 < status.since <= time.monotonic()
        assert (status.version, status.begun, status.committed) == (3, 11, 10)
        assert (status.rss, status.command) == (1 << 40, 7)


def test_attaching_takes_the_descriptor_over():
    """The worker's side holds no descriptor of its own; closing the first side is idempotent."""
    before = open_fds()
    status = StatusLine()
    other = StatusLine(os.dup(status.fd))
    assert other.fd == -1
    status.begun = 5
    status.close()
    status.close()
    other.close()
    assert (status.fd, status.begun, other.begun) == (-1, 5, 5)
    del status, other
    assert open_fds() == before


# nonsense

WORDS = st.lists(
    st.integers(0, 10) | st.integers(0, (1 << 64) - 1) | st.just((1 << 64) - 1),
    min_size=8,
    max_size=8,
)


@given(WORDS)
def test_whatever_the_page_holds_is_a_status(words):
    """Any words are a phase, a time that is past, and numbers in range; no read raises."""
    with a_line() as status:
        status._words[:8] = memoryview(b"".join(word.to_bytes(8, "little") for word in words)).cast(
            "Q"
        )
        for _ in range(2):
            phase = status.phase
            assert phase is (Phase(words[0]) if words[0] < 7 else Phase.UNKNOWN)
            assert phase.name.isupper()
            assert 0 <= status.since <= time.monotonic()
            for name in ("version", "begun", "committed", "command"):
                assert 0 <= getattr(status, name) <= MAX_COUNT
            assert 0 <= status.rss <= MAX_BYTES
            assert 0 <= status.progress_count < 1 << 64
            status.close()  # what was said stays as readable


@given(WORDS)
def test_whatever_the_page_holds_a_worker_goes_on(words):
    """The writing side neither raises nor stops counting, at the largest count neither."""
    with a_line() as status:
        for number, word in enumerate(words):
            status._words[number] = word
        before = status.progress_count
        status.enter(Phase.COLLECT)
        status.progress()
        assert status.phase is Phase.COLLECT
        assert (status.progress_count - before) % (1 << 64) == 2
        assert 0 < status.since <= time.monotonic()


def test_a_time_of_the_future_is_now():
    """A worker that claims to have moved in an hour has moved by now, and no later."""
    with a_line() as status:
        status._words[2] = time.monotonic_ns() + 3600 * 10**9
        before = time.monotonic()
        since = status.since
        assert before <= since <= time.monotonic()


def test_a_closed_line_is_unmapped_and_says_what_it_said():
    """The page goes at once; what it said at that moment can be read, and changes no more."""
    name = "keisei-status"
    before = Path("/proc/self/maps").read_text().count(name)
    status = StatusLine()
    other = StatusLine(os.dup(status.fd))
    other.enter(Phase.COMMAND)
    other.version = 7
    status.close()
    other.version = 8
    assert (status.phase, status.version) == (Phase.COMMAND, 7)
    other.close()
    assert Path("/proc/self/maps").read_text().count(name) == before


@pytest.mark.skipif(not kernel.can_seal(), reason="needs seals")
def test_a_page_cannot_be_taken_away():
    """Who has its descriptor can write words, and neither shrink nor grow the page."""
    with a_line() as status:
        for size in (0, 1, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(status.fd, size)
        assert status.phase is Phase.START


def test_memory_of_another_size_is_no_line():
    """A line is one page; anything else is refused before it is mapped."""
    fd, _ = memory.create(2 * PAGE)
    with pytest.raises(NotShared):
        StatusLine(fd)

"""StatusLine: what a worker says, seen by another process, also after the worker's death."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import pytest

import ipc_helpers
from ipc_helpers import open_fds, process
from keisei.ipc.status import Phase, StatusLine


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
    """A number of up to 64 bits is seen at the other end and touches no other one."""
    with a_line() as status:
        other = StatusLine(os.dup(status.fd))
        names = {"version", "begun", "committed", "rss", "command"}
        setattr(status, name, 2**63 + 5)
        assert {one: getattr(other, one) for one in names} == {
            one: 2**63 + 5 if one == name else 0 for one in names
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

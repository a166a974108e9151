"""Descriptors belong to their frame: unclaimed ones are closed, unnamed ones break the queue."""

from __future__ import annotations

import os
import socket

import pytest

from ipc_helpers import open_fds
from keisei.exceptions import QueueBroken
from keisei.ipc import wire
from keisei.ipc.descriptors import Descriptors
from keisei.ipc.frame_reader import FrameReader


def test_what_is_not_claimed_is_closed():
    """By ``close``, or when the last reference goes; what was claimed stays open."""
    before = open_fds()
    fds = Descriptors(os.dup(0) for _ in range(3))
    claimed = fds.claim()
    fds.close()
    assert (len(fds), open_fds()) == (0, before + 1)
    with pytest.raises(IndexError):
        fds.claim()
    os.close(claimed)
    fds = Descriptors([os.dup(0)])
    del fds
    assert open_fds() == before


@pytest.mark.parametrize(("named", "sent"), [(0, 1), (0, 4), (1, 2), (2, 4), (0, 9)])
def test_descriptors_that_no_frame_names_break_the_queue(named, sent):
    """They never pile up: all of them are closed, and nothing more is taken from that writer."""
    near, far = socket.socketpair()
    reader = FrameReader(far)
    before = open_fds()
    frame = wire.HEADER.pack(3 | named << wire.LENGTH_BITS) + b"abc"
    socket.send_fds(near, [frame], [0] * sent)
    payload, fds = reader.get_nowait()
    assert (payload, len(fds)) == (b"abc", named)
    fds.close()
    with pytest.raises(QueueBroken, match=r"^the writer sent descriptors that no frame names$"):
        reader.get_nowait()
    assert open_fds() == before
    near.close()
    reader.close()


def test_a_length_that_never_arrives_costs_no_memory():
    """A header may claim any length: nothing is reserved for what has not come."""
    for nbytes in (1 << 30, 1 << 40, wire.LENGTH_MASK):
        near, far = socket.socketpair()
        reader = FrameReader(far)
        near.send(wire.HEADER.pack(nbytes) + b"a little")
        before = resident()
        assert reader.qsize() == 0
        assert resident() - before < 1 << 24
        near.close()
        with pytest.raises(QueueBroken):
            reader.get_nowait()
        reader.close()


def resident() -> int:
    with open("/proc/self/statm") as statm:  # noqa: PTH123 - a line of the system's
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

"""A forked child of the application changes nothing of its parent's: cells, sockets, watches."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ipc_helpers import bounded, ends, queue_of, turn
from keisei.exceptions import QueueClosed, QueueWouldBlock, WeightsError
from keisei.ipc import forks
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.layout import describe
from keisei.ipc.ring import BUSY, RingReader, RingWriter
from keisei.ipc.watch import Watch
from keisei.ipc.weights import WeightsPublisher, WeightsReader


def forked(work: Callable[[], object]) -> None:
    """Do ``work`` in a forked child, and wait until it has ended well."""
    with warnings.catch_warnings():
        # The other threads are pytest's, and the child does not need them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def by_multiprocessing(work: Callable[[], object]) -> None:
    """Do ``work`` in a process of multiprocessing's start method "fork"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
    process.join(60)
    assert process.exitcode == 0
    process.close()


FORKS = pytest.mark.parametrize("fork", [forked, by_multiprocessing])


class Ring:
    """Both sides of a ring, and the tensors that are held of it."""

    def __init__(self) -> None:
        self.writer, self.reader = RingWriter(4), RingReader()
        self.held: list[dict[str, torch.Tensor]] = []

    def carry(self, value: int) -> None:
        ref, fds = self.writer.write({"x": torch.full((100,), value)})
        segment = self.reader.find(ref, os.dup(fds[0]) if fds else None)
        self.writer.told()
        self.held.append(ref.layout.views(self.reader.take(ref, segment)))

    def num_busy(self) -> int:
        return sum(one.map[: one.cells].count(BUSY) for one in self.writer._segments)

    def close(self) -> None:
        self.held.clear()
        self.writer.close()
        self.reader.close()


@FORKS
def test_a_child_that_drops_a_batch_frees_no_cell(fork):
    """However the child lets go of it: the cell stays its parent's, and so do its values."""
    with contextlib.closing(Ring()) as ring:
        for value in range(3):
            ring.carry(value)

        def drop() -> None:
            ring.held.clear()
            gc.collect()
            ring.reader.close()

        fork(drop)
        assert ring.num_busy() == 3
        for value in range(10, 30):
            ring.carry(value)
        assert [one["x"].unique().tolist() for one in ring.held[:3]] == [[0], [1], [2]]
        ring.held.clear()
        assert ring.num_busy() == 0


@FORKS
def test_rings_that_a_child_makes_work_there(fork):
    """A cell that a child took for itself is free when the child drops it."""

    def use() -> None:
        with contextlib.closing(Ring()) as ring:
            for value in range(5):
                ring.carry(value)
            assert ring.num_busy() == 5
            ring.held.clear()
            assert ring.num_busy() == 0
            forked(ring.held.clear)

    fork(use)


def test_a_child_of_a_child_frees_nothing_either():
    """What the grandparent made and what the parent made stays as it is."""
    with contextlib.closing(Ring()) as outer:
        outer.carry(1)

        def child() -> None:
            inner = Ring()
            inner.carry(2)

            def grandchild() -> None:
                outer.held.clear()
                inner.held.clear()

            forked(grandchild)
            assert (outer.num_busy(), inner.num_busy()) == (1, 1)

        forked(child)
        assert outer.num_busy() == 1


@FORKS
@bounded(60)
async def test_a_child_that_closes_queues_leaves_its_parent_listening(fork):
    """Frames, credits and room are noticed as before: the child touches no epoll set."""
    with ends(credit=2) as (writer, reader), ends() as (plain, other):
        heard: list[bytes] = []
        reader.listen(lambda: heard.append(bytes(reader.get_nowait()[0])))
        getting = asyncio.create_task(other.get())
        writer.watch_credit(lambda: None)
        await turn(5)

        def close() -> None:
            for end in (writer, reader, plain, other):
                end.close()

        fork(close)
        await turn(5)
        for number in range(5):
            await writer.put(bytes([number]), timeout=10)
            while len(heard) <= number:
                await turn()
        plain.put_nowait(b"still here")
        assert (await getting)[0] == b"still here"
        assert heard == [bytes([number]) for number in range(5)]


@FORKS
@bounded(60)
async def test_a_watch_that_a_child_stops_goes_on(fork):
    """A watch that belongs to no queue can be disowned too."""
    near, far = socket.socketpair()
    seen: list[bytes] = []

    def work() -> bool:
        seen.append(near.recv(10))
        return False

    watch = Watch(near.fileno(), writing=False, work=work)
    forks.own(watch)
    watch.listen(lambda: None)
    fork(watch.close)
    far.send(b"one")
    while not seen:
        await turn()
    watch.close()
    near.close()
    far.close()


@FORKS
@bounded(60)
async def test_a_child_cannot_speak_for_its_parent(fork):
    """Ends, queues and publishers of the parent are closed in the child, which says so."""
    weights = {"w": torch.ones(3)}
    publisher = WeightsPublisher(describe(weights))
    reader_of_weights = WeightsReader(os.dup(publisher.fd), publisher.layout)
    publisher.publish(weights)
    with ends(credit=1) as (writer, reader), queue_of() as queue:
        writer.put_nowait(b"before")

        def speak() -> None:
            with pytest.raises(QueueClosed):
                writer.put_nowait(b"from the child")
            with pytest.raises(QueueClosed):
                reader.get_nowait()
            reader.grant(7)
            with pytest.raises(QueueClosed):
                queue.put_nowait("from the child")
            with pytest.raises(WeightsError):
                publisher.publish({"w": torch.zeros(3)})
            assert publisher.fd == -1

        fork(speak)
        assert reader.get_nowait()[0] == b"before"
        assert writer.refresh() == 1
        with pytest.raises(QueueWouldBlock):
            reader.get_nowait()
        queue.put_nowait("from the parent")
        assert queue.get_nowait() == "from the parent"
        assert publisher.publish({"w": torch.full((3,), 2.0)}) == 2
        assert reader_of_weights.read()[0]["w"].tolist() == [2, 2, 2]
    publisher.close()


def test_a_child_holds_no_end_of_its_parents_queues():
    """A worker hears of its application's end though a child of that application lives on."""
    near, far = socket.socketpair()
    writer = FrameWriter(near, None)
    release, wait = os.pipe()[::-1]
    pid = os.fork()
    if pid == 0:
        os.close(release)
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    writer.close()
    far.settimeout(30)
    assert far.recv(10) == b""  # the end, while the child still lives
    os.close(release)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    far.close()


def test_descriptors_that_were_received_are_closed_in_the_child_alone():
    """A frame that was not taken keeps its descriptors in the parent."""
    pipe = os.pipe()
    inode = os.fstat(pipe[0]).st_ino

    def copies() -> int:
        inodes = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the folder's own
                inodes.append(path.stat().st_ino)
        return inodes.count(inode)

    with ends() as (writer, reader):
        numbers = [writer.fileno(), reader.fileno()]
        writer.put_nowait(b"with one", pipe[:1])
        assert reader.qsize() == 1
        assert copies() == 3

        def look() -> None:
            assert copies() == 2
            for number in numbers:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(number)

        forked(look)
        assert copies() == 3
        payload, fds = reader.get_nowait()
        assert (payload, len(fds)) == (b"with one", 1)
        fd = fds.claim()
        assert os.fstat(fd).st_ino == inode
        os.close(fd)
    for fd in pipe:
        os.close(fd)


def test_what_was_closed_is_not_kept_for_later_forks():
    """The list of what children disown holds nothing that is gone."""
    gc.collect()
    before = len(forks._owned)
    for _ in range(100):
        with ends():
            pass
    gc.collect()
    assert len(forks._owned) <= before

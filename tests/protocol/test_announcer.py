"""The announcer: what a worker must know of weights is told in order and for sure."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from keisei.ipc.board import Board
from keisei.ipc.queues import AsyncQueue
from keisei.protocol.announcer import UNREAD, Announcer
from keisei.testing.scenarios import fail_after


class Told:
    """An announcer, and the worker's end of its queue."""

    def __init__(self) -> None:
        queue = AsyncQueue(UNREAD)
        self.reader, self.writer = queue.take_reader(), queue.take_writer()
        self.works = 0
        self.announcer = Announcer(self.writer, self._on_work)

    def _on_work(self) -> None:
        self.works += 1

    async def take(self, number: int) -> list[tuple[bytes, int]]:
        """Take so many frames; return each with the number of its descriptors."""
        taken = []
        for _ in range(number):
            payload, fds = await self.reader.get()
            taken.append((bytes(payload), len(fds)))
            fds.close()
        return taken

    def close(self) -> None:
        self.announcer.close()
        self.writer.close()
        self.reader.close()


@pytest.fixture
async def told():
    one = Told()
    yield one
    one.close()


@pytest.fixture
def board():
    one = Board()
    yield one
    one.close()


async def test_more_frames_than_a_queue_holds_arrive_in_order(told, board):
    """A worker that reads late gets all of them, with their descriptors."""
    number = 5 * UNREAD
    async with fail_after(30):
        for key in range(number):
            told.announcer.tell(key, str(key).encode(), board)
        assert told.works == UNREAD
        assert await told.take(number) == [(str(key).encode(), 1) for key in range(number)]
        assert told.works == number


async def test_what_was_not_sent_is_told_once(told, board):
    """Of several frames about one thing that wait, the last is sent, behind all others."""
    async with fail_after(30):
        for key in range(UNREAD):
            told.announcer.tell(key, b"first", board)
        for turn in (b"second", b"third"):
            for key in (7, 8, 7):
                told.announcer.tell(key, turn, None)
        await told.take(UNREAD)
        told.announcer.tell("end", b"end")
        assert await told.take(3) == [(b"third", 0), (b"third", 0), (b"end", 0)]


async def test_closed_memory_is_not_told(told):
    """Its descriptor may be another file's by then."""
    async with fail_after(30):
        boards = [Board() for _ in range(2 * UNREAD)]
        for key, board in enumerate(boards):
            told.announcer.tell(key, str(key).encode(), board)
        for board in boards[UNREAD + 1 :]:
            board.close()
        told.announcer.tell("end", b"end")
        taken = await told.take(UNREAD + 2)
        assert [frame for frame, _ in taken[UNREAD:]] == [str(UNREAD).encode(), b"end"]
        for board in boards:
            board.close()


async def test_a_kernel_with_too_many_descriptors_in_flight_is_asked_again(
    told, board, monkeypatch
):
    """ETOOMANYREFS passes; any other error is the caller's."""
    refusals = [errno.ETOOMANYREFS] * 2
    put = told.writer.put_nowait

    def refuse(frame, fds=()):
        if refusals:
            number = refusals.pop()
            raise OSError(number, os.strerror(number))
        return put(frame, fds)

    monkeypatch.setattr(told.writer, "put_nowait", refuse)
    async with fail_after(30):
        told.announcer.tell("a", b"a", board)
        told.announcer.tell("b", b"b", board)
        assert await told.take(2) == [(b"a", 1), (b"b", 1)]
        refusals.append(errno.EBADF)
        with pytest.raises(OSError, match="Bad file descriptor"):
            told.announcer.tell("c", b"c", board)


async def test_questions_to_a_worker_that_is_far_behind_are_left_out(told):
    """They do not pile up for ever."""
    async with fail_after(30):
        for number in range(1000):
            told.announcer.ask(str(number).encode())
        assert len(told.announcer._unsent) == 200


async def test_a_worker_that_is_gone_is_told_nothing(told, board):
    """Neither now nor later, and nobody waits for it."""
    async with fail_after(30):
        for key in range(UNREAD + 5):
            told.announcer.tell(key, b"frame", board)
        sending = told.announcer._sending
        told.reader.close()
        await asyncio.wait([sending])
        assert sending.exception() is None
        told.announcer.tell("later", b"frame", board)
        assert not told.announcer._unsent

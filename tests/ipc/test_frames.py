"""FrameWriter and FrameReader: whole frames, credits, descriptors, and peers that die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import zlib

import pytest

import ipc_helpers
from ipc_helpers import (
    CountingSocket,
    bounded,
    counting_pair,
    end_of,
    ends,
    pair_of_fds,
    process,
    take_each,
    turn,
)
from keisei.exceptions import (
    QueueBroken,
    QueueClosed,
    QueueEnded,
    QueueTimeout,
    QueueWouldBlock,
)
from keisei.ipc import serialize, wire
from keisei.ipc.frame_reader import Frame, FrameReader
from keisei.ipc.frame_writer import FrameWriter

LARGE = 8 << 20
SIZES = [0, 1, 2, *(size + d for size in (wire.CHUNK, wire.SHARE) for d in (-9, -8, -1, 0, 1))]


def pattern(nbytes: int) -> bytes:
    return (bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]


def reader_of(fd: int) -> FrameReader:
    return FrameReader(socket.socket(fileno=fd))


def writer_of(fd: int, credit: int | None = None) -> FrameWriter:
    return FrameWriter(socket.socket(fileno=fd), credit)


# sizes


@pytest.mark.parametrize("nbytes", SIZES)
@bounded(30)
async def test_a_frame_of_any_size_arrives_whole(nbytes):
    """Frames around every internal boundary arrive byte for byte, and so does the next one."""
    with ends() as (writer, reader):
        putting = asyncio.create_task(writer.put(pattern(nbytes)))
        payload, fds = await reader.get()
        assert (bytes(payload), len(fds)) == (pattern(nbytes), 0)
        await putting
        await writer.put(b"next")
        assert (await reader.get())[0] == b"next"


@bounded(30)
async def test_many_sizes_one_behind_the_other():
    """Frames that share reads with the tail of one and the head of another stay apart."""
    sizes = [(number * 7919) % 3000 for number in range(500)] + SIZES
    with ends() as (writer, reader):

        async def put_all() -> None:
            for size in sizes:
                await writer.put(pattern(size))

        putting = asyncio.create_task(put_all())
        for size in sizes:
            assert bytes((await reader.get())[0]) == pattern(size)
        await putting


@pytest.mark.parametrize("nbytes", [100, LARGE])
@bounded(30)
async def test_a_frame_belongs_to_its_receiver(nbytes):
    """A received frame is writable memory of its own, which later frames do not touch."""
    with ends() as (writer, reader):
        frames = []
        for number in range(2):
            putting = asyncio.create_task(writer.put(bytes([number]) * nbytes))
            frames.append((await reader.get())[0])
            await putting
        frames[0][:3] = b"own"
        assert bytes(frames[0][:4]) == b"own\0"
        assert bytes(frames[1][:4]) == b"\1\1\1\1"


@bounded(30)
async def test_a_payload_counts_in_bytes():
    """A memoryview of wider elements is sent with all of its bytes."""
    numbers = memoryview(pattern(800)).cast("d")
    assert len(numbers) == 100
    with ends() as (writer, reader):
        writer.put_nowait(numbers)
        writer.put_nowait(b"next")
        assert bytes((await reader.get())[0]) == pattern(800)
        assert (await reader.get())[0] == b"next"


@bounded(30)
async def test_a_payload_that_is_not_contiguous_is_refused_whole():
    """A strided memoryview is a TypeError, and nothing of it is sent."""
    with ends(credit=1) as (writer, reader):
        with pytest.raises(TypeError):
            writer.put_nowait(memoryview(b"abcdef")[::2])
        assert (writer.sent, writer.credit) == (0, 1)
        writer.put_nowait(b"whole")
        assert (await reader.get())[0] == b"whole"


@bounded(30)
async def test_the_background_finishes_what_was_put():
    """After put_nowait of a large frame the loop sends the rest without another call."""
    with ends() as (writer, reader):
        writer.put_nowait(pattern(LARGE))
        assert bytes((await reader.get())[0]) == pattern(LARGE)


@bounded(30)
async def test_flush_waits_for_the_operating_system():
    """A flush returns once every byte was handed over, and its deadline leaves the rest in work."""
    with ends() as (writer, reader):
        await writer.flush()
        writer.put_nowait(pattern(LARGE))
        with pytest.raises(QueueTimeout, match=r"^the reader made no room for 0 s$"):
            await writer.flush(timeout=0)
        flushing = asyncio.create_task(writer.flush())
        await turn(5)
        assert not flushing.done()
        assert bytes((await reader.get())[0]) == pattern(LARGE)
        await flushing


# fairness to the event loop


class Loads:
    """How many bytes each call of a method moves over a socket."""

    def __init__(self, sock: CountingSocket, owner: object, method: str) -> None:
        self.moved: list[int] = []
        work = getattr(owner, method)

        def counting() -> object:
            before = sock.received + sock.transmitted
            result = work()
            self.moved.append(sock.received + sock.transmitted - before)
            return result

        setattr(owner, method, counting)


@bounded(100)
async def test_a_large_frame_is_received_in_shares():
    """100 MB from a busy process come in small shares, between which the loop turns."""
    near, far = counting_pair()
    nbytes = 100_000_000
    reader = FrameReader(near)
    loads = Loads(near, reader, "pump")
    with process(ipc_helpers.send_one, far.detach(), numbers=(nbytes,)) as child:
        getting = asyncio.create_task(reader.get())
        most_in_a_turn = 0
        while not getting.done():
            before = near.received
            await turn()
            most_in_a_turn = max(most_in_a_turn, near.received - before)
        payload, _ = await getting
        assert (len(payload), zlib.crc32(payload)) == (nbytes, zlib.crc32(pattern(nbytes)))
        assert await end_of(child) == 0
    assert sum(loads.moved) == nbytes + wire.HEADER.size
    assert max(loads.moved) < wire.SHARE + wire.CHUNK
    assert near.most_at_once <= wire.SHARE
    # One share by the event, and one by the task that the event wakes.
    assert most_in_a_turn < 2 * (wire.SHARE + wire.CHUNK)
    reader.close()


class Endless(CountingSocket):
    """A socket on which there is always more, however much was read."""

    frame = b""

    def recvmsg(self, size: int, *args: object) -> tuple[bytes, list[object], int, None]:
        offset = self.received % len(self.frame)
        data = (self.frame * (size // len(self.frame) + 2))[offset : offset + size]
        self._count("recvmsg", size)
        self.received += size
        return data, [], 0, None

    def recv_into(self, buffer: memoryview, *args: object) -> int:
        self._count("recv_into", len(buffer))
        self.received += len(buffer)
        return len(buffer)


@pytest.mark.parametrize("nbytes", [100, 1000, wire.SHARE, 1 << 28])
def test_reading_ends_even_if_the_writer_never_does(nbytes):
    """One pump reads one share, be it of small frames or of a gigantic one."""
    near, far = socket.socketpair()
    endless = Endless(fileno=near.detach())
    endless.frame = wire.HEADER.pack(nbytes) + pattern(min(nbytes, 1 << 21))
    reader = FrameReader(endless)
    for _ in range(3):
        before = endless.received
        assert reader.pump() is False
        assert wire.SHARE <= endless.received - before < wire.SHARE + wire.CHUNK
    assert endless.most_at_once <= wire.SHARE
    reader.close()
    far.close()


@bounded(100)
async def test_a_large_frame_is_sent_in_shares():
    """100 MB to a reader that never stops reading go in small shares too."""
    near, far = counting_pair()
    nbytes = 100_000_000
    writer = FrameWriter(near, None)
    far.setblocking(True)

    def receive() -> int:
        checksum, rest, buffer = 0, nbytes, memoryview(bytearray(1 << 20))
        far.recv(wire.HEADER.size)
        while rest:
            count = far.recv_into(buffer)
            checksum, rest = zlib.crc32(buffer[:count], checksum), rest - count
        return checksum

    receiving = asyncio.create_task(asyncio.to_thread(receive))
    writer.put_nowait(pattern(nbytes))
    most_in_a_turn = 0
    while not receiving.done():
        before = near.transmitted
        await turn()
        most_in_a_turn = max(most_in_a_turn, near.transmitted - before)
    assert await receiving == zlib.crc32(pattern(nbytes))
    assert near.transmitted == nbytes + wire.HEADER.size
    assert most_in_a_turn <= wire.SHARE
    assert near.most_at_once == wire.HEADER.size + wire.SHARE
    writer.close()
    far.close()


@bounded(60)
async def test_a_listener_cannot_be_kept_from_returning():
    """However fast a process sends, one event hands over what one share brought."""
    near, far = counting_pair()
    taken = []
    with process(ipc_helpers.flood, far.detach(), numbers=(1000,)):
        reader = FrameReader(near)

        def take_all() -> None:
            before = reader.taken
            take_each(reader)
            taken.append(reader.taken - before)

        reader.listen(take_all)
        while near.received < 50_000_000:
            before = near.received
            await turn()
            assert near.received - before < wire.SHARE + wire.CHUNK
        reader.close()
    assert max(taken) <= (wire.SHARE + wire.CHUNK) // 1000
    assert sum(taken) == reader.taken


@bounded(30)
async def test_many_frames_come_with_one_read():
    """200 small frames that have arrived are taken with a single system call."""
    near, far = counting_pair()
    writer, reader = FrameWriter(near, None), FrameReader(far, "manual")
    for number in range(200):
        writer.put_nowait(bytes([number]))
    assert [bytes(reader.get_nowait()[0])[0] for _ in range(200)] == list(range(200))
    assert far.calls == {"recvmsg": 1}
    writer.close()
    reader.close()


@bounded(30)
async def test_a_frame_beyond_all_memory_breaks_the_queue():
    """A frame that this process cannot hold comes as QueueBroken, behind the frames before it."""
    near, far = socket.socketpair()
    reader = FrameReader(far)
    near.send(wire.HEADER.pack(6) + b"before" + wire.HEADER.pack(1 << 55) + b"beyond")
    assert (await reader.get())[0] == b"before"
    match = rf"^there is no memory for a frame of {1 << 55} bytes$"
    for _ in range(2):
        with pytest.raises(QueueBroken, match=match):
            await reader.get()
    reader.close()
    near.close()


# descriptors


@pytest.fixture
def pipes():
    """Seven descriptors of seven pipes, which their inode tells apart."""
    pairs = [os.pipe() for _ in range(7)]
    yield [near for near, _ in pairs]
    for pair in pairs:
        for fd in pair:
            os.close(fd)


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def claimed(frame: Frame) -> tuple[memoryview, list[int]]:
    payload, fds = frame
    return payload, [fds.claim() for _ in range(len(fds))]


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@bounded(30)
async def test_descriptors_come_with_their_frames(pipes):
    """Each frame brings copies of its own descriptors, 0 to 4, in order, and none stays open."""
    before = ipc_helpers.open_fds()
    with ends() as (writer, reader):
        for first in range(0, 100, 10):
            sent = [[pipes[(n + k) % 7] for k in range(n % 5)] for n in range(first, first + 10)]
            for number, fds in enumerate(sent):
                await writer.put(pattern(number * 371), fds=fds)
            for number, fds in enumerate(sent):
                payload, received = claimed(await reader.get())
                assert bytes(payload) == pattern(number * 371)
                assert inodes(received) == inodes(fds)
                assert not any(os.get_inheritable(fd) for fd in received)
                close_all(received)
    assert ipc_helpers.open_fds() == before


@pytest.mark.parametrize("nbytes", [0, wire.CHUNK, LARGE])
@bounded(30)
async def test_descriptors_find_the_frame_behind_a_large_one(nbytes, pipes):
    """Descriptors belong to their frame also where its head shares a read with another's tail."""
    with ends() as (writer, reader):

        async def put_all() -> None:
            for number in range(6):
                await writer.put(pattern(nbytes + number), fds=pipes[number : number + number % 2])

        putting = asyncio.create_task(put_all())
        for number in range(6):
            payload, received = claimed(await reader.get())
            assert bytes(payload) == pattern(nbytes + number)
            assert inodes(received) == inodes(pipes[number : number + number % 2])
            close_all(received)
        await putting


@bounded(30)
async def test_descriptors_that_cannot_be_passed_are_refused_whole(pipes):
    """Too many or closed descriptors raise in the caller; nothing is sent and no credit used."""
    with ends(credit=1) as (writer, reader):
        with pytest.raises(ValueError, match=r"^a frame carries up to 4 descriptors, not 5$"):
            writer.put_nowait(b"refused", pipes[:5])
        with pytest.raises(OSError, match="Bad file descriptor"):
            await writer.put(b"refused", fds=[os.sysconf("SC_OPEN_MAX") - 1])
        assert (writer.sent, writer.credit) == (0, 1)
        writer.put_nowait(b"taken", pipes[:4])
        payload, received = claimed(await reader.get())
        assert payload == b"taken"
        assert inodes(received) == inodes(pipes[:4])
        close_all(received)


@bounded(30)
async def test_a_frame_with_descriptors_waits_for_its_turn(pipes):
    """Behind a large frame it is refused by put_nowait, and goes with its descriptors by put."""
    with ends(credit=5) as (writer, reader):
        writer.put_nowait(bytes(LARGE))
        writer.put_nowait(b"queued behind it")
        match = r"^the frames before are still on their way$"
        with pytest.raises(QueueWouldBlock, match=match):
            writer.put_nowait(b"with descriptors", pipes[:2])
        putting = asyncio.create_task(writer.put(b"with descriptors", fds=pipes[:2]))
        assert len((await reader.get())[0]) == LARGE
        assert (await reader.get())[0] == b"queued behind it"
        payload, received = claimed(await reader.get())
        assert payload == b"with descriptors"
        assert inodes(received) == inodes(pipes[:2])
        close_all(received)
        await putting


@pytest.mark.parametrize("cut", [0, 8, 12])
@bounded(30)
async def test_what_nobody_took_is_closed(cut, pipes):
    """Closing a reader closes the descriptors of frames that were untaken, partial or unread."""
    before = ipc_helpers.open_fds()
    near, far = socket.socketpair()
    writer, reader = FrameWriter(near, None), FrameReader(far)
    for _ in range(3):
        writer.put_nowait(b"untaken", pipes[:3])
    if cut:
        header = wire.HEADER.pack(100 | 2 << wire.LENGTH_BITS)
        socket.send_fds(near, [(header + pattern(100))[:cut]], pipes[:2])
    assert reader.qsize() == 3
    assert ipc_helpers.open_fds() == before + 2 + 9 + (2 if cut else 0)
    writer.put_nowait(b"unread", pipes[:1])
    reader.close()
    writer.close()
    assert ipc_helpers.open_fds() == before


@bounded(60)
async def test_descriptors_that_find_no_room_break_the_queue(pipes):
    """A process that may open no more gets the frames before, then an error, never a stranger's."""
    outward, answers = pair_of_fds(), pair_of_fds()
    writer, reader = writer_of(outward[0]), reader_of(answers[1])
    roles = ipc_helpers.run_out_of_descriptors, outward[1], answers[0]
    with process(*roles) as child:
        await writer.put(b"before")
        await reader.get()  # it has used up what it may open
        await writer.put(b"lost", fds=pipes[:2])
        payload, _ = await reader.get()
        assert serialize.loads(payload) == [
            b"before",
            "QueueBroken('descriptors were lost on the way: too many are open here')",
        ]
        assert await end_of(child) == 0
    writer.close()
    reader.close()


# a writer that goes


@bounded(60)
async def test_a_writer_killed_in_a_frame_breaks_the_queue():
    """After SIGKILL in the middle of a frame the whole ones before it come, then QueueBroken."""
    near, far = pair_of_fds()
    reader = reader_of(near)
    with process(ipc_helpers.die_in_a_frame, far) as child:
        assert [bytes((await reader.get())[0]) for _ in range(3)] == [b"\0", b"\1", b"\2"]
        with pytest.raises(QueueBroken, match=r"^the writer died in the middle of a frame$"):
            await reader.get()
        with pytest.raises(QueueBroken):
            reader.get_nowait()
        assert type(reader.ended) is QueueBroken
        assert await end_of(child) == -signal.SIGKILL
    reader.close()


@bounded(60)
async def test_a_writer_killed_in_a_header_breaks_the_queue():
    """A header of which only three bytes came counts as the middle of a frame."""
    near, far = pair_of_fds()
    reader = reader_of(near)
    with process(ipc_helpers.die_in_a_header, far):
        assert (await reader.get())[0] == b"whole"
        with pytest.raises(QueueBroken):
            await reader.get()
    reader.close()


@bounded(60)
async def test_a_writer_killed_between_frames_ends_the_queue():
    """What was sent whole before SIGKILL is received, then QueueEnded, every time."""
    near, far = pair_of_fds()
    reader = reader_of(near)
    with process(ipc_helpers.die_between_frames, far) as child:
        assert await end_of(child) == -signal.SIGKILL
        assert reader.ended is None
        assert [bytes((await reader.get())[0]) for _ in range(2)] == [b"first", b"last"]
        for _ in range(2):
            with pytest.raises(QueueEnded, match=r"^the writer closed its end after its last"):
                await reader.get()
    reader.close()


@bounded(30)
async def test_a_closed_writer_ends_the_queue_after_its_last_frame():
    """Frames that were sent before close are received, then QueueEnded, at a waiting get too."""
    with ends() as (writer, reader):
        writer.put_nowait(b"first")
        writer.put_nowait(b"last")
        assert (await reader.get())[0] == b"first"
        assert (await reader.get())[0] == b"last"
        getting = asyncio.create_task(reader.get())
        await turn(3)
        writer.close()
        await asyncio.wait([getting])
        assert type(getting.exception()) is QueueEnded


@bounded(30)
async def test_closing_over_an_unfinished_frame_breaks_it():
    """A frame that was on its way when its writer closed is broken, never short."""
    with ends() as (writer, reader):
        writer.put_nowait(b"whole")
        writer.put_nowait(bytes(LARGE))
        writer.close()
        assert (await reader.get())[0] == b"whole"
        with pytest.raises(QueueBroken):
            await reader.get()


@bounded(30)
async def test_a_writer_that_left_credits_unread_ends_the_queue_too():
    """The reset that such a writer's end causes is an end, after the last frame."""
    with ends() as (writer, reader):
        for number in range(3):
            writer.put_nowait(bytes([number]))
        assert (await reader.get())[0] == b"\0"  # its credit lies unread
        writer.close()
        assert [bytes((await reader.get())[0]) for _ in range(2)] == [b"\1", b"\2"]
        with pytest.raises(QueueEnded):
            await reader.get()


@bounded(60)
async def test_what_the_dead_have_left_is_drained():
    """A drain reads all that lies in the buffer, however much, to the end."""
    near, far = pair_of_fds()
    reader = reader_of(near)
    with process(ipc_helpers.die_in_a_frame, far) as child:
        assert await end_of(child) == -signal.SIGKILL
    reader.drain()
    assert type(reader.ended) is QueueBroken
    assert [bytes(reader.get_nowait()[0]) for _ in range(3)] == [b"\0", b"\1", b"\2"]
    with pytest.raises(QueueBroken):
        reader.get_nowait()
    reader.close()


@bounded(30)
async def test_draining_finds_the_end():
    """A drain reads as far as the writer's end, so that it is known at once."""
    with ends() as (writer, reader):
        writer.put_nowait(b"last")
        writer.close()
        reader.drain()
        assert (type(reader.ended), reader.qsize()) == (QueueEnded, 1)


@bounded(30)
async def test_draining_a_living_writer_takes_what_is_there():
    """A drain stops where nothing more has arrived, and the queue goes on."""
    with ends() as (writer, reader):
        writer.put_nowait(b"first")
        reader.drain()
        assert (reader.ended, reader.qsize()) == (None, 1)
        writer.put_nowait(b"second")
        assert [bytes((await reader.get())[0]) for _ in range(2)] == [b"first", b"second"]


# a reader that goes


@bounded(30)
async def test_a_reader_that_has_gone_ends_the_writer():
    """Every call of the writer raises QueueEnded, also with frames that nobody read."""
    with ends(credit=2) as (writer, reader):
        writer.put_nowait(b"unread")
        reader.close()
        with pytest.raises(QueueEnded, match=r"^the reading end is closed"):
            writer.put_nowait(b"late")
        with pytest.raises(QueueEnded):
            await writer.put(b"late")
        with pytest.raises(QueueEnded):
            await writer.flush()
        with pytest.raises(QueueEnded):
            writer.refresh()
        assert (writer.sent, writer.qsize()) == (1, 0)


@pytest.mark.parametrize("nbytes", [1, LARGE])
@bounded(30)
async def test_a_reader_that_goes_wakes_the_writer(nbytes):
    """Tasks that wait for credit, for room or in flush get QueueEnded when the reader closes."""
    with ends(credit=1) as (writer, reader), ends() as (unbounded, other):
        writer.put_nowait(bytes(nbytes))
        unbounded.put_nowait(bytes(LARGE))
        waiting = [
            asyncio.create_task(writer.put(b"late")),
            asyncio.create_task(unbounded.put(b"late")),
            asyncio.create_task(unbounded.flush()),
        ]
        await turn(5)
        assert not any(task.done() for task in waiting)
        reader.close()
        other.close()
        await asyncio.wait(waiting)
        assert [type(task.exception()) for task in waiting] == [QueueEnded] * 3


@bounded(60)
async def test_a_killed_reader_ends_the_writer():
    """A reader's SIGKILL with frames unread wakes the writer that waits for credit."""
    near, far = pair_of_fds()
    writer = writer_of(near, credit=5)
    with process(ipc_helpers.die_as_a_reader, far, numbers=(2,)) as child:
        for _ in range(5):
            await writer.put(b"within the first credits")
        beyond = [writer.put(b"beyond") for _ in range(3)]
        results = await asyncio.gather(*beyond, return_exceptions=True)
        assert type(results[-1]) is QueueEnded
        assert 5 <= writer.sent <= 7
        assert await end_of(child) == -signal.SIGKILL
    writer.close()


@bounded(60)
async def test_no_signal_is_raised_by_a_reader_that_has_gone():
    """An application that lets SIGPIPE end it gets QueueEnded all the same."""
    near, far = pair_of_fds()
    os.close(near)
    with process(ipc_helpers.put_where_sigpipe_kills, far) as child:
        assert await end_of(child) == 7


# credits


@bounded(30)
async def test_credits_by_hand():
    """With "manual" the writer sends exactly what was granted; taking frames grants nothing."""
    with ends(credit=0, acknowledge="manual") as (writer, reader):
        assert writer.refresh() == 0
        with pytest.raises(QueueWouldBlock):
            writer.put_nowait(b"early")
        reader.grant(2)
        assert writer.credit == 0
        assert writer.refresh() == 2
        reader.grant(1)
        for number in range(3):
            writer.put_nowait(bytes([number]))
        for number in range(3):
            assert (await reader.get())[0] == bytes([number])
        assert writer.refresh() == 0
        with pytest.raises(QueueTimeout):
            await writer.put(b"early", timeout=0)
        putting = asyncio.create_task(writer.put(b"granted"))
        await turn(3)
        assert not putting.done()
        reader.grant(1)
        await putting
        assert (writer.sent, writer.acknowledged, reader.taken) == (4, 4, 3)


@bounded(30)
async def test_credits_that_find_no_room_are_told_later():
    """However many grants a busy writer leaves unread, it gets every one of them."""
    with ends(credit=0, acknowledge="manual") as (writer, reader):
        for _ in range(5000):
            reader.grant(1)
        assert 0 < writer.refresh() < 5000
        while writer.refresh() < 5000:
            await turn()
        assert writer.credit == 5000
        await turn(20)
        assert writer.refresh() == 5000


@bounded(30)
async def test_without_a_bound_there_is_no_credit():
    """A writer without a bound has ``None`` as its credit and knows what was taken."""
    with ends() as (writer, reader):
        assert writer.credit is None
        for _ in range(3):
            writer.put_nowait(b"frame")
        await reader.get()
        assert writer.refresh() is None
        assert (writer.acknowledged, writer.qsize()) == (1, 2)


@bounded(30)
async def test_credits_wake_whoever_watches_them():
    """Their watcher is called at each telling, once more when the reader goes, and then never."""
    with ends(credit=0, acknowledge="manual") as (writer, reader):
        heard = []
        writer.watch_credit(lambda: heard.append(writer.credit))
        await turn(10)
        assert heard == []
        reader.grant(3)
        await turn(10)
        assert heard == [3]
        reader.grant(1)
        reader.grant(1)
        await turn(10)
        assert heard == [3, 5]
        reader.close()
        await turn(50)
        assert heard == [3, 5, 5]
        with pytest.raises(QueueEnded):
            writer.refresh()


@bounded(30)
async def test_waiting_for_credit_and_watching_it_go_together():
    """A put that waits for a credit does not take the watcher's events away."""
    with ends(credit=0, acknowledge="manual") as (writer, reader):
        heard = []
        writer.watch_credit(lambda: heard.append(writer.acknowledged))
        putting = asyncio.create_task(writer.put(b"frame"))
        await turn(3)
        reader.grant(1)
        await putting
        reader.grant(1)
        await turn(10)
        assert heard == [1, 2]


# listeners


@bounded(30)
async def test_a_listener_hears_of_every_arrival():
    """A listener is called when frames have arrived, whatever came before it listened."""
    with ends() as (writer, reader):
        heard = []

        def take_all() -> None:
            heard.extend(take_each(reader))
            heard.append(type(reader.ended).__name__)

        writer.put_nowait(b"before")
        assert reader.qsize() == 1
        reader.listen(take_all)
        await turn(10)
        assert heard == [b"before", "NoneType"]
        writer.put_nowait(b"one")
        writer.put_nowait(b"two")
        await turn(10)
        assert heard[2:] == [b"one", b"two", "NoneType"]
        writer.put_nowait(b"last")
        writer.close()
        await turn(50)
        assert b"last" in heard
        assert heard.count("QueueEnded") == 1
        assert heard[-1] == "QueueEnded"


@bounded(30)
async def test_a_listener_is_not_called_for_a_part():
    """While a large frame is coming nobody is called; when it is whole, once."""
    with ends() as (writer, reader):
        lengths = []
        reader.listen(lambda: lengths.append(len(reader.get_nowait()[0])))
        writer.put_nowait(bytes(LARGE))
        while not lengths:
            await turn()
        await turn(10)
        assert lengths == [LARGE]


@bounded(30)
async def test_listening_at_the_end_hears_of_it():
    """Whoever listens to a queue that has ended is called once, if it is not closed before."""
    for closes in (False, True):
        with ends() as (writer, reader):
            writer.close()
            with pytest.raises(QueueEnded):
                reader.get_nowait()
            heard = []
            reader.listen(lambda heard=heard, reader=reader: heard.append(type(reader.ended)))
            if closes:
                reader.close()
            await turn(20)
            assert heard == ([] if closes else [QueueEnded])


@bounded(30)
async def test_a_listener_may_close_what_it_hears():
    """Closing the reader inside on_arrival, or just before it, is the end of calls."""
    with ends() as (writer, reader):
        heard = []

        def close() -> None:
            heard.append("closed")
            reader.close()

        writer.put_nowait(b"one")
        reader.listen(close)
        writer.put_nowait(b"two")
        await turn(10)
        assert heard == ["closed"]
    with ends() as (writer, reader):
        writer.put_nowait(b"here")
        assert reader.qsize() == 1
        reader.listen(lambda: heard.append("late"))
        reader.close()
        await turn(10)
        assert heard == ["closed"]


@bounded(30)
async def test_a_descriptor_can_be_used_again_after_close():
    """Closing an end forgets every watch, so that the number's next owner is heard."""
    for _ in range(3):
        near, far = socket.socketpair()
        writer, reader = FrameWriter(near, 0), FrameReader(far, "manual")
        writer.watch_credit(lambda: None)
        reader.listen(lambda: None)
        numbers = {near.fileno(), far.fileno()}
        writer.close()
        reader.close()
        near, far = socket.socketpair()
        assert {near.fileno(), far.fileno()} == numbers
        writer, reader = FrameWriter(near, 1), FrameReader(far)
        putting = asyncio.create_task(writer.put(b"one"))
        assert (await reader.get(timeout=10))[0] == b"one"
        await putting
        getting = asyncio.create_task(reader.get(timeout=10))
        await turn(3)
        await writer.put(b"two", timeout=10)
        assert (await getting)[0] == b"two"
        writer.close()
        reader.close()


@bounded(30)
async def test_a_closed_end_says_so():
    """Calls on an end after close raise QueueClosed; grants and length go nowhere."""
    with ends() as (writer, reader):
        writer.close()
        reader.close()
        assert writer.closed
        with pytest.raises(QueueClosed):
            writer.put_nowait(b"late")
        with pytest.raises(QueueClosed):
            writer.refresh()
        with pytest.raises(QueueClosed):
            await writer.flush()
        with pytest.raises(QueueClosed):
            await reader.get(timeout=0)
        reader.grant(1)
        assert (reader.qsize(), writer.qsize()) == (0, 0)
        writer.close()
        reader.close()

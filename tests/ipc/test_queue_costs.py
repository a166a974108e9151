"""What a queue costs, counted in system calls: guards against regressions that no timing shows."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from ipc_helpers import CountingSocket, bounded, counting_pair, take_each, turn
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.frame_writer import FrameWriter

LARGE = 8 << 20


class Counted:
    """Both ends of a queue, and what each of them asked of the operating system."""

    def __init__(self, credit: int | None = None, **reader: str) -> None:
        self.near, self.far = counting_pair()
        self.writer = FrameWriter(self.near, credit)
        self.reader = FrameReader(self.far, **reader)

    def calls(self) -> tuple[Counter[str], Counter[str]]:
        """Return the writer's and the reader's calls since the last time."""
        calls = self.near.calls, self.far.calls
        self.near.reset()
        self.far.reset()
        return calls

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


@pytest.fixture
def counted():
    made = []

    def make(*args, **kwargs):
        made.append(Counted(*args, **kwargs))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


class Watches:
    """Counts how often the running loop begins or ends to watch a descriptor."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        for name in ("add_reader", "remove_reader", "add_writer", "remove_writer"):
            setattr(loop, name, self._counting(name, getattr(loop, name)))

    def _counting(self, name, method):
        def call(*args):
            self.calls[name] += 1
            return method(*args)

        return call


@pytest.mark.parametrize("nbytes", [0, 10, 4096, 60_000])
@pytest.mark.parametrize("credit", [None, 5])
@bounded(30)
async def test_a_small_frame_costs_three_calls(counted, credit, nbytes):
    """A put is one sendmsg; a get of what has arrived is one recvmsg and one send of a credit."""
    queue = counted(credit)
    for _ in range(3):
        await queue.writer.put(bytes(nbytes))
        assert queue.calls() == ({"sendmsg": 1}, {})
        assert len((await queue.reader.get())[0]) == nbytes
        assert queue.calls() == ({}, {"recvmsg": 1, "send": 1})


@bounded(30)
async def test_a_get_that_has_to_wait_costs_one_call_more(counted):
    """A get looks once in vain before it waits, and reads once when the frame has arrived."""
    queue = counted()
    for _ in range(5):
        getting = asyncio.create_task(queue.reader.get())
        await turn(3)
        assert queue.calls() == ({}, {"recvmsg": 1})
        await queue.writer.put(b"frame")
        await getting
        assert queue.calls() == ({"sendmsg": 1}, {"recvmsg": 1, "send": 1})


@bounded(30)
async def test_credits_by_hand_cost_nothing_but_their_grants(counted):
    """With "manual" a get is one recvmsg, and a grant of any size is one send."""
    queue = counted(3, acknowledge="manual")
    await queue.writer.put(b"frame")
    await queue.reader.get()
    assert queue.calls() == ({"sendmsg": 1}, {"recvmsg": 1})
    queue.reader.grant(1000)
    assert queue.calls() == ({}, {"send": 1})


@bounded(30)
async def test_a_writer_reads_credits_only_when_it_has_none(counted):
    """With a bound of 10, one read of credits serves ten frames."""
    queue = counted(10)
    for _ in range(100):
        await queue.writer.put(b"frame")
        await queue.reader.get()
    writer, reader = queue.calls()
    assert writer == {"sendmsg": 100, "recv": 9}
    assert reader == {"recvmsg": 100, "send": 100}


@bounded(30)
async def test_a_writer_without_a_bound_seldom_reads_credits(counted):
    """Credits that nobody waits for are read once in 64 frames, so that they cannot pile up."""
    queue = counted()
    for _ in range(640):
        await queue.writer.put(b"frame")
        await queue.reader.get()
    writer, reader = queue.calls()
    assert writer == {"sendmsg": 640, "recv": 10}
    assert reader == {"recvmsg": 640, "send": 640}


@bounded(30)
async def test_a_listener_takes_a_burst_with_two_calls(counted):
    """However many small frames one event brings, they cost one recvmsg and one send."""
    queue = counted()
    sizes = []

    def take_all() -> None:
        sizes.extend(len(payload) for payload in take_each(queue.reader))

    queue.reader.listen(take_all)
    for _ in range(3):
        sizes.clear()
        for number in range(20):
            queue.writer.put_nowait(bytes(number))
        while not sizes:
            await turn()
        await turn(5)
        assert sizes == list(range(20))
        assert queue.calls() == ({"sendmsg": 20}, {"recvmsg": 1, "send": 1})
    assert queue.writer.qsize() == 0


@bounded(30)
async def test_an_idle_queue_costs_nothing(counted):
    """While both ends wait, the loop may turn for ever without a system call of theirs."""
    queue = counted(0, acknowledge="manual")
    waiting = [
        asyncio.create_task(queue.reader.get()),
        asyncio.create_task(queue.writer.put(b"frame")),
    ]
    queue.writer.watch_credit(lambda: None)
    await turn(5)
    queue.calls()
    await turn(100)
    assert queue.calls() == ({}, {})
    queue.reader.grant(1)
    await asyncio.gather(*waiting)


@bounded(60)
async def test_a_busy_queue_leaves_its_watches_alone(counted):
    """Ends that keep waiting for each other are watched once, not once for each frame."""
    queue, watches, at_the_end = counted(1), Watches(), {}

    async def put_all() -> None:
        for _ in range(500):
            await queue.writer.put(b"frame")
        at_the_end.update(watches.calls)

    async def get_all() -> None:
        for _ in range(500):
            await queue.reader.get()

    async with asyncio.TaskGroup() as group:
        group.create_task(get_all())
        group.create_task(put_all())
    assert at_the_end == {"add_reader": 2}  # the reader's, and the writer's for its credits
    writer, reader = queue.calls()
    assert (writer["sendmsg"], reader["send"]) == (500, 500)


@bounded(60)
async def test_a_large_frame_leaves_its_watches_alone(counted):
    """A frame of many parts is watched once at either end, and not any more afterwards."""
    queue, watches = counted(), Watches()
    getting = asyncio.create_task(queue.reader.get())
    await queue.writer.put(bytes(LARGE))
    await getting
    await turn(5)
    assert watches.calls == {"add_reader": 1, "add_writer": 1, "remove_writer": 1}


@bounded(30)
async def test_a_watch_that_nobody_needs_ends(counted):
    """A frame that finds nobody waiting is read once; what follows waits in the buffer."""
    queue, watches = counted(), Watches()
    getting = asyncio.create_task(queue.reader.get())
    await turn(3)
    queue.writer.put_nowait(b"first")
    await getting
    queue.writer.put_nowait(b"second")
    await turn(10)
    assert watches.calls == {"add_reader": 1, "remove_reader": 1}
    queue.calls()
    queue.writer.put_nowait(b"third")
    await turn(10)
    assert queue.calls() == ({"sendmsg": 1}, {})
    assert queue.reader.qsize() == 2


def test_the_counting_socket_is_one():
    """The counts above are those of the socket that the ends really use."""
    near, far = counting_pair()
    assert isinstance(near, CountingSocket)
    near.sendmsg([b"two"])
    assert far.recv(10) == b"two"
    assert (near.calls, near.transmitted) == ({"sendmsg": 1}, 3)
    assert (far.calls, far.received) == ({"recv": 1}, 3)
    near.close()
    far.close()

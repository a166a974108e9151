"""AsyncQueue: order, bounds, deadlines, cancellation, and both of its ends wherever they are."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

import ipc_helpers
from ipc_helpers import bounded, end_of, parted, process, queue_of, turn
from keisei.exceptions import (
    QueueClosed,
    QueueEnded,
    QueueError,
    QueueTimeout,
    QueueWouldBlock,
    SerializationError,
)
from keisei.ipc import serialize
from keisei.ipc.queues import AsyncQueue

LARGE = 8 << 20  # more than any socket buffer takes


@bounded(30)
async def test_items_come_in_the_order_in_which_they_were_put():
    """What is put first is got first, values of any picklable kind."""
    values = [0, "one", b"two", {"three": [4.0]}, None, (), 2**100]
    with queue_of() as queue:
        for value in values:
            await queue.put(value)
        assert [await queue.get() for _ in values] == values


@pytest.mark.parametrize("maxsize", [1, 2, 7, 100])
@bounded(30)
async def test_the_bound_is_exact(maxsize):
    """A queue takes maxsize items and not one more until one is got."""
    with queue_of(maxsize) as queue:
        for item in range(maxsize):
            await queue.put(item)
        with pytest.raises(QueueWouldBlock):
            queue.put_nowait("too many")
        with pytest.raises(QueueTimeout):
            await queue.put("too many", timeout=0.001)
        assert queue.qsize() == maxsize
        assert await queue.get() == 0
        await queue.put(maxsize, timeout=0)
        with pytest.raises(QueueWouldBlock):
            queue.put_nowait("too many")
        assert [queue.get_nowait() for _ in range(maxsize)] == list(range(1, maxsize + 1))


@bounded(30)
async def test_the_bound_may_exceed_the_buffers():
    """A bound far beyond what the operating system buffers is as exact, for large items too."""
    with parted(3000) as (sending, receiving):
        for item in range(3000):
            sending.put_nowait(item)
        with pytest.raises(QueueWouldBlock):
            sending.put_nowait("too many")
        assert sending.qsize() == 3000
        assert [await receiving.get() for _ in range(3000)] == list(range(3000))
        while sending.qsize():
            await turn()
    with queue_of(3) as queue:
        for item in range(3):
            await queue.put(bytes([item]) * LARGE, timeout=0)
        with pytest.raises(QueueTimeout):
            await queue.put(bytes(LARGE), timeout=0)
        assert [(await queue.get())[-1] for _ in range(3)] == [0, 1, 2]


@bounded(30)
async def test_without_a_bound_the_buffers_are_the_bound():
    """A queue without maxsize takes hundreds of small items, then put waits until some are got."""
    with queue_of() as queue:
        fitting = 0
        try:
            while True:
                await queue.put(fitting, timeout=0)
                fitting += 1
        except QueueTimeout:
            assert fitting > 100
        putting = asyncio.create_task(queue.put(fitting))
        assert [await queue.get() for _ in range(fitting + 1)] == list(range(fitting + 1))
        await putting


@bounded(30)
async def test_put_waits_for_room():
    """A put on a full queue ends as soon as an item is got, not before."""
    with queue_of(1) as queue:
        await queue.put("first")
        putting = asyncio.create_task(queue.put("second"))
        await turn(10)
        assert not putting.done()
        assert queue.get_nowait() == "first"
        await putting
        assert await queue.get() == "second"


@bounded(30)
async def test_get_waits_for_an_item():
    """A get on an empty queue ends as soon as an item is put, not before."""
    with queue_of() as queue:
        getting = asyncio.create_task(queue.get())
        await turn(10)
        assert not getting.done()
        queue.put_nowait("item")
        assert await getting == "item"


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
@bounded(30)
async def test_a_timeout_leaves_the_queue_as_it_was(timeout):
    """After QueueTimeout nothing was taken or added, and both calls work as before."""
    with queue_of(1) as queue:
        with pytest.raises(QueueTimeout, match=rf"^nothing arrived in the queue for {timeout} s$"):
            await queue.get(timeout=timeout)
        await queue.put("kept", timeout=timeout)
        with pytest.raises(QueueTimeout, match=rf"^no room in the queue for {timeout} s$"):
            await queue.put("refused", timeout=timeout)
        assert queue.qsize() == 1
        assert await queue.get(timeout=timeout) == "kept"
        with pytest.raises(TimeoutError):
            await queue.get(timeout=timeout)


@bounded(30)
async def test_nowait_calls_say_when_they_would_wait():
    """get_nowait on an empty and put_nowait on a full queue raise QueueWouldBlock."""
    with queue_of(1) as queue:
        with pytest.raises(QueueWouldBlock, match=r"^the queue is empty$"):
            queue.get_nowait()
        queue.put_nowait("item")
        with pytest.raises(QueueWouldBlock, match=r"^the queue is full$"):
            queue.put_nowait("another")
        assert queue.get_nowait() == "item"
        with pytest.raises(QueueWouldBlock):
            queue.get_nowait()


@bounded(30)
async def test_an_item_still_on_its_way_blocks_the_next():
    """put_nowait behind an item that is too large for the buffers raises, and put waits."""
    with queue_of() as queue:
        queue.put_nowait(bytes(LARGE))
        with pytest.raises(QueueWouldBlock, match=r"^the frames before are still on their way$"):
            queue.put_nowait("next")
        putting = asyncio.create_task(queue.put("next"))
        assert len(await queue.get()) == LARGE
        await putting
        assert await queue.get() == "next"


# how long it is


@pytest.mark.parametrize("maxsize", [0, 8])
@bounded(30)
async def test_the_length_is_true_at_every_step(maxsize):
    """Wherever the ends are, qsize counts what was put and nobody got."""
    with queue_of(maxsize) as whole, parted(maxsize) as (sending, receiving):
        for number in range(1, 6):
            whole.put_nowait(number)
            sending.put_nowait(number)
            assert (whole.qsize(), sending.qsize(), receiving.qsize()) == (number,) * 3
        for number in range(4, -1, -1):
            whole.get_nowait()
            receiving.get_nowait()
            assert (whole.qsize(), sending.qsize(), receiving.qsize()) == (number,) * 3


@bounded(30)
async def test_an_item_on_its_way_counts():
    """An item that is larger than the buffers counts from put to get."""
    with queue_of() as queue:
        queue.put_nowait(bytes(LARGE))
        assert queue.qsize() == 1
        await queue.get()
        assert queue.qsize() == 0


@pytest.mark.parametrize("maxsize", [0, 10_000])
@bounded(60)
async def test_the_writer_knows_the_length_after_ever_so_many_items(maxsize):
    """Credits that did not fit into the buffer, since nobody read them, are told later."""
    with parted(maxsize) as (sending, receiving):
        for number in range(5000):
            sending.put_nowait(number)
            assert receiving.get_nowait() == number
        while sending.qsize():
            await turn()
        sending.put_nowait("last")
        assert sending.qsize() == 1


@pytest.mark.parametrize("maxsize", [0, 5])
@bounded(60)
async def test_the_writer_knows_what_another_process_has_taken(maxsize):
    """The length is true across processes too, in the middle of a burst."""
    outward: AsyncQueue[int] = AsyncQueue(maxsize)
    with queue_of() as orders, queue_of() as answers:
        fds = outward.detach_reader(), orders.detach_reader(), answers.detach_writer()
        with process(ipc_helpers.take_on_demand, *fds, numbers=(maxsize,)) as child:
            for number in range(5):
                await outward.put(number)
            assert outward.qsize() == 5
            await orders.put(2)
            assert await answers.get() == [0, 1]
            assert outward.qsize() == 3
            await orders.put(3)
            assert await answers.get() == [2, 3, 4]
            assert outward.qsize() == 0
            orders.close()
            assert await end_of(child) == 0
        outward.close()


@bounded(30)
async def test_a_closed_queue_is_empty():
    """After close the length is 0 at either end."""
    with parted(2) as (sending, receiving), queue_of() as whole:
        for queue in (sending, whole):
            queue.put_nowait("item")
        assert receiving.qsize() == 1
        receiving.close()
        assert (sending.qsize(), receiving.qsize()) == (0, 0)
        sending.close()
        whole.close()
        assert (sending.qsize(), whole.qsize()) == (0, 0)


# cancellation


@bounded(100)
async def test_a_cancelled_get_loses_nothing():
    """Whenever a get is cancelled around an item's arrival, the item is got once, in order."""
    got, cancelled = [], 0
    with queue_of() as queue:
        for number in range(10_000):
            getting = asyncio.create_task(queue.get())
            await turn(number % 3)
            queue.put_nowait(number)
            await turn(number // 3 % 6)
            getting.cancel()
            await asyncio.wait([getting])
            if getting.cancelled():
                cancelled += 1
            else:
                got.append(getting.result())
            while queue.qsize():
                got.append(queue.get_nowait())
    assert got == list(range(10_000))
    assert 1000 < cancelled < 9000  # both outcomes happened, many times


@bounded(100)
async def test_a_cancelled_put_is_either_done_or_not():
    """Whenever a put is cancelled around the moment of room, it is queued once or not at all."""
    put, got = [], []
    with queue_of(1) as queue:
        queue.put_nowait("first")
        for number in range(10_000):
            putting = asyncio.create_task(queue.put(number))
            await turn(number % 3)
            got.append(queue.get_nowait())
            await turn(number // 3 % 6)
            putting.cancel()
            await asyncio.wait([putting])
            if not putting.cancelled():
                put.append(number)
            else:
                put.append(str(number))
                queue.put_nowait(str(number))
        got.append(queue.get_nowait())
        assert queue.qsize() == 0
    assert got == ["first", *put]
    assert 1000 < sum(isinstance(one, int) for one in put) < 9000


@bounded(100)
async def test_a_get_that_times_out_as_an_item_arrives_loses_nothing():
    """With deadlines of 0 and next to 0, every item of a busy process is got once, in order."""
    got, timed_out, burst = [], 0, 100
    queue: AsyncQueue[int] = AsyncQueue()
    permits: AsyncQueue[None] = AsyncQueue()
    fds = queue.detach_writer(), permits.detach_reader()
    with process(ipc_helpers.count_up, *fds, numbers=(20_000, burst)) as child:
        for deadline in range(10**9):
            try:
                got.append(await queue.get(timeout=(0, 1e-6, 1e-4)[deadline % 3]))
            except QueueTimeout:
                timed_out += 1
                if len(got) == burst * permits.writer.sent < 20_000:
                    await permits.put(None)  # it is waiting, so each burst meets a getter
            except QueueEnded:
                break
        assert await end_of(child) == 0
    queue.close()
    permits.close()
    assert got == list(range(20_000))
    assert timed_out > 100


@bounded(100)
async def test_a_put_that_times_out_as_room_arises_is_not_queued():
    """With deadlines of 0 and next to 0, exactly the puts that returned reach a busy process."""
    put, attempts = [], 10_000
    queue: AsyncQueue[int] = AsyncQueue(2)
    with queue_of() as answers:
        fds = queue.detach_reader(), answers.detach_writer()
        with process(ipc_helpers.take_all, *fds, numbers=(2,)) as child:
            await queue.put(-1)
            for number in range(attempts):
                try:
                    await queue.put(number, timeout=(0, 1e-6, 1e-4)[number % 3])
                except QueueTimeout:
                    continue
                put.append(number)
            await queue.aclose()
            assert await answers.get() == [-1, *put]
            assert await end_of(child) == 0
    assert 0 < len(put) < attempts


# several tasks, loops, threads and processes


@bounded(30)
async def test_the_task_that_waits_longest_gets_first():
    """Several waiting getters are served in the order in which they came."""
    with queue_of() as queue:
        getters = [asyncio.create_task(queue.get()) for _ in range(5)]
        await turn(3)
        for number in range(5):
            queue.put_nowait(number)
            await turn(5)
        assert await asyncio.gather(*getters) == [0, 1, 2, 3, 4]


@bounded(30)
async def test_the_task_that_waits_longest_puts_first():
    """Several waiting putters are served in the order in which they came."""
    with queue_of(1) as queue:
        queue.put_nowait("full")
        putters = [asyncio.create_task(queue.put(number)) for number in range(5)]
        await turn(3)
        assert [await queue.get() for _ in range(6)] == ["full", 0, 1, 2, 3, 4]
        await asyncio.gather(*putters)


@bounded(60)
async def test_many_tasks_share_both_ends():
    """Ten putters and ten getters move each item exactly once."""
    got: list[int] = []

    async def get(queue):
        while (item := await queue.get()) >= 0:
            got.append(item)

    async def put(queue, first):
        for item in range(first, 1000, 10):
            await queue.put(item)

    with queue_of(3) as queue:
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(get(queue))
            async with asyncio.TaskGroup() as putting:
                for first in range(10):
                    putting.create_task(put(queue, first))
            for _ in range(10):
                await queue.put(-1)
    assert sorted(got) == list(range(1000))


@bounded(60)
async def test_another_process_gets_and_answers():
    """Both ends work in a process that received their descriptors."""
    values = [1, "two", {"three": b"3" * 100_000}]
    outward, inward = AsyncQueue(), AsyncQueue()
    with process(ipc_helpers.echo, outward.detach_reader(), inward.detach_writer()) as child:
        for value in values:
            await outward.put(value)
            assert await inward.get() == value
        outward.close()
        with pytest.raises(QueueEnded):
            await inward.get()
        assert await end_of(child) == 0
    inward.close()


def test_a_queue_serves_a_second_event_loop():
    """After the first loop has ended, also in the middle of waits, a second one uses the queue."""
    queue: AsyncQueue[str] = AsyncQueue(1)

    async def first() -> None:
        async with asyncio.timeout(30):
            with pytest.raises(QueueTimeout):
                await queue.get(timeout=0.001)
            await queue.put("full")
            waiting = [asyncio.create_task(queue.put("never")) for _ in range(2)]
            await turn(3)
            assert not any(task.done() for task in waiting)

    async def second() -> None:
        async with asyncio.timeout(30):
            putting = asyncio.create_task(queue.put("second"))
            await turn(3)
            assert not putting.done()
            assert [await queue.get(), await queue.get()] == ["full", "second"]
            getting = asyncio.create_task(queue.get())
            await turn(3)
            await queue.put("third")
            assert await getting == "third"

    asyncio.run(first())
    asyncio.run(second())
    queue.close()


def test_an_item_half_sent_in_one_event_loop_is_finished_in_the_next():
    """What the first loop could not send any more is sent by the second one's calls."""
    queue: AsyncQueue[bytes] = AsyncQueue()

    async def first() -> None:
        await queue.put(bytes(LARGE))

    async def second() -> None:
        async with asyncio.timeout(30):
            putting = asyncio.create_task(queue.put(b"next"))
            assert await queue.get() == bytes(LARGE)
            assert await queue.get() == b"next"
            await putting

    asyncio.run(first())
    asyncio.run(second())
    queue.close()


def test_the_nowait_calls_need_no_event_loop():
    """Outside of a loop the nowait calls work; the rest of a large item goes with the next loop."""
    queue: AsyncQueue[bytes] = AsyncQueue(2)
    queue.put_nowait(b"small")
    assert queue.get_nowait() == b"small"
    queue.put_nowait(bytes(LARGE))
    with pytest.raises(QueueWouldBlock):
        queue.get_nowait()

    async def finish() -> None:
        async with asyncio.timeout(30):
            getting = asyncio.create_task(queue.get())
            assert queue.writer is not None
            await queue.writer.flush()
            assert await getting == bytes(LARGE)

    asyncio.run(finish())
    queue.close()


def test_the_ends_work_in_two_loops_of_two_threads():
    """One thread's loop puts and another's gets, with a bound that both keep running into."""
    queue: AsyncQueue[int] = AsyncQueue(3)
    got: list[int] = []

    async def put() -> None:
        async with asyncio.timeout(60):
            for number in range(3000):
                await queue.put(number)
            await queue.put(-1)

    async def get() -> None:
        async with asyncio.timeout(60):
            while (item := await queue.get()) >= 0:
                got.append(item)

    thread = threading.Thread(target=lambda: asyncio.run(put()))
    thread.start()
    asyncio.run(get())
    thread.join(timeout=60)
    assert got == list(range(3000))
    queue.close()


# values that cannot travel


class ExitAtPickle:
    def __reduce__(self):
        raise SystemExit(3)


class ErrorAtUnpickle:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise RuntimeError("not here")


@pytest.mark.parametrize("item", [lambda: None, ExitAtPickle(), [threading.Lock()]])
@bounded(30)
async def test_an_item_that_cannot_be_pickled_is_not_queued(item):
    """The error is raised in the caller, and the queue is as it was, room included."""
    with queue_of(1) as queue:
        with pytest.raises(SerializationError, match=r"^the item cannot be pickled \("):
            await queue.put(item)
        with pytest.raises(SerializationError):
            queue.put_nowait(item)
        assert queue.qsize() == 0
        await queue.put("good", timeout=0)
        assert await queue.get() == "good"


@bounded(30)
async def test_an_item_that_cannot_be_rebuilt_is_taken():
    """The error is raised in the one who gets it; the next item comes as usual."""
    with queue_of(2) as queue:
        await queue.put(ErrorAtUnpickle())
        await queue.put("good")
        match = r"^the item cannot be unpickled \(RuntimeError: not here\)$"
        with pytest.raises(SerializationError, match=match):
            await queue.get()
        assert queue.qsize() == 1
        assert await queue.get() == "good"


@bounded(30)
async def test_descriptors_that_nobody_asked_for_are_closed():
    """A descriptor that comes with an item, which could not own it, does not stay open."""
    with queue_of() as queue:
        before = ipc_helpers.open_fds()
        assert queue.writer is not None
        queue.writer.put_nowait(serialize.dumps("item"), [0, 1])
        assert await queue.get() == "item"
        assert ipc_helpers.open_fds() == before


# the end


@bounded(30)
async def test_closing_wakes_everybody_who_waits():
    """Tasks in get, put and flush get QueueClosed at once, and so does every later call."""
    with queue_of(1) as full, queue_of() as stuck, queue_of() as empty:
        full.put_nowait("item")
        stuck.put_nowait(bytes(LARGE))
        assert stuck.writer is not None
        waiting = [
            asyncio.create_task(full.put("next")),
            asyncio.create_task(stuck.put("next")),
            asyncio.create_task(stuck.writer.flush()),
            asyncio.create_task(empty.get()),
        ]
        await turn(5)
        assert not any(task.done() for task in waiting)
        for queue in (full, stuck, empty):
            queue.close()
        await asyncio.wait(waiting)
        assert [type(task.exception()) for task in waiting] == [QueueClosed] * 4
        with pytest.raises(QueueClosed, match=r"^put on a queue whose writing end was closed$"):
            await full.put("late")
        with pytest.raises(QueueClosed, match=r"^get on a queue whose reading end was closed$"):
            await empty.get()
        with pytest.raises(QueueClosed):
            full.put_nowait("late")
        with pytest.raises(QueueClosed):
            empty.get_nowait()


@bounded(30)
async def test_closing_again_changes_nothing():
    """Both ways of closing may be used any number of times, in any order."""
    with parted() as (sending, receiving):
        for queue in (sending, receiving):
            queue.close()
            await queue.aclose()
            queue.close()


@bounded(60)
async def test_an_orderly_end_loses_nothing():
    """An aclose sends first what was put, however large; the other process then gets the end."""
    queue: AsyncQueue[object] = AsyncQueue()
    with queue_of() as answers:
        fds = queue.detach_reader(), answers.detach_writer()
        with process(ipc_helpers.take_all, *fds, numbers=(0,)) as child:
            await queue.put(bytes(LARGE))
            await queue.put("last")
            await queue.put(bytes(LARGE))
            await queue.aclose()
            assert await answers.get() == [bytes(LARGE), "last", bytes(LARGE)]
            assert await end_of(child) == 0


@bounded(30)
async def test_an_orderly_end_waits_for_nobody_in_the_same_process():
    """An aclose of a queue with both ends, of which nobody could read any more, returns."""
    with queue_of() as queue:
        await queue.put(bytes(LARGE))
        await queue.aclose()
        with pytest.raises(QueueClosed):
            queue.get_nowait()


@bounded(30)
async def test_an_orderly_end_can_be_cut_short():
    """A cancelled aclose has closed the end all the same."""
    with parted() as (sending, receiving):
        await sending.put(bytes(LARGE))
        closing = asyncio.create_task(sending.aclose())
        await turn(3)
        assert not closing.done()
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        with pytest.raises(QueueClosed):
            sending.put_nowait("late")
        with pytest.raises(QueueError):
            await receiving.get()


@bounded(30)
async def test_an_orderly_end_does_not_wait_for_a_reader_that_has_gone():
    """An aclose with an item on its way to a closed reader returns."""
    with parted() as (sending, receiving):
        await sending.put(bytes(LARGE))
        closing = asyncio.create_task(sending.aclose())
        await turn(3)
        receiving.close()
        await closing


# ends that are given away


@bounded(30)
async def test_an_end_in_another_process_is_no_end_here():
    """Calls on an end that was given away say so, as QueueClosed."""
    with queue_of() as queue:
        os.close(queue.detach_writer())
        os.close(queue.detach_reader())
        with pytest.raises(QueueClosed, match=r"^this queue's writing end is in another process$"):
            await queue.put("item")
        with pytest.raises(QueueClosed, match=r"^this queue's reading end is in another process$"):
            await queue.get()
        with pytest.raises(QueueClosed):
            queue.detach_writer()
        assert queue.qsize() == 0


@bounded(30)
async def test_what_was_put_before_is_received_where_the_reader_went():
    """Items wait in the queue itself while its receiving end moves, and their number is known."""
    whole: AsyncQueue[int] = AsyncQueue(3)
    whole.put_nowait(1)
    whole.put_nowait(2)
    assert whole.qsize() == 2
    with whole_reader(whole) as receiving:
        assert [await receiving.get(), await receiving.get()] == [1, 2]
        assert whole.qsize() == 0
    whole.close()


def whole_reader(queue):
    import contextlib

    return contextlib.closing(AsyncQueue.from_reader(queue.detach_reader(), queue.maxsize))


@bounded(30)
async def test_an_end_that_was_used_stays():
    """An end whose past its new owner could not know is not given away, and goes on working."""
    with queue_of() as queue:
        queue.put_nowait("first")
        queue.put_nowait("second")
        with pytest.raises(QueueError, match=r"^a writing end that was used cannot be given"):
            queue.writer.detach()
        assert queue.get_nowait() == "first"
        with pytest.raises(QueueError, match=r"^a reading end that was used cannot be given"):
            queue.reader.detach()
        assert queue.get_nowait() == "second"


@pytest.mark.parametrize("make", [AsyncQueue, lambda n: AsyncQueue.from_reader(0, n)])
def test_a_negative_bound_is_refused(make):
    """A maxsize below 0 is a ValueError that says what to give; nothing is opened."""
    before = ipc_helpers.open_fds()
    with pytest.raises(ValueError, match=r"^maxsize is -1; give the bound, or 0 for none$"):
        make(-1)
    assert ipc_helpers.open_fds() == before

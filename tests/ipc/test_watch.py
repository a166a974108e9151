"""Watch: tasks and listeners that wait for one direction of one descriptor."""

from __future__ import annotations

import asyncio
import socket

import pytest

from ipc_helpers import bounded, turn
from keisei.ipc.watch import Watch, deadline_after


@pytest.fixture
def watched():
    """A watch for what arrives at one end of a socket pair, and the other end."""
    near, far = socket.socketpair()
    near.setblocking(False)

    def work() -> bool:
        watch.received += near.recv(100)
        return False

    watch = Watch(near.fileno(), writing=False, work=work)
    watch.received = b""
    yield watch, far
    watch.stop()
    near.close()
    far.close()


@bounded(30)
async def test_an_event_is_worked_on_before_those_who_wait_are_woken(watched):
    """Every waiting task is woken by an event, after what it makes due was done."""
    watch, far = watched
    waiting = [asyncio.create_task(watch.wait(None)) for _ in range(3)]
    await turn(3)
    far.send(b"abc")
    assert await asyncio.gather(*waiting) == [True] * 3
    assert watch.received == b"abc"


@bounded(30)
async def test_a_deadline_ends_a_wait(watched):
    """A wait whose deadline passes says so; a deadline of the past passes at once."""
    watch, far = watched
    assert deadline_after(None) is None
    for timeout in (-1, 0, 0.001):
        assert await watch.wait(deadline_after(timeout)) is False
    far.send(b"x")
    assert await watch.wait(deadline_after(10)) is True


@bounded(30)
async def test_a_wait_leaves_nothing_behind(watched, monkeypatch):
    """However a wait ends, by event, deadline or cancellation, its future and timer are gone."""
    watch, far = watched
    loop = asyncio.get_running_loop()
    timers = []
    call_at = loop.call_at

    def recording(*args, **kwargs):
        timers.append(call_at(*args, **kwargs))
        return timers[-1]

    monkeypatch.setattr(loop, "call_at", recording)
    await watch.wait(deadline_after(0))
    far.send(b"x")
    await watch.wait(deadline_after(10))
    waiting = asyncio.create_task(watch.wait(deadline_after(10)))
    await turn(3)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert watch._futures == {}
    assert len(timers) == 3
    assert all(timer.cancelled() for timer in timers)


@bounded(30)
async def test_stopping_wakes_everybody(watched):
    """Tasks look again after stop, and a listener is not called any more."""
    watch, far = watched
    heard = []
    watch.listen(lambda: heard.append(watch.received))
    waiting = asyncio.create_task(watch.wait(None))
    await turn(3)
    watch.stop()
    assert await waiting is True
    far.send(b"x")
    await turn(5)
    assert (heard, watch.received) == ([], b"")


@bounded(30)
async def test_a_listener_hears_every_event_beside_those_who_wait(watched):
    """The listener is called after the work of each event, whoever else waits."""
    watch, far = watched
    heard = []
    watch.listen(lambda: heard.append(watch.received))
    far.send(b"a")
    assert await watch.wait(deadline_after(10)) is True
    far.send(b"b")
    await turn(5)
    assert heard == [b"a", b"ab"]


def test_a_loop_that_was_closed_in_the_middle_of_a_wait_is_forgotten(watched):
    """The next loop begins anew; the futures of the closed one are left alone."""
    watch, far = watched
    loop = asyncio.new_event_loop()
    called = []

    async def leave_a_future() -> None:
        watch.listen(lambda: called.append("of the first loop"))
        future = loop.create_future()
        future.add_done_callback(called.append)
        watch._futures[future] = None

    loop.run_until_complete(leave_a_future())
    loop.close()

    async def wait() -> bool:
        far.send(b"x")
        return await watch.wait(deadline_after(10))

    assert asyncio.run(wait()) is True
    assert (watch._futures, called) == ({}, [])


def test_a_second_loop_takes_over_from_one_that_still_exists(watched):
    """Whoever waits last has the watch; the loop before does not hear of it any more."""
    watch, far = watched
    first = asyncio.new_event_loop()

    async def listen() -> None:
        watch.listen(lambda: None)

    first.run_until_complete(listen())

    async def wait() -> bool:
        far.send(b"x")
        return await watch.wait(deadline_after(10))

    assert asyncio.run(wait()) is True

    async def hear_nothing() -> None:
        far.send(b"y")
        await turn(5)

    first.run_until_complete(hear_nothing())
    first.close()
    assert watch.received == b"x"


def test_without_a_loop_nothing_is_watched(watched):
    """Outside of a loop begin does nothing: the next call inside of one will."""
    watch, _ = watched
    watch.begin()
    assert watch._loop is None


@bounded(30)
async def test_a_rest_ends_with_what_happened_in_it(watched):
    """Nothing is noticed before; then everything is, and from then on each event again."""
    watch, far = watched
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    watch.listen(heard.set)
    until = loop.time() + 0.05
    watch.rest(until)
    watch.rest(until + 60)  # one rest at a time
    before = []
    loop.call_at(until - 0.001, lambda: before.append(watch.received))
    far.send(b"a")
    far.send(b"b")
    await heard.wait()
    assert (before, watch.received) == ([b""], b"ab")
    heard.clear()
    far.send(b"c")
    await heard.wait()
    assert watch.received == b"abc"


@bounded(30)
async def test_one_rest_after_another_watches_nothing(watched, monkeypatch):
    """A listener that rests again and again costs a timer each time and no registration."""
    watch, far = watched
    loop = asyncio.get_running_loop()
    rested = asyncio.Event()
    registered = []
    add_reader = loop.add_reader

    def rest_again() -> None:
        if len(watch.received) < 5:
            far.send(b"x")
            watch.rest(loop.time())
        else:
            rested.set()

    watch.listen(rest_again)
    monkeypatch.setattr(loop, "add_reader", lambda *args: registered.append(add_reader(*args)))
    far.send(b"x")
    await rested.wait()
    await turn(3)
    assert watch.received == b"xxxxx"
    assert len(registered) == 1, "after the last rest"


@bounded(30)
async def test_stop_ends_a_rest(watched):
    """Whoever stops or closes a watch in its rest leaves no timer, and may begin anew."""
    watch, far = watched
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    scheduled = _scheduled(loop)
    watch.listen(heard.set)
    watch.rest(loop.time() + 60)
    watch.stop()
    assert _scheduled(loop) == scheduled
    watch.listen(heard.set)
    far.send(b"x")
    await heard.wait()
    watch.rest(loop.time() + 60)
    watch.close()
    assert _scheduled(loop) == scheduled


def _scheduled(loop):
    return [timer for timer in loop._scheduled if not timer.cancelled()]

"""The page's streams: one look for all of them, none without them, and no browser holds them up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from keisei.observers.page import pool_page
from keisei.observers.page.streams import StreamResponses
from keisei.testing.scenarios import fail_after
from page_fakes import STATS, Client, FakeManager, worker

INTERVAL = 0.01


async def test_a_stream_has_a_state_at_once_and_then_with_each_interval():
    """The states are numbered without a gap where the browser reads."""
    async with fail_after(30):
        client = Client(pool_page(FakeManager(), interval=INTERVAL))
        states = await client.frames(4)
        numbers = [state["sequence"] for state in states]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        headers = dict(client.sent[0]["headers"])
        assert client.sent[0]["status"] == 200
        assert headers[b"content-type"] == b"text/event-stream"
        assert headers[b"cache-control"] == b"no-store"
        client.leave()
        await client.task


async def test_nothing_is_looked_at_without_an_open_page():
    """The timer begins with the first stream and ends with the last."""
    async with fail_after(30):
        manager = FakeManager()
        page = pool_page(manager, interval=INTERVAL)
        assert (page.num_streams, manager.looks) == (0, 0)
        clients = [Client(page), Client(page)]
        for client in clients:
            await client.frames(2)
        assert page.num_streams == 2
        (feed,) = page._streams._feeds.values()
        clients[0].leave()
        await clients[0].task
        assert not feed._following.done()
        clients[1].leave()
        await clients[1].task
        assert (page.num_streams, page._streams._feeds) == (0, {})
        assert feed._following.done()
        assert feed._timer.cancelled()


async def test_all_streams_share_one_look():
    """Forty pages cost the pool what one costs."""
    async with fail_after(30):
        manager = FakeManager()
        page = pool_page(manager, interval=INTERVAL)
        clients = [Client(page) for _ in range(40)]
        for client in clients:
            await client.frames(5)
        newest = max(client.states[-1]["sequence"] for client in clients)
        assert manager.looks == newest
        for client in clients:
            client.leave()
            await client.task


async def test_a_slow_browser_gets_the_newest_state_and_no_backlog():
    """While it does not read, one frame waits; then the newest comes, and others are skipped."""
    async with fail_after(30):
        manager = FakeManager()
        page = pool_page(manager, interval=INTERVAL)
        slow, fast = Client(page), Client(page)
        await slow.frames(1)
        slow.ready.clear()
        seen = len(slow.states)
        await fast.frames(len(fast.states) + 20)
        assert len(slow.states) == seen
        manager.numbers = replace(STATS, num_steps=12345)
        while fast.states[-1]["numbers"]["steps"] != 12345:
            await fast.frames(len(fast.states) + 1)
        slow.ready.set()
        states = await slow.frames(seen + 2)
        skipped = states[seen + 1]["sequence"] - states[seen]["sequence"]
        assert skipped > 10
        assert states[seen + 1]["numbers"]["steps"] == 12345
        for client in (slow, fast):
            client.leave()
            await client.task


async def test_a_browser_that_leaves_while_it_is_slow_ends_its_stream():
    """Whether it reads or not, its disconnection is noticed."""
    async with fail_after(30):
        page = pool_page(FakeManager(), interval=INTERVAL)
        client = Client(page)
        await client.frames(1)
        client.ready.clear()
        client.leave()
        await client.task
        assert page.num_streams == 0


@pytest.mark.parametrize("limit", [{"max_seconds": 0.05}, {"max_bytes": 100}])
async def test_a_stream_ends_by_itself_before_any_server_waits_for_it(limit):
    """After its time, or so many bytes, it is complete, and the browser opens another one."""
    async with fail_after(30):

        async def make():
            return b'{"sequence":1}', INTERVAL

        responses = StreamResponses(make, **limit)
        client = Client(responses.answer)
        await client.task
        assert client.is_complete
        assert len(client.states) >= 1
        assert responses.num_streams == 0


async def test_closing_the_page_ends_its_streams():
    """Each is completed within a moment, and a later one at once."""
    async with fail_after(30):
        page = pool_page(FakeManager(), interval=INTERVAL)
        client = Client(page)
        await client.frames(1)
        page.close()
        await client.task
        assert client.is_complete
        later = Client(page)
        await later.task
        assert later.is_complete


async def test_a_browser_that_reads_nothing_does_not_hold_the_end_up():
    """When the page is closed its stream ends although a frame was never taken."""
    async with fail_after(30):
        page = pool_page(FakeManager(), interval=INTERVAL)
        client = Client(page)
        await client.frames(1)
        client.ready.clear()
        page.close()
        await client.task
        assert not client.is_complete


async def test_a_cancelled_stream_leaves_nothing_behind():
    """The timer ends, and so do the tasks that waited for it."""
    async with fail_after(30):
        page = pool_page(FakeManager(), interval=INTERVAL)
        client = Client(page)
        await client.frames(1)
        client.task.cancel()
        await asyncio.wait([client.task])
        assert client.task.cancelled()
        assert page.num_streams == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_that_raises_for_a_client_that_is_gone_is_understood():
    """ASGI servers may raise OSError from send then; it is no error of the page."""

    async def send(message):
        if message["type"] == "http.response.body":
            raise OSError("the client is gone")

    async def receive():
        await asyncio.Event().wait()

    async with fail_after(30):
        page = pool_page(FakeManager(), interval=INTERVAL)
        scope = {"type": "http", "method": "GET", "path": "/events", "headers": []}
        await page(scope, receive, send)
        assert page.num_streams == 0


async def test_a_large_pool_is_looked_at_less_often():
    """A thousand slots are shown anew every 2.5 s, whatever the interval is."""
    page = pool_page(FakeManager(workers=FakeManager().workers * 500), interval=INTERVAL)
    frame, seconds = await page._make_frame()
    assert seconds == 2.5
    assert len(frame) < 100_000


async def test_a_large_pool_does_not_hold_the_loop_up():
    """The loop turns many times while a thousand rows are made, and the frame is as a whole."""
    page = pool_page(FakeManager(workers=tuple(map(worker, range(1000)))), interval=INTERVAL)
    making = asyncio.create_task(page._make_frame())
    turns = 0
    while not making.done():
        await asyncio.wait([making], timeout=0)
        turns += 1
    state = json.loads(making.result()[0])
    assert turns > 30
    assert [row[0] for row in state["workers"]] == list(range(1000))
    assert state["sequence"] == 1


async def test_a_state_that_cannot_be_made_is_logged(caplog):
    """The streams stand still and end in their time; the reason is in the log."""

    async def make():
        raise ZeroDivisionError

    async with fail_after(30):
        client = Client(StreamResponses(make, max_seconds=0.05).answer)
        await client.task
        assert client.is_complete
        assert client.states == []
    assert "the page's state could not be made; open pages stand still" in caplog.text

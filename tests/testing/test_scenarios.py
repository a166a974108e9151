"""fail_after: a limit that costs nothing when it is kept and explains itself when it is not."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

import pool_workers
from keisei.events import PoolPaused, PoolStarted, WorkerReady
from keisei.testing.failpoints import Gate
from keisei.testing.scenarios import all_stacks, fail_after, next_event


async def test_a_limit_that_is_kept_changes_nothing():
    """The body's result and its errors pass through; so does a TimeoutError of its own."""
    async with fail_after(30):
        value = await asyncio.wait_for(asyncio.to_thread(int, "3"), 10)
    assert value == 3
    with pytest.raises(ZeroDivisionError):
        async with fail_after(30):
            raise ZeroDivisionError
    with pytest.raises(TimeoutError, match="the body's"):
        async with fail_after(30):
            raise TimeoutError("the body's")


async def test_a_limit_that_is_exceeded_shows_the_stacks_of_everybody(make_manager):
    """Threads and tasks of the application, and the place where each worker stands."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)

        async def scenario(manager):
            async with fail_after(0.2):
                await manager.collect()

        async with fail_after(30), make_manager(worker) as manager:
            pids = [(await gate.visitor()).pid, (await gate.visitor()).pid]
            with pytest.raises(AssertionError, match=r"was not done within 0\.2 s") as caught:
                await asyncio.create_task(scenario(manager), name="my scenario")
            gate.open()
        text = str(caught.value)
    assert text.startswith("my scenario was not done")
    assert "await manager.collect()" in text
    for pid in pids:
        (report,) = [
            part for part in text.split("--- ") if part.startswith(f"worker process {pid}")
        ]
        assert "in hold\n" in report
        assert "in collect\n" in report


async def test_an_error_that_was_on_its_way_is_not_hidden():
    """When cleaning up after an error takes too long, both are in the report."""

    async def scenario():
        async with fail_after(0.05):
            try:
                raise ZeroDivisionError("the first")
            finally:
                await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="was not done") as caught:
        await scenario()
    chain = []
    error = caught.value
    while error is not None:
        chain.append(type(error))
        error = error.__cause__ or error.__context__
    assert ZeroDivisionError in chain


async def test_stacks_can_be_taken_at_any_time():
    """Without workers there are the application's own."""
    text = all_stacks()
    assert "test_stacks_can_be_taken_at_any_time" in text
    assert "--- worker process" not in text


async def test_next_event_passes_over_others(make_manager):
    """The first event of the kind, and for which the condition holds, is returned."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    events = manager.events()
    async with fail_after(30), manager:
        ready = await next_event(events, WorkerReady, lambda event: event.worker_id == 1)
        assert (ready.worker_id, ready.incarnation) == (1, 0)
        assert await next_event(events, PoolStarted) == PoolStarted(2)
    with pytest.raises(AssertionError, match="the pool stopped without another PoolPaused"):
        await next_event(events, PoolPaused)

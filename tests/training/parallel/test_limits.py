"""What bounds a pool: overflow, staleness, recycling."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

import pool_workers
from keisei.events import ExitCause, WorkerExited, WorkerReady
from keisei.exceptions import CollectTimeout
from keisei.testing.failpoints import Gate
from keisei.testing.scenarios import fail_after, next_event

WEIGHTS = {"w": torch.zeros(1)}


async def test_drop_oldest_keeps_the_newest_and_counts_the_rest(make_manager):
    """Workers never wait; the newest experiences of each are kept, without a gap at the end."""
    config = {"overflow": "drop_oldest", "max_queue_size": 3, "num_workers": 1}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        while manager.stats().num_dropped < 50:
            await manager.send_command("number")
        await manager.pause()
        ((_, number),) = (await manager.send_command("number")).items()
        assert manager.queue_info().experience_queue_sizes == (3,)
        batches = await manager.collect()
        assert [batch.data["number"].item() for batch in batches] == [
            number - 2,
            number - 1,
            number,
        ]
        stats = manager.stats()
        assert stats.num_dropped + stats.num_batches == number
        assert [batch.sequence for batch in batches] == [number - 3, number - 2, number - 1]


async def test_drop_oldest_drops_nothing_that_somebody_waits_for(make_manager):
    """collect() with min_steps beyond the queues is met, and by experiences without a gap."""
    config = {"overflow": "drop_oldest", "max_queue_size": 2, "num_workers": 1}
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, **config) as manager:
            collecting = asyncio.create_task(manager.collect(min_steps=20))
            await gate.visitor()
            gate.open()
            batches = await collecting
            assert [batch.data["number"].item() for batch in batches] == list(range(1, 21))


async def test_blocking_drops_nothing(make_manager):
    """By default a full queue makes the worker wait."""
    config = {"max_queue_size": 1, "num_workers": 1}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        numbers = []
        async for batch in manager.experiences():
            numbers.append(batch.data["number"].item())
            if len(numbers) == 30:
                break
        assert numbers == list(range(1, 31))
        assert manager.stats().num_dropped == 0


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_pacing_keeps_every_batch_as_fresh_as_wanted(make_manager, max_staleness):
    """With a steady learner no batch is older than max_staleness, and none is thrown away.

    With one worker, that is: which of several is starved, and so stale, nobody can tell.
    """
    config = {"max_staleness": max_staleness, "max_queue_size": 8, "num_workers": 1}
    model = torch.nn.Linear(1, 1)
    async with (
        fail_after(30),
        make_manager(pool_workers.Counting, model=model, **config) as manager,
    ):
        staleness = []
        for _ in range(30):
            batches = await manager.collect(min_steps=2)
            assert len(batches) == 2
            staleness += [batch.staleness for batch in batches]
            await manager.push_weights(model)
        assert max(staleness) <= max_staleness
        assert manager.stats().num_dropped == 0


async def test_pacing_stops_workers_that_run_ahead(make_manager):
    """Nobody collects more than (max_staleness + 1) updates' worth since the last push."""
    config = {"max_staleness": 1, "max_queue_size": 50}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        await manager.push_weights(WEIGHTS)
        for _ in range(5):
            await manager.collect(min_steps=6)
            await manager.push_weights(WEIGHTS, wait=True)
        await manager.pause()
        begun = sum((await manager.send_command("number")).values())
        assert begun <= 5 * 6 + 2 * 6
        await manager.resume()


async def test_pacing_gives_way_to_somebody_who_waits(make_manager):
    """A collect that wants more than the pace allows gets it instead of waiting for ever."""
    config = {"max_staleness": 0, "max_queue_size": 50}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        await manager.push_weights(WEIGHTS)
        assert len(await manager.collect(min_steps=100)) == 100


async def test_stale_batches_are_dropped_and_counted(make_manager):
    """With "drop" nothing older than max_staleness is delivered, and every loss is counted."""
    model = torch.nn.Linear(1, 1)
    config = {"max_staleness": 1, "staleness_policy": "drop", "max_queue_size": 4, "model": model}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        while manager.stats().num_queued < 8:  # all of them with the first weights
            await manager.send_command("number")
        await manager.push_weights(model)
        assert [batch.staleness for batch in await manager.collect(min_steps=2)] == [1, 1]
        await manager.push_weights(model)
        batches = await manager.collect(min_steps=8)
        assert len(batches) == 8
        assert max(batch.staleness for batch in batches) <= 1
        assert min(batch.weights_version for batch in batches) >= 2
        assert manager.stats().num_dropped >= 6
        await manager.pause()
        begun = sum((await manager.send_command("number")).values())
        stats = manager.stats()
        assert stats.num_batches + stats.num_dropped + stats.num_queued == begun


async def test_collect_never_counts_what_it_must_drop(make_manager):
    """Stale batches in the queue do not satisfy min_steps, nor a collect without it."""
    config = {"max_staleness": 0, "staleness_policy": "drop", "num_workers": 1}
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, **config) as manager:
            await manager.push_weights(WEIGHTS)
            (await gate.visitor()).release()
            held = await gate.visitor()
            await manager.push_weights(WEIGHTS)
            with pytest.raises(CollectTimeout, match="0 of 1 steps arrived"):
                await manager.collect(min_steps=1, timeout=0.05)
            with pytest.raises(CollectTimeout, match="nothing arrived"):
                await manager.collect(timeout=0.05)
            held.release()
            (await gate.visitor()).release()
            gate.open()
            assert [batch.staleness for batch in await manager.collect(min_steps=1)] == [0]
            assert manager.stats().num_dropped == 2


async def test_marking_delivers_everything_and_says_how_stale_it_is(make_manager):
    """With "mark" old batches come with their policy lag."""
    config = {"max_staleness": 0, "staleness_policy": "mark", "num_workers": 1}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        await manager.push_weights(WEIGHTS)
        while manager.stats().num_queued < 4:
            await manager.send_command("number")
        for _ in range(3):
            await manager.push_weights(WEIGHTS)
        batches = (await manager.collect())[:4]
        assert [(batch.staleness, batch.data["number"].item()) for batch in batches] in (
            [(3, 1), (3, 2), (3, 3), (3, 4)],
            [(4, 1), (3, 2), (3, 3), (3, 4)],  # the first may have begun before the first push
            [(4, 1), (4, 2), (3, 3), (3, 4)],
            [(4, 1), (4, 2), (4, 3), (3, 4)],
            [(4, 1), (4, 2), (4, 3), (4, 4)],
        )
        assert all(batch.staleness + batch.weights_version == 4 for batch in batches)
        assert manager.stats().num_dropped == 0


@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
async def test_workers_are_recycled_after_so_many_experiences(make_manager, worker):
    """Each process delivers exactly its number, then a successor takes over; it is no failure."""
    manager = make_manager(worker, max_experiences_per_worker=3)
    events = manager.events()
    async with fail_after(30), manager:
        batches = await manager.collect(min_steps=30)
        counts = {}
        for batch in batches:
            key = batch.worker_id, batch.incarnation
            assert batch.sequence == counts.get(key, 0)
            counts[key] = batch.sequence + 1
        assert max(counts.values()) == 3
        finished = [counts[key] for key in counts if (key[0], key[1] + 1) in counts]
        assert finished == [3] * len(finished)
        assert len(finished) >= 8
        exited = await next_event(events, WorkerExited)
        assert exited.cause is ExitCause.RECYCLED
        assert manager.incidents == ()


async def test_workers_are_recycled_above_their_memory_limit(make_manager):
    """A process whose memory is above the limit is replaced between two experiences."""
    manager = make_manager(pool_workers.Hoarding, num_workers=1, max_worker_rss=600 << 20)
    events = manager.events()
    async with fail_after(60), manager:
        async for batch in manager.experiences():
            assert batch.info["hoarded"] <= 600 << 20
            if batch.incarnation == 2:
                break
        exited = await next_event(events, WorkerExited)
        assert exited.cause is ExitCause.RECYCLED
        await next_event(events, WorkerReady, lambda event: event.incarnation == 2)
        assert manager.incidents == ()

"""The sync mode: rounds of exactly one experience per live worker with the newest weights."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

import pool_workers
from keisei.events import ExitCause, WorkerIncident, WorkerReady
from keisei.testing.failpoints import Failpoint, Gate, armed, kill
from keisei.testing.scenarios import fail_after, next_event

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
WORKERS = pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])


@BACKENDS
@WORKERS
async def test_a_round_is_one_experience_of_each_worker_in_order(make_manager, backend, worker):
    """Every collect returns one batch per worker, ordered by worker, with the same number."""
    config = {"mode": "sync", "num_workers": 3, "backend": backend}
    async with fail_after(30), make_manager(worker, **config) as manager:
        for number in range(1, 6):
            batches = await manager.collect()
            assert [batch.worker_id for batch in batches] == [0, 1, 2]
            assert [batch.data["number"].item() for batch in batches] == [number] * 3


@BACKENDS
async def test_every_round_has_exactly_the_newest_weights(make_manager, backend):
    """After each push the next round was collected with that version, by every worker."""
    config = {"mode": "sync", "backend": backend}
    weights = {"w": torch.zeros(3)}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        for expected in range(1, 8):
            weights["w"] += 1
            assert await manager.push_weights(weights) == expected
            batches = await manager.collect()
            assert [batch.weights_version for batch in batches] == [expected, expected]
            assert [batch.info["version"] for batch in batches] == [expected, expected]
            assert [batch.staleness for batch in batches] == [0, 0]


async def test_min_steps_takes_whole_rounds(make_manager):
    """As many rounds as needed for the steps, and all of the last one."""
    worker = partial(pool_workers.Counting, 10)
    async with fail_after(30), make_manager(worker, mode="sync") as manager:
        batches = await manager.collect(min_steps=50)
        order = [(batch.data["number"][0].item(), batch.worker_id) for batch in batches]
        assert order == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


async def test_workers_wait_between_rounds(make_manager):
    """Nothing is collected that no round has asked for."""
    async with fail_after(30), make_manager(pool_workers.Counting, mode="sync") as manager:
        assert await manager.send_command("number") == {0: 0, 1: 0}
        await manager.collect()
        assert await manager.send_command("number") == {0: 1, 1: 1}
        assert manager.stats().num_queued == 0


async def test_a_worker_killed_in_a_round_is_replaced_within_it(make_manager):
    """The round waits for the successor, which brings its one experience with the same version."""
    worker = armed(pool_workers.Counting, Failpoint("collect", kill, worker_id=1, hit=2))
    manager = make_manager(worker, mode="sync")
    async with fail_after(30), manager:
        await manager.push_weights({"w": torch.ones(2)})
        await manager.collect()
        batches = await manager.collect()
        assert [(batch.worker_id, batch.incarnation) for batch in batches] == [(0, 0), (1, 1)]
        assert [batch.weights_version for batch in batches] == [1, 1]
        assert [batch.data["number"].item() for batch in batches] == [2, 1]
        (incident,) = manager.incidents
        assert (incident.worker_id, incident.incarnation) == (1, 0)
        assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGKILL")
        assert (incident.phase, incident.experiences_lost) == ("collect", 1)


async def test_an_experience_that_was_sent_counts_for_the_round(make_manager):
    """A worker that dies right after sending has done its part; nobody collects it again."""
    worker = armed(pool_workers.Counting, Failpoint("committed", kill, worker_id=0))
    manager = make_manager(worker, mode="sync")
    events = manager.events()
    async with fail_after(30), manager:
        batches = await manager.collect()
        assert [(batch.worker_id, batch.incarnation) for batch in batches] == [(0, 0), (1, 0)]
        await next_event(events, WorkerIncident)
        await next_event(events, WorkerReady)
        batches = await manager.collect()
        assert [(batch.worker_id, batch.incarnation) for batch in batches] == [(0, 1), (1, 0)]
        assert manager.incidents[0].experiences_lost == 0


async def test_a_pool_without_a_ready_worker_goes_on_with_the_next_one(make_manager):
    """A round that is asked for while the only worker is being replaced waits for it."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting,
            Failpoint("committed", kill),
            Failpoint("setup", gate.hold, incarnation=1),
        )
        manager = make_manager(worker, mode="sync", num_workers=1)
        async with fail_after(30), manager:
            assert [batch.incarnation for batch in await manager.collect()] == [0]
            starting = await gate.visitor()
            collecting = asyncio.create_task(manager.collect())
            await manager.send_command("number", worker_ids=[])  # a turn of the loop
            assert not collecting.done()
            starting.release()
            assert [batch.incarnation for batch in await collecting] == [1]


async def test_a_cancelled_round_goes_on_by_itself(make_manager):
    """Its experiences come with the next call; nobody collects a second time."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, mode="sync") as manager:
            first = asyncio.create_task(manager.collect())
            held = [await gate.visitor(), await gate.visitor()]
            first.cancel()
            await asyncio.wait([first])
            assert first.cancelled()
            for visitor in held:
                visitor.release()
            batches = await manager.collect()
            assert [batch.data["number"].item() for batch in batches] == [1, 1]
            gate.open()


async def test_weights_are_not_pushed_into_a_round(make_manager):
    """A push waits for the round that has begun; the next round has them."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, mode="sync") as manager:
            await manager.push_weights({"w": torch.zeros(1)})
            collecting = asyncio.create_task(manager.collect())
            held = [await gate.visitor(), await gate.visitor()]
            pushing = asyncio.create_task(manager.push_weights({"w": torch.ones(1)}))
            for _ in range(20):
                await pool_workers.turn()
            assert not pushing.done()
            assert manager.weights_version == 1
            for visitor in held:
                visitor.release()
            assert [batch.weights_version for batch in await collecting] == [1, 1]
            assert await pushing == 2
            gate.open()
            assert [batch.weights_version for batch in await manager.collect()] == [2, 2]


async def test_pushes_beside_a_reader_never_mix_versions_in_a_round(make_manager):
    """With a task that pushes large weights all the time, each round still has one version."""
    weights = {"w": torch.zeros(1 << 19)}
    manager = make_manager(pool_workers.Counting, mode="sync", num_workers=3)
    async with fail_after(60), manager:

        async def push():
            while True:
                await manager.push_weights(weights)

        pushing = asyncio.create_task(push())
        seen = []
        for _ in range(40):
            batches = await manager.collect()
            versions = {batch.weights_version for batch in batches}
            assert len(batches) == 3
            assert len(versions) == 1
            seen += versions
        pushing.cancel()
        await asyncio.wait([pushing])
        assert seen == sorted(seen)
        assert seen[-1] > 5


async def test_concurrent_readers_never_split_a_round_unevenly(make_manager):
    """Each of two concurrent collects returns a whole round."""
    async with fail_after(30), make_manager(pool_workers.Counting, mode="sync") as manager:
        rounds = await asyncio.gather(*(manager.collect() for _ in range(6)))
        assert [[batch.worker_id for batch in batches] for batches in rounds] == [[0, 1]] * 6
        numbers = [batches[0].data["number"].item() for batches in rounds]
        assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


async def test_experiences_iterates_round_by_round(make_manager):
    """The next round begins when the batches of the one before have been taken."""
    async with fail_after(30), make_manager(pool_workers.Counting, mode="sync") as manager:
        order = []
        async for batch in manager.experiences():
            order.append((batch.data["number"].item(), batch.worker_id))
            if len(order) == 5:
                break
        assert order == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
        assert [batch.worker_id for batch in await manager.collect()] == [1]


async def test_a_recycled_worker_leaves_no_gap_in_the_rounds(make_manager):
    """Workers that are replaced on purpose after each two experiences miss no round."""
    config = {"mode": "sync", "max_experiences_per_worker": 2}
    manager = make_manager(pool_workers.Counting, **config)
    events = manager.events()
    async with fail_after(30), manager:
        for number in range(8):
            if number % 2 == 0:  # a round begins with those that are ready
                for _ in range(2):
                    await next_event(events, WorkerReady)
            batches = await manager.collect()
            assert [batch.worker_id for batch in batches] == [0, 1]
            assert [batch.incarnation for batch in batches] == [number // 2] * 2
        assert manager.incidents == ()

"""scale(): up and down, with draining; nothing that was committed is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
import torch

import pool_workers
from keisei.events import ExitCause, PoolScaled, WorkerExited, WorkerReady
from keisei.exceptions import WorkerLost
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.leaks import children
from keisei.testing.scenarios import fail_after, next_event

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])


@BACKENDS
async def test_scaling_up_adds_ready_workers(make_manager, backend):
    """When scale returns, the new workers answer, have the weights, and collect."""
    async with fail_after(30), make_manager(pool_workers.Counting, backend=backend) as manager:
        await manager.push_weights({"w": torch.zeros(1)})
        await manager.scale(4)
        assert [info.worker_id for info in manager.workers] == [0, 1, 2, 3]
        assert manager.stats().num_workers == manager.stats().num_ready == 4
        assert manager.is_healthy
        replies = await manager.send_command("version", worker_ids=[2, 3])
        assert replies == {2: 1, 3: 1}
        assert await pool_workers.workers_heard(manager, 4) == {0, 1, 2, 3}


@BACKENDS
async def test_scaling_down_removes_the_upper_slots(make_manager, backend):
    """When scale returns, the processes are gone and are no incidents; the others go on."""
    manager = make_manager(pool_workers.Counting, backend=backend, num_workers=4)
    events = manager.events()
    async with fail_after(30), manager:
        pids = [info.pid for info in manager.workers]
        await manager.scale(1)
        assert [info.worker_id for info in manager.workers] == [0]
        assert manager.stats().num_workers == manager.stats().num_ready == 1
        if backend == "local":
            assert not set(pids[1:]) & set(children())
        assert await manager.send_command("worker_id") == {0: 0}
        with pytest.raises(WorkerLost):
            await manager.send_command("worker_id", worker_ids=[3])
        exited = [await next_event(events, WorkerExited) for _ in range(3)]
        assert {event.worker_id for event in exited} == {1, 2, 3}
        assert {event.cause for event in exited} <= {ExitCause.REQUESTED, ExitCause.GOODBYE}
        assert (await next_event(events, PoolScaled)).num_workers == 1
        assert manager.incidents == ()
        assert len(await manager.collect(min_steps=20)) >= 20


@pytest.mark.parametrize("large", [False, True], ids=["small frames", "large frames"])
async def test_nothing_committed_is_lost_by_scaling_down(make_manager, large):
    """All that a removed worker delivered, by its own account, is there: 1, 2, 3 … to the last."""
    with Gate() as gate:
        worker = partial(pool_workers.Reporting, gate, large)
        async with fail_after(30), make_manager(worker, num_workers=3) as manager:
            numbers = {0: [], 1: [], 2: []}
            for batch in await manager.collect(min_steps=5):
                numbers[batch.worker_id].append(batch.data["number"].item())
            scaling = asyncio.create_task(manager.scale(1))
            reports = [await gate.visitor(), await gate.visitor()]
            gate.open()
            await scaling
            await manager.pause()
            for batch in await manager.collect():
                numbers[batch.worker_id].append(batch.data["number"].item())
            for report in reports:
                worker_id, delivered = map(int, report.label.split())
                assert numbers[worker_id] == list(range(1, delivered + 1))


@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_a_removed_worker_finishes_what_it_is_collecting(make_manager, mode):
    """The experience that was under way is delivered before the process ends."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker, mode=mode) as manager:
            collecting = asyncio.create_task(manager.collect(min_steps=2))
            held = await gate.visitor()
            scaling = asyncio.create_task(manager.scale(1))
            await asyncio.wait([scaling], timeout=0.05)
            assert not scaling.done()
            held.release()
            await scaling
            batches = await collecting
            if mode == "sync":
                assert [batch.worker_id for batch in batches] == [0, 1]
                assert [batch.worker_id for batch in await manager.collect()] == [0]
            else:
                batches += await manager.collect()
                assert 1 in {batch.worker_id for batch in batches}
            assert manager.incidents == ()


async def test_a_round_does_not_wait_for_a_slot_that_was_removed(make_manager):
    """A worker that has not begun its part of the round leaves it without one."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker, mode="sync") as manager:
            busy = asyncio.create_task(manager.send_command("echo", worker_ids=[1]))
            held = await gate.visitor()
            collecting = asyncio.create_task(manager.collect())
            await asyncio.wait([collecting], timeout=0.05)
            scaling = asyncio.create_task(manager.scale(1))
            await asyncio.wait([scaling], timeout=0.05)
            held.release()
            await scaling
            assert await busy == {1: None}
            assert [batch.worker_id for batch in await collecting] in ([0], [0, 1])
            assert [batch.worker_id for batch in await manager.collect()] == [0]


@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_scaling_back_and_forth(make_manager, mode):
    """Slots that come back have new incarnations and fresh queues; batches keep their order."""
    async with fail_after(60), make_manager(pool_workers.Counting, mode=mode) as manager:
        last = {}
        for size in (1, 3, 2, 4, 1, 2):
            await manager.scale(size)
            for batch in await manager.collect(min_steps=10):
                key = batch.worker_id, batch.incarnation
                assert batch.sequence == last.get(key, -1) + 1
                last[key] = batch.sequence
            assert manager.stats().num_ready == size
        async for batch in manager.experiences():
            if (batch.worker_id, batch.incarnation) == (1, 2):
                break
        assert manager.incidents == ()


async def test_concurrent_scales_end_in_a_size_that_was_asked_for(make_manager):
    """Calls at the same time are carried out one after the other."""
    async with fail_after(60), make_manager(pool_workers.Counting) as manager:
        await asyncio.gather(*(manager.scale(size) for size in (4, 1, 3, 1, 2, 3)))
        assert manager.stats().num_workers == manager.stats().num_ready == 3
        assert (await manager.send_command("worker_id")) == {0: 0, 1: 1, 2: 2}
        assert await pool_workers.workers_heard(manager, 3) == {0, 1, 2}
        assert manager.incidents == ()


async def test_a_slot_that_is_still_draining_can_be_added_again(make_manager):
    """Its new process starts when the old one has gone; there are never two."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        manager = make_manager(worker)
        events = manager.events()
        async with fail_after(30), manager:
            held = await gate.visitor()
            down = asyncio.create_task(manager.scale(1))
            await asyncio.wait([down], timeout=0.05)
            down.cancel()
            await asyncio.wait([down])
            up = asyncio.create_task(manager.scale(2))
            await asyncio.wait([up], timeout=0.05)
            assert not up.done()
            held.release()
            await up
            await next_event(events, WorkerExited)
            ready = await next_event(events, WorkerReady)
            assert (ready.worker_id, ready.incarnation) == (1, 1)
            assert await manager.send_command("worker_id") == {0: 0, 1: 1}
            heard = set()
            while not heard >= {(0, 0), (1, 1)}:
                heard |= {(b.worker_id, b.incarnation) for b in await manager.collect()}
            assert manager.incidents == ()


async def test_a_cancelled_scale_goes_on_by_itself(make_manager):
    """The slots are filled although nobody waits for it any more."""
    manager = make_manager(pool_workers.Counting)
    events = manager.events()
    async with fail_after(30), manager:
        scaling = asyncio.create_task(manager.scale(3))
        await asyncio.wait([scaling], timeout=0)
        scaling.cancel()
        await asyncio.wait([scaling])
        await next_event(events, WorkerReady, lambda event: event.worker_id == 2)
        assert await manager.send_command("worker_id", worker_ids=[2]) == {2: 2}


async def test_a_worker_killed_while_it_drains_is_gone_all_the_same(make_manager):
    """scale() returns when the process is gone, however that came about."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            scaling = asyncio.create_task(manager.scale(1))
            await asyncio.wait([scaling], timeout=0.05)
            os.kill(held.pid, signal.SIGKILL)
            await scaling
            assert [info.worker_id for info in manager.workers] == [0]
            assert len(await manager.collect(min_steps=30)) >= 30


@pytest.mark.parametrize("size", [0, -1])
async def test_a_pool_needs_a_worker(make_manager, size):
    """Less than one is refused, and nothing has changed."""
    async with fail_after(30), make_manager(pool_workers.Counting, backend="inline") as manager:
        with pytest.raises(ValueError, match=f"num_workers is {size}; a pool needs at least one"):
            await manager.scale(size)
        assert manager.stats().num_workers == 2


async def test_scaling_to_the_present_size_changes_nothing(make_manager):
    """Nobody is restarted."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        pids = [info.pid for info in manager.workers]
        await manager.scale(2)
        assert [info.pid for info in manager.workers] == pids


async def test_each_worker_knows_how_many_there_were_when_it_started(make_manager):
    """context.num_workers is the number of slots at the start of the process."""
    async with fail_after(30), make_manager(partial(pool_workers.Knowing)) as manager:
        await manager.scale(3)
        assert await manager.send_command("num_workers") == {0: 2, 1: 2, 2: 3}

"""restart(): a fresh process for one worker, on request; nothing that was committed is lost."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import torch

import pool_workers
from keisei.events import ExitCause, WorkerExited, WorkerReady
from keisei.exceptions import WorkerLost
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.leaks import children
from keisei.testing.scenarios import fail_after, next_event

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])


@BACKENDS
async def test_a_restarted_worker_is_a_new_process_with_the_newest_weights(make_manager, backend):
    """When restart returns, its successor answers and collects; its sibling is what it was."""
    manager = make_manager(pool_workers.Counting, backend=backend)
    events = manager.events()
    async with fail_after(30), manager:
        await manager.push_weights({"w": torch.zeros(1)})
        before = manager.workers
        await manager.restart(1)
        after = manager.workers
        assert [info.incarnation for info in after] == [0, 1]
        assert after[0].pid == before[0].pid
        if backend == "local":
            assert after[1].pid != before[1].pid
            assert before[1].pid not in children()
        assert await manager.send_command("version", worker_ids=[1]) == {1: 1}
        assert await pool_workers.workers_heard(manager, 2) == {0, 1}
        exited = await next_event(events, WorkerExited)
        assert exited == WorkerExited(1, 0, ExitCause.RECYCLED)
        assert (await next_event(events, WorkerReady)).incarnation == 1
        assert (manager.incidents, manager.stats().num_restarts) == ((), 1)
        assert manager.is_healthy


@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_the_experience_that_is_being_collected_is_delivered(make_manager, mode):
    """The old process finishes its work first, and a round is complete with it."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker, mode=mode) as manager:
            collecting = asyncio.create_task(manager.collect(min_steps=2))
            held = await gate.visitor()
            restarting = asyncio.create_task(manager.restart(1))
            await asyncio.wait([restarting], timeout=0.05)
            assert not restarting.done()
            held.release()
            await restarting
            batches = await collecting
            while (1, 1) not in {(batch.worker_id, batch.incarnation) for batch in batches}:
                batches += await manager.collect()
            numbers = [batch.data["number"].item() for batch in batches if batch.worker_id == 1]
            assert numbers[0] == 1
            assert manager.stats().num_lost == 0


async def test_a_round_gets_its_experience_from_the_successor(make_manager):
    """A worker that had not begun its part of a round is replaced within it."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker, mode="sync") as manager:
            busy = asyncio.create_task(manager.send_command("echo", worker_ids=[1]))
            held = await gate.visitor()
            collecting = asyncio.create_task(manager.collect())
            restarting = asyncio.create_task(manager.restart(1))
            await asyncio.wait([restarting], timeout=0.05)
            held.release()
            await restarting
            assert await busy == {1: None}
            assert [batch.worker_id for batch in await collecting] == [0, 1]


async def test_a_worker_that_is_restarted_in_a_pause_stands_still(make_manager):
    """Its successor collects nothing before resume."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        await manager.pause()
        await manager.restart(0)
        assert await manager.send_command("number", worker_ids=[0]) == {0: 0}
        await manager.resume()
        assert await pool_workers.workers_heard(manager, 2) == {0, 1}


async def test_a_worker_that_dies_while_it_is_restarted_is_replaced_once(make_manager):
    """The call returns with the next incarnation, however the old process came to its end."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            restarting = asyncio.create_task(manager.restart(1))
            await asyncio.wait([restarting], timeout=0.05)
            os.kill(held.pid, signal.SIGKILL)
            await restarting
            assert [info.incarnation for info in manager.workers] == [0, 1]
            assert manager.incidents == ()


async def test_a_slot_that_was_given_up_is_filled_again(make_manager):
    """The pool is complete again, which nothing else brings about."""
    manager = make_manager(
        pool_workers.Counting, on_exhausted="degrade", restart={"max_restarts": 0}
    )
    events = manager.events()
    async with fail_after(30), manager:
        os.kill(manager.workers[1].pid, signal.SIGKILL)
        while manager.workers[1].state != "given up":
            await anext(events)
        assert not manager.is_healthy
        await manager.restart(1)
        assert manager.is_healthy
        assert await pool_workers.workers_heard(manager, 2) == {0, 1}


async def test_a_cancelled_restart_goes_on_by_itself(make_manager):
    """The slot is filled although nobody waits for it any more, and calls may be repeated."""
    manager = make_manager(pool_workers.Counting)
    events = manager.events()
    async with fail_after(30), manager:
        for turns in range(6):
            restarting = asyncio.create_task(manager.restart(0))
            await asyncio.wait([restarting], timeout=0 if turns % 2 else 0.002 * turns)
            restarting.cancel()
            await asyncio.wait([restarting])
        await next_event(events, WorkerReady, lambda one: one.worker_id == 0 < one.incarnation)
        await asyncio.gather(manager.restart(0), manager.restart(0))
        assert manager.is_healthy
        assert manager.incidents == ()


async def test_a_pool_that_stops_restarts_nobody(make_manager):
    """Whoever waits for the successor is told that there is none."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            restarting = asyncio.create_task(manager.restart(1))
            await asyncio.wait([restarting], timeout=0.05)
            stopping = asyncio.create_task(manager.stop())
            held.release()
            await stopping
            with pytest.raises(WorkerLost, match=r"^worker 1 was not restarted: its slot is stop"):
                await restarting


@pytest.mark.parametrize("worker_id", [-1, 2])
async def test_a_slot_that_does_not_exist_is_refused(make_manager, worker_id):
    """The error names the workers that there are, and nothing has changed."""
    async with fail_after(30), make_manager(pool_workers.Counting, backend="inline") as manager:
        expected = f"^worker_id is {worker_id}; this pool has the workers 0 to 1$"
        with pytest.raises(ValueError, match=expected):
            await manager.restart(worker_id)
        assert [info.incarnation for info in manager.workers] == [0, 0]


async def test_the_age_of_a_process_is_told(make_manager):
    """A new process is younger than its sibling, and all have moved since they started."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        await manager.restart(1)
        old, new = manager.workers
        assert old.age > new.age > 0
        assert 0 <= old.seconds_since_progress <= old.age + 60
    assert [(one.age, one.seconds_since_progress) for one in manager.workers] == [(0, 0)] * 2


async def test_a_manager_tells_its_state(make_manager):
    """It goes from "not started" to "running" to "stopped"."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    states = [manager.state]
    async with fail_after(30):
        starting = asyncio.create_task(manager.start())
        await asyncio.wait([starting], timeout=0)
        states.append(manager.state)
        await starting
        states.append(manager.state)
        await manager.stop()
    assert [*states, manager.state] == ["not started", "starting", "running", "stopped"]

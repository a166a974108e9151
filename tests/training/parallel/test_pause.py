"""pause() is a barrier; resume() and reset()."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest

import pool_workers
from keisei.events import PoolPaused, PoolResumed, WorkerReady
from keisei.exceptions import CollectTimeout, CommandTimeout
from keisei.testing.failpoints import ARM, Failpoint, Gate, armed, kill
from keisei.testing.scenarios import fail_after, next_event

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
WORKERS = pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
MODES = pytest.mark.parametrize("mode", ["async", "sync"])


async def count(manager):
    """Return how many experiences the workers have collected, by their own account."""
    return await manager.send_command("number")


@BACKENDS
@WORKERS
async def test_nothing_is_collected_after_pause_returns(make_manager, backend, worker):
    """Demand for more, and room for more, move nobody until resume; then nothing is missing."""
    async with fail_after(30), make_manager(worker, backend=backend) as manager:
        batches = await manager.collect(min_steps=10)
        await manager.pause()
        assert manager.stats().is_paused
        before = await count(manager)
        arrived = sum(before.values())
        collecting = asyncio.create_task(manager.collect(min_steps=arrived + 20))
        for _ in range(20):
            assert await count(manager) == before
        assert not collecting.done()
        await manager.resume()
        batches += await collecting
        found = {0: [], 1: []}
        for batch in batches:
            found[batch.worker_id].append(batch.data["number"].item())
        assert all(ones == list(range(1, len(ones) + 1)) for ones in found.values())
        assert len(batches) == arrived + 30


@MODES
async def test_pause_waits_for_what_is_being_collected(make_manager, mode):
    """The barrier falls when the last experience that had begun is delivered."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, mode=mode) as manager:
            collecting = asyncio.create_task(manager.collect(min_steps=2))
            held = [await gate.visitor(), await gate.visitor()]
            pausing = asyncio.create_task(manager.pause())
            await pool_workers.turn()  # it is told to both before one of them can go on
            held[0].release()
            await asyncio.wait([pausing], timeout=0.05)
            assert not pausing.done()
            held[1].release()
            await pausing
            assert [batch.data["number"].item() for batch in await collecting] == [1, 1]
            assert await count(manager) == {0: 1, 1: 1}
            gate.open()


@MODES
async def test_pause_waits_for_a_collect_that_is_a_coroutine(make_manager, mode):
    """The worker answers commands beside its collect, but the pause only when that has ended."""
    with Gate() as gate:
        worker = partial(pool_workers.Coroutine, gate=gate)
        async with fail_after(30), make_manager(worker, mode=mode) as manager:
            collecting = asyncio.create_task(manager.collect(min_steps=2))
            held = sorted([await gate.visitor(), await gate.visitor()], key=lambda it: it.label)
            pausing = asyncio.create_task(manager.pause())
            for _ in range(3):  # what is answered was asked after the pause
                assert await count(manager) == {0: 0, 1: 0}
            assert not pausing.done()
            held[0].release()
            while await count(manager) != {0: 1, 1: 0}:
                pass
            assert await count(manager) == {0: 1, 1: 0}
            assert not pausing.done()
            held[1].release()
            await pausing
            assert [batch.data["number"].item() for batch in await collecting] == [1, 1]
            assert await count(manager) == {0: 1, 1: 1}
            gate.open()


@WORKERS
async def test_pause_brings_what_came_while_the_queues_rested(make_manager, force_rests, worker):
    """All that was delivered is here when pause returns, although no look at it was due yet."""
    force_rests(3600.0)
    with Gate() as gate:
        worker = partial(worker, gate=gate)
        async with fail_after(30), make_manager(worker, max_queue_size=16) as manager:
            for visitor in [await gate.visitor(), await gate.visitor()]:
                visitor.release()
            while manager.stats().num_queued < 2:  # one look at each queue
                await pool_workers.turn()
            gate.open()
            while await count(manager) != {0: 16, 1: 16}:
                pass
            assert manager.stats().num_queued == 2, "the queues rest"
            await manager.pause()
            assert manager.queue_info().experience_queue_sizes == (16, 16)
            assert len(await manager.collect()) == 32


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("rests", [None, 0.02], ids=["", "rests"])
@WORKERS
async def test_pause_brings_everything_whatever_the_queues_hold(
    make_manager, force_rests, worker, size, rests
):
    """In a stream of batches each pause is complete: what was collected is queued or taken."""
    if rests is not None:
        force_rests(rests)
    async with fail_after(60), make_manager(worker, max_queue_size=size) as manager:
        for _ in range(8):
            await manager.pause()
            here = manager.stats().num_queued + manager.stats().num_batches
            assert here == sum((await count(manager)).values())
            await manager.resume()
            await manager.collect(min_steps=size)


async def test_commands_and_weights_are_handled_while_paused(make_manager):
    """A paused worker answers, and takes new weights, without collecting."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        await manager.pause()
        before = await count(manager)
        assert await manager.send_command("echo", "hello") == {0: "hello", 1: "hello"}
        await manager.push_weights({"w": pool_workers.torch.zeros(1)}, wait=True)
        assert await manager.send_command("version") == {0: 1, 1: 1}
        assert await count(manager) == before


async def test_a_push_waits_for_no_round_of_a_paused_pool(make_manager):
    """A round that a pause holds up goes on after it, with what was pushed and set meanwhile."""
    async with fail_after(30), make_manager(pool_workers.Counting, mode="sync") as manager:
        await manager.pause()
        collecting = asyncio.create_task(manager.collect(min_steps=2))
        await pool_workers.turn()
        assert await manager.push_weights({"w": pool_workers.torch.zeros(1)}, wait=True) == 1
        assert await manager.configure({"level": 1}) == 1
        await manager.resume()
        batches = await collecting
        assert [(one.weights_version, one.settings_version) for one in batches] == [(1, 1)] * 2


async def test_what_was_delivered_before_can_be_taken_while_paused(make_manager):
    """All that the workers have delivered is there when pause returns; no more of it comes."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        for _ in range(30):
            await manager.pause()
            here = manager.stats().num_queued + manager.stats().num_batches
            assert here == sum((await count(manager)).values())
            await manager.resume()
            await manager.collect(min_steps=4)
        while manager.queue_info().experience_queue_sizes != (4, 4):
            await count(manager)
        await manager.pause()
        assert len(await manager.collect()) == 8
        with pytest.raises(CollectTimeout):
            await manager.collect(timeout=0.05)


@MODES
async def test_a_worker_that_is_replaced_while_paused_stays_paused(make_manager, mode):
    """The new process does not collect until resume."""
    manager = make_manager(pool_workers.Counting, mode=mode)
    events = manager.events()
    async with fail_after(30), manager:
        await manager.pause()
        os.kill(manager.workers[0].pid, signal.SIGKILL)
        await next_event(events, WorkerReady, lambda event: event.incarnation == 1)
        with pytest.raises(CollectTimeout):
            await manager.collect(min_steps=100, timeout=0.05)
        assert (await count(manager))[0] == 0
        await manager.resume()
        seen = set()
        while not seen >= {(0, 1), (1, 0)}:
            seen |= {(batch.worker_id, batch.incarnation) for batch in await manager.collect()}


@MODES
async def test_a_worker_that_was_starting_when_the_pause_began_does_not_collect(make_manager, mode):
    """It was told to collect at its start; the pause came later and holds for it too."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting,
            Failpoint("on_command", kill, worker_id=0),
            Failpoint("setup", gate.hold, worker_id=0, incarnation=1),
        )
        manager = make_manager(worker, mode=mode)
        events = manager.events()
        async with fail_after(30), manager:
            dying = asyncio.create_task(manager.send_command("echo", worker_ids=[0]))
            starting = await gate.visitor()
            await asyncio.wait([dying])
            assert dying.exception() is not None
            await manager.pause()
            starting.release()
            await next_event(events, WorkerReady, lambda event: event.incarnation == 1)
            with pytest.raises(CollectTimeout):
                await manager.collect(min_steps=100, timeout=0.05)
            assert (await count(manager))[0] == 0
            await manager.resume()
            assert await pool_workers.workers_heard(manager, 2) == {0, 1}


async def test_pause_and_resume_may_be_repeated(make_manager):
    """Twice the one, twice the other, both at once: the last word counts."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        for _ in range(5):
            await manager.collect(min_steps=3)
            await manager.pause()
            await manager.pause()
            await asyncio.gather(manager.pause(), manager.pause())
            before = await count(manager)
            assert await count(manager) == before
            await manager.resume()
            await manager.resume()
            await manager.collect(min_steps=20)
        pausing = asyncio.create_task(manager.pause())
        await asyncio.wait([pausing], timeout=0)
        await manager.resume()
        await pausing
        assert not manager.stats().is_paused
        await manager.collect(min_steps=20)


async def test_a_pause_that_times_out_names_the_worker_and_stays_in_force(make_manager):
    """The pool is pausing all the same; the slow worker stands still when it is done."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=0))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            with pytest.raises(CommandTimeout, match=r"worker 0 .* within 0.05 s; it is in coll"):
                await manager.pause(timeout=0.05)
            assert manager.stats().is_paused
            held.release()
            await manager.pause()
            before = await count(manager)
            assert before[0] == 1
            await manager.resume()
            await manager.collect(min_steps=30)


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_a_worker_that_stands_still_is_never_taken_for_hung(make_manager, how):
    """Nobody owes anything in a pause, whether or not its barrier was waited for."""
    with Gate() as gate:
        manager = make_manager(armed(pool_workers.Counting), collect_timeout=0.4)
        holding = Failpoint("collect", gate.hold, worker_id=1)
        async with fail_after(30), manager:
            # Not before all are there: it is not for long that it may stand there.
            await manager.send_command(ARM, [holding], worker_ids=[1])
            collecting = asyncio.create_task(manager.collect(min_steps=100))
            held = await gate.visitor()
            collecting.cancel()
            await asyncio.wait([collecting])
            if how == "timeout":
                with pytest.raises(CommandTimeout):
                    await manager.pause(timeout=0.01)
            else:
                pausing = asyncio.create_task(manager.pause())
                await asyncio.wait([pausing], timeout=0.01)
                pausing.cancel()
                await asyncio.wait([pausing])
            held.release()
            with pytest.raises(CollectTimeout):
                await manager.collect(min_steps=100, timeout=1.5)
            assert manager.incidents == ()
            await manager.resume()
            await manager.collect(min_steps=100)


async def test_a_worker_that_dies_in_a_pause_stands_still(make_manager):
    """The barrier falls although a worker died instead of coming to rest."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            pausing = asyncio.create_task(manager.pause())
            await asyncio.wait([pausing], timeout=0.05)
            os.kill(held.pid, signal.SIGKILL)
            await pausing
            assert manager.stats().is_paused


async def test_a_new_worker_of_a_paused_pool_is_paused(make_manager):
    """scale() during a pause starts workers that stand still."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        await manager.pause()
        await manager.scale(3)
        with pytest.raises(CollectTimeout):
            await manager.collect(min_steps=100, timeout=0.05)
        assert (await count(manager))[2] == 0
        await manager.resume()
        assert await pool_workers.workers_heard(manager, 3) == {0, 1, 2}


async def test_pause_and_resume_are_told(make_manager):
    """Events say when the pool stands still and when it goes on."""
    manager = make_manager(pool_workers.Counting)
    events = manager.events()
    async with fail_after(30), manager:
        await manager.pause()
        await next_event(events, PoolPaused)
        await manager.resume()
        await next_event(events, PoolResumed)


@BACKENDS
async def test_reset_begins_again_in_every_worker(make_manager, backend):
    """reset() calls the hook once in each worker; what was collected before stays queued."""
    manager = make_manager(pool_workers.Counting, backend=backend, mode="sync")
    async with fail_after(30), manager:
        await manager.collect()
        await manager.collect()
        await manager.reset()
        assert await manager.send_command("resets") == {0: 1, 1: 1}
        assert [batch.data["number"].item() for batch in await manager.collect()] == [1, 1]
        assert [batch.sequence for batch in await manager.collect()] == [3, 3]


async def test_an_error_in_reset_is_the_callers(make_manager):
    """The worker lives on; the caller hears what was raised."""
    worker = armed(pool_workers.Counting, Failpoint("reset", pool_workers.no))
    async with fail_after(30), make_manager(worker) as manager:
        with pytest.raises(Exception, match="worker 0 answered command 'reset' with an error"):
            await manager.reset()
        await manager.reset()
        assert await manager.send_command("resets") == {0: 1, 1: 1}
        await manager.send_command(ARM, [])
        assert manager.incidents == ()

"""Cancellation: each public await, cancelled at every point, leaves a pool that answers right."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

import backend_workers
import pool_workers
from keisei.exceptions import ManagerStateError
from keisei.testing.leaks import check_no_leaks
from keisei.testing.scenarios import fail_after

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
MODES = pytest.mark.parametrize("mode", ["async", "sync"])
WEIGHTS = {"w": torch.zeros(4)}
LARGE = {"w": torch.zeros(1 << 19)}


class Account:
    """Checks that a worker's experiences come as 1, 2, 3 …, whatever else happens."""

    def __init__(self):
        self.last = {}

    def book(self, batches):
        for batch in batches:
            key = batch.worker_id, batch.incarnation
            number = batch.data["number"][0].item()
            assert number == self.last.get(key, 0) + 1, f"{key}: {number} after {self.last}"
            self.last[key] = number
        return batches


async def cancel_after(awaitable, turns):
    """Cancel ``awaitable`` after so many turns of the loop; return its result, or ``None``."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(turns):
        if task.done():
            break
        await one_turn()
    was_done = task.done()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() != was_done or not task.cancelled()
    return None if task.cancelled() else task.result()


async def one_turn():
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    await turned.wait()


async def assert_right_answers(manager, account):
    """Use the pool in every way and check what comes back."""
    everybody = range(manager.stats().num_workers)
    assert await manager.send_command("worker_id") == dict(zip(everybody, everybody, strict=True))
    account.book(await manager.collect(min_steps=4))
    assert not manager.stats().is_paused
    assert manager.incidents == ()


def collect(manager, account):
    return manager.collect(min_steps=3)


def push(manager, account):
    return manager.push_weights(WEIGHTS, wait=True)


def push_large(manager, account):
    return manager.push_weights(LARGE, wait=True)


def command(manager, account):
    return manager.send_command("echo", 1)


def large_command(manager, account):
    return manager.send_command("echo", bytes(3_000_000))


def reset_nothing(manager, account):
    return manager.send_command("resets")


async def pause_and_resume(manager, account):
    try:
        await manager.pause()
    finally:
        await manager.resume()


CALLS = [collect, push, command, reset_nothing, pause_and_resume]


@BACKENDS
@MODES
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
async def test_a_call_cancelled_at_any_turn_leaves_the_pool_consistent(
    make_manager, backend, mode, call
):
    """Cancelled after 0, 1, 2 … turns of the loop: no batch is lost or doubled, nothing hangs."""
    manager = make_manager(pool_workers.Counting, backend=backend, mode=mode)
    account = Account()
    async with fail_after(60), manager:
        for turns in range(12):
            result = await cancel_after(call(manager, account), turns)
            if call is collect and result is not None:
                account.book(result)
            await assert_right_answers(manager, account)
        version = manager.weights_version
        assert manager.stats().num_pushes == version
        assert await manager.push_weights(WEIGHTS, wait=True) == version + 1
        assert await manager.send_command("version") == dict.fromkeys(range(2), version + 1)


@pytest.mark.parametrize("call", [push_large, large_command], ids=lambda call: call.__name__)
async def test_calls_that_use_a_thread_can_be_cancelled_too(make_manager, call):
    """What is copied or pickled in a thread is either done or not, and counted so."""
    manager = make_manager(pool_workers.Counting)
    account = Account()
    async with fail_after(60), manager:
        for turns in range(0, 24, 2):
            await cancel_after(call(manager, account), turns)
            assert manager.stats().num_pushes == manager.weights_version
        await assert_right_answers(manager, account)


@BACKENDS
@MODES
async def test_iteration_cancelled_at_any_turn_loses_no_batch(make_manager, backend, mode):
    """A step of experiences() either returns a batch or leaves it to the next one."""
    manager = make_manager(pool_workers.Counting, backend=backend, mode=mode)
    account = Account()
    async with fail_after(60), manager:
        for turns in [0, 1, 2, 3, 4, 5] * 8:
            batch = await cancel_after(anext(manager.experiences()), turns)
            if batch is not None:
                account.book([batch])
        await assert_right_answers(manager, account)


@BACKENDS
async def test_scale_cancelled_at_any_turn_goes_on_by_itself(make_manager, backend):
    """The next scale finds the pool in order and brings it to its size."""
    manager = make_manager(pool_workers.Counting, backend=backend)
    account = Account()
    async with fail_after(60), manager:
        for turns in range(8):
            await cancel_after(manager.scale(3 - turns % 2), turns)
            await manager.scale(2 + turns % 2)
            assert manager.stats().num_ready == 2 + turns % 2
            await assert_right_answers(manager, account)


@BACKENDS
async def test_start_cancelled_at_any_turn_leaves_nothing(make_manager, backend):
    """No process, descriptor, thread or task remains, and the manager says that it is over."""
    started = False
    for turns in [0, 1, 2, 3, 5, 8, 13, 21, 34, 55]:
        # A process comes up when it will, be the turns few or many: here none does.
        worker = pool_workers.Counting if backend == "inline" else backend_workers.HangsInSetup
        manager = make_manager(worker, backend=backend, model=torch.nn.Linear(1, 1))
        with check_no_leaks():
            async with fail_after(30):
                await cancel_after(manager.start(), turns)
                if turns > 0:
                    with pytest.raises(ManagerStateError):
                        await manager.start()
                if manager.is_healthy:
                    started = True
                await manager.stop()
            del manager
    assert started == (backend == "inline")


@BACKENDS
async def test_stop_cancelled_at_any_turn_is_carried_to_its_end(make_manager, backend):
    """When the cancelled call returns, every worker is gone."""
    for turns in range(6):
        manager = make_manager(pool_workers.Counting, backend=backend)
        async with fail_after(30):
            await manager.start()
            await manager.collect()
            await cancel_after(manager.stop(), turns)
            if turns > 0:
                assert manager.stats().num_ready == 0
                assert {info.state for info in manager.workers} == {"stopped"}
            await manager.stop()


class Learning:
    def learn(self, batches):
        return None

    def state_dict(self):
        return WEIGHTS


@BACKENDS
async def test_run_cancelled_at_any_turn_leaves_nothing(make_manager, backend):
    """Every worker is gone when the cancelled run returns."""
    for turns in [0, 1, 2, 4, 8, 16, 32, 64, 128]:
        manager = make_manager(pool_workers.Counting, backend=backend, learner=Learning())
        with check_no_leaks():
            async with fail_after(30):
                await cancel_after(manager.run(), turns)
            del manager


@BACKENDS
async def test_a_task_group_that_fails_takes_the_pool_along(make_manager, backend):
    """A sibling's error cancels run(); the group ends with that error when all are gone."""
    manager = make_manager(pool_workers.Counting, backend=backend, learner=Learning())

    async def fail():
        await anext(manager.events())
        raise ArithmeticError("the sibling's")

    async def live():
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.run())
            group.create_task(fail())

    async with fail_after(30):
        with pytest.raises(ExceptionGroup) as caught:
            await live()
    assert [str(error) for error in caught.value.exceptions] == ["the sibling's"]
    assert manager.stats().num_ready == 0


async def test_the_body_cancelled_while_it_collects(make_manager):
    """Leaving async with by a cancellation ends every worker, then the cancellation goes on."""
    manager = make_manager(partial(pool_workers.Counting, 2))

    async def live():
        async with manager:
            while True:
                await manager.collect(min_steps=50)

    async with fail_after(30):
        living = asyncio.create_task(live())
        async for event in manager.events():
            if type(event).__name__ == "PoolStarted":
                break
        living.cancel()
        await asyncio.wait([living])
    assert living.cancelled()
    assert manager.stats().num_ready == 0

"""Cancellation: each public await, cancelled at every point, leaves a pool that answers right."""

from __future__ import annotations

import asyncio
import types
from functools import partial

import pytest
import torch

import backend_workers
import pool_workers
from keisei.exceptions import CollectTimeout, ManagerStateError, WeightsError
from keisei.testing.failpoints import Gate
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


async def cancel_at(awaitable, number):
    """Cancel ``awaitable`` where it is suspended for the time ``number``, from 0 on.

    Returns whether it came to that, and its result, ``None`` if it was cancelled.
    """
    was_reached = False

    @types.coroutine
    def in_steps():
        nonlocal was_reached
        steps, count, error = awaitable.__await__(), 0, None
        while True:
            try:
                future = next(steps) if error is None else steps.throw(error)
            except StopIteration as done:
                return done.value
            if count == number:
                was_reached = True
                asyncio.current_task().cancel()
            count, error = count + 1, None
            try:
                yield future
            except BaseException as raised:  # noqa: BLE001 - it is the awaitable's
                error = raised

    async def run():
        return await in_steps()

    task = asyncio.create_task(run())
    await asyncio.wait([task])
    return was_reached, None if task.cancelled() else task.result()


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
    turns, following = 0, 1
    # Some turns wait for a thread, so how many a start takes depends on the machine's load.
    while turns <= 55 or (backend == "inline" and not started):
        # A process comes up when it will, be the turns few or many: here none does.
        worker = pool_workers.Counting if backend == "inline" else backend_workers.HangsInSetup
        manager = make_manager(worker, backend=backend, model=torch.nn.Linear(1, 1))
        with check_no_leaks():
            async with fail_after(30):
                await cancel_after(manager.start(), turns)
                if turns > 0:
                    with pytest.raises(ManagerStateError):
                        await manager.start()
                    assert manager.is_healthy or manager.state == "stopped"
                if manager.is_healthy:
                    started = True
                await manager.stop()
            del manager
        turns, following = following, turns + following
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


# what a call leaves behind that has given up


async def count(manager):
    """Return how many experiences the workers have collected, by their own account."""
    return await manager.send_command("number")


async def assert_nothing_is_wanted(manager, account):
    """Hold that workers go as far as their queues, or as one round, and not a step further.

    Nothing is queued afterwards.
    """
    account.book(await manager.collect(timeout=20))
    version = manager.weights_version
    assert await manager.push_weights(WEIGHTS) == version + 1
    size = manager.config.max_queue_size
    if manager.config.mode == "sync":
        await count(manager)  # a round that has begun is collected before the next answer
        before = await count(manager)
        for _ in range(20):
            assert await count(manager) == before
        assert manager.stats().num_queued in (0, manager.stats().num_workers)
        await manager.pause()
    else:
        while min(manager.queue_info().experience_queue_sizes) < size:
            await one_turn()
        for _ in range(20):  # before each answer there would be an experience
            await count(manager)
        await manager.pause()
        assert set(manager.queue_info().experience_queue_sizes) == {size}
    if manager.stats().num_queued:
        account.book(await manager.collect())
    await manager.resume()


@pytest.mark.parametrize("overflow", ["block", "drop_oldest"])
@pytest.mark.parametrize("how", ["timeout", "outer timeout", "cancel"])
@MODES
async def test_a_collect_that_gave_up_leaves_no_demand(make_manager, mode, how, overflow):
    """Whatever it had asked for: nobody collects it afterwards, no queue outgrows its bound."""
    manager = make_manager(pool_workers.Counting, mode=mode, overflow=overflow)
    account = Account()
    async with fail_after(60), manager:
        for _ in range(2):
            if how == "timeout":
                with pytest.raises(CollectTimeout):
                    await manager.collect(min_steps=10**9, timeout=0.01)
            elif how == "outer timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await manager.collect(min_steps=10**9)
            else:
                assert await cancel_at(manager.collect(min_steps=10**9), 0) == (True, None)
            if overflow == "block":
                await assert_nothing_is_wanted(manager, account)
            else:  # gaps are what it is for
                await assert_nothing_is_wanted(manager, Nobody())


class Nobody:
    """Keeps no account."""

    def book(self, batches):
        return batches


@pytest.mark.parametrize("how", ["outer timeout", "cancel"])
async def test_a_push_that_gave_up_waiting_for_a_round_holds_none(make_manager, how):
    """Rounds go on as if it had never been asked for, and the next push is the first."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(60), make_manager(worker, mode="sync") as manager:
            collecting = asyncio.create_task(manager.collect())
            for _ in range(2):
                await gate.visitor()
            if how == "cancel":
                assert await cancel_at(manager.push_weights(WEIGHTS), 0) == (True, None)
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await manager.push_weights(WEIGHTS)
            assert not collecting.done()
            gate.open()
            account = Account()
            account.book(await collecting)
            for _ in range(3):
                account.book(await manager.collect(timeout=20))
            assert manager.weights_version == 0
            await assert_nothing_is_wanted(manager, account)
            assert manager.weights_version == 1


async def test_a_push_that_gave_up_takes_no_other_along(make_manager):
    """Of two that wait for a round one is cancelled; the other has the next round wait for it."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(60), make_manager(worker, mode="sync") as manager:
            collecting = asyncio.create_task(manager.collect())
            for _ in range(2):
                await gate.visitor()
            pushing = asyncio.create_task(manager.push_weights(LARGE))
            await one_turn()
            assert await cancel_at(manager.push_weights(LARGE), 0) == (True, None)
            gate.open()
            assert [batch.weights_version for batch in await collecting] == [0, 0]
            assert [batch.weights_version for batch in await manager.collect(timeout=20)] == [1, 1]
            assert await pushing == 1


async def test_a_push_that_is_refused_holds_no_round(make_manager):
    """Weights of another shape are the caller's error, and rounds go on."""
    async with fail_after(60), make_manager(pool_workers.Counting, mode="sync") as manager:
        account = Account()
        await manager.push_weights(WEIGHTS)
        for wrong in ({"w": torch.zeros(5)}, {"v": torch.zeros(4)}):
            with pytest.raises(WeightsError):
                await manager.push_weights(wrong)
            await assert_nothing_is_wanted(manager, account)


async def scale(manager, account):
    number = 3 if manager.stats().num_workers == 2 else 2
    try:
        await manager.scale(number)
    except asyncio.CancelledError:
        await manager.scale(number)  # it goes on by itself, and what is looked at is the end
        raise


def push_only(manager, account):
    return manager.push_weights(WEIGHTS)


def collect_one(manager, account):
    return manager.collect()


def iterate(manager, account):
    return anext(manager.experiences())


def reset(manager, account):
    return manager.send_command("resets", worker_ids=[1])


def collect_many(manager, account):
    return manager.collect(min_steps=50)


COLLECTING = [collect_one, collect_many, iterate]
ASKING = [push_only, push, command, large_command, reset, pause_and_resume, scale]


@MODES
@pytest.mark.parametrize("call", COLLECTING, ids=lambda call: call.__name__)
async def test_a_collect_cancelled_wherever_it_waits_leaves_nothing_behind(
    make_manager, mode, call
):
    """At its first wait, its second … up to the last: no demand, no round held, no batch lost."""
    manager = make_manager(pool_workers.Counting, mode=mode)
    account = Account()
    async with fail_after(60), manager:
        await assert_nothing_is_wanted(manager, account)
        for number in range(6):
            was_reached, result = await cancel_at(call(manager, account), number)
            assert was_reached or number > 0
            if result is not None:
                account.book([result] if call is iterate else result)
            await assert_nothing_is_wanted(manager, account)
        assert manager.incidents == ()


@MODES
@pytest.mark.parametrize("is_read", [False, True], ids=["", "beside a reader"])
@pytest.mark.parametrize("call", ASKING, ids=lambda call: call.__name__)
async def test_a_call_cancelled_wherever_it_waits_leaves_nothing_behind(
    make_manager, mode, call, is_read
):
    """Cancelled at its first wait, its second … up to the last: the next calls answer right."""
    manager = make_manager(pool_workers.Counting, mode=mode)
    account = Account()
    async with fail_after(60), manager:
        await manager.push_weights(WEIGHTS)
        was_reached, number = True, 0
        while was_reached and number < 10:
            if is_read:
                reading = asyncio.create_task(manager.collect(min_steps=20))
                await one_turn()
            was_reached, _ = await cancel_at(call(manager, account), number)
            if is_read:
                account.book(await reading)
            await assert_nothing_is_wanted(manager, account)
            number += 1
        assert number > 1
        assert manager.stats().num_pushes == manager.weights_version
        assert manager.incidents == ()


@MODES
async def test_cancelled_calls_leave_nobody_to_be_taken_for_hung(make_manager, mode):
    """What was asked of a worker and given up is owed no more: it may stand still for long."""
    manager = make_manager(pool_workers.Counting, mode=mode, collect_timeout=0.3)
    account = Account()
    async with fail_after(60), manager:
        await manager.pause()
        for call in [*COLLECTING, *ASKING]:
            await cancel_at(call(manager, account), 0)
            await manager.pause()
        with pytest.raises(CollectTimeout):
            await manager.collect(min_steps=10**6, timeout=0.9)
        assert manager.incidents == ()

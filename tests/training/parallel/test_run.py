"""run(): the whole life with a learner."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest
import torch

import pool_workers
from keisei.events import PoolStopped, UpdateCompleted
from keisei.exceptions import ManagerStateError, PoolExhausted, WeightsError, WorkerStartError
from keisei.testing.failpoints import Failpoint, Gate, armed, kill
from keisei.testing.scenarios import fail_after


class Learning:
    """Counts what it learns from, and has weights that hold the number of its updates."""

    def __init__(self, then=None):
        self.updates = []
        self.threads = set()
        self.then = then

    def learn(self, batches):
        self.threads.add(threading.get_ident())
        self.updates.append([(b.worker_id, b.sequence, b.weights_version) for b in batches])
        if self.then is not None:
            self.then(self)
        return {"steps": float(sum(batch.num_steps for batch in batches))}

    def state_dict(self):
        return {"updates": torch.tensor([len(self.updates)])}


class LearningAsync(Learning):
    async def learn(self, batches):
        await pool_workers.turn()
        return super().learn(batches)


class LearningInDisguise(LearningAsync):
    """Its learn is a plain function that returns an awaitable."""

    def learn(self, batches):
        return super().learn(batches)


class Watching:
    def __init__(self, kind):
        self.kind = kind
        self.seen = []

    def on_event(self, event):
        if isinstance(event, self.kind):
            self.seen.append(event)


LEARNERS = pytest.mark.parametrize("learner", [Learning, LearningAsync])
BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])


@BACKENDS
@LEARNERS
async def test_sync_updates_are_rounds_with_the_newest_weights(make_manager, backend, learner):
    """Each update has one batch per worker, collected with what the update before gave."""
    learner = learner()
    worker = partial(pool_workers.Counting, 5)
    manager = make_manager(worker, learner=learner, mode="sync", backend=backend)
    async with fail_after(30):
        report = await manager.run(max_steps=40)
    assert learner.updates == [[(0, n, n + 1), (1, n, n + 1)] for n in range(4)]
    assert (report.num_updates, report.num_steps, report.num_batches) == (4, 40, 8)
    assert (report.reason, report.weights_version) == ("max_steps", 5)
    assert (report.num_restarts, report.incidents) == (0, ())
    assert report.metrics == {"steps": 10.0}
    assert report.steps_per_second == report.num_steps / report.seconds


@LEARNERS
async def test_async_updates_have_as_many_steps_as_wanted(make_manager, learner):
    """steps_per_update is reached by every update, and nothing is lost between two of them."""
    learner = learner()
    manager = make_manager(pool_workers.Counting, learner=learner)
    async with fail_after(30):
        report = await manager.run(max_steps=95, steps_per_update=10)
    assert [len(update) for update in learner.updates] == [10] * 10
    assert report.num_steps == report.num_batches == 100
    for worker_id in (0, 1):
        numbers = [
            number for update in learner.updates for w, number, _ in update if w == worker_id
        ]
        assert numbers == list(range(len(numbers)))


async def test_a_plain_learner_never_blocks_the_loop(make_manager):
    """Learn runs in one thread of its own, and the application's tasks run meanwhile."""
    turned = threading.Event()

    def wait_for_the_loop(learner):
        asked.set()
        assert turned.wait(20)
        turned.clear()

    asked = threading.Event()
    learner = Learning(then=wait_for_the_loop)
    manager = make_manager(pool_workers.Counting, learner=learner, backend="inline")

    async def answer():
        while True:
            await asyncio.to_thread(asked.wait, 0.01)
            if asked.is_set():
                asked.clear()
                turned.set()

    async with fail_after(30):
        answering = asyncio.create_task(answer())
        report = await manager.run(max_steps=10, steps_per_update=2)
        answering.cancel()
        await asyncio.wait([answering])
    assert report.num_updates == 5
    assert len(learner.threads) == 1
    assert threading.get_ident() not in learner.threads


async def test_an_awaitable_that_a_plain_learn_returns_is_awaited(make_manager):
    """A learner that is wrapped by something else may return its coroutine."""
    learner = LearningInDisguise()
    manager = make_manager(pool_workers.Counting, learner=learner, mode="sync")
    async with fail_after(30):
        report = await manager.run(max_steps=4)
    assert report.num_updates == len(learner.updates) == 2
    assert report.metrics == {"steps": 2.0}


@pytest.mark.parametrize("sync_interval", [1, 3])
async def test_weights_are_pushed_every_sync_interval_updates(make_manager, sync_interval):
    """The first ones before the first update, then after every so many."""
    learner = Learning()
    config = {"mode": "sync", "sync_interval": sync_interval}
    manager = make_manager(pool_workers.Counting, learner=learner, **config)
    async with fail_after(30):
        report = await manager.run(max_steps=14)
    versions = [update[0][2] for update in learner.updates]
    assert versions == [1 + n // sync_interval for n in range(7)]
    assert report.weights_version == 1 + 7 // sync_interval


async def test_the_managers_model_is_the_first_version(make_manager):
    """With a model the learner's weights are pushed only after the first update."""
    learner = Learning()
    model = torch.nn.Module()
    model.register_buffer("updates", torch.tensor([0]))
    manager = make_manager(pool_workers.Counting, learner=learner, model=model, mode="sync")
    async with fail_after(30):
        report = await manager.run(max_steps=6)
    assert [update[0][2] for update in learner.updates] == [1, 2, 3]
    assert report.weights_version == 4


async def test_max_seconds_ends_a_run(make_manager):
    """Also when no experience comes at all."""
    with Gate() as gate:
        worker = partial(pool_workers.Coroutine, gate=gate)
        manager = make_manager(worker, learner=Learning(), backend="inline")
        async with fail_after(30):
            report = await manager.run(max_seconds=0.2)
        assert (report.reason, report.num_updates, report.metrics) == ("max_seconds", 0, {})
        assert report.seconds >= 0.2


async def test_request_stop_ends_a_run_after_the_update(make_manager):
    """The update that is being learned is finished and counted."""
    learner = Learning(then=lambda learner: len(learner.updates) == 3 and stop())
    manager = make_manager(pool_workers.Counting, learner=learner, mode="sync")
    loop = asyncio.get_running_loop()

    def stop():
        loop.call_soon_threadsafe(manager.request_stop)

    async with fail_after(30):
        report = await manager.run()
    assert report.reason == "request_stop"
    assert len(learner.updates) == report.num_updates >= 3
    assert report.weights_version == report.num_updates + 1


async def test_stop_from_another_task_ends_a_run_in_an_orderly_way(make_manager):
    """The update that is being learned is finished; the run returns its report."""
    learning, go_on = threading.Event(), threading.Event()

    def wait(learner):
        learning.set()
        assert go_on.wait(20)

    manager = make_manager(pool_workers.Counting, learner=Learning(then=wait), mode="sync")
    async with fail_after(30):
        running = asyncio.create_task(manager.run())
        await asyncio.to_thread(learning.wait, 20)
        stopping = asyncio.create_task(manager.stop())
        await asyncio.wait([stopping], timeout=0.01)
        go_on.set()
        await stopping
        report = await running
    assert (report.reason, report.num_updates, report.weights_version) == ("request_stop", 1, 1)


async def test_request_stop_ends_a_run_that_waits(make_manager):
    """Also one whose workers deliver nothing, and one that has not begun."""
    with Gate() as gate:
        worker = partial(pool_workers.Coroutine, gate=gate)
        manager = make_manager(worker, learner=Learning(), backend="inline")
        async with fail_after(30):
            running = asyncio.create_task(manager.run())
            await gate.visitor()
            manager.request_stop()
            assert (await running).reason == "request_stop"
            manager = make_manager(worker, learner=Learning(), backend="inline")
            manager.request_stop()
            assert (await manager.run()).reason == "request_stop"


@LEARNERS
async def test_a_learner_that_raises_ends_the_run_with_its_error(make_manager, learner):
    """The error is the learner's own; the pool is stopped."""

    def fail(learner):
        raise ArithmeticError(f"after {len(learner.updates)}")

    watching = Watching(PoolStopped)
    manager = make_manager(
        pool_workers.Counting, learner=learner(then=fail), observers=[watching], mode="sync"
    )
    async with fail_after(30):
        with pytest.raises(ArithmeticError, match="after 1"):
            await manager.run()
    assert len(watching.seen) == 1
    with pytest.raises(ManagerStateError, match="is stopped"):
        await manager.collect()


async def test_a_run_goes_on_after_a_crash(make_manager):
    """The incident is in the report; the updates are complete."""
    learner = Learning()
    worker = armed(pool_workers.Counting, Failpoint("collect", kill, worker_id=1, hit=3))
    manager = make_manager(worker, learner=learner, mode="sync")
    async with fail_after(30):
        report = await manager.run(max_steps=12)
    assert [[w for w, _, _ in update] for update in learner.updates] == [[0, 1]] * 6
    assert [sequence for update in learner.updates for w, sequence, _ in update if w == 1] == [
        0,
        1,
        0,
        1,
        2,
        3,
    ]
    assert report.num_restarts == 1
    assert [incident.signal_name for incident in report.incidents] == ["SIGKILL"]


async def test_a_pool_that_fails_too_often_ends_the_run(make_manager):
    """PoolExhausted carries the incidents; all processes are gone."""
    worker = armed(pool_workers.Counting, Failpoint("collect", kill, incarnation=None))
    manager = make_manager(worker, learner=Learning(), restart={"max_restarts": 2})
    async with fail_after(30):
        with pytest.raises(PoolExhausted, match="more than 2 failures") as caught:
            await manager.run()
    assert len(caught.value.incidents) == 3


async def test_a_run_that_cannot_start_says_why(make_manager):
    """An exception in setup is raised with the worker's traceback, without restarts."""
    worker = armed(pool_workers.Counting, Failpoint("setup", pool_workers.no))
    manager = make_manager(worker, learner=Learning())
    async with fail_after(30):
        with pytest.raises(WorkerStartError, match="no, because of the test") as caught:
            await manager.run()
    assert "in no\n" in caught.value.remote_traceback
    assert {incident.incarnation for incident in manager.incidents} == {0}


async def test_weights_of_the_learner_that_do_not_fit_end_the_run(make_manager):
    """The error names the keys."""
    manager = make_manager(
        pool_workers.Counting, learner=Learning(), model=torch.nn.Linear(1, 1), mode="sync"
    )
    async with fail_after(30):
        with pytest.raises(WeightsError, match="missing keys: weight, bias; unexpected keys: up"):
            await manager.run(max_steps=100)


async def test_a_run_needs_a_learner(make_manager):
    """Without one the error says what to do."""
    manager = make_manager(pool_workers.Counting)
    with pytest.raises(ManagerStateError, match=r"ParallelManager\(worker, learner=\.\.\.\)"):
        await manager.run()


async def test_a_run_inside_async_with_leaves_the_pool_running(make_manager):
    """Two runs and a collect, with one pool."""
    learner = Learning()
    manager = make_manager(pool_workers.Counting, learner=learner, mode="sync")
    async with fail_after(30), manager:
        first = await manager.run(max_steps=4)
        second = await manager.run(max_steps=4)
        assert (first.num_updates, second.num_updates) == (2, 2)
        assert [update[0][1] for update in learner.updates] == [0, 1, 2, 3]
        assert len(await manager.collect()) == 2


async def test_a_manager_runs_once(make_manager):
    """Its second life would not be the first one's continuation, so it is refused."""
    manager = make_manager(pool_workers.Counting, learner=Learning(), backend="inline")
    async with fail_after(30):
        await manager.run(max_steps=1)
        with pytest.raises(ManagerStateError, match="it serves once, so make a new one"):
            await manager.run(max_steps=1)


async def test_updates_are_told(make_manager):
    """Each update is an event with true numbers, in order."""
    watching = Watching(UpdateCompleted)
    worker = partial(pool_workers.Counting, 3)
    manager = make_manager(worker, learner=Learning(), observers=[watching], mode="sync")
    async with fail_after(30):
        await manager.run(max_steps=18)
    assert [event.update for event in watching.seen] == [1, 2, 3]
    assert [event.num_steps for event in watching.seen] == [6, 12, 18]
    assert [event.weights_version for event in watching.seen] == [2, 3, 4]
    assert [event.staleness for event in watching.seen] == [0, 0, 0]
    assert [event.num_workers for event in watching.seen] == [2, 2, 2]
    assert [event.metrics for event in watching.seen] == [{"steps": 6.0}] * 3
    assert all(event.steps_per_second > 0 for event in watching.seen)


async def test_a_cancelled_run_finishes_its_update_and_ends_everybody(make_manager):
    """The learner's thread is never left alone with the batches; then the cancellation goes on."""
    learning, go_on = threading.Event(), threading.Event()

    def wait(learner):
        learning.set()
        assert go_on.wait(20)

    learner = Learning(then=wait)
    manager = make_manager(pool_workers.Counting, learner=learner, mode="sync")
    async with fail_after(30):
        running = asyncio.create_task(manager.run())
        await asyncio.to_thread(learning.wait, 20)
        running.cancel()
        await asyncio.wait([running], timeout=0.05)
        assert not running.done()
        go_on.set()
        await asyncio.wait([running])
    assert running.cancelled()
    assert len(learner.updates) == 1
    assert manager.stats().num_ready == 0

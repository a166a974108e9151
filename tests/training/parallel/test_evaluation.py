"""run(evaluate=...): consistent weights, beside training, one at a time; errors are told."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest
import torch

import pool_workers
from keisei import Evaluation
from keisei.events import EvaluationCompleted, EvaluationFailed, UpdateCompleted
from keisei.exceptions import ConfigurationError, ManagerStateError
from keisei.testing.scenarios import fail_after


class Learning:
    """Has two tensors that differ while it learns, and are equal between two updates."""

    def __init__(self, then=None):
        self.number = 0
        self.a, self.b = torch.zeros(1), torch.zeros(1)
        self.then = then

    def learn(self, batches):
        self.number += 1
        self.a.fill_(self.number)
        if self.then is not None:
            self.then(self)
        self.b.fill_(self.number)
        return {}

    def state_dict(self):
        return {"a": self.a, "b": self.b}


class Watching:
    def __init__(self):
        self.seen = []

    def on_event(self, event):
        if isinstance(event, (EvaluationCompleted, EvaluationFailed, UpdateCompleted)):
            self.seen.append(event)

    def of(self, kind):
        return [event for event in self.seen if isinstance(event, kind)]


@pytest.fixture
def pool(make_manager):
    """Return a maker of a manager, its learner and what it tells."""

    def make(then=None, **config):
        watching, learner = Watching(), Learning(then)
        manager = make_manager(
            pool_workers.Counting,
            learner=learner,
            observers=[watching],
            **{"mode": "sync", "num_workers": 1, "backend": "inline", **config},
        )
        return manager, learner, watching

    return make


def gauge(weights):
    assert weights["a"] == weights["b"]
    return {"value": weights["a"], "name": "not a number"}


async def gauge_async(weights):
    await pool_workers.turn()
    return gauge(weights)


@pytest.mark.parametrize("backend", ["local", "inline"])
@pytest.mark.parametrize("evaluate", [gauge, gauge_async])
async def test_evaluations_see_the_weights_at_the_end_of_an_update(pool, backend, evaluate):
    """Their numbers are events and in the report, with the update that they are about."""
    manager, _, watching = pool(backend=backend)
    async with fail_after(60):
        report = await manager.run(max_steps=40, evaluate=evaluate, evaluate_every=5)
    found = watching.of(EvaluationCompleted)
    assert report.evaluations == tuple(found)
    assert [event.evaluation for event in found] == list(range(1, len(found) + 1))
    assert found[0].update == 5
    for event in found:
        assert event.metrics == {"value": event.update}
        assert (event.num_steps, event.weights_version) == (event.update, event.update + 1)
        assert event.seconds > 0
    gaps = [b.update - a.update for a, b in itertools.pairwise(found)]
    assert all(gap >= 5 for gap in gaps)


async def test_the_copy_is_the_evaluations_own(pool):
    """Training changes nothing of it, and it changes nothing of training."""
    gate, seen = threading.Event(), []

    def evaluate(weights):
        gate.wait(30)
        seen.append((weights["a"].item(), weights["b"].item()))
        weights["a"].fill_(-1)

    def then(learner):
        if learner.number == 10:
            gate.set()

    manager, learner, _ = pool(then)
    async with fail_after(60):
        report = await manager.run(max_steps=12, evaluate=Evaluation(evaluate, every=100))
        assert report.evaluations == ()
    manager, learner, _ = pool(then)
    async with fail_after(60):
        await manager.run(max_steps=12, evaluate=Evaluation(evaluate, every=8))
    assert seen == [(8.0, 8.0)]
    assert learner.a.item() == 12


async def test_a_slow_evaluation_never_queues_up(pool):
    """While one runs none begins; the next begins with the newest weights."""
    gate, begun, ended = threading.Event(), [], []

    def evaluate(weights):
        assert len(begun) == len(ended), "two at a time"
        begun.append(weights["a"].item())
        gate.wait(30)
        ended.append(weights["a"].item())

    def then(learner):
        if learner.number == 9:
            gate.set()

    manager, _, watching = pool(then)
    async with fail_after(60):
        await manager.run(max_steps=40, evaluate=evaluate, evaluate_every=1)
    assert begun == ended
    assert begun[0] == 1
    assert begun[1] >= 9
    updates = [event.update for event in watching.of(EvaluationCompleted)]
    assert updates == [int(value) for value in begun]


class Broken(Exception):
    pass


def break_plainly(weights):
    raise Broken("the opponent is missing")


async def break_async(weights):
    await pool_workers.turn()
    raise Broken("the opponent is missing")


def stop_iteration(weights):
    raise StopIteration("odd")


@pytest.mark.parametrize(
    ("evaluate", "kind", "text"),
    [
        (break_plainly, Broken, "the opponent is missing"),
        (break_async, Broken, "the opponent is missing"),
        (stop_iteration, RuntimeError, r"the run's evaluate\(\) raised StopIteration"),
    ],
)
async def test_an_error_ends_the_run(pool, evaluate, kind, text):
    """It is told as an event and raised by run(), once the workers are gone."""
    manager, _, watching = pool()
    async with fail_after(60):
        with pytest.raises(kind, match=text):
            await manager.run(evaluate=evaluate)
    (failed,) = watching.of(EvaluationFailed)
    assert (failed.evaluation, failed.update) == (1, 1)
    assert failed.error.startswith(kind.__name__)
    assert manager.workers == () or all(info.pid is None for info in manager.workers)


async def test_an_error_is_only_told_where_that_is_asked_for(pool, caplog):
    """The run goes on, and so do the evaluations."""
    manager, learner, watching = pool()

    def evaluate(weights):
        if weights["a"].item() == 2:
            raise Broken("for once")
        return {"value": weights["a"].item()}

    async with fail_after(60):
        report = await manager.run(
            max_steps=20, evaluate=Evaluation(evaluate, every=2, on_error="tell")
        )
    assert (report.reason, learner.number) == ("max_steps", 20)
    (failed,) = watching.of(EvaluationFailed)
    assert failed == EvaluationFailed(1, 2, "Broken: for once")
    assert report.evaluations
    assert "evaluation 1, of update 2, has failed: Broken: for once" in caplog.text


async def test_the_error_of_the_last_evaluation_is_raised_too(pool):
    """The one that runs when the last update is done is waited for."""
    manager, learner, _ = pool()
    async with fail_after(60):
        with pytest.raises(Broken):
            await manager.run(max_steps=3, evaluate=break_async, evaluate_every=3)
    assert learner.number == 3


HANGS = pytest.mark.parametrize("kind", ["thread", "coroutine", "stubborn coroutine"])


@pytest.fixture
def hanging():
    """Return a maker of evaluations that hang, until the end of the test."""
    release, begun = threading.Event(), asyncio.Event()

    def make(kind):
        loop = asyncio.get_running_loop()

        def in_thread(weights):
            loop.call_soon_threadsafe(begun.set)
            release.wait(60)

        async def coroutine(weights):
            begun.set()
            await loop.create_future()

        async def stubborn(weights):
            begun.set()
            try:
                await loop.create_future()
            except asyncio.CancelledError:
                await asyncio.wait([loop.create_future()], timeout=1)

        known = {"thread": in_thread, "coroutine": coroutine, "stubborn coroutine": stubborn}
        return known[kind], begun

    yield make
    release.set()


@HANGS
async def test_an_evaluation_that_hangs_does_not_hold_up_the_end(pool, hanging, kind):
    """An orderly run ends with its report; the evaluation is told as abandoned."""
    evaluate, _ = hanging(kind)
    manager, _, watching = pool(shutdown_timeout=0.3)
    async with fail_after(30):
        report = await manager.run(max_steps=5, evaluate=evaluate)
        assert (report.reason, report.evaluations) == ("max_steps", ())
    (failed,) = watching.of(EvaluationFailed)
    assert failed.error == "abandoned: it had not ended 0.3 s after the run"
    await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=1.1)


@HANGS
async def test_a_cancelled_run_does_not_wait_for_an_evaluation_that_hangs(pool, hanging, kind):
    """The cancellation goes on within the grace."""
    evaluate, begun = hanging(kind)
    manager, _, _ = pool(shutdown_timeout=0.3)
    async with fail_after(30):
        running = asyncio.create_task(manager.run(evaluate=evaluate))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=1.1)


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
async def test_an_evaluation_may_have_a_time_limit(pool, hanging, kind):
    """More is an error in it, and the next one does not wait for its thread."""
    evaluate, _ = hanging(kind)
    manager, _, watching = pool(shutdown_timeout=0.3)
    async with fail_after(30):
        with pytest.raises(TimeoutError, match=r"the evaluation took longer than 0\.05 s"):
            await manager.run(evaluate=Evaluation(evaluate, timeout=0.05))
    assert len(watching.of(EvaluationFailed)) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"evaluate_every": 3}, r"there is no evaluate"),
        ({"evaluate": gauge, "evaluate_every": 0}, "must be at least 1"),
        ({"evaluate": 7}, "must be callable"),
    ],
)
async def test_what_cannot_be_is_refused(pool, arguments, problem):
    """Before anything is started."""
    manager, _, _ = pool()
    with pytest.raises(ConfigurationError, match=problem):
        await manager.run(**arguments)
    assert manager.workers == ()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"timeout": 0}, "must be positive"),
        ({"on_error": "ignore"}, "must be 'raise' or 'tell'"),
        ({"every": 0}, "must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, problem):
    """Every problem is named."""
    with pytest.raises(ConfigurationError, match=problem):
        Evaluation(gauge, **arguments)


async def test_the_learners_weights_are_taken_between_two_updates(pool):
    """snapshot_learner() waits for the update that is being learned; without a run it refuses."""
    entered, gate = threading.Event(), threading.Event()

    def then(learner):
        if learner.number == 4:
            entered.set()
            gate.wait(30)

    manager, _, _ = pool(then, sync_interval=1000)
    async with fail_after(60):
        with pytest.raises(ManagerStateError, match=r"run\(\) is not learning now"):
            await manager.snapshot_learner()
        running = asyncio.create_task(manager.run(max_steps=400))
        await asyncio.to_thread(entered.wait, 30)
        taking = asyncio.create_task(manager.snapshot_learner())
        await asyncio.wait([taking], timeout=0.05)
        assert not taking.done()
        gate.set()
        data = (await taking).model_data
        assert data["a"] == data["b"] >= 4
        for _ in range(20):
            if running.done():
                break
            data = (await manager.snapshot_learner()).model_data
            assert data["a"] == data["b"]
        await running
        with pytest.raises(ManagerStateError):
            await manager.snapshot_learner()

"""Policy: how often a slot is filled again, what is given up, and who is told."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
import torch

import fault_workers
import pool_workers
from fault_helpers import LIMIT, check_order, kinds, next_incident, until_ready, watched
from keisei.events import (
    ExitCause,
    PoolEscalated,
    Remedy,
    WorkerGivenUp,
    WorkerIncident,
)
from keisei.exceptions import PoisonedWeights, PoolExhausted, WeightsError
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint, armed
from keisei.testing.scenarios import fail_after, next_event

THREE = {"max_restarts": 3, "backoff_base": 0.0, "backoff_cap": 0.0}


def always(fault, worker_id=None):
    """Return a worker that meets ``fault`` at each first ``collect`` of each process."""
    return armed(
        pool_workers.Counting, Failpoint("collect", fault, worker_id=worker_id, incarnation=None)
    )


async def test_the_budget_is_exact(make_manager):
    """``max_restarts`` failures are restarted, one more ends the pool, and who waits is told."""
    async with fail_after(LIMIT):
        manager = make_manager(pool_workers.Counting, restart=THREE)
        events = manager.events()
        async with manager:
            for incarnation in range(3):
                os.kill(manager.workers[1].pid, signal.SIGKILL)
                assert (await next_incident(events)).remedy is Remedy.RESTARTED
                await until_ready(events, 1, incarnation + 1)
            assert len(await manager.collect(min_steps=20)) == 20
            assert manager.is_healthy
            os.kill(manager.workers[1].pid, signal.SIGKILL)
            escalated = await next_event(events, PoolEscalated)
            assert escalated.incident.incarnation == 3
            for use in (manager.collect(), manager.send_command("echo"), anext(later(manager))):
                with pytest.raises(PoolExhausted, match="more than 3 failures") as caught:
                    await use
                assert caught.value.incidents == manager.incidents
        assert [one.remedy for one in manager.incidents] == [Remedy.RESTARTED] * 3 + [
            Remedy.ESCALATED
        ]
        assert {info.pid for info in manager.workers} == {None}


async def later(manager):
    async for batch in manager.experiences():
        yield batch


@pytest.mark.parametrize(
    "how",
    [
        failpoints.segfault,
        partial(failpoints.exit_now, 5),
        partial(fault_workers.throw_named, "NotAnException"),
        failpoints.hang,
    ],
    ids=["segfault", "exit", "raise", "hang"],
)
async def test_poisoned_weights_are_withdrawn(make_manager, how):
    """Three slots failing on one version put the previous one back; the publisher hears of it."""
    worker = partial(fault_workers.Poisoned, how)
    config = {
        "num_workers": 3,
        "start_timeout": 15.0,  # the first to fail may load the version once more, in its start
        "collect_timeout": 0.8,
        "command_timeout": 0.8,
        "check_finite": True,
    }
    async with fail_after(LIMIT), make_manager(worker, **config) as manager:
        assert await manager.push_weights(fault_workers.weights(1.0), wait=True, timeout=30) == 1
        events = manager.events()
        assert await manager.push_weights(fault_workers.weights(float("nan"))) == 2
        collecting = asyncio.create_task(collected(manager, version=3))
        for _ in range(3):
            assert (await next_incident(events)).weights_version == 2
        batches = await collecting
        assert {float(b.data["value"][0]) for b in batches if b.weights_version == 3} == {1.0}
        assert not any(b.weights_version == 2 for b in batches)
        assert manager.weights_version == 3
        with pytest.raises(PoisonedWeights, match="weights version 2 was withdrawn") as caught:
            await manager.push_weights(fault_workers.weights(2.0))
        assert (caught.value.version, caught.value.replacement) == (2, 3)
        assert await manager.push_weights(fault_workers.weights(2.0), wait=True, timeout=30) == 4
        assert manager.stats().num_not_finite == 1
        assert {one.worker_id for one in manager.incidents} == {0, 1, 2}
        assert {one.weights_version for one in manager.incidents} == {2}


async def collected(manager, version):
    """Collect until every worker has delivered with ``version``."""
    batches = []
    while len({b.worker_id for b in batches if b.weights_version == version}) < 3:
        batches += await manager.collect()
    return batches


async def test_weights_of_another_shape_never_reach_a_worker(make_manager):
    """A shape bomb is refused at push_weights, with names; the pool and its version stay."""
    worker = partial(fault_workers.Poisoned, failpoints.segfault)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        assert await manager.push_weights(fault_workers.weights(1.0), wait=True) == 1
        for bomb in ({"w": torch.zeros(5)}, {"v": torch.zeros(4)}, {}):
            with pytest.raises(WeightsError):
                await manager.push_weights(bomb)
        assert manager.weights_version == 1
        assert manager.incidents == ()
        assert await manager.push_weights(fault_workers.weights(2.0), wait=True) == 2


async def test_one_bad_slot_is_given_up_and_the_others_train(make_manager):
    """With ``degrade`` the slot that always fails is left empty after its budget; once told."""
    config = {"num_workers": 3, "restart": THREE, "on_exhausted": "degrade"}
    worker = always(failpoints.kill, worker_id=2)
    async with fail_after(LIMIT), watched(make_manager(worker, **config)) as (manager, events):
        batches = await manager.collect(min_steps=20)
        given_up = await next_event(events, WorkerGivenUp)
        assert given_up.worker_id == 2
        assert [one.remedy for one in manager.incidents] == [Remedy.RESTARTED] * 3 + [
            Remedy.GAVE_UP
        ]
        assert kinds(manager.incidents) == [(2, n, ExitCause.SIGNAL) for n in range(4)]
        batches += await manager.collect(min_steps=50)
        assert {batch.worker_id for batch in batches} == {0, 1}
        check_order(batches)
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert [info.state for info in manager.workers] == ["running", "running", "given up"]


async def test_a_bad_slot_escalates_where_it_must(make_manager):
    """With ``raise`` the same ends the pool, and the error lists the failures of that slot."""
    worker = always(failpoints.kill, worker_id=1)
    async with fail_after(LIMIT):
        with pytest.raises(PoolExhausted) as caught:
            await collect_for_ever(make_manager(worker, restart=THREE))
    assert kinds(caught.value.incidents) == [(1, n, ExitCause.SIGNAL) for n in range(4)]
    assert "worker 1 (incarnation 3) ended by signal" in str(caught.value)


async def collect_for_ever(manager):
    """Run the pool to its end, which may come before all workers are ready."""
    async with manager:
        while True:
            await manager.collect()


async def test_fewer_than_min_workers_escalates(make_manager):
    """``degrade`` ends where ``min_workers`` begins."""
    config = {
        "restart": {**THREE, "max_restarts": 0},
        "on_exhausted": "degrade",
        "min_workers": 2,
    }
    worker = always(failpoints.kill, worker_id=1)
    manager = make_manager(worker, **config)
    async with fail_after(LIMIT):
        with pytest.raises(PoolExhausted, match=r"fewer than min_workers \(2\)"):
            await collect_for_ever(manager)
    assert kinds(manager.incidents) == [(1, 0, ExitCause.SIGNAL)]


async def test_an_observer_that_raises_is_removed(make_manager):
    """Supervision goes on without it, the other observers hear everything, once."""
    heard = []
    worker = armed(pool_workers.Counting, Failpoint("collect", failpoints.kill, worker_id=1, hit=2))
    observers = [Broken(), Heard(heard)]
    async with (
        fail_after(LIMIT),
        watched(make_manager(worker, observers=observers)) as (manager, events),
    ):
        collecting = asyncio.create_task(manager.collect(min_steps=30))
        await until_ready(events, 1, 1)
        await collecting
    assert [type(event) for event in heard].count(WorkerIncident) == 1
    assert observers[0].calls == 1


class Broken:
    calls = 0

    def on_event(self, event):
        self.calls += 1
        raise fault_workers.Speechless


class Heard:
    def __init__(self, heard):
        self.heard = heard

    def on_event(self, event):
        self.heard.append(event)


async def test_a_restarted_worker_has_the_latest_weights_and_the_pause(make_manager):
    """After five pushes, and while the pool is paused, a successor is ready with version 5."""
    worker = partial(fault_workers.Poisoned, int)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        events = manager.events()
        for version in range(1, 6):
            await manager.push_weights(fault_workers.weights(float(version)))
        await manager.pause()
        os.kill(manager.workers[1].pid, signal.SIGKILL)
        await until_ready(events, 1, 1)
        assert manager.workers[1].weights_version == 5
        assert await manager.send_command("version", worker_ids=[1]) == {1: 5}
        assert await manager.send_command("number", worker_ids=[1]) == {1: 0}
        await manager.resume()
        batches = []
        while not any((b.worker_id, b.incarnation) == (1, 1) for b in batches):
            batches += await manager.collect()
        first = next(b for b in batches if (b.worker_id, b.incarnation) == (1, 1))
        assert (first.weights_version, first.info["version"]) == (5, 5)
        assert len(manager.incidents) == 1

"""push_weights(): whole, never backwards, newest first, and refused when they do not fit."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from functools import partial

import pytest
import torch
from torch import nn

import pool_workers
from keisei.events import WeightsPushed, WorkerIncident
from keisei.exceptions import (
    CommandTimeout,
    PoisonedWeights,
    PoolExhausted,
    WeightsError,
    WorkerLost,
    WorkerStartError,
)
from keisei.ipc.weights import WeightsPublisher
from keisei.testing.failpoints import Failpoint, Gate, armed, kill
from keisei.testing.scenarios import fail_after, next_event
from pool_workers import a_model

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])


def same(batch, model):
    """Return whether a batch of a ``Modelled`` worker holds the model's weights, bit by bit."""
    state = model.state_dict()
    return batch.data.keys() == state.keys() and all(
        torch.equal(batch.data[name], tensor) and batch.data[name].dtype == tensor.dtype
        for name, tensor in state.items()
    )


@BACKENDS
async def test_weights_arrive_bit_equal_and_take_effect_in_the_next_batch(make_manager, backend):
    """After a push every next experience was collected with exactly those weights."""
    worker = partial(pool_workers.Modelled, a_model)
    async with fail_after(30), make_manager(worker, mode="sync", backend=backend) as manager:
        for seed in range(1, 5):
            model = a_model(seed)
            version = await manager.push_weights(model)
            batches = await manager.collect()
            assert [batch.weights_version for batch in batches] == [version, version]
            assert all(same(batch, model) for batch in batches)


@BACKENDS
async def test_the_managers_model_is_version_1(make_manager, backend):
    """Workers have the model's weights before they collect for the first time."""
    model = a_model(5)
    worker = partial(pool_workers.Modelled, a_model)
    async with fail_after(30), make_manager(worker, model=model, backend=backend) as manager:
        assert manager.weights_version == 1
        for batch in await manager.collect(min_steps=20):
            assert batch.weights_version == 1
            assert same(batch, model)


@BACKENDS
@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.AsyncHooks])
async def test_an_overriding_load_weights_gets_the_weights_and_the_version(
    make_manager, backend, worker
):
    """The hook of the worker is called, with each version that is applied, in order."""
    async with fail_after(30), make_manager(worker, backend=backend) as manager:
        seen = {0: [], 1: []}
        for version in range(1, 6):
            await manager.push_weights({"w": torch.full((2,), version)}, wait=True)
            assert await manager.send_command("version") == {0: version, 1: version}
            for batch in await manager.collect():
                assert batch.info["version"] == batch.weights_version
                seen[batch.worker_id].append(batch.weights_version)
        assert all(versions == sorted(versions) for versions in seen.values())


async def test_wait_returns_when_every_worker_has_them(make_manager):
    """push_weights(wait=True) waits for a worker that is busy; without wait it does not."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            assert await manager.push_weights({"w": torch.zeros(1)}) == 1
            waiting = asyncio.create_task(manager.push_weights({"w": torch.zeros(1)}, wait=True))
            await asyncio.wait([waiting], timeout=0.05)
            assert not waiting.done()
            held.release()
            assert await waiting == 2
            assert [info.weights_version for info in manager.workers] == [2, 2]


async def test_a_wait_that_times_out_names_the_worker_and_leaves_them_published(make_manager):
    """The version is there; the busy worker takes it before its next experience."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            with pytest.raises(
                CommandTimeout, match=r"worker 0 has not applied weights version 1 within 0.05 s"
            ):
                await manager.push_weights({"w": torch.zeros(1)}, wait=True, timeout=0.05)
            assert manager.weights_version == 1
            held.release()
            assert await manager.push_weights({"w": torch.zeros(1)}, wait=True) == 2


async def test_wait_does_not_wait_for_the_dead(make_manager):
    """A worker that dies instead of applying the weights is left out; its successor has them."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            held = await gate.visitor()
            waiting = asyncio.create_task(manager.push_weights({"w": torch.zeros(1)}, wait=True))
            await asyncio.wait([waiting], timeout=0.05)
            os.kill(held.pid, signal.SIGKILL)
            assert await waiting == 1
            async for batch in manager.experiences():
                if batch.incarnation == 1:
                    assert batch.weights_version == 1
                    break


async def test_only_the_newest_version_is_owed(make_manager):
    """A worker that was busy during ten pushes applies the last one only."""
    with Gate() as gate:
        worker = armed(pool_workers.Recording, Failpoint("collect", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            for version in range(1, 11):
                await manager.push_weights({"w": torch.full((3,), version)})
            held.release()
            await manager.push_weights({"w": torch.full((3,), 11)}, wait=True)
            (versions,) = (await manager.send_command("versions")).values()
            assert versions in ([10, 11], [11])


async def test_a_new_incarnation_has_the_newest_weights_before_it_collects(make_manager):
    """After pushes and a crash the successor's first batch has the newest version."""
    worker = armed(pool_workers.Recording, Failpoint("on_command", kill, worker_id=0))
    async with fail_after(30), make_manager(worker, mode="sync") as manager:
        for version in range(1, 6):
            await manager.push_weights({"w": torch.full((3,), version)})
        with pytest.raises(Exception, match="SIGKILL"):
            await manager.send_command("versions", worker_ids=[0])
        incarnation = 0
        while incarnation == 0:  # a round begins with the workers that are ready then
            for batch in await manager.collect():
                assert batch.weights_version == 5
                assert batch.data["w"].tolist() == [5, 5, 5]
                incarnation = max(incarnation, batch.incarnation)


@pytest.mark.parametrize("size", [16, 1 << 20], ids=["small", "copied in a thread"])
async def test_no_worker_ever_sees_half_of_one_version_and_half_of_another(make_manager, size):
    """While versions are pushed as fast as possible, each applied one is whole and newer."""
    manager = make_manager(pool_workers.Recording, num_workers=3)
    async with fail_after(60), manager:
        await manager.push_weights({"w": torch.zeros(size), "v": torch.zeros(size)})

        async def push():
            while True:
                number = manager.weights_version + 1
                weights = torch.full((size,), float(number))
                await manager.push_weights({"w": weights, "v": weights})

        pushing = asyncio.create_task(push())
        newest = dict.fromkeys(range(3), 0)
        async for batch in manager.experiences():
            (value,) = set(batch.data["w"].tolist()) | set(batch.data["v"].tolist())
            assert value == (batch.weights_version if batch.weights_version > 1 else 0)
            assert batch.weights_version >= newest[batch.worker_id]
            newest[batch.worker_id] = batch.weights_version
            if min(newest.values()) > 30:
                break
        pushing.cancel()
        await asyncio.wait([pushing])


async def test_the_first_weights_may_be_pushed_while_a_worker_is_replaced(make_manager):
    """A slot whose process has just died does not stand in the way, and has them afterwards."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting,
            Failpoint("on_command", kill, worker_id=0),
            Failpoint("setup", gate.hold, worker_id=0, incarnation=1),
        )
        manager = make_manager(worker)
        manager.add_observer(PushingAtIncidents(manager))
        async with fail_after(30), manager:
            with pytest.raises(WorkerLost):
                await manager.send_command("echo", worker_ids=[0])
            (await gate.visitor()).release()
            assert await manager.push_weights({"w": torch.zeros(1)}, wait=True) == 2
            while manager.stats().num_ready < 2:
                await manager.collect()
            async for batch in manager.experiences():
                if (batch.worker_id, batch.weights_version) == (0, 2):
                    break
            assert await manager.send_command("version") == {0: 2, 1: 2}


async def test_weights_that_kill_their_workers_are_withdrawn(make_manager):
    """After three slots died of a version the one before is back; the publisher is told, once."""
    manager = make_manager(pool_workers.Allergic, num_workers=3)
    async with fail_after(30), manager:
        assert await manager.push_weights({"w": torch.ones(2)}, wait=True) == 1
        assert await manager.push_weights({"w": torch.full((2,), float("nan"))}) == 2
        async for batch in manager.experiences():
            if batch.weights_version == 3:
                break
        with pytest.raises(PoisonedWeights, match="version 2 was withdrawn") as caught:
            await manager.push_weights({"w": torch.ones(2)})
        assert (caught.value.version, caught.value.replacement) == (2, 3)
        assert {incident.weights_version for incident in manager.incidents} == {2}
        assert {incident.phase for incident in manager.incidents} == {"load_weights"}
        assert {incident.worker_id for incident in manager.incidents} == {0, 1, 2}
        assert manager.weights_version == 3
        assert await manager.push_weights({"w": torch.ones(2)}, wait=True) == 4
        newest: dict[int, int] = {}
        while newest != {0: 4, 1: 4, 2: 4}:
            newest |= {batch.worker_id: batch.weights_version for batch in await manager.collect()}
        assert await manager.send_command("version") == {0: 4, 1: 4, 2: 4}


class PushingAtIncidents:
    """Pushes weights when the incident is told: before the slot has fresh queues."""

    def __init__(self, manager):
        self.manager = manager

    def on_event(self, event):
        if isinstance(event, WorkerIncident):
            self.pushing = asyncio.ensure_future(self.manager.push_weights({"w": torch.ones(1)}))


BAD_WEIGHTS = [
    ({"a": torch.zeros(2)}, r"missing keys: b"),
    ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, r"unexpected keys: c"),
    ({"a": torch.zeros(2), "b": torch.zeros(4)}, r"b: shape \[4\] instead of \[3\]"),
    ({"a": torch.zeros(2), "b": torch.zeros(3).half()}, r"b: dtype float16 instead of float32"),
    ({"a": torch.zeros(2), "b": torch.zeros(3).to_sparse()}, "weights must be dense tensors"),
    ({"a": torch.zeros(2), "b": [1, 2, 3]}, "weights must be dense tensors: b is a list"),
    ({}, "at least one tensor"),
]


@pytest.mark.parametrize(("weights", "problem"), BAD_WEIGHTS)
async def test_weights_that_do_not_fit_are_refused(make_manager, weights, problem):
    """Nothing is published, the error names the keys, and the pool goes on with what it had."""
    good = {"a": torch.ones(2), "b": torch.ones(3)}
    manager = make_manager(pool_workers.Counting, backend="inline")
    async with fail_after(30), manager:
        await manager.push_weights(good)
        with pytest.raises(WeightsError, match=problem):
            await manager.push_weights(weights)
        assert manager.weights_version == 1
        assert (manager.stats().num_pushes, manager.stats().weights_version) == (1, 1)
        assert await manager.push_weights(good, wait=True) == 2


async def test_the_first_weights_may_be_refused_too(make_manager):
    """A first push that cannot be published leaves the pool without weights, and usable."""
    async with fail_after(30), make_manager(pool_workers.Counting, backend="inline") as manager:
        with pytest.raises(WeightsError):
            await manager.push_weights({"a": "text"})
        assert manager.weights_version == 0
        assert await manager.push_weights({"a": torch.ones(1)}) == 1


@pytest.mark.parametrize("check_finite", [True, False])
async def test_weights_that_are_not_finite_pass_and_are_counted(make_manager, check_finite):
    """NaN and infinity are the trainer's business; stats count them with check_finite."""
    manager = make_manager(pool_workers.Recording, check_finite=check_finite, mode="sync")
    async with fail_after(30), manager:
        for value in (1.0, float("nan"), float("inf"), 2.0, -float("inf")):
            await manager.push_weights({"w": torch.tensor([value]), "n": torch.tensor([3])})
        batches = await manager.collect()
        assert batches[0].data["w"].tolist() == [-float("inf")]
        assert manager.stats().num_not_finite == (3 if check_finite else 0)
        assert manager.stats().num_pushes == 5


async def test_pushes_are_told_and_counted(make_manager):
    """An event and the stats say what was pushed, with true sizes."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    events = manager.events()
    async with fail_after(30), manager:
        for version in (1, 2):
            await manager.push_weights(
                {"a": torch.zeros(10), "b": torch.zeros(3, dtype=torch.int8)}
            )
            event = await next_event(events, WeightsPushed)
            assert event == WeightsPushed(version, 43)
        assert (manager.stats().num_pushes, manager.stats().bytes_pushed) == (2, 86)


async def test_weights_are_copied(make_manager):
    """What the caller does to its tensors after the push changes nothing."""
    weights = {"w": torch.zeros(4)}
    async with fail_after(30), make_manager(pool_workers.Recording, mode="sync") as manager:
        await manager.push_weights(weights)
        weights["w"].fill_(9.0)
        for batch in await manager.collect():
            assert batch.data["w"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [8, 1 << 21], ids=["small", "copied in a thread"])
async def test_a_push_cancelled_in_flight_is_published_or_not_and_counted_so(make_manager, size):
    """At every point of cancellation the version, the stats and the workers agree."""
    manager = make_manager(pool_workers.Counting, check_finite=True, num_workers=1)
    async with fail_after(60), manager:
        cancelled = 0
        for turns in range(12):
            pushing = asyncio.create_task(manager.push_weights({"w": torch.zeros(size)}, wait=True))
            for _ in range(turns):
                await pool_workers.turn()
            pushing.cancel()
            await asyncio.wait([pushing])
            cancelled += pushing.cancelled()
            assert manager.stats().num_pushes == manager.weights_version
        assert cancelled > 0
        before = manager.weights_version
        assert await manager.push_weights({"w": torch.zeros(size)}, wait=True) == before + 1
        assert await manager.send_command("version") == {0: before + 1}


async def test_a_push_cancelled_in_its_copy_ends_with_it(make_manager, monkeypatch):
    """The copy is made in a thread: until it is done, the push is not over and no other begins."""
    copying, go_on = threading.Event(), threading.Event()
    publish = WeightsPublisher.publish

    def held(publisher, tensors):
        copying.set()
        go_on.wait()
        return publish(publisher, tensors)

    large = {"w": torch.zeros(1 << 21)}
    async with fail_after(60), make_manager(pool_workers.Counting, num_workers=1) as manager:
        await manager.push_weights(large)
        monkeypatch.setattr(WeightsPublisher, "publish", held)
        pushing = asyncio.create_task(manager.push_weights(large))
        await asyncio.to_thread(copying.wait)
        pushing.cancel()
        following = asyncio.create_task(manager.push_weights(large))
        for _ in range(20):
            await pool_workers.turn()
        was_done = pushing.done()
        go_on.set()
        assert not was_done
        with pytest.raises(asyncio.CancelledError):
            await pushing
        assert await following == 3
        assert manager.stats().num_pushes == manager.weights_version == 3


async def test_concurrent_pushes_get_versions_of_their_own(make_manager):
    """Ten pushes at the same time are ten versions; the last one is applied."""
    async with fail_after(30), make_manager(pool_workers.Recording) as manager:
        pushes = [manager.push_weights({"w": torch.full((1 << 18,), n)}) for n in range(10)]
        versions = await asyncio.gather(*pushes)
        assert sorted(versions) == list(range(1, 11))
        await manager.push_weights({"w": torch.full((1 << 18,), 99)}, wait=True)
        await manager.collect(min_steps=4)
        assert manager.weights_version == 11


async def test_a_worker_whose_model_has_other_keys_fails_at_the_start(make_manager):
    """The error of the start names the keys, as torch does."""
    worker = partial(pool_workers.Modelled, partial(nn.Linear, 3, 3))
    manager = make_manager(worker, model=a_model())
    async with fail_after(30):
        with pytest.raises(WorkerStartError, match=r'Missing key\(s\) in state_dict: "weight"'):
            await manager.start()
        assert manager.incidents[0].phase == "load_weights"


async def test_weights_that_the_workers_model_cannot_take_fail_the_worker(make_manager):
    """Later it is an incident of the worker, with torch's message, until the policy ends it."""
    worker = partial(pool_workers.Modelled, partial(nn.Linear, 3, 3))
    manager = make_manager(worker, mode="sync", num_workers=1, restart={"max_restarts": 0})
    async with fail_after(30), manager:
        await manager.collect()
        await manager.push_weights(a_model())
        with pytest.raises(PoolExhausted, match="Missing key"):
            async for _ in manager.experiences():
                pass
        assert manager.incidents[0].phase == "load_weights"
        assert manager.incidents[0].weights_version == 1


@pytest.mark.parametrize("wait", [False, True])
async def test_the_first_weights_for_workers_that_can_take_none_are_refused(make_manager, wait):
    """With neither a model nor an own load_weights the push raises, and nothing is published."""
    worker = partial(pool_workers.Returning, {"x": torch.zeros(1)})
    async with fail_after(30), make_manager(worker, mode="sync") as manager:
        with pytest.raises(WeightsError, match=r"workers \[0, 1\] cannot take weights: in setup"):
            await manager.push_weights({"w": torch.zeros(2)}, wait=wait)
        assert manager.weights_version == 0
        assert [batch.weights_version for batch in await manager.collect()] == [0, 0]
        assert manager.incidents == ()


async def test_a_worker_with_its_own_load_weights_needs_no_model(make_manager):
    """It takes weights as it likes; versions move on."""
    worker = partial(pool_workers.Taking, {"x": torch.zeros(1)})
    async with fail_after(30), make_manager(worker, mode="sync") as manager:
        await manager.push_weights({"w": torch.zeros(2)}, wait=True)
        assert [batch.weights_version for batch in await manager.collect()] == [1, 1]

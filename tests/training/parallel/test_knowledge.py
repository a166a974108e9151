"""What a manager knows: stats, queue_info, workers, incidents, events, observers."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import weakref
from functools import partial

import pytest
import torch

import pool_workers
from keisei import events as ev
from keisei.events import ExitCause, Remedy
from keisei.testing.failpoints import Failpoint, Gate, armed, exit_now, kill
from keisei.testing.scenarios import fail_after, next_event
from keisei.training.parallel.seeds import worker_seed

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])


class Noting:
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


async def test_stats_count_what_happened(make_manager):
    """Every number is the true one, during the life of the pool and after it."""
    worker = partial(pool_workers.Counting, 3)
    manager = make_manager(worker, mode="sync")
    async with fail_after(30), manager:
        assert manager.stats().num_batches == 0
        await manager.push_weights({"w": torch.zeros(5)})
        await manager.collect()
        await manager.collect()
        async for _ in manager.experiences():
            break
        stats = manager.stats()
        assert (stats.num_workers, stats.num_ready) == (2, 2)
        assert (stats.num_batches, stats.num_steps, stats.num_queued) == (5, 15, 1)
        assert (stats.weights_version, stats.num_pushes, stats.bytes_pushed) == (1, 1, 20)
        assert (stats.num_dropped, stats.num_lost, stats.num_restarts) == (0, 0, 0)
        assert (stats.num_incidents, stats.num_not_finite) == (0, 0)
        assert stats.is_paused is False
        assert stats.seconds > 0
    after = manager.stats()
    assert (after.num_batches, after.num_steps, after.num_ready) == (5, 15, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.num_batches = 9


@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_queue_info_tells_true_counts(make_manager, mode):
    """Experiences that wait, commands and announcements that nobody took up, for each worker."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting, Failpoint("on_command", gate.hold, worker_id=1, hit=2)
        )
        manager = make_manager(worker, mode=mode, max_queue_size=3)
        async with fail_after(30), manager:
            await manager.send_command("number")
            while mode == "async" and manager.queue_info().experience_queue_sizes != (3, 3):
                await manager.send_command("number", worker_ids=[0])
            info = manager.queue_info()
            assert (info.num_workers, info.max_queue_size) == (2, 3)
            assert info.control_queue_sizes == info.model_queue_sizes == (0, 0)

            def ask():
                return asyncio.create_task(manager.send_command("echo", worker_ids=[1]))

            asking = [ask()]
            held = await gate.visitor()
            asking += [ask() for _ in range(4)]
            await manager.send_command("echo", worker_ids=[0])
            assert manager.queue_info().control_queue_sizes == (0, 4)
            await manager.push_weights({"w": torch.zeros(1)})
            while manager.queue_info().model_queue_sizes != (0, 2):  # where, and that, they are
                await manager.send_command("echo", worker_ids=[0])
            held.release()
            await asyncio.gather(*asking)
            assert manager.queue_info().control_queue_sizes == (0, 0)
            if mode == "async":
                assert manager.queue_info().experience_queue_sizes == (3, 3)
                assert len(await manager.collect(min_steps=2)) == 2


@BACKENDS
async def test_workers_tells_what_each_slot_is_doing(make_manager, backend):
    """State, phase, incarnation, version and counts of each slot, by worker id."""
    with Gate() as gate:
        worker = partial(pool_workers.Coroutine, gate=gate)
        manager = make_manager(worker, backend=backend)
        assert manager.workers == ()
        async with fail_after(30), manager:
            await manager.push_weights({"w": torch.zeros(1)}, wait=False)
            held = [await gate.visitor(), await gate.visitor()]
            infos = manager.workers
            assert [info.worker_id for info in infos] == [0, 1]
            assert [info.incarnation for info in infos] == [0, 0]
            assert [info.state for info in infos] == ["running", "running"]
            assert [info.phase for info in infos] == ["collect", "collect"]
            assert [info.device for info in infos] == ["cpu", "cpu"]
            assert [info.experiences for info in infos] == [0, 0]
            if backend == "local":
                assert {info.pid for info in infos} == {visitor.pid for visitor in held}
            else:
                assert {info.pid for info in infos} == {None}
            gate.open()
            await manager.collect(min_steps=10)
            await manager.push_weights({"w": torch.zeros(1)}, wait=True)
            assert [info.weights_version for info in manager.workers] == [2, 2]
            assert sum(info.experiences for info in manager.workers) >= 10


async def test_a_worker_is_told_about_itself(make_manager):
    """Its context has the slot, the incarnation, the seed, the device and the newest version."""
    config = {"worker_device_map": ["cpu", "cuda:3"], "threads_per_worker": 2}
    manager = make_manager(pool_workers.Knowing, model=torch.nn.Linear(1, 1), **config)
    events = manager.events()
    async with fail_after(30), manager:
        expected = {
            "worker_id": {0: 0, 1: 1},
            "incarnation": {0: 0, 1: 0},
            "num_workers": {0: 2, 1: 2},
            "seed": {0: worker_seed(7, 0, 0), 1: worker_seed(7, 1, 0)},
            "device": {0: "cpu", 1: "cuda:3"},
            "weights_version": {0: 1, 1: 1},
            "threads": {0: 2, 1: 2},
        }
        for fact, values in expected.items():
            assert await manager.send_command(fact) == values, fact
        assert [info.device for info in manager.workers] == ["cpu", "cuda:3"]
        os.kill(manager.workers[1].pid, signal.SIGKILL)
        await next_event(events, ev.WorkerReady, lambda event: event.incarnation == 1)
        assert await manager.send_command("incarnation") == {0: 0, 1: 1}
        assert await manager.send_command("seed") == {
            0: worker_seed(7, 0, 0),
            1: worker_seed(7, 1, 1),
        }


async def test_health_is_every_slot_being_ready(make_manager):
    """is_healthy is false before, after, and while a slot is being filled again."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting,
            Failpoint("on_command", kill, worker_id=1),
            Failpoint("setup", gate.hold, worker_id=1, incarnation=1),
        )
        manager = make_manager(worker)
        events = manager.events()
        assert not manager.is_healthy
        async with fail_after(30), manager:
            assert manager.is_healthy
            with pytest.raises(Exception, match="SIGKILL"):
                await manager.send_command("echo", worker_ids=[1])
            starting = await gate.visitor()
            assert not manager.is_healthy
            starting.release()
            await next_event(events, ev.WorkerReady, lambda event: event.incarnation == 1)
            assert manager.is_healthy
        assert not manager.is_healthy


@BACKENDS
async def test_events_come_in_the_order_in_which_things_happened(make_manager, backend):
    """From the first start to the end of all, the same for a stream and for an observer."""
    noting = Noting()
    manager = make_manager(
        pool_workers.Counting, backend=backend, num_workers=1, observers=[noting]
    )
    stream = manager.events()
    async with fail_after(30), manager:
        await manager.push_weights({"w": torch.zeros(1)})
        await manager.pause()
        await manager.resume()
        await manager.scale(2)
    assert [event async for event in stream] == noting.events
    pid = noting.events[0].pid
    assert (pid is None) == (backend == "inline")
    second = noting.events[6].pid
    assert noting.events[:9] == [
        ev.WorkerStarted(0, 0, pid),
        ev.WorkerReady(0, 0, pid),
        ev.PoolStarted(1),
        ev.WeightsPushed(1, 4),
        ev.PoolPaused(),
        ev.PoolResumed(),
        ev.WorkerStarted(1, 0, second),
        ev.WorkerReady(1, 0, second),
        ev.PoolScaled(2),
    ]
    assert [type(event) for event in noting.events[9:]] == [
        ev.WorkerExited,
        ev.WorkerExited,
        ev.PoolStopped,
    ]
    assert noting.events[-1] == ev.PoolStopped(0)


async def test_a_crash_is_told_in_order(make_manager):
    """Incident, new start, ready: of the same slot, with the next incarnation."""
    noting = Noting()
    worker = armed(pool_workers.Counting, Failpoint("collect", partial(exit_now, 7), worker_id=1))
    manager = make_manager(worker, observers=[noting])
    events = manager.events()
    async with fail_after(30), manager:
        await next_event(events, ev.WorkerReady, lambda event: event.incarnation == 1)
        of_slot = [
            event
            for event in noting.events
            if getattr(event, "worker_id", None) == 1 or isinstance(event, ev.WorkerIncident)
        ]
        assert [type(event) for event in of_slot] == [
            ev.WorkerStarted,
            ev.WorkerReady,
            ev.WorkerIncident,
            ev.WorkerStarted,
            ev.WorkerReady,
        ]
        assert of_slot[2].incident is manager.incidents[0]
        assert [event.incarnation for event in of_slot[3:]] == [1, 1]
    assert noting.events[-1] == ev.PoolStopped(1)


async def test_an_incident_tells_the_whole_story(make_manager):
    """Slot, incarnation, cause, exit code, phase, losses, remedy, last command and time."""
    worker = armed(
        pool_workers.Counting, Failpoint("collect", partial(exit_now, 7), worker_id=1, hit=3)
    )
    manager = make_manager(worker, mode="sync")
    async with fail_after(30), manager:
        await manager.push_weights({"w": torch.zeros(1)})
        await manager.send_command("echo")
        for _ in range(3):
            await manager.collect()
        (incident,) = manager.incidents
        assert (incident.worker_id, incident.incarnation) == (1, 0)
        assert (incident.cause, incident.exitcode, incident.phase) == (ExitCause.EXIT, 7, "collect")
        assert incident.signal_name is None
        assert (incident.experiences_lost, incident.commands_lost) == (1, 0)
        assert (incident.weights_version, incident.last_command) == (1, "echo")
        assert (incident.remedy, incident.delay) == (Remedy.RESTARTED, 0.0)
        assert "exited with code 7" in incident.summary
        stats = manager.stats()
        assert (stats.num_incidents, stats.num_lost, stats.num_restarts) == (1, 1, 1)


async def test_a_user_error_has_its_traceback(make_manager):
    """An exception in collect is an incident with the worker's own traceback."""
    worker = armed(pool_workers.Counting, Failpoint("collect", pool_workers.no, worker_id=0, hit=2))
    manager = make_manager(worker, mode="sync")
    async with fail_after(30), manager:
        await manager.collect()
        await manager.collect()
        (incident,) = manager.incidents
        assert incident.cause is ExitCause.USER_ERROR
        assert incident.detail == "ValueError: no, because of the test"
        assert "in no\n" in incident.traceback
        assert "pool_workers.py" in incident.traceback


async def test_killing_from_outside_is_named_by_its_signal(make_manager):
    """SIGKILL, SIGTERM and a real-time signal are told apart."""
    manager = make_manager(pool_workers.Counting, mode="sync")
    events = manager.events()
    async with fail_after(30), manager:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGABRT):
            await next_event(events, ev.WorkerReady, lambda event: event.worker_id == 1)
            await manager.collect()
            os.kill(manager.workers[1].pid, number)
            await manager.collect()
            while len(manager.incidents) == 0 or manager.incidents[-1].exitcode != -number:
                await manager.collect()
        names = [incident.signal_name for incident in manager.incidents]
        assert names == ["SIGKILL", "SIGTERM", "SIGABRT"]
        assert {incident.cause for incident in manager.incidents} == {ExitCause.SIGNAL}


async def test_an_observer_that_raises_is_removed_and_the_pool_goes_on(make_manager, caplog):
    """The error is logged once with its traceback; the others hear everything."""
    noting = Noting()

    class Broken:
        def on_event(self, event):
            raise RuntimeError("an observer's own problem")

    manager = make_manager(pool_workers.Counting, observers=[Broken(), noting])
    async with fail_after(30), manager:
        await manager.collect(min_steps=10)
    logged = [record for record in caplog.records if record.name == "keisei.observers"]
    assert len(logged) == 1
    assert logged[0].levelno == logging.ERROR
    assert "an observer's own problem" in str(logged[0].exc_info[1])
    caplog.clear()  # the traceback holds the pool
    del logged
    assert noting.events[-1] == ev.PoolStopped(0)


async def test_an_observer_may_stop_the_pool(make_manager):
    """request_stop from inside on_event ends an iteration."""

    class Stopping:
        def on_event(self, event):
            if isinstance(event, ev.WeightsPushed):
                manager.request_stop()

    manager = make_manager(pool_workers.Counting)
    manager.add_observer(Stopping())
    async with fail_after(30), manager:
        async for _ in manager.experiences():
            await manager.push_weights({"w": torch.zeros(1)})
        assert manager.weights_version == 1


async def test_event_streams_are_independent(make_manager):
    """Each hears everything from its own beginning; one that was left early disturbs nobody."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    early = manager.events()
    async with fail_after(30), manager:
        async for event in early:
            assert isinstance(event, ev.WorkerStarted)
            break
        first = manager.events()
        await manager.pause()
        second = manager.events()
        await manager.resume()
        assert await anext(first) == ev.PoolPaused()
        assert await anext(first) == await anext(second) == ev.PoolResumed()
        waiting = asyncio.ensure_future(anext(second))
        await asyncio.wait([waiting], timeout=0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await manager.pause()
        assert await anext(second) == ev.PoolPaused()
    assert [type(event) async for event in second][-1] is ev.PoolStopped
    assert [type(event) async for event in early][-1] is ev.PoolStopped
    assert [event async for event in manager.events()] == []


async def test_a_reader_that_is_too_slow_loses_the_oldest_events_and_hears_how_many(make_manager):
    """Ten thousand wait for it, the newest; one that keeps up misses nothing meanwhile."""
    weights = {"w": torch.zeros(1)}
    manager = make_manager(pool_workers.Counting, backend="inline")
    async with fail_after(60), manager:
        await manager.pause()
        slow, fast = manager.events(), manager.events()
        assert (slow.num_missed, fast.num_missed) == (0, 0)
        for version in range(1, 10_001):
            await manager.push_weights(weights)
            assert (await anext(fast)).version == version
        assert slow.num_missed == 0, "exactly as many as it holds"
        for version in range(10_001, 10_006):
            await manager.push_weights(weights)
            assert (await anext(fast)).version == version
            assert slow.num_missed == version - 10_000
        assert [(await anext(slow)).version for _ in range(10_000)] == list(range(6, 10_006))
        await manager.push_weights(weights)
        assert (await anext(slow)).version == 10_006
        assert (slow.num_missed, fast.num_missed) == (5, 0)


async def test_a_stream_that_is_forgotten_keeps_nothing(make_manager):
    """Events are not kept for a reader that has gone."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    stream = manager.events()
    gone = weakref.ref(stream)
    async with fail_after(30), manager:
        async for _ in stream:
            break
        del stream
        gc.collect()
        assert gone() is None


async def test_two_managers_know_nothing_of_each_other(make_manager):
    """Two pools in one loop, one of which loses a worker: events and batches are their own."""
    ours, theirs = Noting(), Noting()
    first = make_manager(partial(pool_workers.Counting, 2), observers=[ours])
    second = make_manager(
        armed(partial(pool_workers.Counting, 5), Failpoint("collect", kill, worker_id=0)),
        observers=[theirs],
    )
    async with fail_after(30), first, second:
        a, b = await asyncio.gather(first.collect(min_steps=200), second.collect(min_steps=200))
        assert {batch.num_steps for batch in a} == {2}
        assert {batch.num_steps for batch in b} == {5}
        pids = {info.pid for info in (*first.workers, *second.workers)}
        assert len(pids) == 4
        while not second.incidents:
            await second.collect()
        assert first.incidents == ()
        assert len(second.incidents) == 1
    assert ours.of(ev.WorkerIncident) == []
    assert len(theirs.of(ev.WorkerIncident)) == 1

"""Failpoints fire at their place, in their worker, at their hit; gates hold and let go."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
from functools import partial

import pytest

import pool_workers
from keisei.events import WorkerReady
from keisei.exceptions import CommandError, WorkerLost, WorkerStartError
from keisei.testing import failpoints
from keisei.testing.failpoints import ARM, Failpoint, Gate, armed, failpoint, kill, throw
from keisei.testing.scenarios import fail_after, next_event

ERROR = ValueError("armed")


def test_a_place_where_nothing_is_armed_costs_nothing():
    """User code may call failpoint() anywhere, also outside of a worker."""
    assert failpoint("anywhere") is None


@pytest.mark.parametrize("backend", ["local", "inline"])
@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.AsyncHooks])
@pytest.mark.parametrize("hook", ["setup", "load_weights", "collect", "reset", "on_command"])
async def test_every_hook_is_a_place(make_manager, backend, worker, hook):
    """The fault happens in front of the hook, def or async def, and not elsewhere."""
    factory = armed(worker, Failpoint(hook, partial(throw, ERROR), hit=None, incarnation=None))
    config = {"backend": backend, "num_workers": 1, "restart": {"max_restarts": 0}}
    manager = make_manager(factory, **config, mode="sync")

    async def use():
        async with manager:
            if hook == "load_weights":
                await manager.push_weights({"w": pool_workers.torch.zeros(1)}, wait=True)
            if hook == "reset":
                await manager.reset()
            if hook == "on_command":
                await manager.send_command("echo")
            await manager.collect()

    async with fail_after(30):
        with pytest.raises(Exception, match="ValueError: armed") as caught:
            await use()
    phases = {"reset": None, "on_command": None, "setup": "start"}
    phase = phases.get(hook, hook)
    assert [incident.phase for incident in manager.incidents] == ([phase] if phase else [])
    assert "armed" in str(caught.value)


async def test_a_failpoint_is_meant_for_one_process_and_one_hit(make_manager):
    """Slot, incarnation and the number of the arrival choose where the fault happens."""
    factory = armed(
        pool_workers.Counting,
        Failpoint("collect", kill, worker_id=1, incarnation=0, hit=3),
        Failpoint("collect", kill, worker_id=1, incarnation=1, hit=2),
    )
    async with fail_after(30), make_manager(factory, mode="sync") as manager:
        for _ in range(6):
            await manager.collect()
        found = [(one.worker_id, one.incarnation) for one in manager.incidents]
        assert found == [(1, 0), (1, 1)]
        numbers = await manager.send_command("number")
        assert numbers == {0: 6, 1: 3}


async def test_failpoints_can_be_armed_later(make_manager):
    """The command arms them in a worker that runs; hits count from then on."""
    async with fail_after(30), make_manager(armed(pool_workers.Counting), mode="sync") as manager:
        await manager.collect()
        await manager.send_command(ARM, [Failpoint("collect", kill, hit=2)], worker_ids=[0])
        await manager.collect()
        assert manager.incidents == ()
        await manager.collect()
        assert [one.worker_id for one in manager.incidents] == [0]


@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
async def test_user_code_has_places_of_its_own(make_manager, worker):
    """failpoint() in a hook, and in a thread of one, reaches what is armed for its worker."""
    place = "in a thread" if worker is pool_workers.Coroutine else "my place"
    fault = Failpoint(place, partial(throw, ERROR), worker_id=1)
    config = {"restart": {"max_restarts": 0}, "mode": "sync"}
    async with fail_after(30), make_manager(armed(worker, fault), **config) as manager:
        if worker is pool_workers.Counting:
            with pytest.raises(CommandError, match="ValueError: armed"):
                await manager.send_command("reach", "my place", worker_ids=[1])
            assert await manager.send_command("reach", "my place") == {0: None, 1: None}
        else:
            with pytest.raises(WorkerStartError, match="ValueError: armed"):
                await manager.collect()


@pytest.mark.parametrize(
    "fault", ["kill", "stop", "exit_now", "segfault", "hang", "hold_gil", "garbage", "torn_frame"]
)
async def test_faults_of_whole_processes_spare_the_application(make_manager, fault):
    """Under the inline backend they raise instead of hitting the application itself."""
    factory = armed(pool_workers.Counting, Failpoint("collect", getattr(failpoints, fault)))
    config = {"backend": "inline", "mode": "sync", "restart": {"max_restarts": 0}}
    async with fail_after(30), make_manager(factory, **config) as manager:
        with pytest.raises(WorkerStartError, match=r"the fault .* would hit the application"):
            await manager.collect()


async def test_a_stopped_worker_goes_on_at_sigcont(make_manager):
    """stop() is SIGSTOP: nothing is lost when the process continues in time."""
    factory = armed(pool_workers.Counting, Failpoint("collect", failpoints.stop, hit=2))
    async with fail_after(30), make_manager(factory, num_workers=1, mode="sync") as manager:
        await manager.collect()
        pid = manager.workers[0].pid
        collecting = asyncio.create_task(manager.collect())
        while pool_workers.process_state(pid) != "T":
            await pool_workers.turn()
        os.kill(pid, signal.SIGCONT)
        (batch,) = await collecting
        assert batch.data["number"].item() == 2
        assert manager.incidents == ()


def test_armed_factories_are_picklable():
    """What is armed travels with the factory."""
    with Gate() as gate:
        factory = armed(
            partial(pool_workers.Counting, 3),
            Failpoint("collect", partial(failpoints.exit_now, 3)),
            Failpoint("setup", gate.hold),
        )
        worker = pickle.loads(pickle.dumps(factory))()
        assert isinstance(worker, pool_workers.Counting)
        assert worker.steps == 3


async def test_a_gate_holds_until_it_is_told(make_manager):
    """A visitor says who it is, and goes on when it is released, not before."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, num_workers=1, mode="sync") as manager:
            collecting = asyncio.create_task(manager.collect())
            visitor = await gate.visitor()
            assert visitor.label == "0.0.1"
            assert visitor.pid == manager.workers[0].pid
            await asyncio.wait([collecting], timeout=0.05)
            assert not collecting.done()
            visitor.release()
            assert len(await collecting) == 1


async def test_a_gate_tells_when_its_visitor_dies(make_manager):
    """gone() returns at the death of the process that was held."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold))
        manager = make_manager(worker, num_workers=1)
        events = manager.events()
        async with fail_after(30), manager:
            visitor = await gate.visitor()
            waiting = asyncio.create_task(visitor.gone())
            await asyncio.wait([waiting], timeout=0.05)
            assert not waiting.done()
            os.kill(visitor.pid, signal.SIGKILL)
            await waiting
            await next_event(events, WorkerReady, lambda event: event.incarnation == 1)


async def test_an_open_gate_holds_nobody():
    """Who was held goes on, who comes later passes, and waiting for visitors is an error."""
    gate = Gate()
    copy = pickle.loads(pickle.dumps(gate))
    thread = threading.Thread(target=copy.hold, args=("a thread",))
    thread.start()
    async with fail_after(30):
        visitor = await gate.visitor()
        assert (visitor.label, visitor.pid) == ("a thread", os.getpid())
        waiting = asyncio.create_task(copy.wait("a task"))
        assert (await gate.visitor()).label == "a task"
        gate.open()
        await waiting
        await asyncio.to_thread(thread.join)
        await copy.wait()
        copy.hold()
        with pytest.raises(RuntimeError, match="nobody stands at a gate that is open"):
            await gate.visitor()
        gate.open()


async def test_waiting_at_a_gate_can_be_cancelled():
    """The coroutine leaves, and its visitor is seen to have gone."""
    with Gate() as gate:
        copy = pickle.loads(pickle.dumps(gate))
        async with fail_after(30):
            waiting = asyncio.create_task(copy.wait())
            visitor = await gate.visitor()
            waiting.cancel()
            await asyncio.wait([waiting])
            await visitor.gone()
            assert waiting.cancelled()


async def test_garbage_is_survived_by_the_application(make_manager):
    """The worker is replaced; a command that it was to answer is told so."""
    worker = armed(pool_workers.Counting, Failpoint("on_command", failpoints.close_queues))
    async with fail_after(30), make_manager(worker, num_workers=1) as manager:
        with pytest.raises(WorkerLost):
            await manager.send_command("echo")

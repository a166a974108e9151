"""Hang: what does not move is found by its progress; what moves, however slowly, is left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial

import pytest

import fault_workers
import pool_workers
from fault_helpers import (
    LIMIT,
    METHODS,
    SPAWN_UNDER_STRESS,
    check_order,
    crashing,
    kinds,
    next_incident,
    until_ready,
    watched,
)
from keisei.backends.handle import LocalProcess
from keisei.events import ExitCause, WorkerExited, WorkerSuspected
from keisei.exceptions import CommandTimeout, WorkerLost
from keisei.supervision import shutdown
from keisei.testing import failpoints, leaks
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after, next_event

DEADLINE = {"collect_timeout": 0.6, "command_timeout": 0.6}


def failing(fault, worker=pool_workers.Counting, *, place="collect", hit=2):
    """Return a worker of which number 1 meets ``fault`` when it comes to ``place``."""
    return armed(worker, Failpoint(place, fault, worker_id=1, hit=hit))


async def test_a_stop_that_ends_before_the_deadline_is_no_hang(make_manager):
    """SIGSTOP, then SIGCONT once the worker is suspected: it is heard again, and nobody dies."""
    stopping = Failpoint("collect", failpoints.stop, worker_id=1, hit=2)
    manager = make_manager(armed(pool_workers.Counting), collect_timeout=3.0)
    async with fail_after(LIMIT), watched(manager) as (manager, events):
        await manager.send_command(failpoints.ARM, [stopping], worker_ids=[1])
        collecting = asyncio.create_task(manager.collect(min_steps=1000))
        suspected = await next_event(events, WorkerSuspected)
        assert (suspected.worker_id, suspected.phase) == (1, "collect")
        os.kill(manager.workers[1].pid, signal.SIGCONT)
        check_order(await collecting)
        assert await pool_workers.workers_heard(manager, 2) == {0, 1}
        assert manager.incidents == ()


@SPAWN_UNDER_STRESS
async def test_a_stopped_worker_is_killed_at_the_deadline(make_manager, start_method):
    """The incident of a worker under SIGSTOP names its process state, T."""
    manager = make_manager(failing(failpoints.stop), start_method=start_method, **DEADLINE)
    async with crashing(manager) as incident:
        assert (incident.cause, incident.exitcode) == (ExitCause.HANG, -9)
        assert "process state 'T'" in incident.detail
        assert incident.phase == "collect"


async def test_a_worker_stopped_before_it_is_ready_is_killed_and_replaced(make_manager):
    """SIGSTOP at the start runs into ``start_timeout`` like any other hang."""
    worker = failing(failpoints.stop, place="setup", hit=1)
    async with fail_after(LIMIT), make_manager(worker, start_timeout=4.0) as manager:
        assert kinds(manager.incidents) == [(1, 0, ExitCause.HANG)]
        assert manager.incidents[0].phase == "start"
        assert "process state 'T'" in manager.incidents[0].detail
        assert manager.is_healthy


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (failpoints.hang, "in hang"),
        (failpoints.hold_gil, "in hold_gil"),
        (fault_workers.deadlock, "in deadlock"),
    ],
    ids=["busy loop", "C code with the GIL", "deadlock beside a lively thread"],
)
async def test_a_main_loop_that_does_not_move_is_hung(make_manager, fault, where):
    """Whatever keeps it, and whatever other threads do: the incident shows where it stands."""
    suspicions = []
    manager = make_manager(failing(fault), **DEADLINE)
    manager.add_observer(Suspicions(suspicions))
    async with crashing(manager) as incident:
        assert incident.cause is ExitCause.HANG
        assert where in incident.traceback
        assert incident.experiences_lost == 1
    (suspected,) = suspicions
    assert where in suspected.stacks
    assert suspected.seconds >= 0.3


class Suspicions:
    """Keeps what is suspected of worker 1."""

    def __init__(self, suspicions):
        self.suspicions = suspicions

    def on_event(self, event):
        if isinstance(event, WorkerSuspected) and event.worker_id == 1:
            self.suspicions.append(event)


@pytest.mark.parametrize("place", ["load_weights", "on_command"])
async def test_a_hang_in_another_hook_is_found_too(make_manager, place):
    """Weights and commands have deadlines as ``collect`` has; the caller hears of it."""
    worker = failing(failpoints.hang, partial(fault_workers.Poisoned, int), place=place, hit=1)
    async with fail_after(LIMIT), make_manager(worker, **DEADLINE) as manager:
        events = manager.events()
        if place == "load_weights":
            await manager.push_weights(fault_workers.weights(1.0))
        else:
            with pytest.raises((WorkerLost, CommandTimeout)):
                await manager.send_command("echo", worker_ids=[1])
        incident = await next_incident(events)
        assert incident.cause is ExitCause.HANG
        assert incident.phase == {"on_command": "command"}.get(place, place)
        await until_ready(events, 1, 1)
    assert len(manager.incidents) == 1


async def test_a_slow_worker_that_moves_is_not_killed(make_manager):
    """A ``collect`` longer than its deadline is left alone as long as it reports progress."""
    with Gate() as gate:
        worker = partial(fault_workers.Slow, gate, 4)
        config = {"num_workers": 1, "collect_timeout": 2.0}
        async with fail_after(LIMIT), make_manager(worker, **config) as manager:
            events = manager.events()
            collecting = asyncio.create_task(manager.collect())
            began = time.monotonic()
            for _ in range(4):
                visitor = await gate.visitor()
                await next_event(events, WorkerSuspected)  # half of the deadline has passed
                visitor.release()
            (batch, *_) = await collecting
            assert time.monotonic() - began > 4.0
            assert batch.incarnation == 0
            assert manager.incidents == ()


async def test_a_starved_machine_kills_nobody(make_manager):
    """Ten busy processes beside every worker, and a deadline of a second: no false alarm."""
    burner = armed(pool_workers.Counting, Failpoint("setup", fault_workers.burn_10, worker_id=0))
    async with fail_after(LIMIT), make_manager(burner, collect_timeout=5.0) as manager:
        for version in range(1, 6):
            await manager.push_weights(fault_workers.weights(float(version)))
            check_order(await manager.collect(min_steps=20), gaps=True)
        assert manager.incidents == ()


async def test_a_suspended_supervisor_kills_nobody(make_manager, blocks_the_loop):
    """Time in which the application itself did not run is not held against its workers."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=0))
        async with fail_after(LIMIT), make_manager(worker, collect_timeout=1.0) as manager:
            visitor = await gate.visitor()
            block_the_loop(1.5)
            for _ in range(20):
                await pool_workers.turn()
            assert manager.incidents == ()
            visitor.release()
            check_order(await manager.collect(min_steps=20))
            assert manager.incidents == ()


def block_the_loop(seconds):
    """Stand still with the whole loop, which is what is tested here."""
    signal.sigtimedwait([], seconds)


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_stepped_wall_clock_changes_nothing(make_manager, monkeypatch, hours):
    """Deadlines follow the monotonic clock: a step of an hour neither kills nor spares anybody."""
    shift = 0.0
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + shift)
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, **DEADLINE) as manager:
        events = manager.events()
        await manager.collect(min_steps=10)
        shift = 3600.0 * hours
        await manager.collect(min_steps=10, timeout=30)
        await manager.send_command("echo", timeout=30)
        assert manager.incidents == ()
        os.kill(manager.workers[1].pid, signal.SIGSTOP)
        collecting = asyncio.create_task(manager.collect(min_steps=1000))
        incident = await next_incident(events)
        assert (incident.worker_id, incident.cause) == (1, ExitCause.HANG)
        await collecting


async def test_a_process_that_cannot_be_killed_is_abandoned(
    make_manager, monkeypatch, blocks_the_loop
):
    """A process in state D, for which a ``kill`` without effect stands in, holds up no stop."""
    monkeypatch.setattr(shutdown, "KILL_GRACE", 0.2)
    kill, kept = LocalProcess.kill, []
    worker = failing(fault_workers.ignore_signals_and_hang, hit=1)
    async with fail_after(LIMIT):
        async with make_manager(worker, shutdown_timeout=2.0) as manager:
            events = manager.events()
            victim = manager.workers[1].pid

            def no_effect(process):
                if process.pid != victim:
                    kill(process)
                else:
                    kept.append(process)

            monkeypatch.setattr(LocalProcess, "kill", no_effect)
            await until_collecting(manager, 1)
        (incident,) = manager.incidents
        assert (incident.worker_id, incident.cause) == (1, ExitCause.ABANDONED)
        assert "did not end by SIGKILL" in incident.detail
        assert (await next_event(events, WorkerExited)).worker_id == 0
        assert kept
    os.kill(victim, signal.SIGKILL)
    (process,) = set(kept)
    while victim in leaks.children():
        await pool_workers.turn()  # whoever abandons a process leaves the rest to its end
    process._process.aio_process.join()
    process._process.close()


async def until_collecting(manager, worker_id):
    """Return when a worker is in ``collect``."""
    while manager.workers[worker_id].phase != "collect":
        await pool_workers.turn()


@METHODS
async def test_a_worker_that_ignores_every_signal_is_killed_by_stop(make_manager, start_method):
    """SIGTERM and SIGINT ignored, the rest blocked: SIGKILL follows within the grace."""
    worker = armed(
        pool_workers.Counting, Failpoint("collect", fault_workers.ignore_signals_and_hang)
    )
    config = {"shutdown_timeout": 0.4, "start_method": start_method}
    async with fail_after(LIMIT):
        async with make_manager(worker, **config) as manager:
            await until_collecting(manager, 0)
            await until_collecting(manager, 1)
            began = time.monotonic()
        assert time.monotonic() - began < 0.4 * 1.25 + 2.0
        assert manager.incidents == ()
        assert manager.stats().num_restarts == 0

"""Crash: however a worker ends, it is told once and exactly, and its slot is filled again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
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
    next_incident,
    until_ready,
)
from keisei.events import ExitCause
from keisei.exceptions import CommandError, WorkerLost
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after


def failing(fault, worker=pool_workers.Counting, *, place="collect", hit=2):
    """Return a worker of which number 1 meets ``fault`` when it comes to ``place``."""
    return armed(worker, Failpoint(place, fault, worker_id=1, hit=hit))


@METHODS
async def test_sigkill_in_a_step_restarts_the_slot_alone(make_manager, start_method):
    """A killed worker loses the experience that it had begun, and nobody else notices."""
    worker = failing(failpoints.kill)
    async with crashing(make_manager(worker, start_method=start_method)) as incident:
        assert (incident.cause, incident.exitcode) == (ExitCause.SIGNAL, -9)
        assert (incident.signal_name, incident.phase) == ("SIGKILL", "collect")
        assert incident.experiences_lost == 1


async def test_a_death_is_noticed_within_50_ms(make_manager):
    """From SIGKILL to the incident it takes less than 50 ms, in the best of six."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting, Failpoint("collect", gate.hold, worker_id=0, incarnation=None)
        )
        async with fail_after(LIMIT), make_manager(worker) as manager:
            taken = []
            for incarnation in range(6):
                events = manager.events()
                visitor = await gate.visitor()
                began = time.monotonic()
                os.kill(visitor.pid, signal.SIGKILL)
                incident = await next_incident(events)
                assert incident.incarnation == incarnation
                taken.append(incident.monotonic - began)
                await until_ready(events, 0, incarnation + 1)
            assert min(taken) < 0.05
            assert len(manager.incidents) == 6


@SPAWN_UNDER_STRESS
async def test_a_segfault_shows_the_stack(make_manager, start_method):
    """The incident of a SIGSEGV holds the native report: the signal and the Python stack."""
    worker = failing(failpoints.segfault)
    async with crashing(make_manager(worker, start_method=start_method)) as incident:
        assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGSEGV")
        assert "Fatal Python error: Segmentation fault" in incident.traceback
        assert "failpoints.py" in incident.traceback
        assert "in segfault" in incident.traceback


@SPAWN_UNDER_STRESS
async def test_exit_0_without_a_goodbye_is_a_failure(make_manager, start_method):
    """``os._exit(0)`` in the middle of an episode is abnormal, whatever its code says."""
    worker = failing(partial(failpoints.exit_now, 0))
    async with crashing(make_manager(worker, start_method=start_method)) as incident:
        assert (incident.cause, incident.exitcode) == (ExitCause.EXIT, 0)
        assert incident.detail == "it exited with code 0 without saying goodbye"
        assert incident.experiences_lost == 1


@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
@pytest.mark.parametrize("name", fault_workers.ERRORS)
async def test_whatever_a_hook_raises_is_a_user_error(make_manager, worker, name):
    """Any exception of ``collect``, also SystemExit and its like, is told with its traceback."""
    fault = partial(fault_workers.throw_named, name)
    async with crashing(make_manager(failing(fault, worker))) as incident:
        assert incident.cause is ExitCause.USER_ERROR
        assert "throw_named" in incident.traceback
        assert (incident.phase, incident.exitcode) == ("collect", 1)
        assert incident.experiences_lost == 1


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (fault_workers.recurse, "RecursionError"),
        (fault_workers.chain, "ValueError: a circle"),
        (fault_workers.run_out_of_memory, "MemoryError"),
    ],
    ids=["recursion", "circular cause", "address space"],
)
async def test_running_out_of_something_is_a_user_error(make_manager, fault, expected):
    """An endless recursion and an exhausted address space end in a traceback, not in a riddle."""
    async with crashing(make_manager(failing(fault))) as incident:
        assert incident.cause is ExitCause.USER_ERROR
        assert expected in incident.detail


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "CancelledError"])
async def test_the_same_in_a_command_is_answered(make_manager, name):
    """What ``on_command`` raises is the caller's error; the worker lives on."""
    fault = partial(fault_workers.throw_named, name)
    worker = failing(fault, place="on_command", hit=1)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        with pytest.raises(CommandError, match=name) as caught:
            await manager.send_command("echo", worker_ids=[1])
        assert caught.value.worker_id == 1
        assert await manager.send_command("echo", 5) == {0: 5, 1: 5}
        assert manager.incidents == ()


async def test_abort_from_c_is_named(make_manager):
    """``abort()`` in C code is a SIGABRT with the Python stack that led there."""
    async with crashing(make_manager(failing(fault_workers.abort))) as incident:
        assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGABRT")
        assert "in abort" in incident.traceback


@pytest.mark.parametrize("exits", [fault_workers.c_exit, fault_workers.exit_through_c])
async def test_exit_from_c_is_an_exit_without_a_goodbye(make_manager, exits):
    """``exit()`` and ``_exit()`` in C code are told with their code."""
    async with crashing(make_manager(failing(partial(exits, 3)))) as incident:
        assert (incident.cause, incident.exitcode) == (ExitCause.EXIT, 3)


async def test_a_killed_sibling_is_blamed_and_not_its_killer(make_manager):
    """A worker that kills another causes one incident, of the slot that died."""
    worker = armed(pool_workers.Counting)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        events = manager.events()
        killer, victim = (info.pid for info in manager.workers)
        killing = Failpoint("collect", partial(fault_workers.kill_others, victim))
        await manager.send_command(failpoints.ARM, [killing], worker_ids=[0])
        collecting = asyncio.create_task(drain(manager))
        incident = await next_incident(events)
        await until_ready(events, 1, 1)
        collecting.cancel()
        assert (incident.worker_id, incident.exitcode) == (1, -9)
        assert manager.workers[0].pid == killer
    assert manager.incidents == (incident,)


async def drain(manager):
    async for _ in manager.experiences():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="memory is accounted otherwise")
async def test_a_kill_that_nobody_owns_up_to_may_be_out_of_memory(make_manager):
    """A SIGKILL that is not the pool's is labelled as possibly out of memory, with the last RSS."""
    async with crashing(make_manager(failing(failpoints.kill, hit=3))) as incident:
        assert incident.detail.startswith(
            "SIGKILL that the pool did not send, possibly out of memory; its peak resident memory"
        )
        assert 2**24 < incident.rss < 2**34


async def test_a_leaking_worker_is_recycled_without_an_incident(make_manager):
    """A worker above ``max_worker_rss`` is replaced between two experiences; nothing is lost."""
    config = {"num_workers": 1, "max_worker_rss": 1}
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, **config) as manager:
        collected = []
        async for batch in manager.experiences():
            if batch.incarnation == 2:
                break
            collected.append((batch.incarnation, batch.sequence))
        assert collected == [(0, 0), (1, 0)]
        assert manager.incidents == ()
        assert manager.stats().num_lost == 0


async def test_a_worker_that_grows_is_recycled_when_it_is_too_large(make_manager):
    """The limit is compared with the present memory, not with one that never comes."""
    config = {"num_workers": 1, "max_worker_rss": (600 << 20)}
    async with fail_after(LIMIT), make_manager(fault_workers.Growing, **config) as manager:
        batches = []
        async for batch in manager.experiences():
            batches.append(batch)
            if batch.incarnation == 1:
                break
        check_order(batches)
        assert 2 < len(batches) < 100
        assert manager.incidents == ()


async def test_what_was_sent_before_the_death_arrives(make_manager):
    """A worker killed right after its third frame loses nothing: its queue is read to the end."""
    worker = failing(failpoints.kill, place="committed", hit=3)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        batches = []
        while not any((b.worker_id, b.incarnation) == (1, 1) for b in batches):
            batches += await manager.collect()
        check_order(batches)
        first = [b.sequence for b in batches if (b.worker_id, b.incarnation) == (1, 0)]
        assert first == [0, 1, 2]
        (incident,) = manager.incidents
        assert incident.experiences_lost == 0


@pytest.mark.parametrize("fault", [failpoints.kill, partial(failpoints.exit_now, 4)])
async def test_death_in_load_weights_is_told_with_the_version(make_manager, fault):
    """The incident names the phase and the weights that the worker was applying."""
    worker = failing(fault, fault_workers.finite, place="load_weights", hit=2)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        for version in (1, 2):
            assert await manager.push_weights(fault_workers.weights(1.0), wait=True) == version
        (incident,) = manager.incidents
        assert (incident.worker_id, incident.phase) == (1, "load_weights")
        assert incident.weights_version == 2
        await until_applied(manager, 2)
    assert len(manager.incidents) == 1


async def until_applied(manager, version):
    """Collect until both workers have delivered with ``version``."""
    workers = set()
    while len(workers) < 2:
        workers |= {b.worker_id for b in await manager.collect() if b.weights_version == version}


async def test_death_in_a_command_is_an_answer_at_once(make_manager):
    """The caller hears WorkerLost with the signal; the incident names the command."""
    worker = failing(failpoints.kill, place="on_command", hit=1)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        with pytest.raises(WorkerLost, match="SIGKILL") as caught:
            await manager.send_command("echo", 1)
        assert (caught.value.worker_id, caught.value.incarnation) == (1, 0)
        assert caught.value.exitcode == -9
        assert caught.value.replies == {0: 1}
        (incident,) = manager.incidents
        assert (incident.phase, incident.last_command) == ("command", "echo")
        assert incident.commands_lost == 1


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (failpoints.segfault, ExitCause.SIGNAL),
        (partial(fault_workers.throw_named, "SystemExit"), ExitCause.USER_ERROR),
    ],
    ids=["segfault", "SystemExit"],
)
async def test_a_crash_in_teardown_is_told_and_stops_nothing(make_manager, fault, cause):
    """A stop ends although a worker fails in ``teardown``, with one incident and no restart."""
    worker = failing(fault, place="teardown", hit=1)
    async with fail_after(LIMIT):
        async with make_manager(worker) as manager:
            await manager.collect()
        (incident,) = manager.incidents
        assert (incident.worker_id, incident.cause, incident.phase) == (1, cause, "teardown")
        assert manager.stats().num_restarts == 0


@SPAWN_UNDER_STRESS
async def test_the_whole_process_group_is_killed(make_manager, start_method):
    """A worker that kills its process group takes neither the pool nor its siblings along."""
    worker = failing(fault_workers.kill_own_group)
    async with crashing(make_manager(worker, start_method=start_method)) as incident:
        assert incident.signal_name == "SIGKILL"


async def test_an_alarm_of_the_environment_is_named(make_manager):
    """SIGALRM, by ``signal.setitimer`` without a handler, is told by its name."""
    async with crashing(make_manager(failing(fault_workers.set_an_alarm))) as incident:
        assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGALRM")

"""Startup: a worker that cannot start is told to the caller, in time, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import backend_workers
import fault_workers
import pool_workers
import settings_workers
from fault_helpers import (
    LIMIT,
    METHODS,
    SPAWN_UNDER_STRESS,
    kinds,
    next_incident,
    until_ready,
    watched,
)
from keisei.backends.forkserver import server
from keisei.events import ExitCause, Remedy
from keisei.exceptions import (
    ManagerStateError,
    PoolExhausted,
    SerializationError,
    WorkerStartError,
)
from keisei.testing import failpoints, leaks
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.parallel_manager import ParallelManager

ONE_TRY = {"max_restarts": 0, "backoff_base": 0.0, "backoff_cap": 0.0}


async def refused(manager, kind):
    """Start a pool that cannot start and return why."""
    async with fail_after(LIMIT):
        with pytest.raises(kind) as caught:
            await manager.start()
    assert manager.is_healthy is False
    return caught.value


@SPAWN_UNDER_STRESS
@pytest.mark.parametrize("where", ["factory", "setup"])
async def test_an_exception_at_the_start_reaches_the_caller(make_manager, where, start_method):
    """start() raises the first worker's error with its traceback; nobody tries again."""
    worker = partial(
        fault_workers.Failing, where, partial(fault_workers.throw_named, "NeedsArguments")
    )
    manager = make_manager(worker, num_workers=1, start_method=start_method)
    error = await refused(manager, WorkerStartError)
    assert (error.worker_id, error.incarnation) == (0, 0)
    assert "throw_named" in error.remote_traceback
    assert kinds(manager.incidents) == [(0, 0, ExitCause.START_FAILED)]
    assert manager.incidents[0].remedy is Remedy.ESCALATED


@pytest.mark.parametrize(
    "name", ["SystemExit", "KeyboardInterrupt", "CancelledError", "Unpicklable"]
)
@pytest.mark.parametrize("where", ["factory", "setup"])
async def test_any_kind_of_exception_at_the_start_reaches_the_caller(make_manager, where, name):
    """SystemExit and its like, at the start, are errors of the start like any other."""
    worker = partial(fault_workers.Failing, where, partial(fault_workers.throw_named, name))
    error = await refused(make_manager(worker, num_workers=1), WorkerStartError)
    assert name in str(error)


async def test_run_fails_fast_when_no_worker_ever_started(make_manager):
    """run() raises the start's error and returns only when every process is gone."""

    class Learner:
        def learn(self, batches):
            raise AssertionError("there are no batches")

        def state_dict(self):
            return pool_workers.a_model().state_dict()

    worker = partial(fault_workers.Failing, "setup", partial(fault_workers.throw_named, "Frozen"))
    manager = make_manager(worker, num_workers=4, learner=Learner())
    async with fail_after(LIMIT):
        with pytest.raises(WorkerStartError, match="Frozen: stiff"):
            await manager.run()
    assert {one.cause for one in manager.incidents} <= {ExitCause.START_FAILED}
    assert manager.stats().num_restarts == 0


async def collect_for_ever(manager):
    async with manager:
        while True:
            await manager.collect()


@pytest.mark.parametrize("degrade", [False, True])
async def test_an_exception_in_the_first_collect_is_raised_at_once(make_manager, degrade):
    """As one in ``setup``: it is not tried again, and its traceback reaches the caller."""
    worker = partial(settings_workers.FailsAtFirst, 1, 1)
    extra = {"on_exhausted": "degrade"} if degrade else {}
    async with fail_after(LIMIT):
        manager = make_manager(worker, **extra)
        with pytest.raises(
            WorkerStartError, match="worker 1 failed in its first collect"
        ) as caught:
            await collect_for_ever(manager)
    assert "ValueError: a mistake in collect" in caught.value.remote_traceback
    assert kinds(manager.incidents) == [(1, 0, ExitCause.USER_ERROR)]
    assert manager.stats().num_restarts == 0


@pytest.mark.parametrize("worker", [(2, 0, False), (1, 2, False)], ids=["second", "added"])
async def test_an_exception_in_a_later_collect_is_tried_again(make_manager, worker):
    """Once an experience has been collected, and where a slot was added to a complete pool."""
    factory = partial(settings_workers.FailsAtFirst, *worker)
    async with fail_after(LIMIT), make_manager(factory) as manager:
        await manager.scale(3)
        while not any(batch.incarnation == 1 for batch in await manager.collect()):
            pass
        assert kinds(manager.incidents) == [(worker[1], 0, ExitCause.USER_ERROR)]


async def test_a_restart_that_raises_counts_to_the_budget(make_manager):
    """After a good first start, a failing ``setup`` is retried until the budget is used up."""
    restart = {"max_restarts": 3, "backoff_base": 0.0, "backoff_cap": 0.0}
    error = partial(fault_workers.throw_named, "Frozen")
    worker = armed(
        pool_workers.Counting,
        *(Failpoint("setup", error, worker_id=1, incarnation=number) for number in range(1, 9)),
    )
    killing = Failpoint("collect", failpoints.kill, worker_id=1)
    async with fail_after(LIMIT), make_manager(worker, restart=restart) as manager:
        await manager.send_command(failpoints.ARM, [killing], worker_ids=[1])
        with pytest.raises(PoolExhausted) as caught:
            async for _ in manager.experiences():
                pass
        assert kinds(manager.incidents) == [
            (1, 0, ExitCause.SIGNAL),
            *((1, number, ExitCause.START_FAILED) for number in (1, 2, 3)),
        ]
        assert caught.value.incidents == manager.incidents


@METHODS
async def test_a_module_that_only_the_child_lacks(
    make_manager, start_method, tmp_path, monkeypatch
):
    """An ImportError in the worker's process alone is the error of start()."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / f"gone_in_the_child_{start_method}.py"
    module.write_text("import pool_workers\nclass Here(pool_workers.Counting):\n    pass\n")
    here = importlib.import_module(module.stem)
    manager = make_manager(here.Here, num_workers=1, start_method=start_method)
    for file in (module, *tmp_path.glob("__pycache__/*")):
        file.unlink()
    error = await refused(manager, WorkerStartError)
    assert f"No module named '{module.stem}'" in str(error)
    monkeypatch.delitem(sys.modules, module.stem)


@pytest.mark.parametrize("name", ["lambda", "local class", "SystemExit", "Unpicklable"])
def test_a_factory_that_cannot_be_pickled_is_refused_by_the_constructor(name):
    """No process is started and no descriptor opened for a factory that cannot travel."""

    class Local(pool_workers.Counting):
        pass

    factory = {"lambda": lambda: pool_workers.Counting(2), "local class": Local}.get(
        name, partial(pool_workers.Returning, fault_workers.CannotPickle(name))
    )
    before = leaks.Resources.now()
    with pytest.raises(SerializationError):
        ParallelManager(factory)
    assert leaks.Resources.now() == before


@pytest.mark.parametrize("ballast", [0, 1 << 20])
@SPAWN_UNDER_STRESS
async def test_a_crash_while_unpickling_does_not_block_the_start(
    make_manager, start_method, ballast
):
    """A process that dies on its own arguments, also large ones, is a failed start by SIGSEGV."""
    worker = fault_workers.CrashesWhenUnpickled(ballast)
    config = {"num_workers": 1, "restart": ONE_TRY, "start_method": start_method}
    manager = make_manager(worker, **config)
    error = await refused(manager, (PoolExhausted, WorkerStartError))
    assert "SIGSEGV" in str(error)
    assert kinds(manager.incidents) == [(0, 0, ExitCause.SIGNAL)]
    assert "_crash" in manager.incidents[0].traceback


@pytest.mark.parametrize("how", [failpoints.stop, failpoints.hold_gil, fault_workers.deadlock])
async def test_a_hang_in_setup_is_killed_and_tried_again(make_manager, how):
    """``start_timeout`` ends a start that hangs, in whatever way; the second one serves."""
    worker = armed(pool_workers.Counting, Failpoint("setup", how))
    async with fail_after(LIMIT), make_manager(worker, num_workers=1, start_timeout=4.0) as manager:
        (batch, *_) = await manager.collect()
        assert batch.incarnation == 1
        assert kinds(manager.incidents) == [(0, 0, ExitCause.HANG)]
        assert manager.incidents[0].phase == "start"


@SPAWN_UNDER_STRESS
async def test_a_hang_in_the_constructor_is_killed_and_tried_again(make_manager, start_method):
    """A factory that does not return is a hang of the start, and the next try may succeed."""
    config = {
        "num_workers": 1,
        "start_timeout": 20.0 if start_method == "spawn" else 5.0,
        "start_method": start_method,
    }
    with Gate() as gate:
        worker = partial(fault_workers.Failing, "factory", gate.hold)
        manager = make_manager(worker, **config)
        events = manager.events()
        async with fail_after(LIMIT):
            starting = asyncio.create_task(manager.start())
            await gate.visitor()
            incident = await next_incident(events)
            gate.open()
            await starting
            await manager.stop()
    assert (incident.cause, incident.phase) == (ExitCause.HANG, "start")
    assert "failpoints.py" in incident.traceback
    assert incident.delay == 0.0


async def test_ready_and_dead_at_once_is_a_crash_of_a_running_worker(make_manager):
    """A process that ends right after its ready frame had started: it is no failed start."""
    worker = armed(
        pool_workers.Counting, Failpoint("collect", partial(failpoints.exit_now, 1), worker_id=1)
    )
    async with fail_after(LIMIT), watched(make_manager(worker)) as (manager, events):
        collecting = asyncio.create_task(manager.collect(min_steps=20))
        incident = await next_incident(events)
        await collecting
        assert (incident.cause, incident.exitcode) == (ExitCause.EXIT, 1)
        assert incident.phase == "collect"


@pytest.mark.parametrize("place", ["unpickling", "factory", "setup", "load_weights"])
async def test_a_stop_finds_a_worker_at_any_phase_of_its_start(make_manager, place):
    """stop() while a child is starting ends it; start() says so and nothing is left."""
    with Gate() as gate:
        worker = partial(fault_workers.Stopped, gate, place)
        if place == "unpickling":
            worker = fault_workers.HeldWhenUnpickled(gate)
        model = torch.nn.Linear(1, 1)
        async with fail_after(LIMIT):
            manager = make_manager(worker, num_workers=2, shutdown_timeout=0.2, model=model)
            starting = asyncio.create_task(manager.start())
            visitors = [await gate.visitor(), await gate.visitor()]
            await manager.stop()
            for visitor in visitors:
                await visitor.gone()
            with pytest.raises(ManagerStateError, match="stopped while it was starting"):
                await starting
        assert manager.incidents == ()
        assert manager.workers == () or {info.pid for info in manager.workers} == {None}


async def test_a_stop_before_the_process_exists(make_manager):
    """stop() at the very moment of the start is heard before, or after, the process is made."""
    async with fail_after(LIMIT):
        for turns in range(1, 13):
            manager = make_manager(backend_workers.HangsInSetup)
            starting = asyncio.create_task(manager.start())
            for _ in range(turns):
                await pool_workers.turn()
            await manager.stop()
            with pytest.raises(ManagerStateError, match="stopped while it was starting"):
                await starting
            assert manager.incidents == ()


async def test_a_crash_loop_at_the_start_backs_off_and_escalates(make_manager):
    """Each try waits for a longer time at most, and the one beyond the budget ends the pool."""
    restart = {"max_restarts": 5, "backoff_base": 0.01, "backoff_cap": 0.04}
    fault = partial(failpoints.exit_now, 1)
    worker = armed(pool_workers.Counting, Failpoint("setup", fault, incarnation=None, hit=None))
    manager = make_manager(worker, num_workers=1, restart=restart)
    await refused(manager, (PoolExhausted, WorkerStartError))
    assert [one.incarnation for one in manager.incidents] == [0, 1, 2, 3, 4, 5]
    assert {one.cause for one in manager.incidents} == {ExitCause.START_FAILED}
    assert manager.incidents[0].delay == 0.0
    for incident, ceiling in zip(manager.incidents[1:5], (0.01, 0.02, 0.04, 0.04), strict=True):
        assert 0 <= incident.delay <= ceiling
    assert [one.remedy for one in manager.incidents] == [Remedy.RESTARTED] * 5 + [Remedy.ESCALATED]


# Open: queues that were made before the descriptors ran out are closed by the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@METHODS
async def test_no_descriptors_left_is_a_failed_start_that_is_tried_again(
    make_manager, start_method
):
    """A restart that finds no descriptor is told and retried; the pool recovers when there are."""
    restart = {"max_restarts": 1000, "backoff_base": 0.01, "backoff_cap": 0.02}
    config = {"num_workers": 1, "restart": restart, "start_method": start_method}
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, **config) as manager:
        events = manager.events()
        (pid,) = (info.pid for info in manager.workers)
        with no_descriptor_left():
            os.kill(pid, signal.SIGKILL)
            assert (await next_incident(events)).exitcode == -9
            failed = await next_incident(events)
        assert failed.cause is ExitCause.START_FAILED
        assert "Too many open files" in failed.detail
        numbers = [batch.incarnation for batch in await manager.collect(min_steps=20)]
        assert numbers[-1] == manager.workers[0].incarnation
        causes = [one.cause for one in manager.incidents[1:]]
        assert set(causes) == {ExitCause.START_FAILED}
        assert numbers[-1] == len(manager.incidents)


@contextlib.contextmanager
def no_descriptor_left():
    """Use up every descriptor that this process may open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        lowest = os.open(os.devnull, os.O_RDONLY)
        opened.callback(os.close, lowest)
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                opened.callback(os.close, os.dup(lowest))
        yield


async def test_a_killed_fork_server_takes_nobody_along(make_manager):
    """Living workers go on; the next start relaunches the server, whose lack is no failure."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        events = manager.events()
        pids = [info.pid for info in manager.workers]
        old = server.pid
        os.kill(old, signal.SIGKILL)
        assert len(await manager.collect(min_steps=50)) == 50
        assert [info.pid for info in manager.workers] == pids
        assert manager.incidents == ()
        os.kill(pids[1], signal.SIGKILL)
        incident = await next_incident(events)
        assert (incident.worker_id, incident.incarnation) == (1, 0)
        assert incident.cause in {ExitCause.SIGNAL, ExitCause.LOST}
        await until_ready(events, 1, 1)
        assert server.pid not in {None, old}
    assert manager.incidents == (incident,)


MAIN_WITHOUT_A_GUARD = """
import asyncio
from keisei import ParallelManager, Worker

class Mine(Worker):
    def collect(self):
        raise NotImplementedError

async def main():
    async with ParallelManager(Mine, config={{"num_workers": 2, "start_method": {method!r}}}):
        pass

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "start_method", [pytest.param("forkserver", marks=pytest.mark.stress), "spawn"]
)
def test_a_script_without_the_guard_is_told_so(tmp_path, start_method):
    """A script that starts a pool when it is imported fails once, and says what is missing."""
    script = tmp_path / "script.py"
    script.write_text(MAIN_WITHOUT_A_GUARD.format(method=start_method))
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr
    assert "WorkerStartError" in done.stderr

"""Workers in processes of their own: what they are like, how they end, and what that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import backend_workers
from backend_workers import Explosive, Obedient
from backends.conftest import wait_for_end_of
from keisei import events
from keisei.backends import interpreter, local
from keisei.backends.forkserver import server as the_server
from keisei.backends.handle import LocalProcess
from keisei.backends.local import LocalBackend
from keisei.child.process import STACKS_SIGNAL
from keisei.events import ExitCause, Incident
from keisei.exceptions import ManagerStateError, PoolExhausted, WorkerLost, WorkerStartError
from keisei.testing.conformance.baseline import turn
from keisei.testing.failpoints import Gate
from keisei.testing.scenarios import fail_after, next_event
from keisei.training.parallel.communication import WorkerCommunicator
from keisei.training.parallel.factory import pickle_factory

LIMIT = 60
NO_RESTARTS = {"max_restarts": 0}


async def call(manager, function: Any, *args: Any, worker_id: int = 0) -> Any:
    """Have one worker call a function, and return what it returned."""
    replies = await manager.send_command("call", (function, *args), worker_ids=[worker_id])
    return replies[worker_id]


async def die(manager, function: Any, *args: Any, worker_id: int = 0) -> Incident:
    """Have one worker call a function that ends it, and return the incident."""
    before = len(manager.incidents)
    with pytest.raises(WorkerLost):
        await call(manager, function, *args, worker_id=worker_id)
    return manager.incidents[before]


async def settled(manager) -> None:
    """Wait until every slot is filled or closed."""
    await manager._pool.supervisor.wait_settled()


def descriptors() -> dict[str, str]:
    """Return what this process has open."""
    gc.collect()
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[link.name] = str(link.readlink())
    return found


# what a worker's process is like


async def test_a_worker_process_is_prepared(make_manager, start_method):
    """It leads a group, heeds the right signals, knows its parent, and holds only what is its."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        async with (
            fail_after(LIMIT),
            make_manager(Obedient, num_workers=1, start_method=start_method) as manager,
        ):
            await manager.pause()
            facts = await call(manager, backend_workers.facts)
            found = await call(manager, backend_workers.descriptors)
            assert manager.workers[0].pid == await call(manager, os.getpid)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(read_end)
        os.close(write_end)
    assert facts == {
        "group": 0,
        "sigint": True,
        "sigterm": True,
        "blocked": [],
        "name": "keisei-worker-0.0",
        "parent is alive": True,
        "start method": multiprocessing.get_start_method(allow_none=True),
        "threads": 1,
        "argv": sys.argv,
        "path": sys.path,
        "folder": str(Path.cwd()),
        "stdin": "/dev/null",
    }
    # The lifeline twice, standard error, the report; four queues, and the loop's own pair and its
    # selector.
    assert found.count("pipe") == 4
    assert found.count("socket") == 6
    assert found.count("anon_inode") == 1


async def test_a_request_for_stacks_does_not_kill_a_process_that_boots(make_manager, start_method):
    """The signal that asks for stacks is held until the process can take it."""
    manager = make_manager(Obedient, num_workers=1, start_method=start_method)
    stream = manager.events()
    async with fail_after(LIMIT):
        starting = asyncio.create_task(manager.start())
        started = await next_event(stream, events.WorkerStarted)
        os.kill(started.pid, STACKS_SIGNAL)
        await starting
        await call(manager, os.getpid)  # by now it has taken the signal
        assert manager.incidents == ()
        report = manager._pool.supervisor.running(0).handle.crash_report()
        assert "File " in report
        await manager.stop()


async def test_stacks_are_written_without_harm_to_a_busy_process(make_manager):
    """A suspected worker whose threads run on is asked 2,000 times, and goes on."""
    manager = make_manager(Obedient, num_workers=1)
    async with fail_after(LIMIT), manager:
        with Gate() as gate:
            standing = asyncio.create_task(call(manager, backend_workers.stand_amid_threads, gate))
            await gate.visitor()
            handle = manager._pool.supervisor.running(0).handle
            for _ in range(2000):
                size = os.fstat(handle._crash_fd).st_size
                handle.dump_stacks()
                while os.fstat(handle._crash_fd).st_size == size and not handle.has_exited:
                    await turn()
            assert not handle.has_exited
            gate.open()
            assert await standing == "sound"


# how they end

ENDS = [
    (os._exit, (0,), ExitCause.EXIT, 0, None),
    (os._exit, (255,), ExitCause.EXIT, 255, None),
    (backend_workers.die, (signal.SIGKILL,), ExitCause.SIGNAL, -9, "SIGKILL"),
    (backend_workers.segfault, (), ExitCause.SIGNAL, -11, "SIGSEGV"),
    (backend_workers.die, (signal.SIGTERM,), ExitCause.SIGNAL, -15, "SIGTERM"),
    (backend_workers.abort, (), ExitCause.SIGNAL, -6, "SIGABRT"),
    (os._exit, (3,), ExitCause.EXIT, 3, None),
]
SPAWNED_ENDS = 4  # as many of them as are worth the start of an interpreter


async def test_every_end_is_told_exactly(make_manager, start_method):
    """Exit codes and signals arrive as they are, and native crashes bring their stacks."""
    ends = ENDS[:SPAWNED_ENDS] if start_method == "spawn" else ENDS
    async with (
        fail_after(LIMIT),
        make_manager(
            Obedient,
            num_workers=len(ends) + 1,
            start_method=start_method,
            on_exhausted="degrade",
            restart=NO_RESTARTS,
        ) as manager,
    ):
        for worker_id, (function, args, cause, exitcode, name) in enumerate(ends):
            incident = await die(manager, function, *args, worker_id=worker_id)
            assert incident.worker_id == worker_id
            assert (incident.cause, incident.exitcode) == (cause, exitcode)
            assert incident.signal_name == name
            assert (incident.phase, incident.last_command) == ("command", "call")
            if name in ("SIGSEGV", "SIGABRT"):
                assert incident.traceback.startswith("Fatal Python error")
                assert f" in {function.__name__}\n" in incident.traceback
            else:
                assert incident.traceback is None
        assert await call(manager, os.getpid, worker_id=len(ends)) == manager.workers[-1].pid


async def test_an_exit_in_user_code_is_an_error_of_the_user(make_manager, start_method):
    """``sys.exit(3)`` in a hook is answered, in ``setup`` it fails the start with a traceback."""
    factory = functools.partial(Explosive, functools.partial(sys.exit, 3))
    with pytest.raises(WorkerStartError, match="SystemExit: 3") as caught:
        async with (
            fail_after(LIMIT),
            make_manager(factory(), num_workers=1, start_method=start_method),
        ):
            pass
    assert caught.value.exitcode == 1
    assert "SystemExit: 3" in caught.value.remote_traceback


async def test_a_crash_while_it_unpickles_its_worker(make_manager):
    """A segfault before there is any user code is told with its native stack."""
    async with fail_after(LIMIT):
        with pytest.raises(PoolExhausted) as caught:
            async with make_manager(
                Explosive(backend_workers.segfault), num_workers=1, restart=NO_RESTARTS
            ):
                pass
    (incident,) = caught.value.incidents
    assert (incident.cause, incident.exitcode, incident.phase) == (ExitCause.SIGNAL, -11, "start")
    assert " in segfault\n" in incident.traceback


def reap(pid: int) -> None:
    """Reap a child before the loop can hear of its end."""
    assert os.waitpid(pid, 0) == (pid, signal.SIGKILL)


async def test_a_child_that_somebody_else_reaps_is_lost(make_manager):
    """Its exit code is unknown, and it is replaced like any other."""
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method="spawn") as manager,
    ):
        pid = manager.workers[0].pid
        os.kill(pid, signal.SIGKILL)
        reap(pid)
        stream = manager.events()
        incident = (await next_event(stream, events.WorkerIncident)).incident
        assert (incident.cause, incident.exitcode) == (ExitCause.LOST, None)
        await settled(manager)
        assert manager.workers[0].pid != pid


async def test_a_worker_without_a_pidfd_is_watched_all_the_same(
    make_manager, start_method, monkeypatch
):
    """Where the system has no pidfd the report pipe tells of the end, and the code is exact."""
    monkeypatch.delattr(os, "pidfd_open")
    async with (
        fail_after(LIMIT),
        make_manager(
            Obedient,
            num_workers=1,
            start_method=start_method,
            on_exhausted="degrade",
            restart=NO_RESTARTS,
        ) as manager,
    ):
        assert (await die(manager, os._exit, 3)).exitcode == 3


@pytest.mark.parametrize(
    ("start_method", "kernel"), [("forkserver", "new"), ("forkserver", "old"), ("spawn", "old")]
)
async def test_processes_that_a_worker_started_end_with_it(
    make_manager, start_method, fifo, monkeypatch, kernel
):
    """Its process group is ended also by kernels that send no signal to one through a pidfd."""
    if kernel == "old":
        real = signal.pidfd_send_signal

        def send(pidfd: int, number: int, info: Any = None, flags: int = 0) -> None:
            if flags:
                raise OSError(22, "Invalid argument")
            real(pidfd, number)

        monkeypatch.setattr(signal, "pidfd_send_signal", send)
    path, fd = fifo
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method=start_method) as manager,
    ):
        await call(manager, backend_workers.start_grandchild, path)
        await die(manager, os._exit, 0)
        await wait_for_end_of(fd)


# the fork server


class Held:
    """Holds starts in their thread until the test lets them go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.undone = threading.Event()
        self.starts: list[Any] = []
        run, undo = local._Start.run, local._Start.undo

        def held_run(start: Any) -> None:
            self.starts.append(start)
            self.begun.set()
            self.go_on.wait()
            run(start)

        def told_undo(start: Any) -> None:
            undo(start)
            self.undone.set()

        monkeypatch.setattr(local._Start, "run", held_run)
        monkeypatch.setattr(local._Start, "undo", told_undo)


async def test_living_workers_outlive_their_fork_server(make_manager):
    """They are not declared dead, the next start brings a new server, without a failed start."""
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=2) as manager:
        before = [info.pid for info in manager.workers]
        server = the_server.pid
        kill_and_wait(server)
        assert [await call(manager, os.getpid, worker_id=key) for key in (0, 1)] == before
        assert manager.incidents == ()
        lost = await die(manager, os._exit, 3, worker_id=0)
        assert (lost.cause, lost.exitcode) == (ExitCause.LOST, None)
        await settled(manager)
        assert the_server.pid not in (None, server)
        assert await call(manager, os.getpid, worker_id=1) == before[1]
        assert (await die(manager, os._exit, 3, worker_id=0)).exitcode == 3
        assert len(manager.incidents) == 2


def kill_and_wait(pid: int) -> None:
    """Kill a child of this process, and return when it is dead; something else reaps it."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_two_managers_share_one_server(make_manager):
    """They start at the same time, and the end of one leaves the other alone."""
    async with fail_after(LIMIT):
        first, second = (make_manager(Obedient, num_workers=2) for _ in range(2))
        await asyncio.gather(first.start(), second.start())
        server = the_server.pid
        await first.stop()
        assert the_server.pid == server
        assert (await die(second, os._exit, 4)).exitcode == 4
        await settled(second)
        assert second.incidents[1:] == ()
        await second.stop()
        assert the_server.pid == server


async def test_a_server_that_hangs_while_it_imports_is_aborted(make_manager):
    """A start that cannot get on is a failed start after ``start_timeout``, and nothing is left."""
    async with fail_after(LIMIT):
        with pytest.raises(WorkerStartError, match="no process within start_timeout"):
            async with make_manager(
                Obedient,
                num_workers=1,
                preload=["blocking_import"],
                start_timeout=0.5,
                restart=NO_RESTARTS,
            ):
                pass
    assert the_server.pid is None
    await warm_again(make_manager)


async def warm_again(make_manager) -> None:
    """Have the server run that the other tests share."""
    async with make_manager(Obedient, num_workers=1):
        assert the_server.pid is not None


async def stop_while_starting(manager: Any, held: Held) -> None:
    """Stop the pool once the thread of a start runs."""
    starting = asyncio.create_task(manager.start())
    await asyncio.to_thread(held.begun.wait)
    await manager.stop()
    with pytest.raises(ManagerStateError, match="stopped while it was starting"):
        await starting


async def test_a_pool_that_is_stopped_while_its_server_imports(make_manager, monkeypatch):
    """It stops within its grace, and nothing is left."""
    held = Held(monkeypatch)
    held.go_on.set()
    manager = make_manager(
        Obedient,
        num_workers=2,
        preload=["blocking_import"],
        shutdown_timeout=0.2,
        start_timeout=1000.0,
    )
    async with fail_after(LIMIT):
        await stop_while_starting(manager, held)
    assert the_server.pid is None
    assert manager.incidents == ()
    await warm_again(make_manager)


async def test_a_start_that_asks_after_its_abort_brings_no_server(make_manager, monkeypatch):
    """A thread that gets its turn late fails, and does not begin what nobody would end."""
    held = Held(monkeypatch)
    manager = make_manager(
        Obedient,
        num_workers=2,
        preload=["blocking_import"],
        shutdown_timeout=0.1,
        start_timeout=1000.0,
    )
    async with fail_after(LIMIT):
        await stop_while_starting(manager, held)
        held.go_on.set()
        for thread in threading.enumerate():
            if thread.name.startswith("keisei-start"):
                await asyncio.to_thread(thread.join)
    assert the_server.pid is None
    await warm_again(make_manager)


async def test_a_server_that_is_killed_before_it_tells_of_a_process_leaves_none(make_manager):
    """The process never begins: nobody could end it."""
    async with fail_after(LIMIT):
        with pytest.raises(WorkerStartError, match="the fork server ended"):
            async with make_manager(
                backend_workers.HangsInSetup,
                num_workers=1,
                preload=["dying_server"],
                restart=NO_RESTARTS,
            ):
                pass
    assert the_server.pid is None
    await warm_again(make_manager)


# descriptors


async def test_restarts_leave_no_descriptor_behind(make_manager, start_method):
    """After many restarts the application has open what it had after the first."""
    restarts = 20 if start_method == "forkserver" else 2
    async with (
        fail_after(LIMIT),
        make_manager(
            Obedient,
            num_workers=1,
            start_method=start_method,
            restart={"max_restarts": restarts + 1, "backoff_base": 0.0, "backoff_cap": 0.0},
        ) as manager,
    ):
        await manager.pause()  # experiences that nobody takes would hold memory
        counts = []
        for number in range(restarts):
            await die(manager, os._exit, number % 256)
            await settled(manager)
            counts.append(len(descriptors()))
        assert manager.workers[0].incarnation == restarts
    assert counts == [counts[0]] * restarts


async def test_a_system_without_room_for_a_process_is_asked_again(make_manager, monkeypatch):
    """EAGAIN is a failed start, which is tried again."""
    real = interpreter.util.spawnv_passfds
    refusals = [BlockingIOError(11, "Resource temporarily unavailable")] * 2

    def spawn(*args: Any) -> int:
        if refusals:
            raise refusals.pop()
        return real(*args)

    monkeypatch.setattr(interpreter.util, "spawnv_passfds", spawn)
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method="spawn") as manager,
    ):
        assert [incident.cause for incident in manager.incidents] == [ExitCause.START_FAILED] * 2
        assert "Resource temporarily unavailable" in manager.incidents[0].detail
        assert manager.workers[0].incarnation == 2


async def test_a_system_without_room_for_a_thread_is_asked_again(make_manager, monkeypatch):
    """A thread that cannot be made is a failed start too, and closes what it was to be given."""
    real = threading.Thread.start
    refusals = [2]

    def start(thread: threading.Thread) -> None:
        if thread.name == "keisei-start" and refusals[0]:
            refusals[0] -= 1
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=1) as manager:
        assert [incident.cause for incident in manager.incidents] == [ExitCause.START_FAILED] * 2
        assert "can't start new thread" in manager.incidents[0].detail
        assert manager.workers[0].incarnation == 2
        refusals[0] = 1  # of the one that lets the fork server go


# starts that nobody waits for any more


def open_backend(start_method: str) -> LocalBackend:
    return LocalBackend(
        pickle_factory(Obedient), start_method=start_method, preload=None, max_concurrent_starts=2
    )


@pytest.mark.usefixtures("_warm_fork_server")
async def test_a_start_that_is_cancelled_is_undone(monkeypatch):
    """The caller is cancelled at once; the process that comes up is ended, and all is closed."""
    held = Held(monkeypatch)
    async with fail_after(LIMIT):
        backend = open_backend("forkserver")
        await backend.open()
        communicator = WorkerCommunicator(1)
        starting = asyncio.create_task(backend.start(communicator.endpoints(0), "test"))
        await asyncio.to_thread(held.begun.wait)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        held.go_on.set()
        await asyncio.to_thread(held.undone.wait)
        (start,) = held.starts
        assert start.process.aio_process._closed
        await communicator.cleanup()
        await backend.aclose()


@pytest.mark.usefixtures("_warm_fork_server")
def test_a_start_that_outlives_its_loop_is_undone(monkeypatch):
    """When the loop is closed before the process is up, the thread itself ends it."""
    held = Held(monkeypatch)

    backends = []

    async def main() -> None:
        backend = open_backend("forkserver")
        backends.append(backend)
        communicator = WorkerCommunicator(1)
        starting = asyncio.create_task(backend.start(communicator.endpoints(0), "test"))
        await asyncio.to_thread(held.begun.wait)
        starting.cancel()
        await asyncio.wait([starting])
        await communicator.cleanup()

    the_server.acquire()
    asyncio.run(main())
    held.go_on.set()
    assert held.undone.wait(LIMIT)
    (start,) = held.starts
    assert start.process.aio_process._closed
    the_server.release()
    backends[0]._stderr.join(LIMIT)


@pytest.mark.usefixtures("_warm_fork_server")
async def test_a_process_that_cannot_be_watched_is_ended(monkeypatch):
    """When the loop takes no more descriptors the start fails, and the process is gone."""
    held = Held(monkeypatch)
    held.go_on.set()

    def refuse(process: LocalProcess, fd: int, callback: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalProcess, "_watch", refuse)
    async with fail_after(LIMIT):
        backend = open_backend("forkserver")
        await backend.open()
        communicator = WorkerCommunicator(1)
        with pytest.raises(OSError, match="No space left"):
            await backend.start(communicator.endpoints(0), "test")
        await asyncio.to_thread(held.undone.wait)
        await communicator.cleanup()
        await backend.aclose()

"""Shutdown and orphans: the pool ends when it is told to, and with its application in any case."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import fault_workers
import pool_workers
from fault_helpers import LIMIT, METHODS
from keisei.exceptions import KeiseiError, ManagerStateError
from keisei.supervision import shutdown
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after
from process_ends import end_of

TESTS = Path(__file__).parent.parent
PATIENCE = 60.0
GONE_WITHIN = 2.0
EVERYWHERE = ["idle", "busy", "C", "stopped", "starting"]
# A spawned worker takes seconds to start; its tie to the application is the same.
SOMEWHERE = ["C", "starting"]


class Application:
    """A process of its own with a pool, and all that descends from it."""

    def __init__(self, states, start_method, end, folder, *wrapper):
        address = f"keisei-tether-{secrets.token_hex(8)}"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(PATIENCE)
        self.listener.bind(f"\0{address}")
        self.listener.listen(8)
        arguments = {
            "address": address,
            "states": states,
            "start_method": start_method,
            "end": end,
        }
        self.folder = folder
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "fault_app", json.dumps(arguments)],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "TMPDIR": str(folder),
            },
        )
        self.num_workers = len(states)
        self.tethers = []
        self.pidfds = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        self.listener.close()
        for tether in self.tethers:
            tether.close()
        for pidfd in self.pidfds:
            os.close(pidfd)

    def wait_up(self):
        """Wait until all workers are where they shall be, and watch every process there is."""
        for _ in range(self.num_workers):
            tether, _ = self.listener.accept()
            tether.settimeout(PATIENCE)
            assert tether.recv(1) == b"x"
            self.tethers.append(tether)
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                self.pidfds.append(end_of(pid))
        assert len(self.pidfds) >= 2 * self.num_workers

    def tell(self):
        """Let it come to the end that it was made for."""
        self.process.stdin.close()
        self.process.stdin = None

    def wait_all_gone(self):
        """Return the application's output and error once nothing of it is left, in time."""
        output = self.process.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + GONE_WITHIN
        for tether in self.tethers:
            tether.settimeout(max(0.001, deadline - time.monotonic()))
            while tether.recv(1):
                pass
        for pidfd in self.pidfds:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([pidfd], [], [], left)[0], "a process has outlived its application"
        assert list(self.folder.iterdir()) == []
        return output


def descendants(root):
    """Return the pids of all processes below ``root``."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int(
                (entry / "stat").read_bytes().rpartition(b")")[2].split()[1]
            )
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


@METHODS
def test_nobody_outlives_an_application_that_is_killed(tmp_path, start_method):
    """SIGKILL ends workers that idle, loop, are in C, stopped or starting, their children, all."""
    states = EVERYWHERE if start_method == "forkserver" else SOMEWHERE
    with Application(states, start_method, "fall off", tmp_path) as application:
        application.wait_up()
        application.process.kill()
        application.wait_all_gone()
        assert application.process.returncode == -9


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("os._exit", 7),
        ("segfault", -11),
        ("fall off", 0),
        pytest.param("abort", -6, marks=pytest.mark.stress),
        pytest.param("raise", 1, marks=pytest.mark.stress),
        pytest.param("sys.exit", 0, marks=pytest.mark.stress),
    ],
)
def test_nobody_outlives_an_application_that_ends(tmp_path, end, expected):
    """Any other end without stop() takes everybody along too, and no exit handler hangs."""
    with Application(EVERYWHERE, "forkserver", end, tmp_path) as application:
        application.wait_up()
        application.tell()
        _, errors = application.wait_all_gone()
        assert application.process.returncode == expected, errors


@pytest.mark.parametrize(
    "start_method", ["forkserver", pytest.param("spawn", marks=pytest.mark.stress)]
)
def test_ctrl_c_ends_the_pool_once_and_quietly(tmp_path, start_method):
    """SIGINT to the whole process group: one KeyboardInterrupt, none of it in a worker."""
    with Application(["idle", "idle"], start_method, "with", tmp_path) as application:
        application.wait_up()
        os.killpg(application.process.pid, signal.SIGINT)
        _, errors = application.wait_all_gone()
        assert application.process.returncode == -signal.SIGINT
        assert errors.count("Traceback (most recent call last)") <= 2, errors
        assert "keisei-worker" not in errors
        assert not re.search(r"^Process ", errors, re.MULTILINE)


def test_an_applications_own_handler_ends_the_pool(tmp_path):
    """A handler that calls request_stop() ends everything in an orderly way, without a word."""
    with Application(["moving", "moving"], "forkserver", "handler", tmp_path) as application:
        application.wait_up()
        os.killpg(application.process.pid, signal.SIGTERM)
        assert application.wait_all_gone() == ("clean", "")
        assert application.process.returncode == 0


def can_unshare():
    done = subprocess.run(
        ["unshare", "-Upf", "true"], capture_output=True, check=False, timeout=PATIENCE
    )
    return done.returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="no pid namespace can be made here")
def test_a_manager_may_be_pid_1_of_a_container(tmp_path):
    """In a pid namespace of its own the application lives, works, and takes its workers along."""
    wrapper = ["unshare", "-Upf", "--kill-child"]
    with Application(
        ["moving", "moving"], "forkserver", "handler", tmp_path, *wrapper
    ) as application:
        application.wait_up()
        (one, *_) = [
            pid
            for pid in descendants(application.process.pid)
            if b"fault_app" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(one, signal.SIGTERM)
        assert application.wait_all_gone() == ("clean", "")
        assert application.process.returncode == 0


# within one process


async def test_a_second_stop_shortens_the_grace(make_manager, monkeypatch):
    """A worker that hangs has ``shutdown_timeout``, or two seconds from the second stop()."""
    monkeypatch.setattr(shutdown, "HURRIED_GRACE", 0.2)
    worker = armed(pool_workers.Counting, Failpoint("collect", failpoints.hang))
    async with fail_after(LIMIT):
        manager = make_manager(worker, shutdown_timeout=1000.0)
        await manager.start()
        while {info.phase for info in manager.workers} != {"collect"}:
            await pool_workers.turn()
        first = asyncio.create_task(manager.stop())
        await pool_workers.turn()
        assert not first.done()
        await manager.stop()
        await first
        assert manager.incidents == ()


async def test_stop_may_be_called_at_any_time_and_again(make_manager):
    """Before the start, twice, at once from many tasks and after a failure: the same end."""
    async with fail_after(LIMIT):
        unused = make_manager(pool_workers.Counting)
        await unused.stop()
        await unused.stop()
        with pytest.raises(ManagerStateError, match="stopped"):
            await unused.start()

        manager = make_manager(pool_workers.Counting)
        await manager.start()
        await asyncio.gather(*(manager.stop() for _ in range(5)))
        await manager.stop()
        assert not manager.is_healthy
        with pytest.raises(ManagerStateError, match="stopped"):
            await manager.collect()

        fault = partial(fault_workers.throw_named, "Frozen")
        failed = make_manager(armed(pool_workers.Counting, Failpoint("setup", fault)))
        with pytest.raises(KeiseiError, match="Frozen: stiff"):
            await failed.start()
        await failed.stop()
        await failed.stop()
        assert {info.pid for info in failed.workers} == {None}


@pytest.mark.parametrize(
    "name", ["Frozen", "NotAnException", "KeyboardInterrupt", "CancelledError"]
)
async def test_the_users_own_error_wins(make_manager, name):
    """What is raised in ``async with`` comes out of it, as it is, when every process is gone."""
    async with fail_after(LIMIT):
        manager = make_manager(pool_workers.Counting)
        error = fault_workers.ERRORS[name]()
        task = asyncio.current_task()
        with pytest.raises(type(error)) as caught:  # noqa: PT012 - the block is what is tested
            async with manager:
                await manager.collect()
                raise error
        assert caught.value is error
        assert task.cancelling() == 0
        assert {info.pid for info in manager.workers} == {None}


async def test_an_error_of_the_clean_up_is_a_note_on_the_users_own(make_manager, monkeypatch):
    """When stop() fails as well, the user's error tells of it."""
    async with fail_after(LIMIT):
        manager = make_manager(pool_workers.Counting)
        stop = manager.stop

        async def failing_stop():
            await stop()
            raise OSError("the clean-up failed")

        monkeypatch.setattr(manager, "stop", failing_stop)
        with pytest.raises(ZeroDivisionError) as caught:
            async with manager:
                raise ZeroDivisionError
        (note,) = caught.value.__notes__
        assert "the clean-up failed" in note


async def test_stop_with_full_queues_both_ways_is_bounded(make_manager):
    """Unread experiences and unheard commands are discarded; nobody waits for a feeder."""
    with Gate() as gate:
        worker = armed(
            fault_workers.Talkative, Failpoint("on_command", gate.hold, worker_id=0, hit=1)
        )
        async with fail_after(LIMIT):
            async with make_manager(worker, shutdown_timeout=0.3) as manager:
                commands = [
                    asyncio.create_task(manager.send_command("echo", bytes(1 << 20)))
                    for _ in range(20)
                ]
                await gate.visitor()
            answers = await asyncio.gather(*commands, return_exceptions=True)
            assert {type(answer).__name__ for answer in answers} <= {"WorkerLost", "dict"}
            assert {type(answer).__name__ for answer in answers} >= {"WorkerLost"}
            assert manager.incidents == ()


async def test_a_cancelled_stop_stops_all_the_same(make_manager):
    """Cancelled at every possible point, stop() is carried to its end before the cancellation."""
    async with fail_after(LIMIT):
        for turns in range(12):
            manager = make_manager(pool_workers.Counting)
            await manager.start()
            stopping = asyncio.create_task(manager.stop())
            for _ in range(turns):
                await pool_workers.turn()
            stopping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stopping
            await manager.stop()
            assert {info.pid for info in manager.workers} == {None}
            assert manager.incidents == ()


async def test_what_a_worker_leaves_running_ends_with_it(make_manager):
    """Threads, tasks that cannot be cancelled and forked children of a worker hold up no stop."""
    async with fail_after(LIMIT):
        async with make_manager(fault_workers.Leaving, shutdown_timeout=0.5) as manager:
            await manager.collect(min_steps=10)
        assert manager.incidents == ()

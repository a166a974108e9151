"""Idle costs nothing: a worker without work does not wake up, nor does the fork server."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

import pool_workers
from keisei.backends.forkserver import server
from keisei.testing.scenarios import fail_after

WORKERS = pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
WINDOW = 2000
"""Commands to another worker: half a second or more, in which ten looks a second would show."""
WORK = "sum(range(20_000_000))"
"""What another process computes meanwhile: half a second or more, too."""
TOLERATED = 2
"""Times that a process goes to sleep and was not yet asleep when the window began."""


def wake_ups(pid):
    """Return how often the threads of a process have gone to sleep so far."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                count += int(line.split()[1])
    return count


async def until_full(manager):
    """Return when every worker has delivered all that its queue takes."""
    size = manager.config.max_queue_size
    while set(manager.queue_info().experience_queue_sizes) != {size}:
        await pool_workers.turn()


@pytest.mark.parametrize("state", ["paused", "without credit", "between rounds"])
@WORKERS
async def test_an_idle_worker_does_not_wake_up(make_manager, worker, state):
    """While another one is kept busy, its count of sleeps stands still, and the fork server's."""
    mode = "sync" if state == "between rounds" else "async"
    async with fail_after(60), make_manager(worker, mode=mode) as manager:
        if state == "paused":
            await manager.collect(min_steps=20)
            await manager.pause()
        elif state == "without credit":
            await manager.collect(min_steps=20)
            await until_full(manager)
        else:
            await manager.collect()
        pid = manager.workers[1].pid
        await manager.send_command("echo", worker_ids=[1])
        while pool_workers.process_state(pid) != "S":
            await pool_workers.turn()
        before = wake_ups(pid), wake_ups(server.pid)
        for _ in range(WINDOW):
            await manager.send_command("echo", worker_ids=[0])
        after = wake_ups(pid), wake_ups(server.pid)
        assert after[0] - before[0] <= TOLERATED
        assert after[1] == before[1]
        while wake_ups(pid) == after[0]:  # what wakes it up is counted
            assert await manager.send_command("worker_id", worker_ids=[1]) == {1: 1}


async def end_of(process):
    """Wait, without a timer, until a process has closed its standard output."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.stdout, ended.set)
    await ended.wait()
    loop.remove_reader(process.stdout)


@pytest.fixture
def stranger():
    """Return what starts a process that computes for a while, and then ends."""
    with contextlib.ExitStack() as started:
        command = [sys.executable, "-S", "-c", WORK]
        yield lambda: started.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))


@pytest.mark.parametrize("state", ["paused", "without credit"])
@WORKERS
async def test_an_idle_application_does_not_wake_up(make_manager, stranger, worker, state):
    """Its loop and every other thread sleep, but for a last look at each worker's progress."""
    config = {"num_workers": 3, "max_queue_size": 16}
    async with fail_after(60), make_manager(worker, **config) as manager:
        await manager.collect(min_steps=200)
        if state == "paused":
            await manager.pause()
        else:
            await until_full(manager)
        await manager.send_command("echo")
        process = stranger()
        before = wake_ups("self")
        await end_of(process)
        assert wake_ups("self") - before <= TOLERATED + config["num_workers"]

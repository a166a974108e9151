"""Named shared memory that worker code makes is gone after any end of the worker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from child_workers import Sharing
from keisei.testing.scenarios import fail_after

LIMIT = 60
WHERE = pytest.mark.parametrize("where", ["here", "spawn", "fork", "forkserver"])


def exists(name: str) -> bool:
    return Path("/dev/shm", name).exists()


async def gone(pidfd: int) -> None:
    """Wait for the end of a process."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


@WHERE
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_it_is_gone_after_a_kill(make_manager, where, number):
    """Whoever made it, the worker or a child of its own: the tracker outlives the whole group."""
    manager = make_manager(partial(Sharing, where), num_workers=1)
    async with fail_after(LIMIT), manager:
        pid, name, tracker_pid = (await manager.send_command("what"))[0]
        assert exists(name)
        tracker_fd = os.pidfd_open(tracker_pid)
        os.kill(pid, number)
        await gone(tracker_fd)
        assert not exists(name)


@WHERE
async def test_it_is_gone_after_an_orderly_end(make_manager, where):
    """A tracker of the worker itself is waited for before the worker ends."""
    manager = make_manager(partial(Sharing, where), num_workers=1)
    async with fail_after(LIMIT):
        async with manager:
            _, name, tracker_pid = (await manager.send_command("what"))[0]
            assert exists(name)
            tracker_fd = os.pidfd_open(tracker_pid)
        if where == "fork":
            await gone(tracker_fd)
        else:
            os.close(tracker_fd)
        assert not exists(name)


APPLICATION = """
import asyncio, functools, os, sys
from keisei import ParallelManager
from child_workers import Sharing

async def main():
    async with ParallelManager(functools.partial(Sharing, "here"), config={"num_workers": 1}) as m:
        print(*(await m.send_command("what"))[0][1:], flush=True)
        await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_it_is_gone_after_the_application_was_killed():
    """The kernel ends the workers then, and the tracker unlinks what they left."""
    async with fail_after(LIMIT):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", APPLICATION),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        name, tracker_pid = (await process.stdout.readline()).decode().split()
        assert exists(name)
        tracker_fd = os.pidfd_open(int(tracker_pid))
        process.kill()
        await process.wait()
        await gone(tracker_fd)
        assert not exists(name)


async def test_a_worker_that_shares_nothing_starts_no_tracker(make_manager):
    """Nothing is started where it is not used."""
    async with fail_after(LIMIT), make_manager(partial(Sharing, "nowhere")) as manager:
        found = await manager.send_command("what")
        assert [tracked for _, _, tracked in found.values()] == [None, None]


HELD = """
import os, sys, time
sys.path[:] = {path!r}
from multiprocessing import resource_tracker
from keisei.child import tracker

tracker.keep_apart()
resource_tracker.ensure_running()
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    os.read(reading, 1)
    os._exit(0)
began = time.monotonic()
tracker.clean_up(0.1)
print(time.monotonic() - began)
"""


def test_a_child_that_keeps_the_tracker_busy_is_not_waited_for_long():
    """The wait for the clean-up is bounded."""
    result = subprocess.run(
        [sys.executable, "-c", HELD.format(path=sys.path)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert 0.1 <= float(result.stdout) < LIMIT / 2

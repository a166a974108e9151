"""What workers start ends with them, wherever it hides, and nothing else does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backend_workers
from backend_workers import Obedient
from backends.conftest import wait_for_end_of
from keisei.backends.forkserver import server as the_server
from keisei.child import descendants
from keisei.exceptions import WorkerLost
from keisei.testing.scenarios import fail_after

LIMIT = 60
HIDING = [
    backend_workers.start_in_a_session,
    backend_workers.start_in_sessions_of_sessions,
    backend_workers.fork_twice,
    backend_workers.fork_in_c,
]


async def call(manager: Any, function: Callable[..., Any], *args: Any, worker_id: int = 0) -> Any:
    """Have one worker call a function, and return what it returned."""
    replies = await manager.send_command("call", (function, *args), worker_ids=[worker_id])
    return replies[worker_id]


@pytest.mark.parametrize("hide", HIDING, ids=lambda hide: hide.__name__)
async def test_what_hides_ends_with_a_worker_that_dies(make_manager, fifo, hide):
    """In a session of its own, without a parent, or forked in C: it is ended with its worker."""
    path, fd = fifo
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=1) as manager:
        await call(manager, hide, path)
        with pytest.raises(WorkerLost):
            await call(manager, backend_workers.die, signal.SIGKILL)
        await wait_for_end_of(fd)


@pytest.mark.parametrize("hide", HIDING, ids=lambda hide: hide.__name__)
async def test_what_hides_ends_with_the_pool(make_manager, fifo, hide):
    """An orderly end of the worker leaves no more behind than its death."""
    path, fd = fifo
    async with fail_after(LIMIT):
        async with make_manager(Obedient, num_workers=1) as manager:
            await call(manager, hide, path)
        await wait_for_end_of(fd)


async def test_a_worker_keeps_its_daemons_while_it_lives(make_manager, fifo):
    """One whose parent has ended belongs to its own worker, and outlives others."""
    path, fd = fifo
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=2) as manager:
        daemon = await call(manager, backend_workers.fork_twice, path)
        assert backend_workers.parent_of(daemon) == manager.workers[0].pid
        os.read(fd, 1)
        for _ in range(2):
            with pytest.raises(WorkerLost):
                await call(manager, os._exit, 3, worker_id=1)
            await manager._pool.supervisor.wait_settled()
        await call(manager, os.getpid, worker_id=1)
        assert backend_workers.parent_of(daemon) == manager.workers[0].pid
        with pytest.raises(WorkerLost):
            await call(manager, os._exit, 3)
        await wait_for_end_of(fd)


async def test_a_resource_tracker_may_tidy_up(make_manager, fifo, tmp_path):
    """What unlinks the names that a killed worker left is not killed with what it left."""
    path, fd = fifo
    tidied = tmp_path / "tidied"
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=1) as manager:
        await call(manager, backend_workers.start_a_tracker, path, str(tidied), False)
        with pytest.raises(WorkerLost):
            await call(manager, backend_workers.die, signal.SIGKILL)
        await wait_for_end_of(fd)
        assert tidied.exists()


async def test_a_resource_tracker_that_hangs_is_ended(make_manager, fifo, tmp_path):
    """It has two seconds, which hold up neither the next worker nor the end of the pool."""
    path, fd = fifo
    tidied = tmp_path / "tidied"
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=1) as manager:
        await call(manager, backend_workers.start_a_tracker, path, str(tidied), True)
        with pytest.raises(WorkerLost):
            await call(manager, backend_workers.die, signal.SIGKILL)
        begun = time.monotonic()
        await manager._pool.supervisor.wait_settled()
        await call(manager, os.getpid)
        await wait_for_end_of(fd, descendants.TRACKER_PATIENCE + 2.0)
        assert time.monotonic() - begun > descendants.TRACKER_PATIENCE - 1.0
        assert tidied.exists()
        assert manager.workers[0].incarnation == 1


async def test_a_server_that_is_killed_leaves_what_is_in_no_group(make_manager, fifo):
    """Its workers live on and are replaced; their daemons are theirs to the end, not longer."""
    path, fd = fifo
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=1) as manager:
        daemon = await call(manager, backend_workers.start_in_a_session, path)
        os.read(fd, 1)
        os.kill(the_server.pid, signal.SIGKILL)
        assert await call(manager, os.getpid) == manager.workers[0].pid
        assert backend_workers.parent_of(daemon) == manager.workers[0].pid
        os.kill(daemon, signal.SIGKILL)
        await wait_for_end_of(fd)
        with pytest.raises(WorkerLost):
            await call(manager, os._exit, 3)
        await manager._pool.supervisor.wait_settled()  # by a new server


def test_children_are_found_without_the_kernels_list(monkeypatch):
    """Where there is no file of children, every process is asked for its parent."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        found = descendants.children()
        assert pid in found
        real = Path.read_bytes

        def read(path: Path) -> bytes:
            if path.name == "children":
                raise FileNotFoundError(path)
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", read)
        assert descendants.children() == found
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

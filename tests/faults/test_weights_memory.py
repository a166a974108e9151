"""Weights and shared memory: never torn, never in anyone's way, never left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

import fault_workers
import pool_workers
from fault_helpers import LIMIT, crashing, kinds, next_incident, until_ready
from keisei.events import ExitCause
from keisei.ipc import memory
from keisei.ipc.layout import describe
from keisei.ipc.weights import WeightsReader
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint, armed
from keisei.testing.scenarios import fail_after

SIZE = 1 << 20


def filled(value):
    """Return weights of 4 MiB that are ``value`` all over."""
    return {"w": torch.full((SIZE,), float(value))}


def test_a_publisher_killed_while_it_writes_leaves_the_version_before():
    """Whoever reads after a write that never ended gets the last whole version."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()  # small tensors: torch's threads do not survive a fork
        if pid == 0:
            fault_workers.die_while_publishing(theirs)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        reader = WeightsReader(fd, describe(fault_workers.weights(0.0)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    tensors, version = reader.read()
    assert version == 1
    assert tensors["w"].unique().tolist() == [1.0]


async def test_workers_never_see_half_of_a_version(make_manager):
    """Under a stream of pushes and kills, every weight that a worker reports is of one version."""
    worker = fault_workers.Summing
    restart = {"max_restarts": 1000, "backoff_base": 0.0, "backoff_cap": 0.0}
    async with fail_after(LIMIT), make_manager(worker, restart=restart) as manager:
        version = await manager.push_weights(filled(1), wait=True)
        events = manager.events()
        for killed in range(5):
            collecting = asyncio.create_task(manager.collect(min_steps=10))
            while not collecting.done():
                version = await manager.push_weights(filled(version + 1))
            for batch in await collecting:
                low, high = batch.data["range"].tolist()
                assert low == high == batch.weights_version
            os.kill(manager.workers[1].pid, signal.SIGKILL)
            assert (await next_incident(events)).incarnation == killed
            await until_ready(events, 1, killed + 1)
        assert kinds(manager.incidents) == [(1, n, ExitCause.SIGNAL) for n in range(5)]


@pytest.fixture
def large_weights() -> dict[str, torch.Tensor]:
    """256 MiB, filled before there is a loop that this could block."""
    return {"w": torch.ones(64 << 20)}


async def test_the_first_large_weights_do_not_block_the_loop(make_manager, large_weights):
    """Their memory is reserved and filled beside it; a push that is cut short is whole or not."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        pushing = asyncio.create_task(manager.push_weights(large_weights))
        await pool_workers.turn()
        pushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pushing
        version = manager.weights_version
        assert version in (0, 1)
        assert await manager.push_weights(large_weights) == version + 1


@pytest.mark.parametrize("fault", [failpoints.kill, failpoints.stop], ids=["killed", "stopped"])
async def test_a_reader_that_ends_in_its_read_is_in_nobodys_way(make_manager, fault):
    """The publisher goes on, and the buffer is used again, while a reader is dead or stopped."""
    worker = armed(
        partial(fault_workers.Poisoned, int), Failpoint("load_weights", fault, worker_id=1)
    )
    config = {"command_timeout": 2.0, "collect_timeout": 2.0, "shutdown_timeout": 0.3}
    async with fail_after(LIMIT), make_manager(worker, **config) as manager:
        events = manager.events()
        for version in range(1, 11):
            assert await manager.push_weights(fault_workers.weights(float(version))) == version
        incident = await next_incident(events)
        assert (incident.worker_id, incident.phase) == (1, "load_weights")
        await until_ready(events, 1, 1)
        assert await manager.push_weights(fault_workers.weights(11.0), wait=True) == 11
        assert await manager.send_command("version") == {0: 11, 1: 11}


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_lack_of_shared_memory_is_an_error_of_the_caller(make_manager, monkeypatch):
    """With no room for the weights push_weights raises; nothing is published and nobody dies."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", refuse)  # a full tmpfs, or a limited one
            with pytest.raises(OSError, match="No space left"):
                await manager.push_weights(filled(1))
        assert manager.weights_version == 0
        assert await manager.push_weights(filled(1), wait=True) == 1
        assert manager.incidents == ()


async def test_a_worker_without_room_for_its_experience_says_so(make_manager):
    """A full shared memory is a user error with ENOSPC, not a SIGBUS in the middle of a copy."""
    worker = armed(
        fault_workers.Varying,
        Failpoint("collect", fault_workers.fill_shared_memory, worker_id=1, hit=2),
    )
    async with crashing(make_manager(worker)) as incident:
        assert incident.cause is ExitCause.USER_ERROR
        assert "No space left" in incident.detail


async def test_a_file_size_limit_is_an_error_and_no_signal(make_manager):
    """Under RLIMIT_FSIZE, which also bounds memory files, the worker's error is told."""
    worker = armed(
        fault_workers.Varying,
        Failpoint("collect", fault_workers.limit_file_size, worker_id=1, hit=2),
    )
    async with crashing(make_manager(worker)) as incident:
        assert incident.cause in {ExitCause.USER_ERROR, ExitCause.SIGNAL}
        assert "File too large" in incident.detail or incident.signal_name == "SIGXFSZ"


def test_dev_shm_is_not_used():
    """Memory has no name: the limit that Docker sets on /dev/shm, 64 MiB, does not concern it."""
    before = sorted(Path("/dev/shm").iterdir())
    size = 80 << 20
    fd, shared = memory.create(size, "keisei-test")
    with shared:
        assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "/memfd:keisei-test (deleted)"
        assert len(shared) == size
        assert [path for path in sorted(Path("/dev/shm").iterdir()) if path not in before] == []
    os.close(fd)


async def test_what_was_committed_outlives_its_worker(make_manager):
    """Tensors of a worker that has gone, by exit or stop, stay readable and writable."""
    worker = armed(
        pool_workers.Counting, Failpoint("committed", failpoints.exit_now, worker_id=1, hit=2)
    )
    async with fail_after(LIMIT):
        manager = make_manager(worker)
        events = manager.events()
        async with manager:
            await next_incident(events)
            batches = [b for b in await manager.collect() if b.incarnation == 0]
        ours = [batch.data["number"] for batch in batches if batch.worker_id == 1]
        assert [number.tolist() for number in ours] == [[1], [2]]
        ours[0] += 41
        assert ours[0].tolist() == [42]
        assert ours[1].tolist() == [2]
        assert len(manager.incidents) == 1


async def test_changing_a_batch_changes_no_other(make_manager):
    """A batch is the learner's own: to write into it reaches neither worker nor later batches."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, num_workers=1) as manager:
        expected = 0
        async for batch in manager.experiences():
            expected += 1
            assert batch.data["number"].tolist() == [expected]
            batch.data["number"].fill_(-1)
            if expected == 50:
                break
        assert await manager.send_command("number") != {0: -1}


async def test_kept_batches_are_never_written_over(make_manager):
    """A learner may keep as many batches as it likes: their memory is not used again meanwhile."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, num_workers=1) as manager:
        kept = []
        async for batch in manager.experiences():
            kept.append(batch)
            if len(kept) == 100:
                break
        assert [batch.data["number"].item() for batch in kept] == list(range(1, 101))


async def test_the_address_space_of_the_application_may_be_limited(make_manager):
    """Without address space for the weights push_weights raises, and the pool serves on."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        pages = fault_workers.address_pages()
        weights = {"w": torch.empty(8 << 20)}
        try:
            used = pages * resource.getpagesize() + weights["w"].nbytes
            resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), limits[1]))
            with pytest.raises((OSError, MemoryError)):
                await manager.push_weights(weights)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert manager.weights_version == 0
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()

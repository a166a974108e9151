"""WorkerCommunicator alone, as an application that runs its own processes has it."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

import pool_workers
from keisei import QueueEnded, QueueTimeout, WorkerCommunicator, WorkerLost
from keisei.exceptions import CommandTimeout
from keisei.testing.failpoints import Gate
from keisei.testing.scenarios import fail_after
from parallel_system_helpers import worker_processes

LIMIT = 60.0

pytestmark = pytest.mark.usefixtures("_warm_fork_server")


async def test_renewed_queues_are_those_of_the_next_process():
    """It counts on, has the newest weights, and its batches begin anew; its sibling goes on."""
    communicator = WorkerCommunicator(2, max_queue_size=2, timeout=LIMIT)
    weights = {"w": torch.zeros(3)}
    async with (
        fail_after(LIMIT),
        worker_processes(communicator, pool_workers.Counting) as processes,
    ):
        assert await communicator.send_model_weights(weights, wait=True) == 1
        batches = await communicator.collect_experiences()
        processes.handles[0].kill()
        await processes.handles[0].wait()
        before = communicator.lines[0], communicator.lines[1]
        renewed = communicator.renew(0)
        assert communicator.lines[0] is renewed is not before[0]
        assert communicator.lines[1] is before[1]
        assert (renewed.worker_id, renewed.incarnation) == (0, 1)
        assert communicator.get_queue_info().control_queue_sizes == (0, 0)
        await processes.start(0)
        assert await communicator.send_control_command("worker_id") == {0: 0, 1: 1}
        assert await communicator.send_control_command("version") == {0: 1, 1: 1}
        while sum(batch.incarnation for batch in batches) < 5:
            batches += await communicator.collect_experiences(max_batches=1)
        for key in ((0, 0), (0, 1), (1, 0)):
            ours = [batch for batch in batches if (batch.worker_id, batch.incarnation) == key]
            assert [batch.sequence for batch in ours] == list(range(len(ours)))
            assert [batch.data["number"].item() - 1 for batch in ours] == list(range(len(ours)))


async def test_whoever_waits_for_renewed_queues_is_told():
    """A command, and weights that nobody has applied; what others are asked is answered."""
    with Gate() as gate:
        communicator = WorkerCommunicator(2, max_queue_size=2, timeout=LIMIT)
        worker = partial(pool_workers.Coroutine, gate=gate)
        async with fail_after(LIMIT), worker_processes(communicator, worker) as processes:
            line = communicator.lines[0]
            processes.handles[0].kill()
            await processes.handles[0].wait()
            asking = asyncio.create_task(communicator.send_control_command("echo", 5))
            while not line.has_requests:
                await pool_workers.turn()
            communicator.renew(0, 7)
            with pytest.raises(WorkerLost, match="its queues were renewed") as caught:
                await asking
            assert (caught.value.worker_id, caught.value.incarnation) == (0, 0)
            assert caught.value.replies == {1: 5}
            assert communicator.lines[0].incarnation == 7
            with pytest.raises(WorkerLost, match="its queues were renewed"):
                await line.ask(99, "echo", b"", LIMIT)
            await processes.start(0)
            assert await communicator.send_control_command("echo", 6) == {0: 6, 1: 6}


async def test_the_old_worker_hears_the_end_of_renewed_queues():
    """Its ends are those of nobody, and what it still sends reaches nobody."""
    communicator = WorkerCommunicator(1, max_queue_size=2, timeout=0.05)
    old = communicator.endpoints(0)
    try:
        asking = asyncio.create_task(communicator.send_control_command("echo"))
        await pool_workers.turn()
        communicator.renew(0)
        with pytest.raises(WorkerLost):
            await asking
        assert len(await old.control.get()) == 2, "the command was sent before"
        for end in (old.control, old.model):
            with pytest.raises(QueueEnded):
                await end.get()
        with pytest.raises(QueueEnded):
            old.reply.put_nowait(b"a late answer")
        new = communicator.endpoints(0)
        with pytest.raises(CommandTimeout):
            await communicator.send_control_command("echo")
        with pytest.raises(QueueTimeout):
            await communicator.collect_experiences()
        new.close()
    finally:
        old.close()
        await communicator.cleanup()


async def test_a_slot_may_be_added_and_removed():
    """``renew`` makes one that was not there; ``remove`` fails those who wait for it."""
    communicator = WorkerCommunicator(1, timeout=LIMIT)
    try:
        line = communicator.renew(3)
        assert (line.worker_id, line.incarnation) == (3, 0)
        assert sorted(communicator.lines) == [0, 3]
        ends = communicator.endpoints(3)
        asking = asyncio.create_task(communicator.send_control_command("echo", worker_ids=[3]))
        await pool_workers.turn()
        communicator.remove(3)
        with pytest.raises(WorkerLost, match="its slot was removed"):
            await asking
        with pytest.raises(ValueError, match="no such worker"):
            await communicator.send_control_command("echo", worker_ids=[3])
        assert communicator.num_workers == 1
        ends.close()
    finally:
        await communicator.cleanup()


@pytest.mark.parametrize("data", [1, bytes(3_000_000)], ids=["small", "large"])
async def test_a_command_that_was_cancelled_is_answered_to_nobody(data):
    """Its late reply is dropped; the worker has handled it once, and the next one gets its own."""
    communicator = WorkerCommunicator(2, max_queue_size=2, timeout=LIMIT)
    async with fail_after(LIMIT), worker_processes(communicator, pool_workers.Counting):
        await communicator.send_control_command("echo")  # they have started
        for turns in range(8):
            asking = asyncio.create_task(communicator.send_control_command("reset", data))
            for _ in range(turns):
                await pool_workers.turn()
            asking.cancel()
            await asyncio.wait([asking])
            assert not any(line.has_requests for line in communicator.lines.values())
            answers = await communicator.send_control_command("echo", turns)
            assert answers == {0: turns, 1: turns}
        resets = await communicator.send_control_command("resets")
        assert resets[0] == resets[1] <= 8


@pytest.mark.parametrize("size", [4, 1 << 21], ids=["small", "large"])
async def test_weights_whose_sending_was_cancelled_are_published_or_not(size):
    """The version tells what workers have; a wait that was cancelled leaves nobody waited for."""
    communicator = WorkerCommunicator(2, max_queue_size=2, timeout=LIMIT)
    weights = {"w": torch.zeros(size)}
    async with fail_after(LIMIT), worker_processes(communicator, pool_workers.Counting):
        for turns in range(12):
            before = communicator.weights_version
            sending = asyncio.create_task(communicator.send_model_weights(weights, wait=True))
            for _ in range(turns):
                await pool_workers.turn()
            sending.cancel()
            await asyncio.wait([sending])
            assert communicator.weights_version in (before, before + 1)
            assert not any(line.has_requests for line in communicator.lines.values())
        version = await communicator.send_model_weights(weights, wait=True)
        assert await communicator.send_control_command("version") == {0: version, 1: version}

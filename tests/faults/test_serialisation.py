"""Serialisation: what cannot travel is an error where it was given, and nothing else."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

import fault_workers
import pool_workers
from fault_helpers import LIMIT, crashing, next_incident, watched
from keisei.events import ExitCause
from keisei.exceptions import CommandError, SerializationError
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after

UNPICKLABLE = ["TypeError", "SystemExit", "CancelledError", "Speechless", "NotAnException"]


@pytest.mark.parametrize("error", UNPICKLABLE)
async def test_an_argument_that_cannot_be_pickled_raises_at_the_caller(make_manager, error):
    """Nothing is sent, whatever ``__reduce__`` raised, and the pool answers the next command."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        for data in (
            fault_workers.CannotPickle(error),
            [bytes(2 << 20), fault_workers.CannotPickle(error)],  # pickled in a thread
        ):
            with pytest.raises(SerializationError, match="the data of command 'echo'"):
                await manager.send_command("echo", data)
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


async def test_an_argument_that_cannot_be_unpickled_is_answered(make_manager):
    """The worker that cannot rebuild an argument says so and lives."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        with pytest.raises(CommandError, match="cannot be unpickled"):
            await manager.send_command("echo", fault_workers.Bomb())
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


@pytest.mark.parametrize("error", UNPICKLABLE)
async def test_a_reply_that_cannot_be_pickled_is_answered(make_manager, error):
    """The caller hears why, and the worker lives."""
    async with fail_after(LIMIT), make_manager(fault_workers.Replying) as manager:
        with pytest.raises(CommandError, match="cannot be pickled"):
            await manager.send_command("reply", error)
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


async def test_a_reply_that_cannot_be_unpickled_is_an_error_of_the_caller(make_manager):
    """A SystemExit on the way back into the application is caught, and told as what it is."""
    async with fail_after(LIMIT), make_manager(fault_workers.Replying) as manager:
        with pytest.raises(CommandError, match="cannot be unpickled"):
            await manager.send_command("reply", "bomb")
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


@pytest.mark.parametrize("error", UNPICKLABLE)
async def test_an_experience_that_cannot_be_pickled_names_what_and_why(make_manager, error):
    """The worker's traceback arrives as a user error; what was delivered before stays."""
    worker = partial(fault_workers.BadInfo, error)
    async with crashing(make_manager(worker)) as incident:
        assert incident.cause is ExitCause.USER_ERROR
        assert "Experience.info cannot be pickled" in incident.detail
        assert "fault_workers.py" in incident.traceback


async def test_an_experience_that_cannot_be_unpickled_is_told(make_manager):
    """An ``info`` that explodes in the application costs the worker, not the application."""
    manager = make_manager(partial(fault_workers.BadInfo, "bomb"))
    async with crashing(manager, gaps=True) as incident:
        assert incident.cause is ExitCause.PROTOCOL
        assert incident.experiences_lost >= 1
        assert "cannot be unpickled" in incident.detail


@pytest.mark.parametrize("value", fault_workers.NOT_EXPERIENCES)
async def test_a_collect_that_returns_something_else_is_told(make_manager, value):
    """``None``, a generator, a list, a sparse tensor …: a user error that names the type."""
    worker = partial(fault_workers.BadResult, value)
    async with crashing(make_manager(worker)) as incident:
        assert incident.cause is ExitCause.USER_ERROR
        assert fault_workers.NOT_EXPERIENCES[value][1] in incident.detail
        assert incident.phase == "collect"


@pytest.mark.parametrize("name", fault_workers.ERRORS)
async def test_an_exception_that_cannot_travel_arrives_as_text(make_manager, name):
    """Odd signatures, frozen and speechless classes: the caller gets their traceback as text."""
    async with fail_after(LIMIT), make_manager(fault_workers.Replying) as manager:
        with pytest.raises(CommandError) as caught:
            await manager.send_command("throw", name, worker_ids=[1])
        assert "throw_named" in caught.value.remote_traceback
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


@pytest.mark.parametrize("size", [0, 1, 16 << 20])
async def test_tensors_of_any_size_arrive(make_manager, size):
    """No byte or many millions: the data arrives, beside an empty tensor with its shape."""
    async with fail_after(LIMIT), make_manager(fault_workers.Large, num_workers=1) as manager:
        await manager.send_command("size", size)
        async for batch in manager.experiences():
            assert batch.data["empty"].shape == (0, 4)
            if batch.data["data"].shape == (size,):
                break
        if size:
            assert (batch.data["data"][0], batch.data["data"][-1]) == (1, 2) or size == 1
        assert manager.incidents == ()


@pytest.mark.stress
async def test_tensors_of_more_than_2_gib_arrive(make_manager):
    """An experience and a command of more than 2 GiB pass, and the loop goes on meanwhile."""
    size = (2 << 30) + 4097
    config = {"num_workers": 1, "max_queue_size": 1}
    async with fail_after(110), make_manager(fault_workers.Large, **config) as manager:
        await manager.send_command("size", size)
        async for batch in manager.experiences():
            if batch.data["data"].shape == (size,):
                assert (batch.data["data"][0], batch.data["data"][-1]) == (1, 2)
                break
        assert manager.incidents == ()


async def test_a_large_reply_does_not_block_the_loop(make_manager):
    """64 MiB of reply are received in shares, and others are served in between."""
    async with fail_after(LIMIT), make_manager(fault_workers.Replying) as manager:
        large = asyncio.create_task(manager.send_command("large", 64 << 20, worker_ids=[0]))
        while not large.done():
            assert await manager.send_command("echo", 1, worker_ids=[1]) == {1: 1}
        assert len((await large)[0]) == 64 << 20


async def test_a_large_last_answer_is_an_answer(make_manager):
    """What a worker has answered whole counts, though it died before the answer was unpacked."""
    with Gate() as gate:
        faults = [
            Failpoint("on_command", gate.hold, worker_id=0),
            Failpoint("committed", failpoints.kill, worker_id=0),
        ]
        manager = make_manager(armed(fault_workers.Replying, *faults), mode="sync")
        async with fail_after(LIMIT), watched(manager) as (manager, events):
            asked = asyncio.create_task(manager.send_command("large", 32 << 20, worker_ids=[0]))
            held = await gate.visitor()
            collecting = asyncio.create_task(manager.collect())
            await pool_workers.turn()
            held.release()
            assert len((await asked)[0]) == 32 << 20
            await next_incident(events)
            await collecting
            assert manager.incidents[0].commands_lost == 0


async def test_a_tensor_in_a_command_is_a_copy(make_manager):
    """What was sent may be changed at once, and what was delivered belongs to the receiver."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        data = torch.arange(5)
        asking = asyncio.create_task(manager.send_command("echo", data))
        await pool_workers.turn()
        replies = await asking
        replies[0][0] = 99
        assert replies[1].tolist() == data.tolist() == [0, 1, 2, 3, 4]

"""send_command(): received by real workers, answered, at most once, and never a silence."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from functools import partial

import pytest
import torch

import pool_workers
from keisei.events import WorkerReady
from keisei.exceptions import CommandError, CommandTimeout, SerializationError, WorkerLost
from keisei.testing.failpoints import Failpoint, Gate, armed, exit_now, kill
from keisei.testing.scenarios import fail_after, next_event

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
WORKERS = pytest.mark.parametrize(
    "worker", [pool_workers.Counting, pool_workers.Coroutine, pool_workers.AsyncHooks]
)


@BACKENDS
@WORKERS
async def test_every_worker_answers_for_itself(make_manager, backend, worker):
    """The replies are those of the workers, by worker id."""
    async with fail_after(30), make_manager(worker, backend=backend, num_workers=3) as manager:
        assert await manager.send_command("worker_id") == {0: 0, 1: 1, 2: 2}
        assert await manager.send_command("worker_id", worker_ids=[2]) == {2: 2}
        assert await manager.send_command("worker_id", worker_ids=(2, 0)) == {2: 2, 0: 0}
        assert await manager.send_command("worker_id", worker_ids=[]) == {}
        assert await manager.send_command("worker_id", worker_ids=[1, 1]) == {1: 1}


@BACKENDS
async def test_data_and_replies_arrive_as_they_were_sent(make_manager, backend):
    """Nested values and tensors make the way there and back unchanged, as copies."""
    tensor = torch.arange(6.0).reshape(2, 3)
    data = {"text": "ü", "nested": [1, (2.5, None)], "bytes": b"\0" * 10, "tensor": tensor}
    async with fail_after(30), make_manager(pool_workers.Counting, backend=backend) as manager:
        for reply in (await manager.send_command("echo", data)).values():
            assert torch.equal(reply.pop("tensor"), tensor)
            assert reply == {key: value for key, value in data.items() if key != "tensor"}


async def test_large_data_and_replies_are_whole(make_manager):
    """A command of megabytes, which no socket buffers, and its reply lose no byte."""
    data = os.urandom(5_000_000)
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        assert await manager.send_command("echo", data) == {0: data, 1: data}


@BACKENDS
@WORKERS
async def test_concurrent_commands_get_their_own_replies(make_manager, backend, worker):
    """A hundred commands at the same time, to one, several and all, are not mixed up."""
    async with fail_after(60), make_manager(worker, backend=backend) as manager:

        async def ask(number):
            chosen = [[0], [1], [0, 1]][number % 3]
            replies = await manager.send_command("echo", number, worker_ids=chosen)
            assert replies == dict.fromkeys(chosen, number)

        await asyncio.gather(*map(ask, range(100)))


async def test_pipelined_commands_are_handled_in_order(make_manager):
    """Commands that were sent one after the other, without waiting, are handled in that order."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold, worker_id=0))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            await manager.pause()
            await manager.reset()
            sent = [asyncio.create_task(manager.send_command("number"))]
            held = await gate.visitor()
            sent += [
                asyncio.create_task(manager.send_command(name, worker_ids=[0]))
                for name in ["resets", "reset", "resets", "reset", "reset", "resets"]
            ]
            assert not any(task.done() for task in sent)
            held.release()
            replies = [reply[0] for reply in await asyncio.gather(*sent)]
            assert replies == [0, 1, None, 2, None, None, 4]


async def test_a_command_is_answered_between_two_experiences(make_manager):
    """A worker in a def collect answers when that is done, and not before."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            asking = asyncio.create_task(manager.send_command("number"))
            await asyncio.wait([asking], timeout=0.05)
            assert not asking.done()
            held.release()
            assert await asking == {0: 1}
            gate.open()


@BACKENDS
async def test_a_command_is_answered_beside_a_coroutine_collect(make_manager, backend):
    """While a coroutine collects, commands are handled at once; the experience is not disturbed."""
    with Gate() as gate:
        worker = partial(pool_workers.Coroutine, gate=gate)
        config = {"num_workers": 1, "backend": backend}
        async with fail_after(30), make_manager(worker, **config) as manager:
            held = await gate.visitor()
            assert await manager.send_command("number") == {0: 0}
            assert await manager.send_command("echo", "beside") == {0: "beside"}
            with pytest.raises(CommandError):
                await manager.send_command("raise", ValueError("no"))
            held.release()
            gate.open()
            (first, *_) = await manager.collect()
            assert first.data["number"].item() == 1
            assert manager.incidents == ()


@BACKENDS
@WORKERS
async def test_an_unknown_command_is_an_error_that_names_it(make_manager, backend, worker):
    """The reply is a CommandError; the worker lives on."""
    async with fail_after(30), make_manager(worker, backend=backend) as manager:
        with pytest.raises(
            CommandError, match=f"{worker.__name__} knows no command 'fly'"
        ) as caught:
            await manager.send_command("fly", worker_ids=[1])
        assert (caught.value.worker_id, caught.value.incarnation) == (1, 0)
        assert "LookupError" in caught.value.remote_traceback
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


async def test_an_error_of_some_carries_the_replies_of_the_others(make_manager):
    """The first error is raised; it knows who answered what, and who else failed."""
    worker = armed(
        pool_workers.Counting,
        Failpoint("on_command", pool_workers.no, worker_id=0),
        Failpoint("on_command", pool_workers.no, worker_id=2),
    )
    async with fail_after(30), make_manager(worker, num_workers=3) as manager:
        with pytest.raises(CommandError, match="no, because of the test") as caught:
            await manager.send_command("echo", "hello")
        assert caught.value.worker_id == 0
        assert caught.value.replies == {1: "hello"}
        assert caught.value.errors.keys() == {0, 2}
        assert caught.value.errors[2].worker_id == 2
        assert any("worker 2" in note for note in caught.value.__notes__)


async def test_data_that_cannot_be_pickled_raises_at_the_caller(make_manager):
    """Nothing is sent; the error names the command and the reason."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        await manager.pause()
        with pytest.raises(SerializationError, match="data of command 'echo' cannot be pickled"):
            await manager.send_command("echo", lambda: None)
        with pytest.raises(SerializationError, match="SystemExit"):
            await manager.send_command("echo", pool_workers.ExitsOnPickling())
        assert manager.queue_info().control_queue_sizes == (0, 0)
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}


async def test_a_reply_that_cannot_be_pickled_is_the_callers_error(make_manager):
    """The worker lives on; the caller learns what could not travel."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        with pytest.raises(CommandError, match="reply to command 'unpicklable reply' cannot be"):
            await manager.send_command("unpicklable reply")
        assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


async def test_exceptions_with_unusual_constructors_come_as_text(make_manager):
    """An exception that does not survive pickling is told all the same."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        with pytest.raises(CommandError, match=r"Unusual: a and b") as caught:
            await manager.send_command("raise unusual", worker_ids=[0])
        assert "Unusual" in caught.value.remote_traceback


async def test_a_worker_that_dies_answers_with_worker_lost_at_once(make_manager):
    """The error names the slot and what ended it; the next incarnation answers again."""
    worker = armed(pool_workers.Counting, Failpoint("on_command", kill, worker_id=0))
    async with fail_after(30), make_manager(worker) as manager:
        with pytest.raises(WorkerLost, match=r"worker 0 was lost: .*SIGKILL") as caught:
            await manager.send_command("echo", "hello")
        assert (caught.value.worker_id, caught.value.incarnation) == (0, 0)
        assert caught.value.exitcode == -signal.SIGKILL
        assert caught.value.replies == {1: "hello"}
        (incident,) = manager.incidents
        assert (incident.last_command, incident.commands_lost) == ("echo", 1)
        assert incident.phase == "command"


async def test_commands_behind_the_deadly_one_are_lost_too(make_manager):
    """All that waited for the dead process are told; none is handled by its successor."""
    worker = armed(pool_workers.Counting, Failpoint("on_command", partial(exit_now, 3)))
    async with fail_after(30), make_manager(worker, num_workers=1) as manager:
        asked = [manager.send_command("echo", number) for number in range(5)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [WorkerLost] * 5
        assert [answer.exitcode for answer in answers] == [3] * 5
        assert manager.incidents[0].commands_lost == 5


async def test_a_command_to_a_worker_that_is_not_ready_is_refused(make_manager):
    """A slot that is being filled again, or that is none, cannot be asked; the others can."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Counting,
            Failpoint("on_command", kill, worker_id=0),
            Failpoint("setup", gate.hold, worker_id=0, incarnation=1),
        )
        async with fail_after(30), make_manager(worker) as manager:
            with pytest.raises(WorkerLost):
                await manager.send_command("echo", worker_ids=[0])
            starting = await gate.visitor()
            with pytest.raises(WorkerLost, match="worker 0 is not ready now"):
                await manager.send_command("echo", worker_ids=[0, 1])
            with pytest.raises(WorkerLost, match="worker 7 is not ready now"):
                await manager.send_command("echo", worker_ids=[7])
            assert await manager.send_command("echo", 1) == {1: 1}
            starting.release()


async def test_a_late_answer_is_dropped(make_manager):
    """After CommandTimeout the worker finishes; its answer reaches nobody else."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker) as manager:
            asking = asyncio.create_task(manager.send_command("echo", "first", worker_ids=[1]))
            held = await gate.visitor()
            with pytest.raises(
                CommandTimeout, match=r"worker 1 did not answer 'echo' within 0.1 s; it is in comm"
            ):
                await manager.send_command("echo", "early", worker_ids=[1], timeout=0.1)
            held.release()
            assert await asking == {1: "first"}
            assert await manager.send_command("echo", "late") == {0: "late", 1: "late"}
            assert manager.incidents == ()


async def test_command_timeout_of_the_configuration_is_the_default(make_manager):
    """Without a timeout of its own a command has the pool's."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold, worker_id=1))
        async with fail_after(30), make_manager(worker, command_timeout=0.1) as manager:
            with pytest.raises(TimeoutError, match=r"within 0.1 s"):
                await manager.send_command("echo", "early", worker_ids=[1])
            gate.open()


async def test_large_commands_do_not_get_in_the_way_of_a_resume(make_manager):
    """Frames that wait for room keep their order, and none of them is forgotten."""
    data = bytes(3_000_000)
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            await manager.pause()
            asking = [asyncio.create_task(manager.send_command("echo", data)) for _ in range(3)]
            held = await gate.visitor()
            await manager.resume()
            pausing = asyncio.create_task(manager.pause())
            await asyncio.wait([pausing], timeout=0)
            await manager.resume()
            held.release()
            assert [await one for one in asking] == [{0: data}] * 3
            await pausing
            assert len(await manager.collect(min_steps=20)) == 20


async def test_a_worker_that_dies_with_large_commands_on_their_way_loses_all(make_manager):
    """Commands that were not sent yet end in the same error as the one that was."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            data = bytes(3_000_000)
            asking = [asyncio.create_task(manager.send_command("echo", data)) for _ in range(3)]
            held = await gate.visitor()
            os.kill(held.pid, signal.SIGKILL)
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(answer) for answer in answers] == [WorkerLost] * 3


class HeldInPickling:
    """Cannot be pickled before the test lets it."""

    def __init__(self):
        self.go_on = threading.Event()

    def __reduce__(self):
        assert self.go_on.wait(60)
        return (int, ())


async def test_a_command_never_reaches_a_successor(make_manager):
    """A worker that dies while the data are being pickled has lost the command."""
    manager = make_manager(pool_workers.Counting, num_workers=1)
    events = manager.events()
    async with fail_after(60), manager:
        await next_event(events, WorkerReady)
        held = HeldInPickling()
        asking = asyncio.create_task(manager.send_command("echo", [bytes(3_000_000), held]))
        await asyncio.wait([asking], timeout=0.05)
        os.kill(manager.workers[0].pid, signal.SIGKILL)
        await next_event(events, WorkerReady)
        held.go_on.set()
        with pytest.raises(WorkerLost):
            await asking
        assert await manager.send_command("echo", 1) == {0: 1}


async def test_a_cancelled_command_leaves_the_others_alone(make_manager):
    """Cancelling one of several commands drops its reply only."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("on_command", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            asking = [asyncio.create_task(manager.send_command("echo", n)) for n in range(3)]
            held = await gate.visitor()
            asking[0].cancel()
            asking[1].cancel()
            await asyncio.wait(asking[:2])
            held.release()
            assert await asking[2] == {0: 2}
            assert [task.cancelled() for task in asking] == [True, True, False]

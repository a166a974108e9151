"""Workers in the application's own process: tasks in the shape of processes."""

from __future__ import annotations

import asyncio
import functools

import pytest

from keisei.backends.inline import InlineBackend, InlineProcess
from keisei.child.runtime import WorkerRuntime
from keisei.events import ExitCause
from keisei.testing.conformance.baseline import turn
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.communication import WorkerCommunicator
from pool_workers import Coroutine, Counting, Returning

LIMIT = 30


async def start() -> tuple[WorkerCommunicator, InlineProcess]:
    """Start a worker that waits for its first frame."""
    communicator = WorkerCommunicator(1)
    return communicator, await InlineBackend().start(communicator.endpoints(0), "test")


async def test_a_task_that_fails_has_an_exit_code_and_a_report(monkeypatch):
    """An error of the library's own in it is no error of whoever waits for it."""

    async def serve(runtime: WorkerRuntime) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(WorkerRuntime, "serve", serve)
    async with fail_after(LIMIT):
        communicator, process = await start()
        assert await process.wait() == 1
        assert "ZeroDivisionError: a bug" in process.crash_report()
        await communicator.cleanup()


async def test_a_task_shows_where_it_stands():
    """The report of a task that lives is where it is suspended, and of a killed one nothing."""
    async with fail_after(LIMIT):
        communicator, process = await start()
        await turn()
        process.dump_stacks()
        assert "runtime.py" in process.crash_report()
        assert process.state() == ""
        assert process.pid is None
        process.kill()
        await process.wait()
        assert process.crash_report() == ""
        await communicator.cleanup()


@pytest.mark.parametrize("worker", [Counting, Coroutine])
async def test_restarts_share_a_loop_with_what_was_there(make_manager, worker):
    """Workers that are killed again and again leave nothing in the loop that deafens the next."""
    async with fail_after(LIMIT), make_manager(worker, num_workers=2, backend="inline") as manager:
        for number in range(8):
            manager._pool.supervisor.running(number % 2).handle.kill()
            await turn()
            await manager._pool.supervisor.wait_settled()
            assert await manager.send_command("worker_id") == {0: 0, 1: 1}
            await manager.collect(min_steps=9)
        assert [one.cause for one in manager.incidents] == [ExitCause.SIGNAL] * 8
        assert [one.exitcode for one in manager.incidents] == [-9] * 8


def cancelled() -> None:
    """Raise what a task of the worker's own might, that somebody has cancelled."""
    raise asyncio.CancelledError("a task of its own was cancelled")


FAILING = functools.partial(Returning, cancelled)


async def test_a_cancellation_that_a_hook_raises_is_its_own(make_manager):
    """A hook that lets ``CancelledError`` out has failed; it was not killed."""
    async with (
        fail_after(LIMIT),
        make_manager(
            functools.partial(Returning, cancelled), num_workers=1, backend="inline"
        ) as manager,
    ):
        with pytest.raises(Exception, match="CancelledError"):
            await manager.collect()
    assert {one.cause for one in manager.incidents} == {ExitCause.USER_ERROR}

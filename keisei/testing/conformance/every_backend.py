"""What holds for every backend, whether its workers are processes or not."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from keisei.backends.base import Backend
from keisei.exceptions import WorkerLost
from keisei.testing.conformance.baseline import Baseline, turn
from keisei.testing.conformance.checking import LIMIT, checked, require, require_equal
from keisei.testing.conformance.pool import run_pool
from keisei.testing.conformance.stage import Stage, hold_no_effect, wait_ended
from keisei.testing.failpoints import Gate

_MOST_DESCRIPTORS = 64


@checked
async def check_orderly_end(backend: Backend) -> None:
    """A worker starts, answers, and ends when asked: with a goodbye, and exit code 0."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        require(not actor.handle.has_exited, "has_exited is true of a worker that was started")
        require_equal(await actor.call(divmod, 7, 2), (3, 1), "the answer of the worker")
        require(not actor.handle.has_exited, "has_exited is true of a worker that answers")
        actor.stop()
        words = await actor.ended(0, "an orderly end")
        require(words.said_goodbye, "the worker was stopped and its goodbye has not arrived")


@checked
async def check_many_may_wait(backend: Backend) -> None:
    """Any number of tasks wait for the end; one that is cancelled harms nobody."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        waiters = [asyncio.ensure_future(actor.handle.wait()) for _ in range(3)]
        await turn()
        waiters[0].cancel()
        await asyncio.wait(waiters[:1])
        require(waiters[0].cancelled(), "a task that waits cannot be cancelled")
        await turn()
        require(
            not any(waiter.done() for waiter in waiters[1:]),
            "one task that waited was cancelled, and others with it",
        )
        await actor.call(os.getpid)
        actor.stop()
        require_equal(await asyncio.gather(*waiters[1:]), [0, 0], "what two waiters were told")
        await actor.ended(0, "an orderly end")


@checked
async def check_kill(backend: Backend) -> None:
    """``kill`` ends a worker, as SIGKILL; after the end nothing has an effect or raises."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        await actor.call(os.getpid)
        actor.handle.kill()
        words = await actor.ended(-signal.SIGKILL, "kill()")
        require(not words.said_goodbye, "a worker that was killed has said goodbye")
        await hold_no_effect(actor, -signal.SIGKILL)


@checked
async def check_kill_at_once(backend: Backend) -> None:
    """A worker that is killed before it does anything ends, and so do its queues."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        actor.handle.kill()
        await actor.ended(-signal.SIGKILL, "kill()")


@checked
async def check_terminate(backend: Backend) -> None:
    """``terminate`` ends a worker; after the end nothing has an effect or raises."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        await actor.call(os.getpid)
        actor.handle.terminate()
        code = await actor.handle.wait()
        require(code is not None and code < 0, f"the exit code after terminate() is {code}")
        await actor.ended(code, "terminate()")
        await hold_no_effect(actor, code)


@checked
async def check_two_starts_at_once(backend: Backend) -> None:
    """Two workers that start together share no queue, and one outlives the other."""
    async with Stage(backend) as stage:
        first, second = await asyncio.gather(stage.start(0), stage.start(1))
        for one, other in ((first, second), (second, first)):
            pids = [one.handle.pid, other.handle.pid]
            require(pids[0] is None or pids[0] != pids[1], f"two workers have the pids {pids}")
            require_equal(await one.call(max, 3, 4), 4, "the answer of one of two")
        first.handle.kill()
        await first.ended(-signal.SIGKILL, "kill(), beside another that lives")
        require_equal(await second.call(min, 3, 4), 3, "the answer of the one that lives")
        second.stop()
        await second.ended(0, "an orderly end")


@checked
async def check_restart(backend: Backend) -> None:
    """In the place of a worker that was killed another starts, on fresh queues."""
    async with Stage(backend) as stage:
        first = await stage.start()
        first.handle.kill()
        await first.ended(-signal.SIGKILL, "kill()")
        second = await stage.start()
        require_equal(await second.call(max, 3, 4), 4, "the answer of the successor")
        second.stop()
        await second.ended(0, "an orderly end")


@checked
async def check_start_that_fails(backend: Backend) -> None:
    """A start without descriptors is an ``OSError`` that leaves nothing, or it succeeds."""
    async with Stage(backend) as stage:
        await (await stage.start()).call(os.getpid)  # what is made once, such as a server, is there
        for number in range(_MOST_DESCRIPTORS):
            line, endpoints = stage.prepare()
            before = Baseline()
            handle = None
            with _descriptors_left(number):
                try:
                    handle = await backend.start(endpoints, "puppet")
                except OSError:
                    await line.read_to_the_end()
            if handle is not None:
                actor = stage.add(handle, line)
                handle.kill()
                await actor.ended(-signal.SIGKILL, "kill()")
                return
            await wait_ended(line)
            line.lose(WorkerLost("the check is over"))
            await before.require_nothing_left()
        raise AssertionError(f"a start fails with {_MOST_DESCRIPTORS} descriptors left")


@contextmanager
def _descriptors_left(number: int) -> Iterator[None]:
    """Let this process open only so many descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)
    taken = [probe]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, probe + _MOST_DESCRIPTORS), hard))
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for fd in taken[-number:] if number else ():
            os.close(fd)
        del taken[len(taken) - number :]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


@checked
async def check_start_that_is_cancelled(backend: Backend) -> None:
    """A start that is cancelled, at whatever moment, leaves no worker and no queue open."""
    async with Stage(backend) as stage:
        await (await stage.start()).call(os.getpid)  # what is made once, such as a server, is there
        for turns in (0, 1, 2, 5, 20):
            line, endpoints = stage.prepare()
            starting = asyncio.ensure_future(backend.start(endpoints, "puppet"))
            await turn(turns)
            starting.cancel()
            await asyncio.wait([starting])
            if not starting.cancelled():  # it was done before
                stage.add(starting.result(), line).handle.kill()
            elif turns:
                await wait_ended(line)
            else:
                endpoints.close()  # it never began


@checked
async def check_abort_of_starts(backend: Backend) -> None:
    """``abort_starts`` is safe at any time; a start under way ends, and later ones succeed."""
    async with Stage(backend) as stage:
        before = Baseline()
        backend.abort_starts()
        await before.wait_quiet()
        line, endpoints = stage.prepare()
        starting = asyncio.ensure_future(backend.start(endpoints, "puppet"))
        await turn(1)
        backend.abort_starts()
        await asyncio.wait([starting])
        error = starting.exception()
        if error is None:
            handle = starting.result()
            handle.kill()
            await handle.wait()
            handle.close()
        elif not isinstance(error, OSError):
            raise AssertionError("a start that was aborted raises no OSError") from error
        await wait_ended(line)
        await before.wait_quiet()
        actor = await stage.start()
        require_equal(await actor.call(max, 3, 4), 4, "the answer of a worker after an abort")


@checked
async def check_pool(backend: Backend) -> None:
    """A pool runs on it: commands, weights and batches are exact, also after a restart."""
    await run_pool(backend)


# where a start can be made to hang


async def check_abort_of_a_start_that_hangs(
    make_hanging: Callable[[Gate], Backend], *, limit: float = LIMIT
) -> None:
    """``abort_starts`` ends a start that does not get on, and whoever holds it up.

    Args:
        make_hanging: Returns a new backend whose starts stand at the gate (``gate.hold``), in a
            process or thread beside the loop, and do not go on before it lets go.
        limit: Seconds.

    Raises:
        AssertionError: It does not end in time, succeeds, raises something else than ``OSError``,
            or leaves something behind.
    """
    with Gate() as gate:

        @checked
        async def check_abort_of_a_start_that_hangs(backend: Backend) -> None:
            """``abort_starts`` ends a start that does not get on, and whoever holds it up."""
            async with Stage(backend) as stage:
                line, endpoints = stage.prepare()
                starting = asyncio.ensure_future(backend.start(endpoints, "puppet"))
                try:
                    visitor = await gate.visitor()
                    require(not starting.done(), "the start that was to hang is done")
                    backend.abort_starts()
                    await asyncio.wait([starting])
                    error = starting.exception()
                    if not isinstance(error, OSError):
                        raise AssertionError("the aborted start raises no OSError") from error
                    await visitor.gone()
                    visitor.release()
                    await wait_ended(line)
                finally:
                    starting.cancel()

        await check_abort_of_a_start_that_hangs(lambda: make_hanging(gate), limit=limit)


CHECKS = (
    check_orderly_end,
    check_many_may_wait,
    check_kill,
    check_kill_at_once,
    check_terminate,
    check_two_starts_at_once,
    check_restart,
    check_start_that_fails,
    check_start_that_is_cancelled,
    check_abort_of_starts,
    check_pool,
)

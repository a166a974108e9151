"""Embedding: the pool takes nothing global and works in any loop, thread and process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading

import pytest
import uvloop

import pool_workers
from fault_helpers import LIMIT, Order, check_order, next_incident, until_ready
from keisei.events import ExitCause
from keisei.exceptions import CollectTimeout, ManagerStateError
from keisei.ipc.kernel import has_pidfd
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.parallel_manager import ParallelManager


async def test_the_applications_signal_handlers_stay(make_manager):
    """Handlers of the loop and of Python are what they were, and SIGTERM to a worker is its own."""
    heard = []
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, heard.append, "SIGTERM")
    usr1 = signal.signal(signal.SIGUSR1, lambda *_: heard.append("SIGUSR1"))
    try:
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1, signal.SIGHUP)
        before = [signal.getsignal(number) for number in watched]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
            events = manager.events()
            os.kill(manager.workers[1].pid, signal.SIGTERM)
            incident = await next_incident(events)
            assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGTERM")
            await until_ready(events, 1, 1)
            assert [signal.getsignal(number) for number in watched] == before
        assert heard == []
        assert [signal.getsignal(number) for number in watched] == before
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        os.kill(os.getpid(), signal.SIGTERM)
        while heard != ["SIGTERM"]:
            await pool_workers.turn()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGUSR1, usr1)


async def test_an_application_that_reaps_every_child_is_served(make_manager):
    """``waitpid(-1)`` elsewhere costs exit codes at most, and the pool reaps no other child."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        events = manager.events()
        own = subprocess.Popen(["true"])  # noqa: ASYNC220 - the pool must not reap it
        os.kill(manager.workers[1].pid, signal.SIGKILL)
        incident = await next_incident(events)
        assert incident.cause in {ExitCause.SIGNAL, ExitCause.LOST}
        await until_ready(events, 1, 1)
        assert own.wait() == 0
    assert len(manager.incidents) == 1


async def test_a_loop_in_another_thread_serves(make_manager):
    """A manager in a thread's own loop starts, collects and restarts; this loop cannot use it."""

    async def use(manager):
        async with fail_after(LIMIT), manager:
            events = manager.events()
            os.kill(manager.workers[0].pid, signal.SIGKILL)
            incident = await next_incident(events)
            assert (incident.worker_id, incident.incarnation) == (0, 0)
            check_order(await manager.collect(min_steps=20))
            return manager

    async with fail_after(LIMIT):
        manager = await asyncio.to_thread(
            lambda: asyncio.run(use(make_manager(pool_workers.Counting)))
        )
        with pytest.raises(ManagerStateError, match="another event loop"):
            await manager.collect()
        assert len(manager.incidents) == 1


def test_a_second_run_of_asyncio_serves(make_manager):
    """Nothing of the first ``asyncio.run`` is in the way of the next ones."""

    async def use():
        async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
            check_order(await manager.collect(min_steps=10))
            return [info.pid for info in manager.workers]

    first, second, third = (asyncio.run(use()) for _ in range(3))
    assert set(first).isdisjoint(second)
    assert set(second).isdisjoint(third)


async def nothing() -> None:
    """Do nothing, in a loop."""


@pytest.fixture(scope="module")
def _used_uvloop() -> None:
    """Have uvloop open what it keeps for the process, before leaks are looked for."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(nothing())


@pytest.mark.usefixtures("_used_uvloop")
def test_uvloop_serves(make_manager):
    """Under uvloop pools start, restart and stop as elsewhere."""

    async def use():
        async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
            events = manager.events()
            os.kill(manager.workers[0].pid, signal.SIGKILL)
            assert (await next_incident(events)).exitcode == -9
            check_order(await manager.collect(min_steps=20))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(use())


async def test_two_managers_are_strangers(make_manager):
    """A crash, a stop and a pause of one pool are no concern of the other in the same loop."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as one:
        async with make_manager(pool_workers.Counting) as other:
            events = one.events()
            await other.pause()
            os.kill(one.workers[0].pid, signal.SIGKILL)
            await next_incident(events)
            assert other.incidents == ()
        check_order(await one.collect(min_steps=20))
        assert len(one.incidents) == 1


@pytest.mark.parametrize("rounds", [300, pytest.param(100_000, marks=pytest.mark.stress)])
async def test_a_collect_that_is_cut_short_loses_and_doubles_nothing(make_manager, rounds):
    """Timed out or cancelled just as a batch arrives: every batch comes exactly once, in order."""
    limit = LIMIT if rounds < 1000 else 800.0
    async with fail_after(limit), make_manager(pool_workers.Counting) as manager:
        order = Order()
        for number in range(rounds):
            if number % 3 == 0:
                try:
                    order.go_on(await manager.collect(timeout=number % 7 * 1e-4))
                except CollectTimeout:
                    continue
            else:
                collecting = asyncio.create_task(manager.collect())
                for _ in range(number % 5):
                    await pool_workers.turn()
                collecting.cancel()
                try:
                    order.go_on(await collecting)
                except asyncio.CancelledError:
                    continue
        order.go_on(await manager.collect(min_steps=10))
        assert manager.stats().num_batches == order.num_batches
        assert manager.incidents == ()


@pytest.mark.skipif(not has_pidfd(), reason="without pidfds there are only numbers")
async def test_a_pid_that_was_given_away_gets_no_signal(make_manager, monkeypatch):
    """Signals go through pidfds: numbers, which a stranger may have by then, are never used.

    Recycling a pid takes a namespace of pids; that no function takes a number stands in for it.
    """
    used = []
    monkeypatch.setattr(os, "kill", lambda *args: used.append(args))
    monkeypatch.setattr(os, "killpg", lambda *args: used.append(args))
    kill = signal.pidfd_send_signal
    async with (
        fail_after(LIMIT),
        make_manager(pool_workers.Counting, shutdown_timeout=0.3) as manager,
    ):
        events = manager.events()
        pidfd = os.pidfd_open(manager.workers[1].pid)
        kill(pidfd, signal.SIGKILL)
        os.close(pidfd)
        await next_incident(events)
        await until_ready(events, 1, 1)
        pidfd = os.pidfd_open(manager.workers[1].pid)
        kill(pidfd, signal.SIGSTOP)
        os.close(pidfd)
        await manager.scale(1)
    assert used == []


async def test_a_foreign_thread_may_ask_for_the_end(make_manager):
    """request_stop() through ``call_soon_threadsafe`` ends an iteration that waits."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        loop = asyncio.get_running_loop()
        await manager.pause()
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(manager.request_stop,))
        thread.start()
        async for _ in manager.experiences():
            pass
        thread.join()
        assert manager.is_stop_requested


async def test_a_forked_copy_of_the_application_keeps_nobody_alive(make_manager):
    """A child that the application forks may end as it likes: pool and workers are not its own."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting) as manager:
        pids = [info.pid for info in manager.workers]
        copy = os.fork()
        if copy == 0:
            os._exit(0)
        os.waitpid(copy, 0)  # noqa: ASYNC222 - it ends at once
        check_order(await manager.collect(min_steps=20))
        assert [info.pid for info in manager.workers] == pids
        assert manager.incidents == ()


async def test_a_manager_needs_no_main_thread_state():
    """A manager may be made anywhere, before there is a loop: nothing is started by it."""
    made = await asyncio.to_thread(ParallelManager, pool_workers.Counting)
    await made.stop()
    assert made.workers == ()

"""A manager's life: where it may be used, and what it says where it may not."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest
import torch

import pool_workers
from keisei.exceptions import ManagerStateError, PoolExhausted, WorkerStartError
from keisei.testing.failpoints import Failpoint, Gate, armed, exit_now
from keisei.testing.leaks import check_no_leaks, has_ended
from keisei.testing.scenarios import fail_after

USES = {
    "experiences": lambda manager: anext(manager.experiences()),
    "collect": lambda manager: manager.collect(),
    "push_weights": lambda manager: manager.push_weights({"w": torch.zeros(1)}),
    "send_command": lambda manager: manager.send_command("echo"),
    "pause": lambda manager: manager.pause(),
    "resume": lambda manager: manager.resume(),
    "reset": lambda manager: manager.reset(),
    "scale": lambda manager: manager.scale(2),
    "restart": lambda manager: manager.restart(0),
}
EACH_USE = pytest.mark.parametrize("use", USES.values(), ids=USES)


async def assert_right_answers(manager):
    """Use a pool in every way and check what comes back."""
    assert await manager.send_command("echo", 5) == {0: 5, 1: 5}
    version = await manager.push_weights({"w": torch.zeros(1)}, wait=True)
    assert await manager.send_command("version") == {0: version, 1: version}
    assert sum(batch.num_steps for batch in await manager.collect(min_steps=20)) >= 20


@EACH_USE
async def test_use_before_the_start_is_a_clear_error(make_manager, use):
    """The error says how to start."""
    manager = make_manager(pool_workers.Counting)
    with pytest.raises(ManagerStateError, match=r"not started; use 'async with manager'"):
        await use(manager)


@EACH_USE
async def test_use_after_the_stop_is_a_clear_error(make_manager, use):
    """The error says that it is stopped and what to do."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    async with manager:
        pass
    with pytest.raises(ManagerStateError, match="this manager is stopped; make a new one"):
        await use(manager)


@EACH_USE
def test_use_from_another_loop_is_a_clear_error(make_manager, use):
    """The error names the way that works from other threads."""
    manager = make_manager(pool_workers.Counting, backend="inline")

    async def main():
        async with fail_after(30), manager:
            await asyncio.to_thread(asyncio.run, elsewhere())
            await assert_right_answers(manager)

    async def elsewhere():
        with pytest.raises(ManagerStateError, match=r"asyncio\.run_coroutine_threadsafe"):
            await use(manager)

    asyncio.run(main())


async def test_what_can_be_asked_at_any_time(make_manager):
    """Properties have harmless values before the start, and the last ones after the stop."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    assert (manager.workers, manager.incidents, manager.weights_version) == ((), (), 0)
    assert not manager.is_healthy
    assert not manager.is_stop_requested
    with pytest.raises(ManagerStateError):
        manager.stats()
    with pytest.raises(ManagerStateError):
        manager.queue_info()
    async with manager:
        await manager.push_weights({"w": torch.zeros(1)})
    assert [info.state for info in manager.workers] == ["stopped", "stopped"]
    assert (manager.incidents, manager.weights_version) == ((), 1)
    assert (manager.stats().num_ready, manager.stats().num_pushes) == (0, 1)
    assert manager.is_stop_requested
    assert not manager.is_healthy


async def test_a_manager_serves_once(make_manager):
    """Starting twice, or again after the stop, is refused without disturbing what runs."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    async with fail_after(30), manager:
        with pytest.raises(ManagerStateError, match="is running; it serves once"):
            await manager.start()
        await assert_right_answers(manager)
    with pytest.raises(ManagerStateError, match="is stopped; it serves once"):
        await manager.start()


async def test_stop_before_the_start(make_manager):
    """It is harmless, may be repeated, and the manager cannot be started any more."""
    manager = make_manager(pool_workers.Counting)
    await manager.stop()
    await manager.stop()
    manager.request_stop()
    assert (manager.workers, manager.incidents, manager.weights_version) == ((), (), 0)
    assert [event async for event in manager.events()] == []
    with pytest.raises(ManagerStateError, match="is stopped"):
        await manager.start()
    with pytest.raises(ManagerStateError):
        manager.stats()


async def test_stop_may_be_called_again_and_at_the_same_time(make_manager):
    """Every call returns when all is over, with the same result."""
    manager = make_manager(pool_workers.Counting)
    async with fail_after(30):
        await manager.start()
        await manager.collect()
        await asyncio.gather(*(manager.stop() for _ in range(4)))
        assert manager.stats().num_ready == 0
        await manager.stop()


async def test_stop_lets_workers_finish_and_tear_down(make_manager):
    """What is being collected is finished, and teardown is called, before the process ends."""
    with Gate() as collecting, Gate() as ending:
        worker = armed(
            pool_workers.Counting,
            Failpoint("collect", collecting.hold),
            Failpoint("teardown", ending.hold),
        )
        manager = make_manager(worker, num_workers=1)
        async with fail_after(30):
            await manager.start()
            held = await collecting.visitor()
            pid = manager.workers[0].pid
            stopping = asyncio.create_task(manager.stop())
            await asyncio.wait([stopping], timeout=0.05)
            held.release()
            last = await ending.visitor()
            assert not stopping.done()
            last.release()
            await stopping
            assert has_ended(pid)
            assert manager.incidents == ()


async def test_a_worker_that_does_not_end_is_killed(make_manager):
    """After shutdown_timeout come SIGTERM and SIGKILL; stop returns when it is gone."""
    with Gate() as gate:
        worker = armed(
            pool_workers.Stubborn, Failpoint("collect", gate.hold, worker_id=1, hit=None)
        )
        manager = make_manager(worker, shutdown_timeout=0.2)
        async with fail_after(30):
            await manager.start()
            held = await gate.visitor()
            await manager.stop()
            await held.gone()
        assert manager.stats().num_ready == 0


async def test_a_second_stop_shortens_the_grace(make_manager):
    """Who asks twice does not want to wait for the whole shutdown_timeout."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold))
        manager = make_manager(worker, num_workers=1, shutdown_timeout=600.0)
        async with fail_after(60):
            await manager.start()
            await gate.visitor()
            first = asyncio.create_task(manager.stop())
            await asyncio.wait([first], timeout=0.05)
            await manager.stop()
            await first


@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_a_failed_start_leaves_nothing_and_says_why(make_manager, backend):
    """The first start's exception is raised with its traceback; there are no restarts."""
    worker = armed(pool_workers.Counting, Failpoint("setup", pool_workers.no, worker_id=1))
    manager = make_manager(worker, backend=backend)
    with check_no_leaks():
        async with fail_after(30):
            with pytest.raises(WorkerStartError, match="worker 1 could not start") as caught:
                await manager.start()
        assert caught.value.worker_id == 1
        assert "ValueError: no, because of the test" in str(caught.value)
        assert "in no\n" in caught.value.remote_traceback
    assert len(manager.incidents) == 1
    assert manager.stats().num_restarts == 0
    await manager.stop()
    with pytest.raises(WorkerStartError):
        await manager.collect()


async def test_a_worker_that_keeps_dying_at_its_start_is_not_tried_for_ever(make_manager):
    """Ends without an exception are tried again, up to the policy's limit."""
    worker = armed(
        pool_workers.Counting, Failpoint("setup", partial(exit_now, 3), incarnation=None)
    )
    manager = make_manager(worker, num_workers=1, restart={"max_restarts": 2})
    async with fail_after(30):
        with pytest.raises((WorkerStartError, PoolExhausted), match="exited with code 3"):
            await manager.start()
    assert [incident.incarnation for incident in manager.incidents] == [0, 1, 2]


async def test_stop_while_starting(make_manager):
    """Whoever starts is told; processes that were under way are gone."""
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("setup", gate.hold, worker_id=1))
        manager = make_manager(worker, shutdown_timeout=0.2)
        async with fail_after(30):
            starting = asyncio.create_task(manager.start())
            held = await gate.visitor()
            await manager.stop()
            await held.gone()
            with pytest.raises(ManagerStateError, match="stopped while it was starting"):
                await starting


@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_the_users_error_wins(make_manager, backend):
    """An exception in the body of async with is raised as it is, and the pool is gone."""
    manager = make_manager(pool_workers.Counting, backend=backend)
    error = ZeroDivisionError("the user's")

    async def live():
        async with manager:
            await manager.collect()
            raise error

    async with fail_after(30):
        with pytest.raises(ZeroDivisionError) as caught:
            await live()
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert manager.stats().num_ready == 0


async def test_an_error_of_the_stop_is_a_note_on_the_users_error(make_manager, monkeypatch):
    """The user's own error is not hidden by what went wrong afterwards."""

    async def live(manager, error):
        async def close_and_fail():
            await close()
            raise OSError("the stop's")

        async with manager:
            close = manager._pool.close
            monkeypatch.setattr(manager._pool, "close", close_and_fail)
            if error is not None:
                raise error

    manager = make_manager(pool_workers.Counting, backend="inline")
    with pytest.raises(ZeroDivisionError) as caught:
        await live(manager, ZeroDivisionError("the user's"))
    assert caught.value.__notes__ == ['stopping the pool failed too: OSError("the stop\'s")']

    manager = make_manager(pool_workers.Counting, backend="inline")
    with pytest.raises(OSError, match="the stop's"):
        await live(manager, None)
    with pytest.raises(ManagerStateError, match="is stopped"):
        await manager.collect()


async def test_a_pool_that_has_failed_raises_the_same_from_every_use(make_manager):
    """PoolExhausted for whoever waits and for whoever comes later; stop is orderly."""
    worker = armed(
        pool_workers.Counting, Failpoint("collect", partial(exit_now, 3), incarnation=None)
    )
    manager = make_manager(worker, mode="sync", restart={"max_restarts": 1})
    async with fail_after(30), manager:
        with pytest.raises(PoolExhausted, match="more than 1 failures in 60 s"):
            await manager.collect(min_steps=1000)
        for use in USES.values():
            with pytest.raises(PoolExhausted):
                await use(manager)
        assert not manager.is_healthy
    assert manager.stats().num_ready == 0


def test_a_second_loop_in_the_same_process(make_manager):
    """Each asyncio.run has its own pool; nothing of the first one remains."""

    async def main():
        async with fail_after(30), make_manager(pool_workers.Counting) as manager:
            await assert_right_answers(manager)

    for _ in range(2):
        with check_no_leaks():
            asyncio.run(main())


def test_a_loop_in_another_thread_than_the_main_one(make_manager):
    """The pool needs nothing that only the main thread has."""
    answers = []

    async def main():
        async with fail_after(30), make_manager(pool_workers.Counting) as manager:
            await assert_right_answers(manager)
            answers.append(len(await manager.collect()))

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(answers) == 1


async def test_nobody_minds_a_manager_that_is_never_started(make_manager):
    """Describing a pool takes nothing that would have to be given back."""
    with check_no_leaks():
        for _ in range(3):
            make_manager(pool_workers.Counting)

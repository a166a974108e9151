"""Plain hooks may run event loops of their own; coroutines run in the worker's."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import warnings
from functools import partial

import pytest
import torch

import child_workers
from child_workers import EXITS, Looping, LoopingBesideACoroutine
from keisei.child.loops import OutsideTheApplicationsLoop, OutsideTheLoop, forget_current_loop
from keisei.testing.scenarios import fail_after

LIMIT = 60


@pytest.fixture(scope="module", autouse=True)
def _used_uvloop() -> None:
    """Have uvloop open what it keeps for the process, before leaks are looked for."""
    child_workers.use_uvloop()


WAYS = [*child_workers.WAYS, "side loop"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("worker", [Looping, LoopingBesideACoroutine])
@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_plain_hooks_run_loops_of_their_own(make_manager, way, worker, backend):
    """``asyncio.run``, own loops, subprocesses, and loops that stay "running" between calls."""
    manager = make_manager(partial(worker, way), num_workers=1, backend=backend)
    async with fail_after(LIMIT), manager:
        version = await manager.push_weights({"w": torch.zeros(1)}, wait=True)
        numbers = []
        while len(numbers) < 3:
            numbers += [b.data["collected"].item() for b in await manager.collect()]
        await manager.reset()
        counts = (await manager.send_command("counts"))[0]
        assert version == 1
        assert numbers[:3] == [1, 2, 3]
        once = {hook: counts[hook] for hook in ("factory", "setup", "load_weights", "reset")}
        assert once == {"factory": 1, "setup": 1, "load_weights": 1, "reset": 1}
        assert counts["on_command"] == 1
        assert manager.incidents == ()


@pytest.mark.parametrize("way", ["run", "side loop"])
async def test_they_do_in_a_spawned_process(make_manager, way):
    """The same holds in a fresh interpreter."""
    manager = make_manager(partial(Looping, way), num_workers=1, start_method="spawn")
    async with fail_after(LIMIT), manager:
        await manager.collect()
        assert (await manager.send_command("counts"))[0]["setup"] == 1
        assert manager.incidents == ()


async def test_a_teardown_uses_the_loop_that_setup_left_running(make_manager):
    """The side loop is there up to the end; a worker whose teardown fails would be an incident."""
    manager = make_manager(partial(Looping, "side loop"), num_workers=1)
    async with fail_after(LIMIT), manager:
        await manager.collect()
    assert manager.incidents == ()


# the context itself


async def test_no_loop_is_running_outside():
    """There is neither a running loop nor a task of it, and both are back afterwards."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    with OutsideTheLoop():
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        assert asyncio.run(child_workers.turned(5)) == 5
    assert asyncio.get_running_loop() is loop
    assert asyncio.current_task() is task
    assert await child_workers.turned(6) == 6


async def test_what_is_left_running_is_brought_back_there_and_nowhere_else():
    """A loop that a library leaves running is out of sight of ours, with its generators' hooks."""
    outside, loop, hooks = OutsideTheLoop(), asyncio.get_running_loop(), sys.get_asyncgen_hooks()
    with outside:
        side = child_workers.SideLoop()
    for _ in range(2):
        assert asyncio.get_running_loop() is loop
        assert sys.get_asyncgen_hooks() == hooks
        assert [number async for number in child_workers.numbers()] == [0, 1, 2]
        assert side.generators == []
        with outside:
            assert asyncio.get_running_loop() is side.loop
            assert sys.get_asyncgen_hooks() != hooks
            assert side.call(child_workers.turned(7)) == 7
    with outside:
        side.close()
    assert asyncio.get_running_loop() is loop
    assert sys.get_asyncgen_hooks() == hooks
    with outside, pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


async def test_an_error_brings_the_loop_back_too():
    """Whatever the hook raises, our loop is the running one again."""
    outside, loop = OutsideTheLoop(), asyncio.get_running_loop()

    async def fail():
        raise StopAsyncIteration

    with pytest.raises(KeyboardInterrupt), outside:
        raise KeyboardInterrupt
    with pytest.raises(StopAsyncIteration), outside:
        asyncio.run(fail())
    assert asyncio.get_running_loop() is loop


async def test_the_application_gets_back_what_a_hook_leaves_changed():
    """Its current loop, its handler of SIGINT and its wake-up for signals are what they were."""
    outside, loop = OutsideTheApplicationsLoop(), asyncio.get_running_loop()
    policy = asyncio.get_event_loop_policy()
    current, handler = policy.get_event_loop(), signal.getsignal(signal.SIGINT)
    heard = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR2, heard.set)
    theirs = asyncio.new_event_loop()
    ours, other = socket.socketpair()
    try:
        with outside:
            asyncio.set_event_loop(theirs)
            theirs.add_signal_handler(signal.SIGUSR1, int)
            signal.signal(signal.SIGINT, lambda *_: None)
        assert policy.get_event_loop() is current
        assert signal.getsignal(signal.SIGINT) is handler
        signal.raise_signal(signal.SIGUSR2)
        await asyncio.wait_for(heard.wait(), LIMIT)
        with outside:
            assert asyncio.get_event_loop() is theirs
            asyncio.set_event_loop(None)
        assert policy.get_event_loop() is current
    finally:
        loop.remove_signal_handler(signal.SIGUSR2)
        theirs.close()
        ours.close()
        other.close()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python has no child watchers any more")
async def test_a_child_watcher_stays_with_the_applications_loop():
    """A watcher that is attached to a loop is so again after a hook has run another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        policy = asyncio.get_event_loop_policy()
        before = policy.get_child_watcher()
        watcher = asyncio.SafeChildWatcher()
        watcher.attach_loop(asyncio.get_running_loop())
        policy.set_child_watcher(watcher)
        try:
            with OutsideTheApplicationsLoop():
                asyncio.run(child_workers.turned(1))
            process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", EXITS)
            assert await asyncio.wait_for(process.wait(), LIMIT) == 1
        finally:
            policy.set_child_watcher(before)
            watcher.close()


def test_a_process_of_its_own_forgets_its_loop():
    """What a program finds that has just begun: no loop was set in its thread."""
    found: list[object] = []

    def run() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        policy = asyncio.get_event_loop_policy()
        found.append(policy.get_event_loop() is loop)
        forget_current_loop()
        with pytest.raises(RuntimeError, match="no current event loop"):
            policy.get_event_loop()
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT)
    assert found == [True]

"""The learner of run(): its errors, its thread, its end when it hangs, and its first weights."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import anyio
import pytest
import torch

import pool_workers
from keisei.events import UpdateCompleted, WeightsPushed, WorkerReady
from keisei.exceptions import LearnerTimeout, ManagerStateError, WeightsError
from keisei.testing.scenarios import fail_after
from keisei.training.parallel import learning
from keisei.training.parallel.learning import LearnerCalls, LearnerThread

ROOT = Path(__file__).parents[3]


class Private(BaseException):
    """An error of the application's own that "except Exception" does not see."""


def a_group():
    return BaseExceptionGroup("two", [Private(), ValueError()])


# Made anew in each test: an error that was raised keeps the frames that it passed, with batches.
STEERING = [StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError]
OTHERS = [ArithmeticError, KeyboardInterrupt, SystemExit, Private, TimeoutError, a_group]
MAKE_STEERING = pytest.mark.parametrize("make_error", STEERING)
MAKE_OTHERS = pytest.mark.parametrize("make_error", OTHERS)
MAKE_ANY = pytest.mark.parametrize("make_error", [*STEERING, *OTHERS])


class Plain:
    """Counts its updates; fails or waits in the method and the update that it is told to."""

    def __init__(self, method="", then=None, *, update=1):
        self.method = method
        self.then = then
        self.update = update
        self.updates = 0
        self.versions = []
        self.threads = []

    def _reached(self, method):
        self.threads.append((method, threading.current_thread().name))
        if method == self.method and self.updates >= self.update:
            self.then()

    def learn(self, batches):
        self.updates += 1
        self.versions.append({batch.weights_version for batch in batches})
        self._reached("learn")
        return {"updates": self.updates}

    def state_dict(self):
        self._reached("state_dict")
        return {"updates": torch.tensor([self.updates])}


class Async(Plain):
    async def learn(self, batches):
        await pool_workers.turn()
        return super().learn(batches)


class AllAsync(Async):
    async def state_dict(self):
        await pool_workers.turn()
        return super().state_dict()


class Wrapped(Plain):
    """Its methods are plain functions that return awaitables, as a decorator makes them."""

    def learn(self, batches):
        return self._later(super().learn, batches)

    def state_dict(self):
        return self._later(super().state_dict)

    async def _later(self, method, *arguments):
        await pool_workers.turn()
        return method(*arguments)


FLAVOURS = pytest.mark.parametrize("flavour", [Plain, Async, AllAsync, Wrapped])
METHODS = pytest.mark.parametrize("method", ["learn", "state_dict"])


def raising(error):
    def fail():
        raise error

    return fail


class Hanging:
    """Something that a learner's thread waits for until the test is over."""

    def __init__(self):
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.let_go.set()
        for thread in threading.enumerate():
            if thread.name == "keisei-learner":
                thread.join(20)
                assert not thread.is_alive()

    def __call__(self):
        self.reached.set()
        self.hang()

    def hang(self):
        assert self.let_go.wait(60)

    async def wait_reached(self):
        assert await asyncio.to_thread(self.reached.wait, 30)


def make_inline(make_manager, learner, **config):
    return make_manager(
        pool_workers.Counting, learner=learner, backend="inline", num_workers=1, **config
    )


# errors


@METHODS
@FLAVOURS
@MAKE_OTHERS
async def test_an_error_of_the_learner_is_what_run_raises(
    make_manager, flavour, method, make_error
):
    """Whatever a method raises arrives as it is, after the pool has stopped."""
    error = make_error()
    manager = make_inline(make_manager, flavour(method, raising(error)))
    async with fail_after(30):
        with pytest.raises(type(error)) as caught:
            await manager.run(max_steps=100)
    assert caught.value is error
    assert manager.stats().num_ready == 0


@METHODS
@FLAVOURS
@MAKE_STEERING
async def test_an_error_that_would_steer_the_waiter_is_wrapped(
    make_manager, flavour, method, make_error
):
    """StopIteration and its kind end the run as the cause of a RuntimeError that names them."""
    error = make_error()
    manager = make_inline(make_manager, flavour(method, raising(error)))
    async with fail_after(30):
        with pytest.raises(RuntimeError, match=f"raised {type(error).__name__}") as caught:
            await manager.run(max_steps=100)
    assert caught.value.__cause__ is error
    assert manager.stats().num_ready == 0


@MAKE_ANY
async def test_an_error_of_the_first_state_dict_ends_the_start(make_manager, make_error):
    """Without a model the start needs the learner's weights; it raises what they raised."""
    error = make_error()
    learner = Plain("state_dict", raising(error), update=0)
    manager = make_inline(make_manager, learner)
    expected = RuntimeError if make_error in STEERING else type(error)
    async with fail_after(30):
        with pytest.raises(expected):
            await manager.start()
    with pytest.raises(ManagerStateError, match="it serves once"):
        await manager.start()


async def test_an_error_of_the_learner_arrives_with_a_background_task(make_manager):
    """A run in a task of a group fails the group: CancelledError would have passed for an end."""
    learner = Plain("learn", raising(asyncio.CancelledError()))
    manager = make_inline(make_manager, learner)
    async with fail_after(30):
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(manager.run(max_steps=100))
    assert [type(error) for error in caught.value.exceptions] == [RuntimeError]


async def test_the_error_of_an_update_that_was_to_be_finished_is_told_with_the_cancellation(
    make_manager,
):
    """When cancelled, an update that fails meanwhile is the cause of the cancellation."""
    error = ValueError("no")
    with Hanging() as hanging:

        def wait_and_fail():
            hanging()
            raise error

        manager = make_inline(make_manager, Plain("learn", wait_and_fail))
        async with fail_after(30):
            running = asyncio.create_task(manager.run())
            await hanging.wait_reached()
            running.cancel()
            await asyncio.wait([running], timeout=0.01)
            hanging.let_go.set()
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_learn_that_is_a_generator_is_refused(make_manager, is_async):
    """Calling a generator function runs nothing of it: that is an error, not an update."""

    class Yielding(Plain):
        def learn(self, batches):
            yield {}

    class YieldingAsync(Plain):
        async def learn(self, batches):
            yield {}

    manager = make_inline(make_manager, YieldingAsync() if is_async else Yielding())
    async with fail_after(30):
        with pytest.raises(TypeError, match=r"learn\(\) is a generator function"):
            await manager.run(max_steps=100)


async def test_weights_that_are_no_mapping_are_told_by_their_type(make_manager):
    """A state_dict that returns nothing is a WeightsError of the learner's."""

    class Forgetful(Plain):
        def state_dict(self):
            return None

    manager = make_inline(make_manager, Forgetful())
    async with fail_after(30):
        with pytest.raises(WeightsError, match=r"the learner's state_dict\(\) returned a NoneType"):
            await manager.run(max_steps=100)


# a learner that hangs


def assert_shows_the_hang(text):
    assert "in hang\n" in text
    assert "self.let_go.wait(60)" in text
    assert learning.__file__ not in text


@METHODS
@pytest.mark.parametrize("flavour", [Plain, Wrapped])
async def test_a_cancelled_run_abandons_a_learner_that_hangs(make_manager, caplog, flavour, method):
    """After shutdown_timeout the cancellation goes on, with the stack of the learner's thread."""

    class HangsInThread(flavour):
        def learn(self, batches):
            if method == "learn":
                hanging()
            return super().learn(batches)

        def state_dict(self):
            if method == "state_dict" and self.updates:
                hanging()
            return super().state_dict()

    with Hanging() as hanging:
        manager = make_inline(make_manager, HangsInThread(), shutdown_timeout=0.2)
        async with fail_after(30):
            running = asyncio.create_task(manager.run())
            await hanging.wait_reached()
            running.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
        (note,) = caught.value.__notes__
        assert note.startswith(
            f"the learner's {method}() did not return within 0.2 s after the run was cancelled; "
        )
        assert_shows_the_hang(note)
        assert [record.getMessage() for record in caplog.records] == [note]
        assert manager.stats().num_ready == 0


async def test_a_timeout_around_a_run_ends_a_learner_that_hangs(make_manager):
    """The TimeoutError comes after the grace; its cause has the stack."""
    with Hanging() as hanging:
        manager = make_inline(make_manager, Plain("learn", hanging), shutdown_timeout=0.2)
        async with fail_after(30):
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.5):
                    await manager.run()
        assert_shows_the_hang(caught.value.__cause__.__notes__[0])


async def test_a_cancelled_scope_ends_a_learner_that_hangs(make_manager):
    """A scope of anyio, which cancels again and again, gets its end after the grace too."""
    with Hanging() as hanging:
        manager = make_inline(make_manager, Plain("learn", hanging), shutdown_timeout=0.2)
        async with fail_after(30):
            with anyio.move_on_after(0.5) as scope:
                await manager.run()
        assert scope.cancelled_caught
        assert hanging.reached.is_set()
        assert manager.stats().num_ready == 0


async def test_a_second_cancellation_shortens_the_grace(make_manager):
    """With a grace of minutes, a run that is cancelled twice ends within two seconds."""
    with Hanging() as hanging:
        manager = make_inline(make_manager, Plain("learn", hanging), shutdown_timeout=600.0)
        async with fail_after(30):
            running = asyncio.create_task(manager.run())
            await hanging.wait_reached()
            running.cancel()
            await asyncio.wait([running], timeout=0.05)
            assert not running.done()
            running.cancel()
            await asyncio.wait([running])
        assert running.cancelled()


async def end_by_stop(manager):
    await manager.stop()


async def end_by_request(manager):
    manager.request_stop()


ENDS = pytest.mark.parametrize("end", [end_by_stop, end_by_request])


@ENDS
@METHODS
async def test_a_stop_ends_a_run_whose_learner_hangs(make_manager, end, method):
    """The run raises LearnerTimeout with the stack, once the grace is over."""
    with Hanging() as hanging:
        manager = make_inline(make_manager, Plain(method, hanging), shutdown_timeout=0.2)
        async with fail_after(30):
            running = asyncio.create_task(manager.run())
            await hanging.wait_reached()
            await end(manager)
            with pytest.raises(LearnerTimeout) as caught:
                await running
        assert caught.value.message.startswith(
            f"the learner's {method}() did not return within 0.2 s after the run should have ended"
        )
        assert_shows_the_hang(caught.value.stack)
        assert str(caught.value).endswith(caught.value.stack.rstrip())
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert manager.stats().num_ready == 0


async def test_max_seconds_ends_a_run_whose_learner_hangs(make_manager):
    """The limit holds whatever the learner does; the error says what it was doing."""
    with Hanging() as hanging:
        manager = make_inline(make_manager, Plain("learn", hanging), shutdown_timeout=0.2)
        async with fail_after(30):
            with pytest.raises(LearnerTimeout) as caught:
                await manager.run(max_seconds=0.5)
        assert_shows_the_hang(caught.value.stack)


async def test_a_pool_that_fails_ends_a_run_whose_learner_hangs(make_manager):
    """Workers that die while the learner hangs do not leave the run waiting for it."""
    with Hanging() as hanging:
        manager = make_manager(
            pool_workers.Counting,
            learner=Plain("learn", hanging),
            num_workers=1,
            shutdown_timeout=0.2,
            restart={"max_restarts": 0},
        )
        async with fail_after(30):
            running = asyncio.create_task(manager.run())
            await hanging.wait_reached()
            os.kill(manager.workers[0].pid, signal.SIGKILL)
            with pytest.raises(LearnerTimeout):
                await running
        assert [incident.signal_name for incident in manager.incidents] == ["SIGKILL"]
        assert manager.stats().num_ready == 0


async def test_a_coroutine_that_does_not_let_itself_be_cancelled_is_abandoned(make_manager):
    """An async learn that goes on after its cancellation is left alone, with its stack told."""
    let_go = asyncio.Event()
    tasks = []

    class Stubborn(Plain):
        async def learn(self, batches):
            tasks.append(asyncio.current_task())
            while not let_go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.wait_in_vain()

        async def wait_in_vain(self):
            await let_go.wait()

    manager = make_inline(make_manager, Stubborn(), shutdown_timeout=0.2)
    async with fail_after(30):
        with pytest.raises(LearnerTimeout) as caught:
            await manager.run(max_seconds=0.3)
        assert "in wait_in_vain\n" in caught.value.stack
        assert not tasks[0].done()
        let_go.set()
        await asyncio.wait(tasks)


async def test_a_cancelled_run_cancels_a_coroutine_at_once(make_manager):
    """An async learn is cancelled as anything that is awaited, without a grace."""
    learning, ended = asyncio.Event(), []

    class Waiting(Plain):
        async def learn(self, batches):
            learning.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

    manager = make_inline(make_manager, Waiting(), shutdown_timeout=600.0)
    async with fail_after(30):
        running = asyncio.create_task(manager.run())
        await learning.wait()
        running.cancel()
        await asyncio.wait([running])
    assert running.cancelled()
    assert ended == ["cancelled"]


async def test_a_coroutine_cannot_swallow_the_cancellation_of_the_run(make_manager):
    """An async learn that takes its cancellation for nothing does not keep the run going."""
    learning = asyncio.Event()

    class Swallowing(Plain):
        async def learn(self, batches):
            learning.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    manager = make_inline(make_manager, Swallowing())
    async with fail_after(30):
        running = asyncio.create_task(manager.run())
        await learning.wait()
        running.cancel()
        await asyncio.wait([running])
    assert running.cancelled()


async def test_a_learner_is_patiently_waited_for_at_its_own_pace(make_manager):
    """Where updates take minutes, an orderly end waits for the last one as long."""

    async def wait_over():
        await over.wait()

    over = asyncio.Event()
    with Hanging() as hanging:
        learner = Plain("learn", hanging)
        calls = LearnerCalls(learner, grace=0.01, wait_over=wait_over)
        async with fail_after(30), calls:
            calls._longest = 60.0
            update = asyncio.create_task(calls.learn([]))
            await hanging.wait_reached()
            over.set()
            await asyncio.wait([update], timeout=0.2)
            assert not update.done()
            hanging.let_go.set()
            assert await update == {"updates": 1}


async def test_an_abandoned_learner_serves_no_other_run_meanwhile(make_manager):
    """A second run would call it from a second thread; when the first has ended, it may."""
    with Hanging() as hanging:
        learner = Plain("learn", hanging)
        manager = make_inline(make_manager, learner, shutdown_timeout=0.2)
        async with fail_after(60), manager:
            with pytest.raises(LearnerTimeout):
                await manager.run(max_seconds=0.1)
            with pytest.raises(ManagerStateError, match="make a new one"):
                await manager.run(max_seconds=0.1)
            with pytest.raises(ManagerStateError, match="make a new one"):
                await make_inline(make_manager, learner).run()
            hanging.let_go.set()
            for thread in threading.enumerate():
                if thread.name == "keisei-learner":
                    await asyncio.to_thread(thread.join, 20)
            assert (await manager.run(max_steps=2)).num_updates >= 1


PROGRAM = """
    import asyncio, sys, threading, torch
    from keisei import ParallelManager
    from pool_workers import Counting

    class Hanging:
        def learn(self, batches):
            print("learning", flush=True)
            self.hang()
        def hang(self):
            threading.Event().wait()
        def state_dict(self):
            return {"w": torch.zeros(1)}

    async def main():
        config = {"num_workers": 1, "backend": "inline", "shutdown_timeout": float(sys.argv[1])}
        await ParallelManager(Counting, learner=Hanging(), config=config).run()

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.mark.parametrize(("grace", "presses"), [("0.3", 1), ("600", 2)])
def test_ctrl_c_ends_a_program_whose_learner_hangs(tmp_path, grace, presses):
    """The first Ctrl-C ends it after the grace, a second one soon; no thread keeps the process."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [sys.executable, str(program), grace],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout.readline() == "learning\n"
        for press in range(presses):
            process.send_signal(signal.SIGINT)
            if press + 1 < presses:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "the learner's learn() did not return within" in errors
    assert "in hang\n" in errors


# the thread


async def test_learn_and_state_dict_share_one_thread(make_manager):
    """Both are called in the learner's thread, never in the loop's and never at the same time."""
    learner = Plain()
    manager = make_inline(make_manager, learner, mode="sync")
    async with fail_after(30):
        await manager.run(max_steps=3)
    assert learner.threads == [
        ("state_dict", "keisei-learner"),
        *[("learn", "keisei-learner"), ("state_dict", "keisei-learner")] * 3,
    ]


@pytest.mark.parametrize("flavour", [Async, AllAsync])
async def test_the_state_dict_of_an_async_learner_is_called_on_the_loop(make_manager, flavour):
    """What is learned on the loop is read on the loop, so that nothing changes it meanwhile."""
    learner = flavour()
    manager = make_inline(make_manager, learner, mode="sync")
    async with fail_after(30):
        await manager.run(max_steps=3)
    here = threading.current_thread().name
    assert learner.threads == [
        ("state_dict", here),
        *[("learn", here), ("state_dict", here)] * 3,
    ]


@FLAVOURS
async def test_a_run_holds_no_batch_once_its_update_is_learned(make_manager, flavour):
    """The memory of an update's batches is free while its weights are read, pushed and told."""
    alive, left = [], []

    class Watcher:
        def on_event(self, event):
            if isinstance(event, (WeightsPushed, UpdateCompleted)):
                left.append(sum(reference() is not None for reference in alive))

    class Watching(flavour):
        def _reached(self, method):
            if method == "state_dict":
                left.append(sum(reference() is not None for reference in alive))

    class PlainWatching(Watching):
        def learn(self, batches):
            alive[:] = [weakref.ref(batch.data["number"]) for batch in batches]
            return super().learn(batches)

    class AsyncWatching(Watching):
        async def learn(self, batches):
            alive[:] = [weakref.ref(batch.data["number"]) for batch in batches]
            return await super().learn(batches)

    learner = AsyncWatching() if issubclass(flavour, Async) else PlainWatching()
    manager = make_manager(
        pool_workers.Counting,
        learner=learner,
        observers=[Watcher()],
        mode="sync",
        num_workers=1,
        sync_interval=2,  # so that the thread is idle after every other update
    )
    gc.disable()
    try:
        async with fail_after(30):
            await manager.run(max_steps=4)
    finally:
        gc.enable()
    assert left == [0] * (2 + 4 + 2 * 2)


async def test_what_an_async_learner_sets_in_its_context_stays(make_manager):
    """All updates of a run share one context, as if they were called by one task."""
    counter = contextvars.ContextVar("counter", default=0)
    seen = []

    class Counter(Plain):
        async def learn(self, batches):
            seen.append(counter.get())
            counter.set(counter.get() + 1)

    manager = make_inline(make_manager, Counter(), mode="sync")
    async with fail_after(30):
        await manager.run(max_steps=3)
    assert seen == [0, 1, 2]
    assert counter.get() == 0


async def test_the_thread_outlives_neither_the_run_nor_a_closed_loop(make_manager):
    """An outcome that arrives when the loop is closed is dropped, and the thread ends."""
    let_go = threading.Event()
    thread = LearnerThread()

    def use_a_loop_of_its_own():
        async def call():
            thread.call(lambda: let_go.wait(30))

        asyncio.run(call())

    async with fail_after(30):
        await asyncio.to_thread(use_a_loop_of_its_own)
        (running,) = (one for one in threading.enumerate() if one.name == "keisei-learner")
        thread.close()
        assert running.is_alive()
        let_go.set()
        await asyncio.to_thread(running.join, 20)
        assert not running.is_alive()


# the first weights


@pytest.mark.parametrize("backend", ["local", "inline"])
@FLAVOURS
async def test_the_first_update_learns_from_the_learners_own_weights(
    make_manager, flavour, backend
):
    """Without a model no batch is collected before the learner's weights are version 1."""
    learner = flavour()
    manager = make_manager(pool_workers.Counting, learner=learner, backend=backend)
    async with fail_after(30):
        report = await manager.run(max_steps=20, steps_per_update=4)
    assert learner.versions[0] == {1}
    assert min(min(versions) for versions in learner.versions) == 1
    assert report.weights_version == report.num_updates + 1


async def test_a_pool_with_a_learner_has_its_weights_without_a_run(make_manager):
    """A pool that is started by itself begins with version 1 too, in every worker."""
    ready = []

    class Watching:
        def on_event(self, event):
            if isinstance(event, WorkerReady):
                ready.append(manager.weights_version)

    manager = make_manager(pool_workers.Counting, learner=Plain(), observers=[Watching()])
    async with fail_after(30), manager:
        (batch, *_) = await manager.collect()
        assert batch.weights_version == 1
    assert ready == [1, 1]


@ENDS
async def test_a_stop_ends_a_start_that_waits_for_the_learner(make_manager, end):
    """A state_dict that hangs at the start keeps neither start() nor stop()."""
    with Hanging() as hanging:
        manager = make_inline(
            make_manager, Plain("state_dict", hanging, update=0), shutdown_timeout=0.2
        )
        async with fail_after(30):
            starting = asyncio.create_task(manager.start())
            await hanging.wait_reached()
            await end(manager)
            with pytest.raises(LearnerTimeout, match=r"the learner's state_dict\(\)"):
                await starting


async def test_a_stop_while_the_first_weights_are_read_is_a_stop_of_the_start(make_manager):
    """Weights that come after the stop are not pushed; the start says that it was stopped."""
    with Hanging() as hanging:
        manager = make_inline(make_manager, Plain("state_dict", hanging, update=0))
        async with fail_after(30):
            starting = asyncio.create_task(manager.start())
            await hanging.wait_reached()
            await manager.stop()
            hanging.let_go.set()
            with pytest.raises(ManagerStateError, match="stopped while it was starting"):
                await starting
        assert manager.stats().num_pushes == 0


async def test_updates_cost_no_more_than_a_few_turns_of_the_loop():
    """A call of a plain method takes well under a millisecond beside the method itself."""

    async def never_over():
        await asyncio.Event().wait()

    learner = Plain()
    async with LearnerCalls(learner, grace=1.0, wait_over=never_over) as calls:
        await calls.learn([])
        costs = []
        for _ in range(200):
            began = time.perf_counter()
            await calls.learn([])
            costs.append(time.perf_counter() - began)
    assert min(costs) < 1e-3

"""How long callbacks hold an event loop up, by a clock that a busy machine does not spoil."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import keisei

Test = TypeVar("Test", bound=Callable[..., Any])

MAX_BLOCKED = 0.02
"""Seconds for which one callback may keep all others from running."""
_TICK = 0.005
_PACKAGE = Path(keisei.__file__).parent


class Blocked(NamedTuple):
    """The callback that took longest, in seconds of its own."""

    seconds: float
    by: str

    def __str__(self) -> str:
        return f"the event loop was blocked for {1000 * self.seconds:.0f} ms by {self.by}"


class _Delays:
    """How long threads of this process could run and did not get a processor, as Linux counts it.

    A thread that computes counts nothing, nor does a thread that sleeps or waits for a reader: both
    hold the loop up by themselves. What counts is the time of others that the loop's thread stands
    in the queue for a processor; or that another thread does, which may hold the interpreter's lock
    meanwhile.
    """

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._nanoseconds: dict[int, int] = {}

    def total(self) -> float:
        """Return the seconds of all Python threads together, those that have ended included."""
        for thread in threading.enumerate():
            if thread.native_id is not None:
                self._look_at(thread.native_id)
        return sum(self._nanoseconds.values()) / 1e9

    def _look_at(self, thread: int) -> None:
        with contextlib.suppress(OSError):  # it has just ended
            if thread not in self._files:
                path = f"/proc/self/task/{thread}/schedstat"
                self._files[thread] = os.open(path, os.O_RDONLY)
            self._nanoseconds[thread] = int(os.pread(self._files[thread], 100, 0).split()[1])

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)


@contextlib.contextmanager
def unblocked(limit: float = MAX_BLOCKED) -> Iterator[None]:
    """Hold that nothing keeps the running event loop for more than 20 ms, or ``limit`` seconds.

    No callback does, ours or asyncio's, nor does a thread that keeps the interpreter's lock: a
    timer that is due is never late for longer. The test's own steps count too: what takes long is
    prepared, and looked at, outside. Nothing is held if the body raises.
    """
    with measured_loop(asyncio.get_running_loop()) as worst:
        yield
    if worst().seconds > limit:
        raise LoopBlocked(str(worst()))


class LoopBlocked(AssertionError):
    """Something kept the event loop for too long."""


def in_one_of(times: int) -> Callable[[Test], Test]:
    """Have a test pass if one of so many runs of it finds the loop free.

    What the library does blocks the loop in every run; that the machine did not run a thread which
    held the interpreter's lock is told apart from it by running again.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        async def run(*args: Any, **kwargs: Any) -> None:
            for left in reversed(range(times)):
                try:
                    await test(*args, **kwargs)
                except LoopBlocked:
                    if not left:
                        raise
                else:
                    return

        return run  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def measured_loop(
    ticking: asyncio.AbstractEventLoop | None = None,
) -> Iterator[Callable[[], Blocked]]:
    """Measure how long each callback of this thread's event loop holds it up.

    Not counted is what others take: see ``_Delays``; and full runs of the garbage collector, which
    fall to whoever allocates next and go over all objects of the process: a tenth of a second in
    a run of the whole suite.

    Args:
        ticking: Also measure how late a timer of this loop is, which is set again and again.

    Yields:
        A function that returns the worst callback so far.
    """
    worst = Blocked(0.0, "")
    run = asyncio.Handle._run
    loop_thread = threading.get_ident()
    delays = _Delays()
    collecting = collected = 0.0
    timer: asyncio.TimerHandle | None = None

    def on_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal collecting, collected
        if phase == "start":
            collecting = time.perf_counter()
        else:
            collected += time.perf_counter() - collecting

    def of_others() -> float:
        return collected + delays.total()

    def blame(seconds: float, others: float, by: Callable[[], str]) -> None:
        nonlocal worst
        if seconds > worst.seconds:
            seconds -= of_others() - others
            if seconds > worst.seconds:
                worst = Blocked(seconds, by())

    def tick(loop: asyncio.AbstractEventLoop, due: float, others: float) -> None:
        nonlocal timer
        blame(loop.time() - due, others, lambda: "a thread, or several callbacks")
        due = loop.time() + _TICK
        timer = loop.call_at(due, tick, loop, due, of_others())

    def timed(handle: asyncio.Handle) -> None:
        if threading.get_ident() != loop_thread:
            run(handle)
            return
        others, began = of_others(), time.perf_counter()
        run(handle)
        blame(time.perf_counter() - began, others, lambda: repr(handle))

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    gc.callbacks.append(on_collection)
    if ticking is not None:
        tick(ticking, ticking.time(), of_others())
    try:
        yield lambda: worst
    finally:
        if timer is not None:
            timer.cancel()
        gc.callbacks.remove(on_collection)
        asyncio.Handle._run = run  # type: ignore[method-assign]
        delays.close()


@contextlib.contextmanager
def computing_loop() -> Iterator[Callable[[], Blocked]]:
    """Measure for how long each callback of this thread's event loop computes.

    That is the processor's time of the loop's thread, so neither another process nor another
    thread can spoil it; and nothing that waits is seen. Full runs of the garbage collector are
    left out, and so are the steps of tasks whose coroutine is a test's or a worker's: they may take
    their time.

    Yields:
        A function that returns the worst callback so far.
    """
    worst = Blocked(0.0, "")
    run = asyncio.Handle._run
    loop_thread = threading.get_ident()
    collecting = collected = 0.0

    def on_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal collecting, collected
        if phase == "start":
            collecting = time.thread_time()
        elif threading.get_ident() == loop_thread:
            collected += time.thread_time() - collecting

    def timed(handle: asyncio.Handle) -> None:
        nonlocal worst
        if threading.get_ident() != loop_thread:
            run(handle)
            return
        before, began = collected, time.thread_time()
        run(handle)
        seconds = time.thread_time() - began - (collected - before)
        if seconds > worst.seconds and not _is_a_tests(handle):
            worst = Blocked(seconds, f"{handle!r} of {_task_of(handle)!r}")

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    gc.callbacks.append(on_collection)
    try:
        yield lambda: worst
    finally:
        gc.callbacks.remove(on_collection)
        asyncio.Handle._run = run  # type: ignore[method-assign]


def _task_of(handle: asyncio.Handle) -> asyncio.Task[object] | None:
    """Return the task of which a callback is a step; ``None`` if it is none of any."""
    task = getattr(handle._callback, "__self__", None)
    return task if isinstance(task, asyncio.Task) else None


def _is_a_tests(handle: asyncio.Handle) -> bool:
    """Return whether a callback is a step of a task that a test, or a worker, has made."""
    task = _task_of(handle)
    if task is None:
        return False
    code = getattr(task.get_coro(), "cr_code", None)
    path = Path(code.co_filename) if code is not None else Path()
    # A worker of the inline backend runs its hooks in the application's loop.
    return not path.is_relative_to(_PACKAGE) or path.is_relative_to(_PACKAGE / "child")

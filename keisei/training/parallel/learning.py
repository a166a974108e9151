"""Calls a learner's methods off the event loop, for a bounded time, and passes on every error.

A plain method runs in a daemon thread of the learner's own, a coroutine in a task of its own. The
loop's executor is not used, because the application may have filled it; nor is an executor of our
own, because the interpreter joins its threads at exit, and a learner that hangs would hold it up.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from keisei.exceptions import LearnerTimeout, ManagerStateError, WeightsError
from keisei.supervision.shutdown import HURRIED_GRACE, within
from keisei.training.parallel.weights_source import HasStateDict

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("keisei.learner")

_PACE = 2.0
"""At an orderly end an update may take as many times as long as the longest one before it."""

_UNWAITABLE = (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)
"""Errors with a meaning for the code that waits: it would take them for the end of an iterator or
for a cancellation of the run, and the learner's error would be lost."""

_abandoned: list[tuple[object, Callable[[], bool]]] = []
"""Learners that a run left behind in a call, each with a function that tells whether it still
runs. No other run may call such a learner meanwhile."""


@dataclass(slots=True)
class Outcome:
    """The value that a call returned, or the error that it raised.

    An error is kept as a value because not every error can be put into a future: CPython refuses
    StopIteration, and the waiting task never wakes up. KeyboardInterrupt and SystemExit would end
    the event loop from inside the task that made the call.
    """

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, function: Callable[[], Any]) -> Self:
        """Call ``function`` and keep its value or its error."""
        try:
            return cls(function())
        except BaseException as error:  # noqa: BLE001 - raised where the outcome is waited for
            return cls(error=error)

    def get(self, method: str, owner: str = "the learner's") -> Any:
        """Return the value, or raise the error.

        Raises:
            RuntimeError: The error is StopIteration, StopAsyncIteration, GeneratorExit or
                CancelledError, which cannot be raised as they are; it is the cause.
            BaseException: Any other error, unchanged.
        """
        error, self.error = self.error, None
        try:
            if isinstance(error, _UNWAITABLE):
                name = type(error).__name__
                raise RuntimeError(f"{owner} {method}() raised {name}") from error
            if error is not None:
                raise error
            return self.value
        finally:
            del error  # its traceback holds this frame

    def drop(self) -> BaseException | None:
        """Discard the value and return the error."""
        if inspect.iscoroutine(self.value):
            self.value.close()  # it was to be awaited, and never begins
        return self.error


class LearnerThread:
    """One daemon thread that calls plain functions, one after the other."""

    def __init__(self) -> None:
        """Start nothing: the thread begins with the first call."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.is_busy = False

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Outcome]:
        """Have the thread call ``function``; cancelling the future changes nothing in the thread.

        The thread keeps nothing of a call once its outcome is known.

        Raises:
            RuntimeError: There is no room for a thread.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        pending = [function]
        del function

        def settle(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        def work() -> None:
            outcome = Outcome.of(pending.pop())
            self.is_busy = False
            try:
                loop.call_soon_threadsafe(settle, outcome)
            except RuntimeError:  # the loop is closed: it waits for nothing
                outcome.drop()

        if self._thread is None:
            thread = threading.Thread(target=self._run, name="keisei-learner", daemon=True)
            thread.start()
            self._thread = thread
        self.is_busy = True
        self._calls.put(work)
        return future

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call

    def close(self) -> None:
        """End the thread: at once if it is idle, else when its call has returned."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            if not self.is_busy:
                thread.join()  # it has nothing left to do

    def stack(self) -> str:
        """Return where the thread's call stands, outermost frame first."""
        frames = sys._current_frames()  # noqa: SLF001 - documented; the only way to another stack
        frame = frames.get(self._thread.ident or 0) if self._thread is not None else None
        lines: list[str] = []
        while frame is not None and frame.f_code is not _OUTERMOST:
            lines[:0] = traceback.format_stack(frame, limit=1)
            frame = frame.f_back
        return "".join(lines)


_OUTERMOST: CodeType = Outcome.of.__func__.__code__  # type: ignore[attr-defined]


class LearnerCalls:
    """Calls the methods of one learner, one at a time, for the length of a run.

    Use it as ``async with``. Every wait for a call ends. When the waiting task is cancelled, the
    learner has ``grace`` seconds to finish; a second cancellation shortens the rest to two
    seconds. When the run is over, or out of time, the learner has ``grace`` seconds too, or twice
    its longest update if that is longer. After that the call is abandoned: a thread cannot be
    ended, so it is left alone with what it holds, and the error shows where it stands.

    A plain method is not interrupted by a cancellation: its update is finished or abandoned. A
    coroutine is cancelled, as any other.
    """

    def __init__(
        self,
        learner: object,
        *,
        grace: float,
        wait_over: Callable[[], Coroutine[Any, Any, None]],
        seconds_left: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Prepare to call; nothing is started yet.

        Args:
            learner: Has ``learn`` and ``state_dict``.
            grace: Seconds that a call may go on after it should have ended.
            wait_over: Returns when the run should end.
            seconds_left: Seconds until the run should end all the same; ``None`` is no limit.

        Raises:
            ManagerStateError: An earlier run has abandoned this learner in a call that still runs.
        """
        _abandoned[:] = [entry for entry in _abandoned if entry[1]()]
        if any(other is learner for other, _ in _abandoned):
            raise ManagerStateError(
                "this learner is still in a call that an earlier run has abandoned; make a new one"
            )
        self._learner = learner
        self._grace = grace
        self._wait_over = wait_over
        self._seconds_left = seconds_left
        self._thread = LearnerThread()
        self._context = contextvars.copy_context()
        self._longest = 0.0
        self._over: asyncio.Task[None]  # from the beginning of ``async with``

    async def __aenter__(self) -> Self:
        self._over = asyncio.create_task(self._wait_over(), name="keisei-run-over")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.close()
        if kind is GeneratorExit:  # the coroutine is being closed and cannot await any more
            return
        self._over.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._over])

    async def learn(self, batches: object) -> Any:
        """Call ``learn(batches)`` and return its value; keep no reference to ``batches`` then.

        Raises:
            LearnerTimeout: It did not return in time after the run should have ended.
            BaseException: The learner's own error, as ``Outcome.get`` raises it.
        """
        began = time.monotonic()
        value = await self._call("learn", batches)
        self._longest = max(self._longest, time.monotonic() - began)
        return value

    async def state_dict(self) -> HasStateDict | Mapping[str, torch.Tensor]:
        """Return the learner's weights.

        ``state_dict`` is called where ``learn`` is called: in the learner's thread, since a copy
        from a device may take long, or on the loop if ``learn`` is a coroutine.

        Raises:
            WeightsError: It returned something else.
            BaseException: As in ``learn``.
        """
        weights = await self._call("state_dict")
        if not isinstance(weights, Mapping) and not hasattr(weights, "state_dict"):
            raise WeightsError(
                f"the learner's state_dict() returned a {type(weights).__qualname__}; "
                "it must return a mapping of names to tensors"
            )
        found: HasStateDict | Mapping[str, torch.Tensor] = weights
        return found

    async def aside(self, function: Callable[[], Any], method: str) -> Any:
        """Call ``function`` in the learner's thread and return its value; errors as in ``learn``.

        Args:
            function: Reads the value of ``method``, which may lie on a device.
            method: The name for errors.
        """
        return (await self._finish(self._thread.call(function), method)).get(method)

    async def _call(self, method: str, *arguments: object) -> Any:
        function = getattr(self._learner, method)
        on_loop = inspect.iscoroutinefunction(getattr(self._learner, "learn", None))
        if on_loop or inspect.iscoroutinefunction(function):
            value = Outcome.of(lambda: function(*arguments)).get(method)
        else:
            call = self._thread.call(functools.partial(function, *arguments))
            value = (await self._finish(call, method)).get(method)
        if inspect.isawaitable(value):  # also of a plain function that wraps a coroutine
            value = await self._await(value, method)
        if inspect.isgenerator(value) or inspect.isasyncgen(value):
            raise TypeError(
                f"the learner's {method}() is a generator function: calling it runs nothing of it; "
                "return the result in place of yielding it"
            )
        return value

    async def _await(self, work: Awaitable[Any], method: str) -> Any:
        task = asyncio.create_task(
            _awaited(work), name=f"keisei-learner-{method}", context=self._context
        )
        try:
            return (await self._finish(task, method)).get(method)
        finally:
            if inspect.iscoroutine(work) and inspect.getcoroutinestate(work) == "CORO_CREATED":
                work.close()  # the task was cancelled before its first step

    # how long

    async def _finish(self, call: asyncio.Future[Outcome], method: str) -> Outcome:
        """Wait until ``call`` is done, or abandon it."""
        either: set[asyncio.Future[Any]] = {call, self._over}
        try:
            left = self._seconds_left()
            timeout = None if left is None else max(0.0, left)
            await asyncio.wait(either, timeout=timeout, return_when="FIRST_COMPLETED")
            patience = max(self._grace, _PACE * self._longest)
            if call.done() or await within(asyncio.shield(call), patience):
                return call.result()
        except asyncio.CancelledError as cancelled:
            await self._end(call, method, cancelled)
            raise
        stack = self._stack(call)
        if isinstance(call, asyncio.Task):
            call.cancel()
            await _outlasts(call, self._grace)
        if not call.done():
            self._abandon(call)
        raise LearnerTimeout(_abandonment(method, patience, "the run should have ended"), stack)

    async def _end(
        self, call: asyncio.Future[Outcome], method: str, cancelled: asyncio.CancelledError
    ) -> None:
        """Wait for ``call`` after a cancellation, which then tells how the call ended."""
        if isinstance(call, asyncio.Task):
            call.cancel()
        if not await _outlasts(call, self._grace):
            stack = self._stack(call)
            text = _abandonment(method, self._grace, "the run was cancelled")
            cancelled.add_note(f"{text}\n{stack.rstrip()}")
            logger.error("%s\n%s", text, stack.rstrip())
            self._abandon(call)
            return
        error = _drop(call)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            raise cancelled from error

    def _abandon(self, call: asyncio.Future[Outcome]) -> None:
        call.add_done_callback(_drop)
        thread, loop = self._thread, asyncio.get_running_loop()
        if isinstance(call, asyncio.Task):
            _abandoned.append((self._learner, lambda: not call.done() and not loop.is_closed()))
        else:
            _abandoned.append((self._learner, lambda: thread.is_busy))

    def _stack(self, call: asyncio.Future[Outcome]) -> str:
        if isinstance(call, asyncio.Task):
            return _stack_of(call.get_coro())
        return self._thread.stack()


async def _awaited(work: Awaitable[Any]) -> Outcome:
    """Wait for ``work`` and keep its value or its error; the body of the learner's task."""
    try:
        return Outcome(await work)
    except BaseException as error:  # noqa: BLE001 - raised where the outcome is waited for
        return Outcome(error=error)


async def _outlasts(call: asyncio.Future[Outcome], seconds: float) -> bool:
    """Return whether ``call`` is done within ``seconds``, also when cancelled meanwhile.

    A further cancellation, such as that of a second Ctrl-C, shortens the rest to two seconds.
    Uses no task: a loop that is being closed cancels every task that it has.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    with anyio.CancelScope(shield=True):
        while not call.done() and (left := deadline - loop.time()) > 0:
            try:
                await asyncio.wait([call], timeout=left)
            except asyncio.CancelledError:
                deadline = min(deadline, loop.time() + HURRIED_GRACE)
    return call.done()


def _drop(call: asyncio.Future[Outcome]) -> BaseException | None:
    """Discard the value of a finished call and return its error."""
    # A task that was cancelled before its first step has no outcome.
    return None if call.cancelled() else call.result().drop()


def _abandonment(method: str, seconds: float, since: str) -> str:
    return (
        f"the learner's {method}() did not return within {seconds:.3g} s after {since}; "
        "it is abandoned. If its updates may take that long, raise shutdown_timeout."
    )


def _stack_of(work: object) -> str:
    """Return the stack of the coroutines that a suspended coroutine waits for, outermost first."""
    lines: list[str] = []
    inner: Any = getattr(work, "cr_await", None)
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None)
        if frame is not None:
            lines += traceback.format_stack(frame, limit=1)
        inner = getattr(inner, "cr_await", None) or getattr(inner, "gi_yieldfrom", None)
    return "".join(lines)

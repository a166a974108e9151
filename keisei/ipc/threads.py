"""Work that may block, in daemon threads of our own: the loop's executor is the application's."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], undo: Callable[[], None] | None = None) -> asyncio.Future[T]:
    """Run ``work`` in a daemon thread: a thread that hangs must not hold up the interpreter's exit.

    Args:
        work: What may block.
        undo: Called in the thread after ``work`` if the event loop is closed by then.

    Returns:
        A future of its result. Cancelling it does not end the work.

    Raises:
        OSError: There is no room for a thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        thread.join()  # it has nothing left to do
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # the work's result is a T
        elif isinstance(error, StopIteration):  # which a future cannot carry
            wrapped = RuntimeError("work in a thread raised StopIteration")
            wrapped.__cause__ = error
            future.set_exception(wrapped)
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as problem:  # noqa: BLE001 - raised where it is waited for
            error = problem
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            if undo is not None and error is None:
                undo()

    thread = threading.Thread(target=run, name="keisei-start", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise BlockingIOError(errno.EAGAIN, str(error)) from error
    return future


def aside(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run short ``work`` that must be done in a thread, or here if there is no room for one."""
    try:
        return in_thread(work)
    except OSError:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        done.set_result(work())
        return done


async def to_the_end(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread and return its result; cancellation waits until it has finished.

    Raises:
        OSError: There is no room for a thread.
        Exception: Whatever ``work`` raises.
    """
    working = in_thread(work)
    cancelled = await finished(working)
    if cancelled is not None:
        working.exception()  # retrieved: the caller is told of its cancellation alone
        raise cancelled
    return working.result()


async def finished(work: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for ``work`` to its end, and return the last cancellation that came meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled

"""Work that may block, in daemon threads of our own: the loop's executor is the application's."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable


def in_thread(
    work: Callable[[], None], undo: Callable[[], None] | None = None
) -> asyncio.Future[None]:
    """Run ``work`` in a daemon thread: one that hangs must not hold up the interpreter's exit.

    Args:
        work: What may block.
        undo: Called in the thread after ``work`` if the event loop is closed by then.

    Raises:
        OSError: There is no room for a thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        thread.join()  # it has nothing left to do
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as problem:  # noqa: BLE001 - raised where it is waited for
            error = problem
        try:
            loop.call_soon_threadsafe(settle, error)
        except RuntimeError:
            if undo is not None and error is None:
                undo()

    thread = threading.Thread(target=run, name="keisei-start", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise BlockingIOError(errno.EAGAIN, str(error)) from error
    return future


def aside(work: Callable[[], None]) -> asyncio.Future[None]:
    """Run short ``work`` that must be done in a thread, or here if there is no room for one."""
    try:
        return in_thread(work)
    except OSError:
        work()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

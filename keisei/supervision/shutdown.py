"""The shutdown ladder: ask, SIGTERM, SIGKILL, and a bounded wait after each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

from keisei.supervision.process import ProcessHandle

T = TypeVar("T")

HURRIED_GRACE = 2.0
KILL_GRACE = 2.0


async def end(
    handle: ProcessHandle,
    *,
    ask: Callable[[], bool],
    grace: float,
    hurry: asyncio.Event,
) -> bool:
    """Bring a process to its end; return whether it is gone.

    Args:
        handle: The process.
        ask: Ask it to end by itself; returns whether it could be asked.
        grace: Seconds that it has for that. A quarter of them follows after SIGTERM.
        hurry: Shortens the rest of the grace to two seconds.
    """
    if ask() and await _gone(handle, grace, hurry):
        return True
    handle.terminate()
    if await _gone(handle, grace / 4, hurry):
        return True
    handle.kill()
    return await _gone(handle, KILL_GRACE, asyncio.Event())


async def _gone(handle: ProcessHandle, seconds: float, hurry: asyncio.Event) -> bool:
    exit_ = asyncio.ensure_future(handle.wait())
    hurried = asyncio.ensure_future(hurry.wait())
    try:
        await asyncio.wait([exit_, hurried], timeout=seconds, return_when="FIRST_COMPLETED")
        if not exit_.done() and hurried.done():
            await asyncio.wait([exit_], timeout=min(seconds, HURRIED_GRACE))
        return exit_.done()
    finally:
        for task in (exit_, hurried):
            task.cancel()
        await asyncio.gather(exit_, hurried, return_exceptions=True)


async def to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end even if the caller is cancelled, then be cancelled.

    For clean-up that must not stop halfway. Holds against cancellation of the task as well as
    of an anyio scope around it.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        if not task.cancelled() and task.exception() is not None:
            raise cancelled from task.exception()
        raise cancelled
    return task.result()

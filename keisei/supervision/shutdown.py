"""The shutdown ladder: ask, SIGTERM, SIGKILL, and a bounded wait after each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio.lowlevel

from keisei.supervision.process import ProcessHandle

with contextlib.suppress(ImportError):  # it is a private module, whose place may change
    # Else anyio imports it at its first use, in the event loop, which stands still for 40 ms.
    import anyio._backends._asyncio

T = TypeVar("T")

HURRIED_GRACE = 2.0
KILL_GRACE = 2.0
_TURNS = 3
"""Turns of the loop after a grace, in which what came in the last one of it is noticed: a loop that
stood still finds the end of a process and the end of its grace in the same turn."""


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
    if ask() and await within(handle.wait(), grace, hurry):
        return True
    handle.terminate()
    if await within(handle.wait(), grace / 4, hurry):
        return True
    handle.kill()
    return await within(handle.wait(), KILL_GRACE)


async def within(
    work: Awaitable[object], seconds: float, hurry: asyncio.Event | None = None
) -> bool:
    """Wait for ``work`` and return whether it was done within the grace; cancel it if not.

    Args:
        work: Something to wait for, whose outcome does not matter; shield what must go on.
        seconds: The grace.
        hurry: Shortens the rest of the grace to two seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    waited_for = asyncio.ensure_future(work)
    hurried = asyncio.ensure_future((hurry or asyncio.Event()).wait())
    try:
        await asyncio.wait([waited_for, hurried], timeout=seconds, return_when="FIRST_COMPLETED")
        if not waited_for.done() and hurried.done():
            rest = min(deadline - loop.time(), HURRIED_GRACE)
            await asyncio.wait([waited_for], timeout=max(0.0, rest))
        for _ in range(_TURNS):
            if not waited_for.done():
                await anyio.lowlevel.checkpoint()
        return waited_for.done()
    finally:
        for task in (waited_for, hurried):
            task.cancel()
        await asyncio.gather(waited_for, hurried, return_exceptions=True)


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

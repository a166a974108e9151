"""Calls the worker's hooks, ``def`` or ``async def``, under a phase, and catches all they raise."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from keisei.child.isolation import Isolation
from keisei.ipc import failures
from keisei.ipc.status import Phase, StatusLine
from keisei.worker import Experience

_NOT_AWAITABLE = frozenset(
    {dict, Experience, type(None), bool, int, float, str, bytes, list, tuple}
)
"""What hooks nearly always return."""

_OURS = ("keisei.child.", "keisei.state_dicts")


class HookFailed(Exception):
    """A hook of the worker raised; carries what the application will be told."""

    def __init__(self, phase: Phase, error: BaseException) -> None:
        error = _without_our_frames(error)
        self.phase = phase
        self.summary = failures.summary(error)
        self.traceback = failures.trace(error)
        super().__init__(self.summary)


class Hooks:
    """Calls hooks; says on the status line which one runs.

    Attributes:
        collecting: The task of a coroutine ``collect`` that is under way.
    """

    def __init__(self, status: StatusLine, isolation: Isolation) -> None:
        self.collecting: asyncio.Task[Any] | None = None
        self._status = status
        self._isolation = isolation

    async def call(self, phase: Phase, hook: Callable[..., Any], *args: Any) -> Any:
        """Call ``hook`` and return its result, awaited where it is awaitable.

        A plain hook runs outside the event loop, a coroutine in it.

        Raises:
            HookFailed: It raised anything, StopIteration and SystemExit included.
            CancelledError: The task was cancelled from outside.
        """
        collecting = self.collecting
        beside_a_collect = collecting is not None and collecting is not asyncio.current_task()
        if beside_a_collect:
            self._status.progress()
        else:
            self._status.enter(phase)
        try:
            with self._isolation:
                result = hook(*args)
            if type(result) not in _NOT_AWAITABLE and inspect.isawaitable(result):
                result = await self._isolation.drive(result)
            return result
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and self._was_cancelled():
                raise  # from outside, not the hook's own
            raise HookFailed(phase, error) from error
        finally:
            if not beside_a_collect:
                self._status.enter(Phase.IDLE)

    def _was_cancelled(self) -> bool:
        """Return whether somebody cancels this task; in a process of its own only we do."""
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            return False
        return self._isolation.is_shared or task is self.collecting


@contextlib.contextmanager
def failing_as(phase: Phase) -> Iterator[None]:
    """Turn an exception of the body, about the worker's own values, into ``HookFailed``."""
    try:
        yield
    except BaseException as error:
        raise HookFailed(phase, error) from error


def _without_our_frames(error: BaseException) -> BaseException:
    """Drop the library's frames from the traceback's top: they tell a user nothing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        if not str(trace.tb_frame.f_globals.get("__name__")).startswith(_OURS):
            break
        trace = trace.tb_next
    return error.with_traceback(trace)

"""Scenarios with a limit: a test that hangs fails instead, and shows where everybody stands."""

from __future__ import annotations

import asyncio
import faulthandler
import io
import os
import select
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from keisei.child.process import STACKS_SIGNAL
from keisei.events import Event
from keisei.testing import leaks
from keisei.training.parallel.streams import EventStream

E = TypeVar("E", bound=Event)

_DUMP_TIME = 0.3
_CRASH_FILE = "keisei-crash"


@asynccontextmanager
async def fail_after(seconds: float) -> AsyncIterator[None]:
    """Limit the time of a scenario, from the start of a pool to its end.

    ::

        async with fail_after(20), ParallelManager(MyWorker) as manager:
            ...

    On expiry the stacks of the application's threads and tasks, and of every worker, are taken;
    then the body is cancelled. A loop that is blocked cannot be helped: that takes a limit from
    outside, such as pytest-timeout's.

    Args:
        seconds: The limit. Choose a multiple of what a starved machine needs: it is never waited
            for where all is well.

    Raises:
        AssertionError: The limit was exceeded; the message holds the stacks.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    stacks = ""

    def expire() -> None:
        nonlocal stacks
        try:
            stacks = all_stacks()
        finally:
            limit.reschedule(loop.time())

    timer = loop.call_later(seconds, expire)
    try:
        async with asyncio.timeout(None) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        name = task.get_name() if task is not None else "?"
        # With its cause: another error may have been on its way when the limit was exceeded.
        raise AssertionError(f"{name} was not done within {seconds:g} s\n{stacks}") from error
    finally:
        timer.cancel()


async def next_event(
    events: EventStream, kind: type[E], when: Callable[[E], bool] | None = None
) -> E:
    """Return the next event of a kind from ``manager.events()``, passing over all others.

    Raises:
        AssertionError: The pool stopped before there was one.
    """
    async for event in events:
        if isinstance(event, kind) and (when is None or when(event)):
            return event
    raise AssertionError(f"the pool stopped without another {kind.__name__}")


def all_stacks() -> str:
    """Return the stacks of this process's threads and tasks, and of every worker process."""
    parts = ["--- threads of the application", _thread_stacks(), "--- tasks", _task_stacks()]
    for pid in leaks.children():
        report = _worker_stacks(pid)
        if report is not None:
            parts += [f"--- worker process {pid}", report]
    return "\n".join(parts)


def _thread_stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _task_stacks() -> str:
    text = io.StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    return text.getvalue()


def _worker_stacks(pid: int) -> str | None:
    """Have a worker write its stacks where it would write a crash; ``None`` if it is none."""
    crash_file = _crash_file(pid)
    if crash_file is None:
        return None
    try:
        before = crash_file.stat().st_size
        os.kill(pid, STACKS_SIGNAL)
        # The handler takes microseconds where a process runs at all; a stopped one writes nothing.
        select.select([], [], [], _DUMP_TIME)
        with crash_file.open("rb") as file:
            file.seek(before)
            text = file.read().decode(errors="replace")
    except OSError:
        return "it has ended"
    return text or "it does not answer: stopped, or in the kernel"


def _crash_file(pid: int) -> Path | None:
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if _CRASH_FILE in str(link.readlink()):
                return link
    except OSError:
        return None
    return None

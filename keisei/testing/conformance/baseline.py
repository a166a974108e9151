"""What there was before a check, and waiting for what is ending by itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from pathlib import Path

from keisei.backends.forkserver import server
from keisei.ipc.kernel import has_pidfd
from keisei.testing import leaks

_PATIENCE = 10.0
"""Seconds that what a backend has begun to end may take; a sound one takes milliseconds."""
_TURNS = 10


async def turn(times: int = _TURNS) -> None:
    """Let the event loop turn; what is ready by then has been done."""
    loop = asyncio.get_running_loop()
    for _ in range(times):
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned


class Baseline:
    """What there was before; waits for what is ending, and holds that nothing is left."""

    def __init__(self) -> None:
        self._resources = leaks.Resources.now()
        self._tasks = asyncio.all_tasks()
        self._threads = set(threading.enumerate())
        self._children = set(leaks.children())

    async def wait_quiet(self) -> None:
        """Wait for the tasks and threads that are ending by themselves."""
        await self._wait_for_ends(with_children=False)

    async def require_nothing_left(self) -> None:
        """Wait for all that is ending by itself, then look.

        Raises:
            AssertionError: Something is left; every kind of thing is listed.
        """
        if leaks.Resources.now().beyond(self._resources):
            gc.collect()  # what garbage holds open would be waited for
            await self._wait_for_ends(with_children=True)
        left = leaks.left_since(self._resources)
        if left:
            raise AssertionError("\n  - ".join(["the backend is closed, and has left:", *left]))

    async def _wait_for_ends(self, *, with_children: bool) -> None:
        """Wait for one after the other: each may begin the next, such as a thread a task."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        known = {*self._children, server.pid}  # a new server in the place of another stays
        while (remaining := deadline - loop.time()) > 0:
            await turn()
            if tasks := asyncio.all_tasks() - self._tasks - {asyncio.current_task()}:
                await asyncio.wait(tasks, timeout=remaining, return_when="FIRST_COMPLETED")
            elif threads := set(threading.enumerate()) - self._threads:
                await _joined(threads.pop(), remaining)
            elif with_children and leaks.Resources.now().beyond(self._resources):
                children = set(leaks.children()) - known
                gone = await _any_gone(children, remaining) if children else None
                if gone is None:
                    return
                known.add(gone)  # if it is there all the same, it is a zombie
            else:
                return


async def _joined(thread: threading.Thread, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def join() -> None:
        thread.join(timeout)
        loop.call_soon_threadsafe(done.set_result, None)

    joiner = threading.Thread(target=join)
    joiner.start()
    await asyncio.shield(done)
    joiner.join()


async def wait_stopped(pid: int) -> bool:
    """Wait until a process has stopped; return ``False`` where the system does not tell."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():  # noqa: ASYNC240 - a file of the kernel's, which never blocks
        return False
    # Nobody but its parent hears of it.
    while stat.read_bytes().rpartition(b")")[2].split()[0] != b"T":  # noqa: ASYNC240 - as above
        await turn(1)
    return True


async def wait_gone(pid: int) -> None:
    """Wait until a process that is nobody's child here has ended, where the system tells."""
    await _any_gone({pid}, _PATIENCE)


async def _any_gone(pids: set[int], timeout: float) -> int | None:
    """Return one of the processes that has ended, ``None`` if none does in time."""
    if not has_pidfd():
        return await _any_gone_looked_for(pids, timeout)
    loop = asyncio.get_running_loop()
    gone: asyncio.Queue[int] = asyncio.Queue()
    fds = []
    try:
        for pid in pids:
            try:
                fds.append(os.pidfd_open(pid))
            except ProcessLookupError:
                return pid
            loop.add_reader(fds[-1], gone.put_nowait, pid)
        async with asyncio.timeout(timeout if fds else 0):
            return await gone.get()
    except TimeoutError:
        return None
    finally:
        for fd in fds:
            loop.remove_reader(fd)
            os.close(fd)


async def _any_gone_looked_for(pids: set[int], timeout: float) -> int | None:
    """Do the same where the kernel has no pidfds, by looking again and again."""
    if not Path("/proc/self/stat").exists():  # noqa: ASYNC240 - a file of the kernel's
        return None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while True:
                for pid in pids:
                    if leaks.has_ended(pid):
                        return pid
                await turn()
    return None

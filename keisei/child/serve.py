"""Serve one incarnation in a process of its own, and tell it if that cannot even begin."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from keisei.child.ending import leave
from keisei.child.process import Inherited, is_cut

if TYPE_CHECKING:
    from keisei.child.runtime import WorkerRuntime

_GOING = 0.3
"""Seconds in which an application that is ending has closed all that it had open."""

_serving: list[WorkerRuntime] = []
"""The worker of this process, once there is one."""


async def serve_worker() -> None:
    """Serve one incarnation in this process; the entry of every worker process."""
    from keisei.child.isolation import OwnProcess
    from keisei.child.loops import forget_current_loop
    from keisei.child.runtime import WorkerRuntime
    from keisei.protocol.endpoints import WorkerEndpoints

    forget_current_loop()
    ends = WorkerEndpoints.attach(list(Inherited.fds))
    isolation = OwnProcess()
    runtime = WorkerRuntime(ends, isolation)
    _serving.append(runtime)
    code = await runtime.serve()
    if ends.control.ended is not None:
        # The queues of an application that is killed may end before its lifeline, which takes this
        # whole group along. Leaving now would leave children of this process behind.
        is_cut(Inherited.lifeline, _GOING)
    if code:
        # Everything was told in frames; leave without multiprocessing's own report, and without
        # waiting for threads.
        await asyncio.get_running_loop().shutdown_asyncgens()
        with isolation:
            leave(code)


def tell_failure(error: BaseException) -> None:
    """Tell the application that this process cannot even begin to serve its worker."""
    from keisei.ipc import failures
    from keisei.ipc.queues import FrameWriter
    from keisei.protocol import messages
    from keisei.protocol.endpoints import REPLY

    failed = messages.Failed(
        "start", failures.summary(error), failures.trace(error), during_start=True
    )
    reply = FrameWriter(socket.socket(fileno=Inherited.fds[REPLY]), None)
    reply.put_nowait(messages.pack(failed))
    reply.close()


def tell_escape(error: BaseException) -> None:
    """Tell the application what a task of the worker's raised through the event loop.

    asyncio stops the loop at SystemExit and KeyboardInterrupt, whoever awaits the task.
    """
    if _serving:
        _serving[-1].tell_escape(error)

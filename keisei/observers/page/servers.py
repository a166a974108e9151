"""Whether the web server wants to end, which an open response is told by nobody.

A server that is asked to stop waits for its open responses. Uvicorn tells neither them nor a
mounted application: it only sets a flag of its own, and sends the end of the lifespan after the
responses have ended, to the outermost application. So the flag is looked for: the server's object
is found, once per stream, by the coroutine that runs it in this event loop. Streams on any other
server end by themselves after some seconds, and browsers open them again.
"""

from __future__ import annotations

import asyncio
import sys
from types import CoroutineType
from typing import Any

from keisei.observers.page.asgi import Scope


def running_servers() -> list[Any]:
    """Return the ``uvicorn.Server`` objects that serve in the running event loop."""
    module = sys.modules.get("uvicorn.server")
    kind = getattr(module, "Server", None)
    if not isinstance(kind, type):
        return []
    found: list[Any] = []
    for task in asyncio.all_tasks():
        coroutine: Any = task.get_coro()
        while isinstance(coroutine, CoroutineType):
            frame = coroutine.cr_frame
            server = frame.f_locals.get("self") if frame is not None else None
            if isinstance(server, kind) and server not in found:
                found.append(server)
            coroutine = coroutine.cr_await
    return found


def are_ending(servers: list[Any]) -> bool:
    """Return whether one of the servers was asked to stop."""
    return any(getattr(server, "should_exit", False) for server in servers)


def abort(servers: list[Any], scope: Scope) -> None:
    """Cut the connection of a request whose client does not read what was sent to it.

    The server would wait for that client before it ends.
    """
    for server in servers:
        state = getattr(server, "server_state", None)
        for connection in list(getattr(state, "connections", ())):
            transport = getattr(connection, "transport", None)
            client = getattr(connection, "client", None)
            if transport is not None and client is not None and client == scope.get("client"):
                transport.abort()

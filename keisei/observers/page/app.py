"""PoolPage: the ASGI application that shows a pool."""

from __future__ import annotations

import hashlib
import time
from importlib import resources
from typing import Any

import anyio.lowlevel

from keisei.events import Event
from keisei.observers.page import asgi, html
from keisei.observers.page.actions import Actions, Authorize
from keisei.observers.page.asgi import Receive, Scope, Send
from keisei.observers.page.ports import ShownManager
from keisei.observers.page.streams import StreamResponses
from keisei.observers.page.view import View

_FILES = {
    "/page.css": "text/css; charset=utf-8",
    "/page.js": "text/javascript; charset=utf-8",
    "/icon.svg": "image/svg+xml",
}
_READ = ("GET", "HEAD")
_MAX_BODY = 4096
_ROWS_AT_ONCE = 64
_SLOTS_PER_SECOND = 400
"""Slots of a large pool that are shown anew in a second: it is looked at less often."""


def pool_page(
    manager: ShownManager,
    *,
    authorize: Authorize | None = None,
    title: str = "keisei",
    interval: float = 0.5,
    max_workers: int = 1024,
) -> PoolPage:
    """Return a live page of a pool, to be mounted in the application's own web server.

    ``app.mount("/pool", pool_page(manager))`` in FastAPI or Starlette; it is a plain ASGI callable
    and needs neither. Make it before or after the manager's start: it shows "not started" until
    then, and "stopped" at the end. Whoever can reach it can read it: protect it as any other part
    of the application.

    Args:
        manager: A ``ParallelManager``; the page observes it. Serve the page in the manager's own
            event loop, or it can only show.
        authorize: Called with the request's ASGI scope and "pause", "resume", "scale" or "restart";
            returns, or is a coroutine that returns, whether this visitor may do that. ``None``
            lets nobody do anything, and shows no buttons.
        title: The heading of the page.
        interval: Seconds between two looks at the pool while a page is open; longer for more than
            a few hundred workers.
        max_workers: The largest size that "scale" takes.

    Raises:
        ValueError: ``interval`` is not positive.
    """
    if interval <= 0:
        raise ValueError(f"interval is {interval}; it must be a positive number of seconds")
    return PoolPage(manager, authorize, title, interval, max_workers)


class PoolPage:
    """An ASGI application; ``pool_page`` makes it."""

    def __init__(
        self,
        manager: ShownManager,
        authorize: Authorize | None,
        title: str,
        interval: float,
        max_workers: int,
    ) -> None:
        self._title = title
        self._interval = interval
        self._view = View(manager)
        self._actions = Actions(manager, authorize, max_workers, self._view.tell)
        self._streams = StreamResponses(self._make_frame)
        self._files = _load_files()
        self._version = hashlib.sha256(b"".join(self._files.values())).hexdigest()[:12]
        self._state: dict[str, Any] = {}
        self._made_at = float("-inf")
        manager.add_observer(self)

    def on_event(self, event: Event) -> None:
        """Continue the curves; the page is an observer of its manager."""
        self._view.on_event(event)

    @property
    def num_streams(self) -> int:
        """Pages that are open and live."""
        return self._streams.num_streams

    def close(self) -> None:
        """End every open stream within a tenth of a second, and later ones at once.

        Uvicorn needs no such call. On another web server call it where that is asked to stop, or
        the server waits until the streams end by themselves, 20 seconds at most. May be called
        from a signal handler or another thread, and again.
        """
        self._streams.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI 3 says."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._answer(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif kind == "lifespan.shutdown":
                self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = asgi.path_within(scope), scope["method"]
        if path.startswith("/actions/"):
            if method != "POST":
                await _refuse_method(send, "POST")
            else:
                await self._act(path.removeprefix("/actions/"), scope, receive, send)
        elif method not in _READ:
            await _refuse_method(send, ", ".join(_READ))
        elif path == "":
            # Relative, so that it is right behind a proxy that adds a prefix too.
            place = scope["path"] or scope.get("root_path", "")
            await asgi.redirect(send, f"./{place.rpartition('/')[2]}/")
        elif path == "/":
            await self._page(scope, send)
        elif path in _FILES:
            cached = (("cache-control", "public, max-age=31536000, immutable"),)
            await asgi.respond(send, 200, self._files[path], _FILES[path], cached)
        elif path == "/events" and method == "GET":
            await self._streams.answer(scope, receive, send)
        elif path == "/state.json":
            await asgi.respond_json(send, 200, await self._newest())
        elif path == "/curves.json":
            await asgi.respond_json(send, 200, self._view.curves())
        elif path == "/incidents.json":
            await asgi.respond_json(send, 200, self._view.incidents())
        else:
            await asgi.respond_text(send, 404, "there is nothing here; the page is at its root")

    async def _page(self, scope: Scope, send: Send) -> None:
        actions = await self._actions.allowed(scope)
        state, incidents = await self._newest(), self._view.incidents()
        await asgi.start(send, 200, "text/html; charset=utf-8")
        if scope["method"] == "GET":
            parts = [html.head(self._title, self._version), html.top(self._title, state, actions)]
            workers = state["workers"]
            for first in range(0, len(workers), _ROWS_AT_ONCE):
                await _send_part(send, "".join(parts))
                parts = [html.rows(workers[first : first + _ROWS_AT_ONCE], actions)]
            await _send_part(send, "".join([*parts, html.bottom(state, incidents)]))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _act(self, action: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await asgi.read_body(receive, _MAX_BODY)
        if body is None:
            await asgi.respond_text(send, 413, "the request is too long")
            return
        answer = await self._actions.do(scope, action, body)
        if "application/json" in (asgi.header(scope, "accept") or ""):
            await asgi.respond_json(send, answer.status, {"text": answer.text})
        elif answer.status < 300:  # noqa: PLR2004 - the statuses of success
            await asgi.redirect(send, "../")
        else:
            await asgi.respond_text(send, answer.status, answer.text)

    # the state

    async def _newest(self) -> dict[str, Any]:
        """Return a state that is younger than the interval; for as many readers as there are."""
        now = time.monotonic()
        if now - self._made_at >= self._interval:
            self._state, self._made_at = await self._view.state(), now
        return self._state

    async def _make_frame(self) -> tuple[bytes, float]:
        self._state, self._made_at = await self._view.state(), time.monotonic()
        workers = self._state["workers"]
        parts = []
        for first in range(0, len(workers), _ROWS_AT_ONCE):
            parts.append(asgi.dumps(workers[first : first + _ROWS_AT_ONCE])[1:-1])
            await anyio.lowlevel.checkpoint()
        rest = asgi.dumps({name: one for name, one in self._state.items() if name != "workers"})
        frame = b'%b,"workers":[%b]}' % (rest[:-1], b",".join(parts))
        return frame, max(self._interval, len(workers) / _SLOTS_PER_SECOND)


async def _send_part(send: Send, part: str) -> None:
    await send(
        {"type": "http.response.body", "body": part.encode(errors="replace"), "more_body": True}
    )
    await anyio.lowlevel.checkpoint()  # a large page is no reason to hold the event loop up


async def _refuse_method(send: Send, allowed: str) -> None:
    await asgi.respond_text(send, 405, f"use {allowed}", (("allow", allowed), *asgi.FRESH))


def _load_files() -> dict[str, bytes]:
    folder = resources.files("keisei.observers.page") / "static"
    return {path: (folder / path[1:]).read_bytes() for path in _FILES}

"""What visitors may do, if the application lets them: pause, resume, scale, restart.

Nothing is done without the ``authorize`` hook, and only for requests that the page itself has sent:
a form of another site, with the visitor's cookies, is refused.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from keisei.observers.page.asgi import Scope, header
from keisei.observers.page.ports import ShownManager

logger = logging.getLogger("keisei.observers.page")

ACTIONS = ("pause", "resume", "scale", "restart")
"""What the ``authorize`` hook is asked about."""

Authorize = Callable[[Scope, str], bool | Awaitable[bool]]
"""Given the request's ASGI scope and one of ``ACTIONS``, returns whether it may be done.

It may be a coroutine function. What it raises is a refusal, and is logged.
"""

_PROMPT = 1.0
"""Seconds that a request waits for its action; a longer one goes on by itself."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request to do something.

    Attributes:
        status: 200 done, 202 going on, 400 no such thing, 403 refused, 409 it failed.
        text: What happened, for people.
    """

    status: int
    text: str


class Actions:
    """Carries out what visitors ask for.

    Args:
        manager: Whose pool it is.
        authorize: Decides; ``None`` refuses everything.
        max_workers: The largest size that ``scale`` may be asked for.
        tell: Shows a sentence on every page: the failure of what went on by itself.
    """

    def __init__(
        self,
        manager: ShownManager,
        authorize: Authorize | None,
        max_workers: int,
        tell: Callable[[str], None],
    ) -> None:
        self._manager = manager
        self._authorize = authorize
        self._max_workers = max_workers
        self._tell = tell
        self._going_on: set[asyncio.Task[Any]] = set()

    async def allowed(self, scope: Scope) -> tuple[str, ...]:
        """Return the actions that the visitor may do."""
        if self._authorize is None:
            return ()
        return tuple([action for action in ACTIONS if await self._is_allowed(scope, action)])

    async def _is_allowed(self, scope: Scope, action: str) -> bool:
        if self._authorize is None:
            return False
        try:
            answer = self._authorize(scope, action)
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception:
            logger.exception("authorize failed for %r; it is refused", action)
            return False
        return answer is True  # a coroutine function that was not awaited must not be a yes

    async def do(self, scope: Scope, action: str, body: bytes) -> Answer:
        """Do what a POST asks for. When cancelled, what was begun goes on."""
        if action not in ACTIONS:
            return Answer(400, f"there is no action {action[:40]!r}")
        if not is_same_origin(scope):
            return Answer(403, "refused: the request does not come from this page")
        if not await self._is_allowed(scope, action):
            return Answer(403, f"refused: you may not {action}")
        try:
            work = self._work(action, _fields(body))
        except ValueError as error:
            return Answer(400, str(error))
        logger.info("%s was asked for on the page", action)
        task = asyncio.get_running_loop().create_task(work, name=f"keisei-page-{action}")
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        await asyncio.wait([task], timeout=_PROMPT)
        if not task.done():
            task.add_done_callback(lambda done: self._ended(action, done))
            return Answer(202, f"{action} goes on")
        if task.cancelled() or task.exception() is not None:
            return Answer(409, _failure(action, task))
        return Answer(200, f"{action}: done")

    def _ended(self, action: str, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._tell(_failure(action, task))

    def _work(self, action: str, fields: Mapping[str, str]) -> Coroutine[Any, Any, None]:
        match action:
            case "pause":
                return self._manager.pause()
            case "resume":
                return self._manager.resume()
            case "scale":
                return self._manager.scale(_number(fields, "num_workers", 1, self._max_workers))
            case _:
                return self._manager.restart(_number(fields, "worker_id", 0, 10**9))


def is_same_origin(scope: Scope) -> bool:
    """Return whether a browser says that the page itself has sent a request.

    Sec-Fetch-Site says it where the page is served over HTTPS or by this machine; elsewhere the
    origin must have the host that was asked. A request that says neither comes from no browser of
    today, and is refused too.
    """
    site = header(scope, "sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin, host = header(scope, "origin"), header(scope, "host")
    return bool(origin and host) and urlsplit(origin or "").netloc == host


def _fields(body: bytes) -> dict[str, str]:
    text = body.decode("ascii", errors="replace")
    return {name: values[-1] for name, values in parse_qs(text, max_num_fields=8).items()}


def _number(fields: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = fields.get(name, "")
    if not (text.isascii() and text.isdigit() and low <= int(text[:12]) <= high):
        raise ValueError(f"{name} must be a number from {low} to {high}")
    return int(text)


def _failure(action: str, task: asyncio.Task[Any]) -> str:
    error = None if task.cancelled() else task.exception()
    return f"{action} failed: {error}" if error is not None else f"{action} was cancelled"

"""Requests: what the application waits for from one worker."""

from __future__ import annotations

import asyncio
from typing import Any

from keisei.exceptions import CommandError, WorkerError
from keisei.protocol import messages

_REMEMBERED = 256
"""Commands whose names are kept for an incident."""


class Unreadable(str):
    """Why a reply's value cannot be rebuilt here; it stands in the place of the value."""

    __slots__ = ()


class Requests:
    """Commands without an answer, and versions of weights and settings that are not applied yet."""

    def __init__(self, worker_id: int, incarnation: int) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._commands: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._versions: dict[asyncio.Future[int], tuple[int, int]] = {}
        self._settings: dict[int, asyncio.Future[None]] = {}
        self._names: dict[int, str] = {}

    def __bool__(self) -> bool:
        """Whether anything is waited for."""
        return bool(self._commands or self._versions or self._settings)

    def open_command(self, sequence: int, name: str) -> asyncio.Future[Any]:
        """Return a future of the answer to a command; ``close_command`` ends the wait."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._commands[sequence] = (name, future)
        self._names[sequence] = name
        if len(self._names) > _REMEMBERED:
            del self._names[next(iter(self._names))]
        return future

    def close_command(self, sequence: int) -> None:
        """Drop the answer to a command, if it still comes."""
        self._commands.pop(sequence, None)

    def open_version(self, number: int, version: int) -> asyncio.Future[int]:
        """Return a future of the version, this or a newer one, that the worker acknowledges."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._versions[future] = (number, version)
        future.add_done_callback(self._versions.pop)
        return future

    def open_settings(self, version: int) -> asyncio.Future[None]:
        """Return a future of the worker's answer to settings.

        It raises ``CommandError`` if the worker refuses them.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings[version] = future
        return future

    def configured(self, message: messages.Configured | messages.Refused) -> None:
        """Take in the answer to settings; one that was not asked for is ignored."""
        future = self._settings.pop(message.version, None)
        if future is None or future.done():
            return
        if isinstance(message, messages.Configured):
            future.set_result(None)
            return
        future.set_exception(
            CommandError(
                f"worker {self._worker_id} refused settings version {message.version} and keeps "
                f"the former ones: {message.message}",
                self._worker_id,
                self._incarnation,
                remote_traceback=message.traceback or None,
            )
        )

    def answer(self, message: messages.Reply | messages.ReplyError, value: Any) -> None:
        """Give a command its answer, unless the wait for it is over."""
        name, future = self._commands.get(message.sequence, ("", None))
        if future is None or future.done():
            return
        if isinstance(message, messages.ReplyError):
            error = f"worker {self._worker_id} answered command {name!r} with an error: "
            error += message.message
            trace = message.traceback or None
        elif isinstance(value, Unreadable):
            error, trace = f"worker {self._worker_id}: the reply to {name!r} {value}", None
        else:
            future.set_result(value)
            return
        future.set_exception(
            CommandError(error, self._worker_id, self._incarnation, remote_traceback=trace)
        )

    def applied(self, number: int, version: int) -> None:
        """Answer everybody who waits for ``version`` of a name or an older one."""
        for future, (name, wanted) in list(self._versions.items()):
            if name == number and wanted <= version and not future.done():
                future.set_result(version)

    def fail(self, error: WorkerError) -> None:
        """Answer everybody with a copy of ``error``."""
        waiting: list[asyncio.Future[Any]] = [future for _, future in self._commands.values()]
        for future in [*waiting, *self._versions, *self._settings.values()]:
            if not future.done() and not future.get_loop().is_closed():
                future.set_exception(copy_of(error))

    @property
    def num_unanswered(self) -> int:
        """Commands that wait for an answer."""
        return sum(not future.done() for _, future in self._commands.values())

    def name_of(self, sequence: int) -> str | None:
        """Return the name of a recent command, ``None`` if it is not known."""
        return self._names.get(sequence)


def copy_of(error: WorkerError) -> WorkerError:
    """Return the same error anew: one exception must not be raised in two tasks."""
    kind, facts = error.__reduce__()[:2]
    copy: WorkerError = kind(*facts)
    return copy

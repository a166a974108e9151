"""Announcer: tells one worker which weights there are and where they lie, in order and for sure."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from keisei.exceptions import QueueClosed, QueueEnded, QueueWouldBlock
from keisei.ipc.frame_writer import FrameWriter

UNREAD = 64
"""Frames that may lie unread in the queue: descriptors in flight count against a limit of the user
that all processes share. More of them wait in the application."""
_MANY = 200
_PAUSE = 0.05
"""Seconds until descriptors are sent again after the kernel had too many of them in flight."""


class Shared(Protocol):
    """Shared memory whose descriptor goes along with a frame."""

    @property
    def fd(self) -> int:
        """The descriptor, or -1 when there is nothing to send any more."""
        ...


class _Unsent(NamedTuple):
    frame: Any
    memory: Shared | None


class Announcer:
    """Sends frames about weights to one worker.

    What finds no room waits here, and is sent as the worker reads. A frame about a name takes the
    place of one about the same name that still waits.
    """

    def __init__(self, writer: FrameWriter, on_work: Callable[[], None]) -> None:
        """Send through ``writer``; call ``on_work`` when the worker was given something to do."""
        self._writer = writer
        self._on_work = on_work
        self._unsent: dict[object, _Unsent] = {}
        self._sending: asyncio.Task[None] | None = None

    def tell(self, key: object, frame: Any, memory: Shared | None = None) -> None:
        """Send a packed frame behind those before it.

        Args:
            key: What it is about; one about the same thing that was not sent yet is left out.
            frame: The frame; do not alter it.
            memory: Its descriptor goes along. If it is closed before the frame is sent, the frame
                is left out: there is another one about its end.
        """
        self._unsent.pop(key, None)
        one = _Unsent(frame, memory)
        if self._unsent or not self._sent_now(one):
            self._unsent[key] = one
            if self._sending is None or self._sending.done():
                self._sending = asyncio.ensure_future(self._send_rest())

    def ask(self, frame: Any) -> None:
        """Send a frame that asks for an answer, unless the worker is dying or very far behind."""
        if len(self._unsent) < _MANY:
            self.tell(object(), frame)

    def _sent_now(self, one: _Unsent) -> bool:
        try:
            return self._sent(one)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            return False

    def _sent(self, one: _Unsent) -> bool:
        """Return whether a frame was sent, or need not be.

        Raises:
            OSError: ``ETOOMANYREFS``: the kernel takes no more descriptors for now.
        """
        fds = [] if one.memory is None else [one.memory.fd]
        if -1 in fds:
            return True
        try:
            self._writer.put_nowait(one.frame, fds)
        except QueueWouldBlock:
            return False
        except (QueueEnded, QueueClosed):
            return True  # nobody reads it
        self._on_work()
        return True

    async def _send_rest(self) -> None:
        while self._unsent:
            key, one = next(iter(self._unsent.items()))
            try:
                is_sent = self._sent(one)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=_PAUSE)
                continue
            if is_sent:
                del self._unsent[key]
            else:
                await self._writer.wait_for_room()

    def close(self) -> None:
        """Send nothing any more."""
        self._unsent.clear()
        if self._sending is not None:
            self._sending.cancel()

"""Whole frames in and out of a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from keisei.exceptions import QueueEnded
from keisei.ipc.frame_reader import Frame, FrameReader
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.wire import Payload

Tell = Callable[[Any], Awaitable[None]]
"""Sends a message to the application."""


def arrived(reader: FrameReader) -> Iterator[Frame]:
    """Take the frames that have arrived; what comes meanwhile is the next event's."""
    with contextlib.suppress(QueueEnded):
        frame = reader.pop()
        while frame is not None:
            yield frame
            frame = reader.pop() if reader.has_news else None


async def send(writer: FrameWriter, payload: Payload, fds: Sequence[int] = ()) -> None:
    """Send a frame whole, before the next collect keeps the loop from it."""
    await writer.put(payload, fds=fds)
    if writer.is_sending:
        await writer.flush()

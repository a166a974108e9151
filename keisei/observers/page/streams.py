"""Server-sent events: the newest state, for as many browsers as are open and as fast as they read.

One timer makes one frame per interval for all of them, and none while nobody looks. A browser that
reads slowly misses frames and gets the newest when it is ready; no frame waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from keisei.observers.page import servers
from keisei.observers.page.asgi import FRESH, Receive, Scope, Send, start

logger = logging.getLogger("keisei.observers.page")

Make = Callable[[], Awaitable[tuple[bytes, float]]]
"""Returns the newest state in JSON, and the seconds after which the next one is due."""

_LOOK = 0.1
"""Seconds between two looks at whether the server is to end, while a stream is open."""
_LAST = 0.3
"""Seconds that a browser has to take the rest of its stream when the server is to end."""
_MAX_SECONDS = 20.0
_MAX_BYTES = 1 << 20
"""A stream ends after these, and the browser opens another one. So no server waits longer for it
than this, and what a browser that reads nothing leaves unread stays small."""
_END = {"type": "http.response.body", "body": b"", "more_body": False}


class Feed:
    """What the streams of one event loop have in common: the newest frame, and their end.

    Attributes:
        frame: The newest frame.
        ending: Set when the server is to end.
        servers: The servers that are known in this loop.
    """

    def __init__(self, make: Make, is_closed: Callable[[], bool]) -> None:
        self.frame = b""
        self.ending = asyncio.Event()
        self.servers = servers.running_servers()
        self._make = make
        self._is_closed = is_closed
        self._streams: set[Stream] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    def join(self, stream: Stream) -> None:
        """Open a stream; with the first one the work begins."""
        self._streams.add(stream)
        if self._following is None:
            self._look()
            following = asyncio.get_running_loop().create_task(self._follow(), name="keisei-page")
            self._following = following
        if self.frame:
            stream.changed.set()

    def leave(self, stream: Stream) -> set[asyncio.Task[None]]:
        """Close a stream; with the last one the work ends. Returns the tasks that are ending."""
        self._streams.discard(stream)
        if self._streams or self._following is None:
            return set()
        if self._timer is not None:
            self._timer.cancel()
        self._following.cancel()
        return {self._following}

    async def _follow(self) -> None:
        """Make frames until the server is to end, or nobody looks."""
        try:
            while not self.ending.is_set():
                state, seconds = await self._make()
                self.frame = b"event: state\ndata: " + state + b"\n\n"
                for stream in self._streams:
                    stream.changed.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self.ending.wait()
        except Exception:
            logger.exception("the page's state could not be made; open pages stand still")
            raise

    def _look(self) -> None:
        if self._is_closed() or servers.are_ending(self.servers):
            self.ending.set()
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_LOOK, self._look)


class Stream:
    """One response: sends the newest frame whenever there is one and the client is ready for it.

    Attributes:
        changed: There is a newer frame, or the stream is to end.
    """

    def __init__(self, feed: Feed, send: Send, max_bytes: int) -> None:
        self.changed = asyncio.Event()
        self._feed = feed
        self._send = send
        self._bytes_left = max_bytes

    def finish(self) -> None:
        """Have ``run`` send no further frame."""
        self._bytes_left = 0
        self.changed.set()

    async def run(self) -> None:
        """Send frames until there were enough, and then the end."""
        with contextlib.suppress(OSError):  # some servers say so that the client is gone
            while True:
                await self.changed.wait()
                self.changed.clear()
                if self._bytes_left <= 0:
                    break
                frame = self._feed.frame
                self._bytes_left -= len(frame)
                await self._send({"type": "http.response.body", "body": frame, "more_body": True})
                if self._bytes_left <= 0:
                    break
            await self._send(_END)


class StreamResponses:
    """Answers requests for the stream of states.

    Args:
        make: Makes frames.
        max_seconds: The longest that a stream lives while its client reads.
        max_bytes: The most that a stream sends, but for its last frame.
    """

    def __init__(
        self, make: Make, *, max_seconds: float = _MAX_SECONDS, max_bytes: int = _MAX_BYTES
    ) -> None:
        self._make = make
        self._max_seconds = max_seconds
        self._max_bytes = max_bytes
        self._feeds: dict[asyncio.AbstractEventLoop, Feed] = {}
        self._closed = False

    @property
    def num_streams(self) -> int:
        """Streams that are open, in all event loops."""
        return sum(feed.num_streams for feed in list(self._feeds.values()))

    def close(self) -> None:
        """End every stream, now and later."""
        self._closed = True

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send states until the client goes, the server ends or the stream has lived long enough.

        When cancelled, the stream ends where it is.
        """
        await start(send, 200, "text/event-stream", (*FRESH, ("x-accel-buffering", "no")))
        loop = asyncio.get_running_loop()
        feed = self._feeds.get(loop)
        if feed is None:
            feed = self._feeds[loop] = Feed(self._make, lambda: self._closed)
        stream = Stream(feed, send, self._max_bytes)
        feed.join(stream)
        sending = loop.create_task(stream.run(), name="keisei-page-stream")
        gone = loop.create_task(_wait_disconnected(receive), name="keisei-page-client")
        ending = loop.create_task(feed.ending.wait(), name="keisei-page-server")
        tasks = {sending, gone, ending}
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(tasks, timeout=self._max_seconds, return_when=first)
            stream.finish()
            if not ending.done():  # a client that reads slowly has its time
                await asyncio.wait(tasks, return_when=first)
            if not (sending.done() or gone.done()):
                await asyncio.wait({sending, gone}, timeout=_LAST, return_when=first)
            if not (sending.done() or gone.done()):
                servers.abort(feed.servers, scope)
                await asyncio.wait({sending, gone}, timeout=_LAST, return_when=first)
            if sending.done():
                sending.result()
        finally:
            tasks |= feed.leave(stream)
            if not feed.num_streams:
                self._feeds.pop(loop, None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Batches and events to iterate over with ``async for``, and the hub that passes events on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableSet
from weakref import WeakSet

from keisei.events import Event
from keisei.observers import Observer, ObserverSet
from keisei.training.parallel.batch import ExperienceBatch

_MAX_EVENTS = 10_000


class ExperienceStream:
    """Batches, until the pool is asked to stop. Holds nothing itself: break out at any time."""

    def __init__(self, next_batch: Callable[[], Awaitable[ExperienceBatch | None]]) -> None:
        self._next_batch = next_batch

    def __aiter__(self) -> ExperienceStream:
        return self

    async def __anext__(self) -> ExperienceBatch:
        batch = await self._next_batch()
        if batch is None:
            raise StopAsyncIteration
        return batch


class EventStream:
    """Events, until the pool has stopped.

    Attributes:
        num_missed: Events that were dropped because the stream was full.
    """

    def __init__(self, streams: MutableSet[EventStream]) -> None:
        self._streams = streams
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self.num_missed = 0
        streams.add(self)

    def push(self, event: Event) -> None:
        """Add an event."""
        if len(self._events) >= _MAX_EVENTS:
            self._events.popleft()
            self.num_missed += 1
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """End the stream after the events that it holds."""
        self._closed = True
        self._streams.discard(self)
        self._changed.set()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        """Return the next event. Safe to cancel."""
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()


class EventHub:
    """Passes a pool's events on to its observers and to its event streams.

    Attributes:
        observers: Told of every event.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self.observers = ObserverSet(observers)
        self._streams: WeakSet[EventStream] = WeakSet()

    def publish(self, event: Event) -> None:
        """Pass ``event`` on."""
        for stream in list(self._streams):
            stream.push(event)
        self.observers.on_event(event)

    def stream(self) -> EventStream:
        """Return the events from now on."""
        return EventStream(self._streams)

    def close(self) -> None:
        """End every stream after the events that it holds."""
        for stream in list(self._streams):
            stream.close()

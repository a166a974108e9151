"""Who watches: observers receive every event of a pool.

``keisei.observers.log`` and ``keisei.observers.progress`` hold two that are ready to use.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from keisei.events import Event

__all__ = ["Observer", "ObserverSet"]

logger = logging.getLogger("keisei.observers")


class Observer(Protocol):
    """Anything with a method ``on_event``."""

    def on_event(self, event: Event) -> None:
        """Take note of ``event``.

        Called on the event loop of the pool, for one event at a time, in the order in which
        things happened. Return soon: the pool waits. Whoever raises is removed and logged.
        """


class ObserverSet:
    """Passes events on to observers and survives them.

    Use it from one thread, the event loop's.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers: list[Observer] = []
        self._pending: deque[Event] = deque()
        self._passing_on = False
        for observer in observers:
            self.add(observer)

    def __iter__(self) -> Iterator[Observer]:
        return iter(tuple(self._observers))

    def __len__(self) -> int:
        return len(self._observers)

    def add(self, observer: Observer) -> None:
        """Pass events on to ``observer`` too, from the next one on.

        Raises:
            TypeError: If ``observer`` has no ``on_event``, or a coroutine in its place.
        """
        hook = getattr(observer, "on_event", None)
        if not callable(hook) or inspect.isclass(observer):
            raise TypeError(f"{observer!r} is no observer: it needs a method on_event(event)")
        if inspect.iscoroutinefunction(hook):
            raise TypeError(f"{observer!r}.on_event must be a plain function, not a coroutine")
        self._observers.append(observer)

    def remove(self, observer: Observer) -> None:
        """Pass nothing more on to ``observer``; one that is not here is no error."""
        self._observers = [other for other in self._observers if other is not observer]

    def on_event(self, event: Event) -> None:
        """Pass ``event`` on to every observer, in the order in which they were added.

        An event that an observer causes meanwhile follows once all have seen this one. An
        observer that raises is logged with its traceback and removed; the others go on.
        """
        self._pending.append(event)
        if self._passing_on:
            return
        self._passing_on = True
        try:
            while self._pending:
                self._pass_on(self._pending.popleft())
        finally:
            self._passing_on = False

    def _pass_on(self, event: Event) -> None:
        for observer in tuple(self._observers):
            try:
                observer.on_event(event)
            except Exception:
                logger.exception(
                    "observer %r failed at %s and was removed", observer, type(event).__name__
                )
                self.remove(observer)

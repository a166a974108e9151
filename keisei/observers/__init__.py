"""Observers receive every event of a pool.

``Observer`` is the protocol that an application's own observers follow, ``ObserverSet`` passes
events on to several of them. Two observers are ready to use, each in a module of its own so that
the other's dependencies are not needed: ``keisei.observers.log.LogObserver`` and
``keisei.observers.progress.RichProgress``.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NoReturn, Protocol

from keisei.events import Event

__all__ = ["Observer", "ObserverSet"]

logger = logging.getLogger("keisei.observers")


class Observer(Protocol):
    """Anything with a method ``on_event``."""

    def on_event(self, event: Event) -> None:
        """Handle ``event``.

        Called on the pool's event loop, for one event at a time, in the order of the events.
        Return soon: the pool waits. An observer that raises is removed, and the error is logged;
        it ends neither the pool nor the application, not even by SystemExit. To end a run, call
        ``manager.request_stop()``.
        """
        ...


class ObserverSet:
    """Passes events on to observers and outlives their errors.

    It is an observer itself. Use it from one thread, the event loop's.

    Args:
        observers: The first observers, in the order in which they receive each event.

    Raises:
        TypeError: One of them has no ``on_event``, or a coroutine function in its place.
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
            TypeError: If ``observer`` has no ``on_event``, or a coroutine function in its place.
        """
        hook = getattr(observer, "on_event", None)
        if not callable(hook) or inspect.isclass(observer):
            raise TypeError(f"{observer!r} is no observer: it needs a method on_event(event)")
        if inspect.iscoroutinefunction(hook):
            raise TypeError(f"{observer!r}.on_event must be a plain function, not a coroutine")
        self._observers.append(observer)

    def remove(self, observer: Observer) -> None:
        """Pass no more events on to ``observer``, if it is in the set."""
        self._observers = [other for other in self._observers if other is not observer]

    def on_event(self, event: Event) -> None:
        """Pass ``event`` on to every observer, in the order in which they were added.

        An event that an observer causes meanwhile follows when all have received this one. An
        observer that raises is logged with its traceback and removed; the others go on.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile, and no event loop is running. In a
                running loop the interrupt is raised from the loop, so that it does not stop the
                pool in the middle of what the event tells of.
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
            except KeyboardInterrupt as interrupt:
                _raise_from_loop(interrupt)
            except BaseException:
                self.remove(observer)
                # A log handler that raises is no reason to end the pool either.
                with contextlib.suppress(Exception):
                    logger.exception(
                        "observer %r failed at %s and was removed", observer, type(event).__name__
                    )


def _raise_from_loop(interrupt: KeyboardInterrupt) -> None:
    """Raise ``interrupt`` in a callback of its own, or here if no event loop is running."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise interrupt from None
    loop.call_soon(_raise, interrupt)


def _raise(interrupt: KeyboardInterrupt) -> NoReturn:
    raise interrupt

"""An event loop in which chance decides what comes first, by a seed, and time costs none.

What the operating system decides in reality is drawn here: which descriptors are found to be
readable in a turn of the loop, in which order, and how long a thread takes. The clock jumps to the
next timer when nothing else is left to do. So a run repeats itself by its seed, and a run that
waits for ever is an error at once.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from keisei.ipc import threads

T = TypeVar("T")

MOST_TURNS = 200_000
LONGEST_THREAD = 0.01
"""Seconds, of the loop's clock."""


class NothingHappens(AssertionError):
    """Everybody waits, and nothing will ever happen."""


class _Chance(selectors.DefaultSelector):
    """Finds some of what is ready, in any order; its clock is the loop's."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.now = 0.0
        self._draw = draw
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns += 1
        if self._turns > MOST_TURNS:
            raise NothingHappens(f"after {MOST_TURNS:,} turns the scenario is not done")
        ready = super().select(0)
        is_busy = timeout is not None and timeout <= 0
        if not ready and not is_busy:
            if timeout is None:
                raise NothingHappens("no callback, no timer and no descriptor is left")
            self.now += timeout
            return []
        least = 0 if is_busy else 1
        return self._draw.sample(ready, self._draw.randint(min(least, len(ready)), len(ready)))


def run(main: Callable[[random.Random], Coroutine[Any, Any, T]], seed: int) -> T:
    """Run ``main`` with a source of randomness in a loop of chance; both by ``seed``.

    Raises:
        NothingHappens: It would never be done.
    """
    draw = random.Random(seed)
    selector = _Chance(draw)

    in_thread = threads.in_thread

    def in_no_thread(work: Callable[[], Any], undo: object = None) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        loop.call_later(draw.random() * LONGEST_THREAD, settle)
        return future

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("keisei.") and vars(module).get("in_thread") is in_thread:
                patch.setattr(module, "in_thread", in_no_thread)
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now  # type: ignore[method-assign]
        try:
            return loop.run_until_complete(main(draw))
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left))
            loop.close()

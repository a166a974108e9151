"""What every check is made of: a limit, a note that names it, and nothing left in the end."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Protocol

from keisei.backends.base import Backend
from keisei.testing.conformance.baseline import Baseline
from keisei.testing.scenarios import fail_after

LIMIT = 60.0
"""Seconds that a check has, unless told otherwise. None waits for them."""


class BackendCheck(Protocol):
    """One check: takes a maker of fresh backends."""

    __name__: str

    def __call__(
        self, make_backend: Callable[[], Backend], *, limit: float = LIMIT
    ) -> Awaitable[None]:
        """Run the check; ``limit`` is in seconds.

        Raises:
            AssertionError: The backend does not do what is held, or not in time.
        """
        ...


def checked(body: Callable[[Backend], Awaitable[None]]) -> BackendCheck:
    """Make a check of ``body``: with a limit, and nothing left in the end."""

    @functools.wraps(body)
    async def check(make_backend: Callable[[], Backend], *, limit: float = LIMIT) -> None:
        try:
            async with fail_after(limit):
                before = Baseline()
                await body(make_backend())
                await before.require_nothing_left()
        except Exception as error:
            error.add_note(f"{body.__name__}: {body.__doc__}")
            raise

    return check


def require(condition: bool, message: str) -> None:
    """Raise ``AssertionError`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


def require_equal(found: object, expected: object, what: str) -> None:
    """Raise ``AssertionError`` unless ``found`` is ``expected``."""
    require(found == expected, f"{what} is {found!r}; it must be {expected!r}")

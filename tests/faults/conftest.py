"""What holds after every fault, besides the leak check of all tests: the loop was not blocked."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from blocked import measured_loop

MAX_LAG = 0.25
"""Seconds. Callbacks take a few milliseconds, and on a starved machine several times that: the loop
then also waits for the interpreter's lock while the thread that holds it is given no processor.
Whoever waits for a process, a thread or a reader in a callback takes longer than this."""


@pytest.fixture(autouse=True)
def _responsive(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[None]:
    """Fail a test in which one callback of the loop, ours or asyncio's, held it up."""
    if sys.platform != "linux" or "blocks_the_loop" in request.fixturenames:
        yield
        return
    with measured_loop() as worst:
        yield
    if worst().seconds > MAX_LAG:
        pytest.fail(str(worst()))


@pytest.fixture
def blocks_the_loop() -> None:
    """Exempt a test that blocks the loop itself, on purpose."""

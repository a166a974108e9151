"""What holds after every fault, besides the leak check of all tests: the loop was not blocked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

import fault_helpers

MAX_LAG = 0.05
MAX_LAG_UNDER_LOAD = 0.25
"""Where more runs than there are processors: the loop also waits for the interpreter's lock while
the thread that holds it is not given one."""


@pytest.fixture(autouse=True)
def _responsive(
    request: pytest.FixtureRequest, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fail a test in which one callback of the loop, ours or asyncio's, took longer than 50 ms."""
    if sys.platform != "linux" or "blocks_the_loop" in request.fixturenames:
        yield
        return
    with fault_helpers.measured_loop(monkeypatch) as worst:
        yield
        seconds, who = worst()
    is_loaded = os.getloadavg()[0] > (os.cpu_count() or 1)
    if seconds > (MAX_LAG_UNDER_LOAD if is_loaded else MAX_LAG):
        pytest.fail(f"the event loop was blocked for {1000 * seconds:.0f} ms by {who}")


@pytest.fixture
def blocks_the_loop() -> None:
    """Exempt a test that blocks the loop itself, on purpose."""

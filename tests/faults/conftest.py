"""What holds after every fault, besides the leak check of all tests: the loop was not blocked."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

import fault_helpers

MAX_LAG = 0.25
"""Seconds. Callbacks take a few milliseconds, and on a starved machine several times that: the loop
then also waits for the interpreter's lock while the thread that holds it is given no processor.
Whoever waits for a process, a thread or a reader in a callback takes longer than this."""


@pytest.fixture(autouse=True)
def _responsive(
    request: pytest.FixtureRequest, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fail a test in which one callback of the loop, ours or asyncio's, held it up."""
    if sys.platform != "linux" or "blocks_the_loop" in request.fixturenames:
        yield
        return
    with fault_helpers.measured_loop(monkeypatch) as worst:
        yield
        seconds, who = worst()
    if seconds > MAX_LAG:
        pytest.fail(f"the event loop was blocked for {1000 * seconds:.0f} ms by {who}")


@pytest.fixture
def blocks_the_loop() -> None:
    """Exempt a test that blocks the loop itself, on purpose."""

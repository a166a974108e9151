"""What holds in every test of the pool, besides the leak check: the loop computes for moments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blocked import MAX_BLOCKED, computing_loop


@pytest.fixture(autouse=True)
def _responsive(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[None]:
    """Fail a test in which one callback of the library kept the loop's thread computing."""
    if request.path.stem == "test_costs":  # it counts calls, and would count the measurement's
        yield
        return
    with computing_loop() as worst:
        yield
    if worst().seconds > MAX_BLOCKED:
        pytest.fail(str(worst()))

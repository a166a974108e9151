"""The soak at the size of a test: see soak.py for what is verified."""

from __future__ import annotations

import pytest

from soak import CAUSES, soak_and_check


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("workers", "seconds"), [(2, 15), (8, 15)])
def test_a_pool_under_the_chaos_monkey_loses_nothing(workers, seconds):
    """Every committed batch comes once and whole, and every fault has exactly one incident."""
    verdict = soak_and_check(seconds, workers=workers, rate=3.0, seed=workers)
    assert verdict.problems == []
    assert verdict.batches > 100
    assert verdict.pushes > 100
    assert sum(verdict.faults.values()) > 10
    assert set(verdict.faults) <= set(CAUSES)
    assert sum(verdict.incidents.values()) == sum(verdict.faults.values())

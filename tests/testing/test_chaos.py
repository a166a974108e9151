"""ChaosMonkey: what it refuses, and a pool that is no victim any more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from keisei.exceptions import PoolExhausted
from keisei.testing.chaos import ChaosMonkey


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_not_positive_is_refused(rate):
    """No number of faults per second, a negative one, and none at all."""
    with pytest.raises(ValueError, match="positive"):
        ChaosMonkey(None, rate=rate)


def test_an_unknown_fault_is_refused_with_the_known_ones():
    """The error names both."""
    with pytest.raises(ValueError, match=r"unknown faults: flood; there are .*garbage.*kill"):
        ChaosMonkey(None, faults=("kill", "flood"))


async def test_a_pool_that_has_given_up_is_left_alone():
    """Its own error belongs to whoever uses it, and is not told again by the monkey."""

    async def send_command(*args, **kwargs):
        raise PoolExhausted("more than 3 failures")

    slot = SimpleNamespace(worker_id=0, incarnation=0, pid=1, state="running")
    pool = SimpleNamespace(workers=(slot,), send_command=send_command)
    monkey = ChaosMonkey(pool, faults=("raise",))
    assert await monkey.strike() is None
    assert monkey.injections == []

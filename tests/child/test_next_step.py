"""What the main loop of a worker does next: a pure decision."""

from __future__ import annotations

import itertools

import pytest

from keisei.child.runtime import Collecting, Step, next_step

NOTHING, RUNNING, DONE = Collecting.NOTHING, Collecting.RUNNING, Collecting.DONE

TABLE = {
    # collecting, is_ending, may_collect
    (NOTHING, False, False): Step.WAIT,
    (NOTHING, False, True): Step.COLLECT,
    (NOTHING, True, False): Step.END,
    (NOTHING, True, True): Step.END,
    (RUNNING, False, False): Step.WAIT,
    (RUNNING, False, True): Step.WAIT,
    (RUNNING, True, False): Step.CUT_SHORT,
    (RUNNING, True, True): Step.CUT_SHORT,
    (DONE, False, False): Step.DELIVER,
    (DONE, False, True): Step.DELIVER,
    (DONE, True, False): Step.DELIVER,
    (DONE, True, True): Step.DELIVER,
}


@pytest.mark.parametrize("state", [*itertools.product(Collecting, [False, True], [False, True])])
def test_the_next_step_follows_from_the_present_state(state):
    """What is collected is delivered first, an end comes before another experience."""
    assert next_step(*state) is TABLE[state]

"""What a learner does with a rollout: advantages by hand, and picking observations."""

from __future__ import annotations

import math

import pytest
import torch

from keisei.training.rollouts import generalized_advantage_estimate, get_observations


def make_rollout(**columns):
    return {name: torch.tensor(column)[:, None] for name, column in columns.items()}


def test_advantages_are_those_worked_out_by_hand():
    """With gamma and lambda of one half every number is exact."""
    data = make_rollout(
        rewards=[1.0, 2.0, 4.0, 8.0],
        values=[2.0, 4.0, 6.0, 8.0],
        next_values=[4.0, 10.0, 8.0, 16.0],
        terminated=[False, False, False, False],
        truncated=[False, True, False, False],
    )
    # deltas: 1+2-2=1, 2+5-4=3 (ends), 4+4-6=2, 8+8-8=8; decay 1/4
    advantages, returns = generalized_advantage_estimate(data, gamma=0.5, gae_lambda=0.5)
    assert advantages[:, 0].tolist() == [1.75, 3.0, 4.0, 8.0]
    assert returns[:, 0].tolist() == [3.75, 7.0, 10.0, 16.0]


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_neither_kind_of_end_lets_a_later_reward_through(end):
    """What happens after an end changes nothing before it."""
    estimates = []
    for later in (0.0, 1000.0):
        columns = {"terminated": [False] * 3, "truncated": [False] * 3}
        columns[end] = [False, True, False]
        data = make_rollout(
            rewards=[1.0, 1.0, later], values=[0.0] * 3, next_values=[0.0] * 3, **columns
        )
        advantages, _ = generalized_advantage_estimate(data, gamma=1.0, gae_lambda=1.0)
        estimates.append(advantages[:, 0].tolist())
    assert estimates == [[2.0, 1.0, 0.0], [2.0, 1.0, 1000.0]]


NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["rewards", "values", "next_values"])
def test_a_masked_step_reaches_no_other(name, number):
    """Whatever number a masked step holds, the others are as by hand, and its own results are 0."""
    columns = {
        "rewards": [1.0, 2.0, 7.0, 4.0],
        "values": [2.0, 4.0, 9.0, 8.0],
        "next_values": [4.0, 10.0, 8.0, 16.0],
    }
    columns[name][2] = number
    data = make_rollout(
        **columns,
        terminated=[False] * 4,
        truncated=[False, True, False, False],
        mask=[True, True, False, True],
    )
    advantages, returns = generalized_advantage_estimate(data, gamma=0.5, gae_lambda=0.5)
    # deltas: 1+2-2=1, 2+5-4=3 (ends), masked, 4+8-8=4; decay 1/4
    assert advantages[:, 0].tolist() == [1.75, 3.0, 0.0, 4.0]
    assert returns[:, 0].tolist() == [3.75, 7.0, 0.0, 12.0]


def test_a_masked_step_ends_what_comes_before_it():
    """A step that is left out in the middle of an episode lets nothing through."""
    data = make_rollout(
        rewards=[1.0, 1.0, 1000.0],
        values=[0.0] * 3,
        next_values=[0.0] * 3,
        terminated=[False] * 3,
        truncated=[False] * 3,
        mask=[True, False, True],
    )
    advantages, _ = generalized_advantage_estimate(data, gamma=1.0, gae_lambda=1.0)
    assert advantages[:, 0].tolist() == [1.0, 0.0, 1000.0]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_no_number_crosses_the_end_of_an_episode(number, end, gae_lambda):
    """0 times infinity is no number, so what follows an end is left out and not multiplied."""
    columns = {"terminated": [False] * 4, "truncated": [False] * 4}
    columns[end] = [False, True, False, False]
    data = make_rollout(
        rewards=[1.0, 1.0, number, 1.0], values=[0.0] * 4, next_values=[0.0] * 4, **columns
    )
    advantages, returns = generalized_advantage_estimate(data, gamma=1.0, gae_lambda=gae_lambda)
    assert advantages[:2, 0].tolist() == returns[:2, 0].tolist() == [1.0 + gae_lambda, 1.0]
    assert advantages[3].item() == returns[3].item() == 1.0
    assert advantages[2].item() == pytest.approx(number, nan_ok=True)


@pytest.mark.parametrize("number", NUMBERS)
def test_with_lambda_zero_a_number_stays_at_its_step(number):
    """One-step estimates do not see a later reward, even one that is not finite."""
    flags = {"terminated": [False] * 3, "truncated": [False] * 3}
    columns = {"values": [0.0] * 3, "next_values": [2.0] * 3}
    data = make_rollout(rewards=[1.0, number, 1.0], **columns, **flags)
    advantages, _ = generalized_advantage_estimate(data, gamma=0.5, gae_lambda=0.0)
    assert advantages[:, 0].tolist() == [2.0, pytest.approx(number, nan_ok=True), 2.0]


@pytest.mark.parametrize("number", NUMBERS)
def test_without_discounting_values_of_later_steps_are_not_read(number):
    """With gamma 0, and at terminated steps, what next_values holds does not matter."""
    flags = {"terminated": [False, True], "truncated": [False] * 2}
    columns = {"rewards": [1.0, 2.0], "values": [0.5, 0.5]}
    data = make_rollout(next_values=[number, number], **columns, **flags)
    advantages, _ = generalized_advantage_estimate(data, gamma=0.0, gae_lambda=0.9)
    assert advantages[:, 0].tolist() == [0.5, 1.5]
    data = make_rollout(next_values=[4.0, number], **columns, **flags)
    advantages, _ = generalized_advantage_estimate(data, gamma=0.5, gae_lambda=1.0)
    assert advantages[:, 0].tolist() == [2.5 + 0.75, 1.5]


def test_with_lambda_one_returns_are_discounted_sums():
    """The Monte Carlo end of the range does not depend on the values inside the rollout."""
    data = make_rollout(
        rewards=[1.0, 1.0, 1.0],
        values=[5.0, -3.0, 7.0],
        next_values=[-3.0, 7.0, 8.0],
        terminated=[False] * 3,
        truncated=[False] * 3,
    )
    _, returns = generalized_advantage_estimate(data, gamma=0.5, gae_lambda=1.0)
    assert returns[:, 0].tolist() == [1 + 0.5 + 0.25 + 8 / 8, 1 + 0.5 + 8 / 4, 1 + 8 / 2]


def test_estimates_are_new_tensors_without_gradient():
    """Nothing of the rollout is changed or aliased, and no graph is kept."""
    values = torch.ones(2, 1, requires_grad=True)
    data = {
        **make_rollout(
            rewards=[1.0, 2.0],
            next_values=[0.0, 0.0],
            terminated=[False, True],
            truncated=[False, False],
        ),
        "values": values,
    }
    before = {name: tensor.clone() for name, tensor in data.items()}
    estimates = generalized_advantage_estimate(data, gamma=0.9, gae_lambda=0.9)
    assert not any(estimate.requires_grad for estimate in estimates)
    for estimate in estimates:
        estimate.zero_()
    assert all(torch.equal(data[name], tensor) for name, tensor in before.items())


def test_observations_are_picked_in_the_policys_form():
    """One tensor, or a mapping by dotted name without the prefix."""
    one, other, rest = torch.zeros(1), torch.ones(1), torch.zeros(1)
    assert get_observations({"observations": one, "actions": rest}) is one
    leaves = get_observations({"observations.a": one, "observations.b.c": other, "actions": rest})
    assert list(leaves) == ["a", "b.c"]
    assert leaves["a"] is one
    assert leaves["b.c"] is other
    with pytest.raises(KeyError, match="no observations among actions"):
        get_observations({"actions": rest})

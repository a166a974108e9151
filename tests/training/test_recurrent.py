"""RecurrentActorCritic against torch's own cells, and against itself step by step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.legal_actions import LegalActions
from keisei.training.recurrent import RecurrentActorCritic

OBSERVATIONS = spaces.Box(-1, 1, (3,), np.float32)
STARTS = torch.tensor([[1, 0], [0, 0], [0, 1], [1, 0], [0, 0]], dtype=torch.bool)
CELLS = ("lstm", "gru")


def make_policy(action_space=None, observation_space=OBSERVATIONS, **kwargs):
    """Make a small policy whose weights and biases are far from their initial values."""
    torch.manual_seed(0)
    space = action_space or spaces.Discrete(4)
    policy = RecurrentActorCritic(
        observation_space, space, hidden_sizes=(8,), state_size=6, **kwargs
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return policy


def unroll(policy, observations, state, starts, **kwargs):
    """Act step by step, as a worker does; return actions, log-probabilities, values, state."""
    rows = []
    for observation, start in zip(observations, starts, strict=True):
        *row, state = policy.act(observation, state, start, **kwargs)
        rows.append(row)
    return [torch.stack(column) for column in zip(*rows, strict=True)], state


@pytest.mark.parametrize("cell", CELLS)
def test_the_cells_are_those_of_torch(cell):
    """Without new episodes, actor and critic remember as nn.LSTM and nn.GRU do."""
    policy = make_policy(cell=cell)
    inputs, state = torch.randn(2, 5, 3, 8), torch.randn(3, 2, policy.memory.num_parts, 6)
    found, end = policy.memory(inputs, state, torch.zeros(5, 3, dtype=torch.bool))
    for index in range(2):
        reference = (nn.LSTM if cell == "lstm" else nn.GRU)(8, 6)
        with torch.no_grad():
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                kind, where, _ = name.split("_")
                ours = getattr(policy.memory, {"ih": "input", "hh": "state"}[where] + f"_{kind}")
                getattr(reference, name).copy_(ours[index].T.squeeze(-1))
        parts = [state[:, index, part].unsqueeze(0) for part in range(policy.memory.num_parts)]
        expected, last = reference(inputs[index], tuple(parts) if cell == "lstm" else parts[0])
        torch.testing.assert_close(found[index], expected)
        last = torch.stack([*last] if cell == "lstm" else [last])[:, 0]
        torch.testing.assert_close(end[:, index], last.transpose(0, 1))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("state", ["zeros", "remembered", "nan"])
def test_whole_rollouts_are_judged_as_they_were_acted(cell, state):
    """evaluate() over [T, N] gives what act() gave step by step, through ends of episodes."""
    policy = make_policy(cell=cell)
    observations, starts = torch.randn(5, 2, 3), STARTS.clone()
    begin = policy.initial_state(2)
    assert begin.shape == (2, 2, policy.memory.num_parts, 6)
    if state != "zeros":
        begin = torch.randn_like(begin)
    if state == "nan":  # of an episode that is over nothing is read
        starts[0] = True
        begin = begin * torch.nan
    (actions, log_probs, values), _ = unroll(policy, observations, begin, starts)
    judged = policy.evaluate(observations, actions, begin, starts)
    torch.testing.assert_close(judged[0], log_probs)
    torch.testing.assert_close(judged[2], values)
    assert judged[1].shape == (5, 2)


@pytest.mark.parametrize("cell", CELLS)
def test_a_new_episode_remembers_nothing(cell):
    """From its first observation on, an episode is the same whatever came before, and no other."""
    policy = make_policy(cell=cell)
    observations = torch.randn(5, 2, 3)
    whole = policy(observations, torch.randn_like(policy.initial_state(2)), STARTS)
    for env, start in ((0, 3), (1, 2)):
        alone = policy(
            observations[start:, env : env + 1],
            policy.initial_state(1),
            torch.zeros(5 - start, 1, dtype=torch.bool),
        )
        for found, expected in zip(whole, alone, strict=True):
            torch.testing.assert_close(found[start:, env : env + 1], expected)
    changed = observations.clone()
    changed[2, 0] += 1.0
    outputs = policy(changed, policy.initial_state(2), STARTS)[0]
    same = outputs == policy(observations, policy.initial_state(2), STARTS)[0]
    assert same.all(-1).T.tolist() == [[True, True, False, True, True], [True] * 5]


def test_a_rollout_may_be_cut_anywhere():
    """The state at the end of one rollout is that at the start of the next."""
    policy = make_policy()
    observations, state = torch.randn(5, 2, 3), policy.initial_state(2)
    whole = policy(observations, state, STARTS)
    for row in range(3):
        _, _, state = policy.step(observations[row], state, STARTS[row])
    rest = policy(observations[3:], state, STARTS[3:])
    for found, expected in zip(rest, whole, strict=True):
        torch.testing.assert_close(found, expected[3:])
    value = policy.value(observations[3], state, STARTS[3])
    torch.testing.assert_close(value, whole[1][3])


def test_gradients_stop_at_the_start_of_an_episode():
    """What an episode did changes nothing of the one before it."""
    policy = make_policy()
    observations = torch.randn(5, 2, 3, requires_grad=True)
    outputs, _ = policy(observations, policy.initial_state(2), STARTS)
    (gradient,) = torch.autograd.grad(outputs[4].square().sum(), observations)
    reached = (gradient != 0).any(-1)
    assert reached.T.tolist() == [
        [False, False, False, True, True],
        [False, False, True] + [True] * 2,
    ]


def test_actor_and_critic_share_no_memory():
    """The gradient of the values leaves the actor's half alone, and the other way round."""
    policy = make_policy()
    weight = policy.memory.state_weight
    results = policy(torch.randn(5, 2, 3), policy.initial_state(2), STARTS)
    for index, result in enumerate(results):
        (gradient,) = torch.autograd.grad(result.square().sum(), weight, retain_graph=True)
        assert gradient[index].abs().sum() > 0
        assert gradient[1 - index].abs().sum() == 0


@pytest.mark.parametrize("as_lists", [False, True])
def test_masks_apply_to_whole_rollouts(as_lists):
    """Masks [T, N, n], or lists for all positions in that order, are those of the single steps."""
    policy = make_policy()
    observations, begin = torch.randn(5, 2, 3), policy.initial_state(2)
    masks = torch.rand(5, 2, 4) < 0.5
    masks[..., 2] = True
    rows, state = [], begin
    for row in range(5):
        legal = LegalActions.from_mask(masks[row])
        allowed = {"legal_actions": legal} if as_lists else {"action_mask": masks[row]}
        *result, state = policy.act(observations[row], state, STARTS[row], **allowed)
        rows.append(result)
    actions, log_probs, _ = (torch.stack(column) for column in zip(*rows, strict=True))
    assert masks.gather(-1, actions[..., None]).all()
    legal = LegalActions.from_mask(masks.flatten(0, 1))
    allowed = {"legal_actions": legal} if as_lists else {"action_mask": masks}
    judged, entropies, _ = policy.evaluate(observations, actions, begin, STARTS, **allowed)
    torch.testing.assert_close(judged, log_probs)
    outputs = policy(observations, begin, STARTS)[0].masked_fill(~masks, -torch.inf)
    expected = torch.distributions.Categorical(logits=outputs).entropy()
    torch.testing.assert_close(entropies, expected)


def test_deterministic_acting_and_dict_observations():
    """A mask in a Dict observation holds here too, and the likeliest allowed action is taken."""
    space = spaces.Dict({"action_mask": spaces.MultiBinary(4), "x": OBSERVATIONS})
    policy = make_policy(observation_space=space)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.int8)
    observations = {"action_mask": mask, "x": torch.randn(2, 3)}
    state, starts = policy.initial_state(2), torch.ones(2, dtype=torch.bool)
    actions, _, _, _ = policy.act(observations, state, starts, deterministic=True)
    outputs = policy.step(observations, state, starts)[0]
    assert torch.equal(actions, outputs.masked_fill(mask == 0, -torch.inf).argmax(-1))


def test_a_copy_computes_the_same():
    """Deepcopy and a state dict carry everything."""
    policy = make_policy(cell="gru")
    other = RecurrentActorCritic(
        OBSERVATIONS, spaces.Discrete(4), hidden_sizes=(8,), state_size=6, cell="gru"
    )
    other.load_state_dict(policy.state_dict())
    inputs = (torch.randn(5, 2, 3), policy.initial_state(2), STARTS)
    for one in (copy.deepcopy(policy), other):
        assert torch.equal(one(*inputs)[0], policy(*inputs)[0])


def test_an_unknown_cell_is_refused():
    """The error names those that there are."""
    with pytest.raises(ConfigurationError, match="cell = 'rnn': must be 'lstm' or 'gru'"):
        make_policy(cell="rnn")

"""ActorCritic against torch.distributions, and its initial weights."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Categorical, Normal

from keisei.training.gymnasium import ActorCritic, Policy

OBSERVATIONS = spaces.Box(-1, 1, (3,), np.float32)


def make_policy(action_space, observation_space=OBSERVATIONS, **kwargs):
    """Make a policy whose outputs are far from uniform."""
    torch.manual_seed(0)
    policy = ActorCritic(observation_space, action_space, **kwargs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return policy


def test_discrete_actions_agree_with_torch_distributions():
    """Log-probability and entropy are those of a categorical distribution, counted from start."""
    policy = make_policy(spaces.Discrete(5, start=2))
    observations, actions = torch.randn(64, 3), torch.randint(2, 7, (64,))
    reference = Categorical(logits=policy(observations)[0])
    log_probs, entropies, values = policy.evaluate(observations, actions)
    torch.testing.assert_close(log_probs, reference.log_prob(actions - 2))
    torch.testing.assert_close(entropies, reference.entropy())
    torch.testing.assert_close(values, policy.value(observations))


def test_multi_discrete_actions_agree_with_torch_distributions():
    """Log-probability and entropy are sums over independent categorical distributions."""
    sizes, starts = [3, 2, 4], [0, 10, 20]
    policy = make_policy(spaces.MultiDiscrete(sizes, start=starts))
    observations = torch.randn(64, 3)
    digits = torch.stack([torch.randint(0, n, (64,)) for n in sizes], dim=-1)
    log_probs, entropies, _ = policy.evaluate(observations, digits + torch.tensor(starts))
    parts = [Categorical(logits=x) for x in policy(observations)[0].split(sizes, dim=-1)]
    expected = sum(part.log_prob(digit) for part, digit in zip(parts, digits.T, strict=True))
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropies, sum(part.entropy() for part in parts))


def test_box_actions_agree_with_torch_distributions():
    """Log-probability and entropy are sums over independent normal distributions."""
    policy = make_policy(spaces.Box(-1, 1, (2, 2), np.float32))
    observations, actions = torch.randn(64, 3), torch.randn(64, 2, 2)
    log_probs, entropies, _ = policy.evaluate(observations, actions)
    means = policy(observations)[0]
    reference = Normal(means, policy.head.log_std.exp().expand_as(means))
    torch.testing.assert_close(log_probs, reference.log_prob(actions.reshape(64, 4)).sum(-1))
    torch.testing.assert_close(entropies, reference.entropy().sum(-1))


def test_sampled_choices_follow_their_probabilities():
    """Over many draws each choice is as frequent as its probability says."""
    policy = make_policy(spaces.Discrete(4))
    observations = torch.full((1, 3), 0.5)
    with torch.inference_mode():
        probabilities = policy(observations)[0].softmax(-1)[0]
        actions, log_probs, _ = policy.act(observations.expand(200_000, 3))
    frequencies = torch.bincount(actions, minlength=4) / 200_000
    torch.testing.assert_close(frequencies, probabilities, atol=0.005, rtol=0)
    torch.testing.assert_close(log_probs.exp(), probabilities[actions])


def test_sampled_box_actions_follow_mean_and_deviation():
    """Over many draws mean and deviation are those of the policy."""
    policy = make_policy(spaces.Box(-1, 1, (2,), np.float32))
    observations = torch.full((1, 3), 0.5)
    with torch.inference_mode():
        means = policy(observations)[0][0]
        actions, _, _ = policy.act(observations.expand(200_000, 3))
    torch.testing.assert_close(actions.mean(0), means, atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), policy.head.log_std.exp(), atol=0.01, rtol=0.01)


def test_actor_and_critic_share_no_weights():
    """The gradient of the values leaves the actor alone, and the other way round."""
    policy = make_policy(spaces.Discrete(2))
    observations = torch.randn(8, 3)
    hidden = policy.hidden[0].weight
    actor, critic = (
        torch.autograd.grad(result.square().sum(), hidden, retain_graph=True)[0]
        for result in policy(observations)
    )
    assert actor[0].abs().sum() > 0
    assert actor[1].abs().sum() == 0
    assert critic[0].abs().sum() == 0
    assert critic[1].abs().sum() > 0


def test_actor_and_critic_compute_plain_networks():
    """The batched product equals two separate networks with tanh."""
    policy = make_policy(spaces.Discrete(2), hidden_sizes=(8, 6))
    observations = torch.randn(5, 3)
    results = []
    for index, output in enumerate((policy.actor_output, policy.critic_output)):
        features = observations
        for layer in (policy.hidden[0], policy.hidden[2]):
            features = torch.tanh(features @ layer.weight[index] + layer.bias[index])
        results.append(output(features))
    outputs, values = policy(observations)
    torch.testing.assert_close(outputs, results[0])
    torch.testing.assert_close(values, results[1].squeeze(-1))


def test_initial_weights_are_orthogonal():
    """Hidden layers have gain sqrt(2), the actor's output 0.01, the critic's 1; biases are zero."""
    policy = ActorCritic(OBSERVATIONS, spaces.Discrete(2))
    for weight in (*policy.hidden[2].weight,):
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(64), atol=1e-4, rtol=0)
    for layer, gain in ((policy.actor_output, 0.01), (policy.critic_output, 1.0)):
        rows = layer.weight.shape[0]
        product = layer.weight @ layer.weight.T
        torch.testing.assert_close(product, gain**2 * torch.eye(rows), atol=1e-5, rtol=0)
    biases = [value for name, value in policy.named_parameters() if name.endswith("bias")]
    assert len(biases) == 4
    assert all((bias == 0).all() for bias in biases)


@pytest.mark.parametrize(
    ("space", "observation", "encoded"),
    [
        (spaces.Discrete(3, start=5), [5, 7], [[1, 0, 0], [0, 0, 1]]),
        (
            spaces.MultiDiscrete([2, 3], start=[0, 4]),
            [[1, 4], [0, 6]],
            [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]],
        ),
        (spaces.Box(0, 255, (1, 2), np.uint8), [[[1, 255]], [[2, 3]]], [[1, 255], [2, 3]]),
        (spaces.MultiBinary(2), [[0, 1], [1, 1]], [[0, 1], [1, 1]]),
    ],
)
def test_observations_are_encoded_as_documented(space, observation, encoded):
    """Choices become one-hot vectors, all else is flattened, and all become float32."""
    policy = ActorCritic(space, spaces.Discrete(2))
    result = policy._encoder(torch.tensor(observation))
    assert result.dtype is torch.float32
    assert result.tolist() == encoded


def test_the_leaves_of_a_dict_are_joined():
    """The encoding of a Dict is that of its leaves, side by side in the space's order."""
    space = spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Dict({"c": OBSERVATIONS})})
    policy = ActorCritic(space, spaces.Discrete(2))
    leaves = {"b.c": torch.tensor([[1.0, 2.0, 3.0]]), "a": torch.tensor([1])}
    assert policy._encoder(leaves).tolist() == [[0, 1, 1, 2, 3]]


def test_a_policy_survives_copying_and_its_state_dict():
    """Copies compute the same, by deepcopy and by a saved state dict."""
    policy = make_policy(spaces.Box(-1, 1, (2,), np.float32))
    other = ActorCritic(OBSERVATIONS, spaces.Box(-1, 1, (2,), np.float32))
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    observations, actions = torch.randn(4, 3), torch.randn(4, 2)
    expected = policy.evaluate(observations, actions)
    for one in (copy.deepcopy(policy), other):
        for result, wanted in zip(one.evaluate(observations, actions), expected, strict=True):
            assert torch.equal(result, wanted)


def test_it_is_a_policy():
    """ActorCritic satisfies the protocol, and a module without the methods does not."""
    assert isinstance(ActorCritic(OBSERVATIONS, spaces.Discrete(2)), Policy)
    assert not isinstance(nn.Linear(1, 1), Policy)

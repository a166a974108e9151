"""Action masks, deterministic acting, MultiBinary, and outputs that are no numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Bernoulli, Categorical, Independent

from keisei.training.actor_critic import ActorCritic
from keisei.training.legal_actions import LegalActions

OBSERVATIONS = spaces.Box(-1, 1, (3,), np.float32)
MASKS = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
ACTION_SPACES = {
    "discrete": spaces.Discrete(5, start=2),
    "multi-discrete": spaces.MultiDiscrete([[3, 2], [2, 4]], start=[[5, 6], [7, 8]]),
    "multi-binary": spaces.MultiBinary((2, 2)),
    "box": spaces.Box(-1, 1, (2, 2), np.float32),
}


def make_policy(action_space, observation_space=OBSERVATIONS, **kwargs):
    """Make a policy whose outputs are far from uniform."""
    torch.manual_seed(0)
    policy = ActorCritic(observation_space, action_space, **kwargs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return policy


def masked_reference(policy, observations, masks):
    return Categorical(logits=policy(observations)[0].masked_fill(~masks, -torch.inf))


@pytest.mark.parametrize("as_lists", [False, True])
def test_masked_actions_agree_with_torch_distributions(as_lists):
    """Log-probability and entropy are those of the categorical over what is allowed."""
    policy = make_policy(spaces.Discrete(5, start=2))
    observations, masks = torch.randn(60, 3), MASKS.repeat(20, 1)
    legal = LegalActions.from_mask(masks)
    allowed = {"legal_actions": legal} if as_lists else {"action_mask": masks}
    actions, log_probs, values = policy.act(observations, **allowed)
    assert masks.gather(-1, (actions - 2)[:, None]).all()
    reference = masked_reference(policy, observations, masks)
    torch.testing.assert_close(log_probs, reference.log_prob(actions - 2))
    torch.testing.assert_close(values, policy.value(observations))
    judged = policy.evaluate(observations, actions, **allowed)
    torch.testing.assert_close(judged[0], reference.log_prob(actions - 2))
    torch.testing.assert_close(judged[1], reference.entropy())
    torch.testing.assert_close(judged[2], values)


@pytest.mark.parametrize("as_lists", [False, True])
def test_allowed_actions_follow_their_probabilities(as_lists):
    """Over many draws each allowed action is as frequent as the masked softmax says."""
    policy = make_policy(spaces.Discrete(5))
    observations, masks = torch.randn(1, 3).expand(100_000, 3), MASKS[:1].expand(100_000, 5)
    legal = LegalActions.from_mask(masks)
    with torch.inference_mode():
        allowed = {"legal_actions": legal} if as_lists else {"action_mask": masks}
        actions, _, _ = policy.act(observations, **allowed)
        expected = masked_reference(policy, observations[:1], MASKS[:1]).probs[0]
    frequencies = torch.bincount(actions, minlength=5) / 100_000
    torch.testing.assert_close(frequencies, expected, atol=0.007, rtol=0)


@pytest.mark.parametrize("as_lists", [False, True])
def test_gradients_of_masked_actions_are_finite_and_exact(as_lists):
    """They are those of a policy that has the allowed logits alone."""
    policy = make_policy(spaces.Discrete(5))
    observations, masks = torch.randn(3, 3), MASKS
    actions = torch.tensor([2, 1, 4])
    legal = LegalActions.from_mask(masks)
    allowed = {"legal_actions": legal} if as_lists else {"action_mask": masks}
    log_probs, entropies, _ = policy.evaluate(observations, actions, **allowed)
    weight = policy.actor_output.weight
    (found,) = torch.autograd.grad((log_probs + entropies).sum(), weight)
    outputs, _ = policy(observations)
    total = torch.zeros(())
    for row, mask, action in zip(outputs, masks, actions, strict=True):
        kept = Categorical(logits=row[mask])
        total = total + kept.log_prob(mask[:action].sum()) + kept.entropy()
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found, expected)


def test_masks_of_several_choices_lie_side_by_side():
    """A MultiDiscrete mask has the parts in the order of nvec; each part is masked by itself."""
    policy = make_policy(spaces.MultiDiscrete([3, 2], start=[1, 10]))
    observations, masks = torch.randn(30, 3), MASKS.repeat(10, 1) | (MASKS[2] * torch.eye(5)[0] > 1)
    masks[:, 3] |= ~masks[:, 4]
    actions, log_probs, _ = policy.act(observations, action_mask=masks)
    logits = policy(observations)[0].masked_fill(~masks, -torch.inf).split([3, 2], dim=-1)
    parts = [Categorical(logits=part) for part in logits]
    digits = (actions - torch.tensor([1, 10])).unbind(-1)
    expected = sum(part.log_prob(digit) for part, digit in zip(parts, digits, strict=True))
    assert log_probs.isfinite().all()
    torch.testing.assert_close(log_probs, expected)
    judged, entropies, _ = policy.evaluate(observations, actions, action_mask=masks)
    torch.testing.assert_close(judged, expected)
    torch.testing.assert_close(entropies, sum(part.entropy() for part in parts))


@pytest.mark.parametrize("as_lists", [False, True])
def test_an_action_that_is_not_allowed_has_no_probability(as_lists):
    """Its log-probability is minus infinity, and the entropies stay finite."""
    policy = make_policy(spaces.Discrete(5))
    legal = LegalActions.from_mask(MASKS)
    allowed = {"legal_actions": legal} if as_lists else {"action_mask": MASKS}
    log_probs, entropies, _ = policy.evaluate(torch.zeros(3, 3), torch.tensor([1, 1, 1]), **allowed)
    assert log_probs[0] == -torch.inf
    assert log_probs[1:].isfinite().all()
    assert entropies[1] == 0.0
    assert entropies.isfinite().all()


def test_masks_may_be_numbers():
    """Environments tell masks as int8: whatever is not 0 is allowed."""
    policy = make_policy(spaces.Discrete(5))
    actions, _, _ = policy.act(torch.zeros(3, 3), action_mask=MASKS.to(torch.int8))
    assert MASKS.gather(-1, actions[:, None]).all()


MASK_SPACES = {
    "int8": spaces.Box(0, 1, (5,), np.int8),
    "bits": spaces.MultiBinary(5),
    "digits": spaces.MultiDiscrete([2] * 5),
}


@pytest.mark.parametrize("name", MASK_SPACES)
def test_a_mask_in_the_observation_is_the_mask(name):
    """It is no input of the network, and is used wherever no other mask is passed."""
    whole = spaces.Dict({"action_mask": MASK_SPACES[name], "board": OBSERVATIONS})
    policy = make_policy(spaces.Discrete(5), whole)
    plain = make_policy(spaces.Discrete(5), spaces.Dict({"board": OBSERVATIONS}))
    plain.load_state_dict(policy.state_dict())
    board = torch.randn(3, 3)
    observations = {"action_mask": MASKS.to(torch.int8), "board": board}
    actions, log_probs, _ = policy.act(observations)
    assert MASKS.gather(-1, actions[:, None]).all()
    expected = plain.evaluate({"board": board}, actions, action_mask=MASKS)
    assert torch.equal(policy.evaluate(observations, actions)[1], expected[1])
    torch.testing.assert_close(log_probs, expected[0])
    other = MASKS.flip(0)
    actions, _, _ = policy.act({"board": board}, action_mask=other)
    assert other.gather(-1, actions[:, None]).all()


@pytest.mark.parametrize(
    ("space", "action_space"),
    [
        (spaces.Dict({"action_mask": spaces.MultiBinary(4), "x": OBSERVATIONS}), "discrete"),
        (spaces.Dict({"action_mask": spaces.Box(0, 1, (5,)), "x": OBSERVATIONS}), "discrete"),
        (spaces.Dict({"action_mask": spaces.MultiBinary(4), "x": OBSERVATIONS}), "box"),
    ],
)
def test_what_does_not_fit_is_an_ordinary_observation(space, action_space):
    """A leaf of that name with another size or floats, or beside a Box of actions, is an input."""
    policy = ActorCritic(space, ACTION_SPACES[action_space])
    assert policy.hidden[0].weight.shape[1] == 3 + space["action_mask"].shape[0]


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_deterministic_actions_are_the_likeliest(name):
    """They are the modes of torch's distributions, always the same, with their log-probability."""
    space = ACTION_SPACES[name]
    policy = make_policy(space)
    observations = torch.randn(16, 3)
    actions, log_probs, _ = policy.act(observations, deterministic=True)
    outputs = policy(observations)[0]
    if name == "discrete":
        expected = outputs.argmax(-1) + 2
    elif name == "multi-discrete":
        digits = [part.argmax(-1) for part in outputs.split([3, 2, 2, 4], dim=-1)]
        expected = torch.stack(digits, -1).reshape(16, 2, 2) + torch.from_numpy(space.start)
    elif name == "multi-binary":
        expected = (outputs > 0).reshape(16, 2, 2)
    else:
        expected = outputs.reshape(16, 2, 2)
    assert torch.equal(actions, expected.to(actions.dtype))
    assert torch.equal(actions, policy.act(observations, deterministic=True)[0])
    assert space.contains(actions[0].detach().numpy().astype(space.dtype)) or name == "box"
    torch.testing.assert_close(log_probs, policy.evaluate(observations, actions)[0])


@pytest.mark.parametrize("as_lists", [False, True])
def test_the_likeliest_allowed_action_is_allowed(as_lists):
    """Deterministic acting respects masks."""
    policy = make_policy(spaces.Discrete(5))
    observations = torch.randn(3, 3)
    legal = LegalActions.from_mask(MASKS)
    allowed = {"legal_actions": legal} if as_lists else {"action_mask": MASKS}
    actions, _, _ = policy.act(observations, deterministic=True, **allowed)
    expected = policy(observations)[0].masked_fill(~MASKS, -torch.inf).argmax(-1)
    assert torch.equal(actions, expected)


def test_multi_binary_actions_agree_with_torch_distributions():
    """Log-probability and entropy are sums over independent Bernoulli distributions, any logit."""
    policy = make_policy(spaces.MultiBinary(3))
    with torch.no_grad():
        policy.actor_output.weight.mul_(10)
    observations = torch.randn(64, 3)
    actions, log_probs, _ = policy.act(observations)
    assert actions.dtype is torch.int8
    assert actions.shape == (64, 3)
    reference = Independent(Bernoulli(logits=policy(observations)[0].double()), 1)
    expected = reference.log_prob(actions.double()).float()
    torch.testing.assert_close(log_probs, expected)
    judged, entropies, _ = policy.evaluate(observations, actions)
    torch.testing.assert_close(judged, expected)
    torch.testing.assert_close(entropies, reference.entropy().float())


@pytest.mark.parametrize("logit", [0.0, 100.0, -100.0, 1e30, -1e30])
def test_extreme_bits_have_finite_results(logit):
    """Certain bits have the entropy 0, and their gradients are numbers."""
    policy = make_policy(spaces.MultiBinary(1))
    with torch.no_grad():
        policy.actor_output.weight.zero_()
        policy.actor_output.bias.fill_(logit)
    actions, log_probs, _ = policy.act(torch.zeros(1, 3))
    judged, entropies, _ = policy.evaluate(torch.zeros(1, 3), actions)
    (judged + entropies).sum().backward()
    expected = math.log(2) if logit == 0 else 0.0
    assert entropies.item() == pytest.approx(expected)
    assert judged.item() == log_probs.item() == pytest.approx(-expected)
    assert actions.item() == (logit > 0) or logit == 0
    assert policy.actor_output.bias.grad.isfinite().all()


def test_sampled_bits_follow_their_probabilities():
    """Over many draws each bit is set as often as its sigmoid says."""
    policy = make_policy(spaces.MultiBinary(3))
    observations = torch.randn(1, 3).expand(100_000, 3)
    with torch.inference_mode():
        actions, _, _ = policy.act(observations)
        expected = policy(observations[:1])[0][0].sigmoid()
    torch.testing.assert_close(actions.float().mean(0), expected, atol=0.007, rtol=0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("batch", [1, 6, 200])
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_outputs_that_are_no_numbers_are_an_error(name, batch, deterministic, number):
    """No action is made of them; the message names the row and what to look at."""
    policy = make_policy(ACTION_SPACES[name])
    observations = torch.zeros(batch, 3)
    with torch.no_grad():
        policy.hidden[2].weight.zero_()
        policy.hidden[2].bias.zero_()
        policy.actor_output.weight.fill_(1.0)
        policy.actor_output.bias.zero_()
    policy.act(observations, deterministic=deterministic)
    with torch.no_grad():
        policy.actor_output.bias.fill_(number)
    with pytest.raises(ValueError, match=r"outputs are not finite in row.* weights diverged"):
        policy.act(observations, deterministic=deterministic)


@pytest.mark.parametrize("batch", [3, 100])
def test_the_row_with_bad_outputs_is_named(batch):
    """One observation that is not finite is found among the others."""
    policy = make_policy(spaces.Discrete(5))
    observations = torch.zeros(batch, 3)
    observations[2, 1] = math.nan
    with pytest.raises(ValueError, match=rf"not finite in row 2 of {batch}, the first being \[nan"):
        policy.act(observations)


def test_the_logit_of_a_forbidden_action_may_be_anything():
    """Masks keep what is no number out of probabilities, entropies and gradients."""
    policy = make_policy(spaces.Discrete(5))
    with torch.no_grad():
        policy.actor_output.bias[1] = math.nan
    masks = torch.tensor([[True, False, True, True, True]])
    legal = LegalActions.from_mask(masks)
    for allowed in ({"action_mask": masks}, {"legal_actions": legal}):
        actions, _, _ = policy.act(torch.zeros(1, 3), **allowed)
        log_probs, entropies, _ = policy.evaluate(torch.zeros(1, 3), actions, **allowed)
        (gradient,) = torch.autograd.grad((log_probs + entropies).sum(), policy.actor_output.bias)
        assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="not finite"):
        policy.act(torch.zeros(1, 3))


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_row_that_allows_nothing_is_an_error(as_lists):
    """Acting and judging name the row, whatever the other rows are."""
    policy = make_policy(spaces.Discrete(5))
    masks = MASKS.clone()
    masks[1] = False
    legal = LegalActions.from_mask(masks)
    allowed = {"legal_actions": legal} if as_lists else {"action_mask": masks}
    message = r"(action_mask|legal_actions) allow nothing in row 1: "
    with pytest.raises(ValueError, match=message):
        policy.act(torch.zeros(3, 3), **allowed)
    with pytest.raises(ValueError, match=message):
        policy.evaluate(torch.zeros(3, 3), torch.zeros(3), **allowed)


def test_a_choice_without_an_allowed_value_is_an_error():
    """A MultiDiscrete mask must allow something in every part."""
    policy = make_policy(spaces.MultiDiscrete([3, 2]))
    masks = torch.tensor([[True, True, True, False, False]])
    with pytest.raises(ValueError, match="allow nothing in row 0"):
        policy.act(torch.zeros(1, 3), action_mask=masks)
    with pytest.raises(ValueError, match="allow nothing in row 0"):
        policy.evaluate(torch.zeros(1, 3), torch.zeros(1, 2), action_mask=masks)


def test_masks_that_do_not_fit_are_refused():
    """Wrong shapes, both kinds at once, and spaces whose actions cannot be masked."""
    policy = make_policy(spaces.Discrete(5))
    observations = torch.zeros(3, 3)
    legal = LegalActions.from_mask(MASKS)
    for masks in (MASKS[:, :4], MASKS[0], MASKS[:1]):
        with pytest.raises(ValueError, match=r"action_mask has the shape .* the logits \[3, 5\]"):
            policy.act(observations, action_mask=masks)
    with pytest.raises(ValueError, match="not both"):
        policy.act(observations, action_mask=MASKS, legal_actions=legal)
    with pytest.raises(ValueError, match="for 2 positions, the logits for"):
        policy.act(observations, legal_actions=legal.pick(torch.tensor([0, 1])))
    for name in ("box", "multi-binary"):
        for allowed in ({"action_mask": MASKS}, {"legal_actions": legal}):
            with pytest.raises(ValueError, match=f"take no {next(iter(allowed))}"):
                make_policy(ACTION_SPACES[name]).act(observations, **allowed)
    with pytest.raises(ValueError, match="an action_mask, no legal_actions"):
        make_policy(ACTION_SPACES["multi-discrete"]).act(observations, legal_actions=legal)


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_policies_can_be_mapped_over(name):
    """An ensemble acts and is judged under torch.func.vmap, as one by one."""
    policies = [make_policy(ACTION_SPACES[name]) for _ in range(2)]
    observations = torch.randn(4, 3)
    actions = policies[0].act(observations)[0]
    weights, _ = torch.func.stack_module_state(policies)
    base = policies[0]

    def judge(weights):
        call = torch.func.functional_call
        return call(_Method(base, "evaluate"), prefixed(weights), (observations, actions))

    def act(weights):
        return torch.func.functional_call(_Method(base, "act"), prefixed(weights), (observations,))

    def prefixed(weights):
        return {f"policy.{key}": value for key, value in weights.items()}

    judged = torch.func.vmap(judge)(weights)
    for found, expected in zip(judged, base.evaluate(observations, actions), strict=True):
        torch.testing.assert_close(found[1], expected)
    drawn, _, _ = torch.func.vmap(act, randomness="different")(weights)
    assert drawn.shape == (2, *actions.shape)


class _Method(torch.nn.Module):
    """Makes a method of a policy what calling the module does."""

    def __init__(self, policy, name):
        super().__init__()
        self.policy, self._name = policy, name

    def forward(self, *arguments):
        return getattr(self.policy, self._name)(*arguments)

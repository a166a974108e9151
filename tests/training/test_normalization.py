"""Running statistics against one pass over everything, and what is normalised by them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from keisei.training.actor_critic import ActorCritic
from keisei.training.normalization import ObservationNormalizer, RewardNormalizer, RunningMoments
from keisei.training.recurrent import RecurrentActorCritic


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_merged_statistics_are_those_of_one_pass(sizes, center):
    """In whatever parts the samples come, count, mean and variance are those of all of them."""
    torch.manual_seed(0)
    samples = torch.randn(sum(sizes), 2, 3, dtype=torch.float64) + center
    moments = RunningMoments((2, 3))
    for part in samples.split(sizes):
        moments.update(part)
    assert moments.count.item() == len(samples)
    if len(samples):
        torch.testing.assert_close(moments.mean, samples.mean(0), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(moments.variance, samples.var(0, correction=0))
    else:
        assert moments.variance.tolist() == torch.ones(2, 3).tolist()


def test_small_differences_of_large_numbers_are_kept():
    """A thousand float32 batches around a large mean lose nothing to rounding."""
    moments = RunningMoments()
    batch = torch.tensor([16_000_000.0, 16_000_001.0, 16_000_002.0])
    for _ in range(1000):
        moments.update(batch)
    assert moments.mean.item() == pytest.approx(16_000_001, abs=1e-6)
    assert moments.variance.item() == pytest.approx(2 / 3, rel=1e-9)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_changes_nothing(number):
    """The error says how many there were; statistics and what they scale stay."""
    normalizer = ObservationNormalizer(2)
    normalizer.update(torch.randn(10, 2))
    before = copy.deepcopy(normalizer.state_dict())
    with pytest.raises(ValueError, match="1 of 6 numbers are not finite"):
        normalizer.update(torch.tensor([[1.0, 2.0], [number, 1.0], [0.0, 0.0]]))
    assert all(torch.equal(value, before[key]) for key, value in normalizer.state_dict().items())


def test_samples_of_another_shape_are_refused():
    """There must be a dimension of samples before that of one sample."""
    for samples in (torch.zeros(2, 3), torch.zeros(2)):
        with pytest.raises(ValueError, match="do not end in"):
            RunningMoments((2,)).update(samples)


def test_observations_are_centred_scaled_and_clipped():
    """A normal component has mean 0 and variance 1 afterwards; a constant one is 0; others stay."""
    normalizer = ObservationNormalizer(3, is_scaled=torch.tensor([True, True, False]), clip=2.0)
    vectors = torch.stack(
        [3 + 5 * torch.randn(5000), torch.full((5000,), 7.0), torch.arange(5000)], -1
    )
    assert torch.equal(normalizer(vectors[:1])[0, 2:], vectors[0, 2:])
    normalizer.update(vectors)
    free = (vectors[:, 0] - vectors[:, 0].mean()) / vectors[:, 0].std(correction=0)
    result = normalizer(vectors)
    torch.testing.assert_close(result[:, 0], free.clamp(-2, 2), atol=1e-4, rtol=1e-4)
    assert result[:, 1].abs().max() == 0
    assert torch.equal(result[:, 2], vectors[:, 2])
    assert normalizer(torch.tensor([[-1e9, 0.0, 1e9]])).tolist()[0][::2] == [-2.0, 1e9]


SPACE = spaces.Dict(
    {"level": spaces.Discrete(3), "place": spaces.Box(-np.inf, np.inf, (2,), np.float32)}
)


@pytest.mark.parametrize("kind", [ActorCritic, RecurrentActorCritic])
def test_a_policys_statistics_are_weights(kind):
    """They lie in its state dict, reach another policy through it, and change what it computes."""
    options = {"normalize_observations": True, "normalize_rewards": True}
    policy, worker = (kind(SPACE, spaces.Discrete(2), **options) for _ in range(2))
    plain = kind(SPACE, spaces.Discrete(2))
    observations = {"level": torch.tensor([[0, 2]] * 50), "place": 100 + torch.randn(50, 2, 2)}
    policy.update_statistics(observations)
    policy.reward_normalizer.moments.update(torch.tensor([1.0, 3.0]))
    worker.load_state_dict(policy.state_dict())
    assert worker.reward_normalizer.moments.variance == 1.0
    flat = torch.nn.functional.one_hot(observations["level"], 3)
    place = observations["place"]
    scaled = (place - place.mean((0, 1))) / place.std((0, 1), correction=0)
    by_hand = {"level": observations["level"], "place": scaled}
    plain.load_state_dict(
        {key: v for key, v in policy.state_dict().items() if "normalizer" not in key}
    )
    encoded = worker.normalizer(worker._encoder(observations))
    assert torch.equal(encoded[..., :3], flat.float())
    torch.testing.assert_close(encoded[..., 3:], scaled, atol=1e-3, rtol=1e-3)
    results = []
    for one, inputs in ((worker, observations), (plain, by_hand)):
        if kind is ActorCritic:
            results.append(one.value({key: tensor[:, 0] for key, tensor in inputs.items()}))
        else:
            starts = torch.zeros(50, 2, dtype=torch.bool)
            results.append(one(inputs, one.initial_state(2), starts)[1])
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)
    plain.update_statistics(observations)
    assert plain.normalizer is None


@dataclass
class Batch:
    """A rollout with its provenance."""

    data: dict[str, torch.Tensor]
    worker_id: int = 0
    incarnation: int = 0
    sequence: int = 0
    rest: dict[str, int] = field(default_factory=dict)


def make_batch(rewards, ends=(), mask=None, **provenance):
    """Make a rollout of one environment; ``ends`` are steps of alternating kinds."""
    flags = torch.zeros(2, len(rewards), 1, dtype=torch.bool)
    for number, end in enumerate(ends):
        flags[number % 2, end] = True
    data = {
        "rewards": torch.tensor(rewards)[:, None],
        "terminated": flags[0],
        "truncated": flags[1],
    }
    if mask is not None:
        data["mask"] = torch.tensor(mask)[:, None]
    return Batch(data, **provenance)


def seen_by(batches, gamma=0.5):
    """Return what the statistics have seen: count, mean, and variance times count."""
    normalizer = RewardNormalizer()
    for batch in batches:
        normalizer.update(batch, gamma=gamma)
    moments = normalizer.moments
    return [moments.count.item(), moments.mean.item(), moments.squares.item()]


def of(*returns):
    returns = torch.tensor(returns, dtype=torch.float64)
    return [len(returns), returns.mean().item(), (returns - returns.mean()).square().sum().item()]


def test_discounted_returns_are_those_by_hand():
    """They add up within an episode, end with it by either kind of end, and cross rollouts."""
    batches = [
        make_batch([1.0, 2.0, 4.0], ends=[1]),
        make_batch([8.0, 1.0, 1.0], ends=[2, 0], sequence=1),
    ]
    assert seen_by(batches) == pytest.approx(of(1.0, 2.5, 4.0, 10.0, 1.0, 1.5))


def test_workers_do_not_mix():
    """Batches of two workers in turn give the sums of each by itself."""
    batches = [
        make_batch([1.0], worker_id=0),
        make_batch([10.0], worker_id=1),
        make_batch([1.0], worker_id=0, sequence=1),
        make_batch([10.0], worker_id=1, sequence=1),
    ]
    assert seen_by(batches) == pytest.approx(of(1.0, 10.0, 1.5, 15.0))


@pytest.mark.parametrize("provenance", [{"incarnation": 1}, {"sequence": 2}])
def test_a_restart_and_a_missing_batch_begin_anew(provenance):
    """A new process has new episodes; after a gap the sum in progress is not known."""
    batches = [make_batch([1.0, 1.0]), make_batch([4.0], **provenance)]
    assert seen_by(batches) == pytest.approx(of(1.0, 1.5, 4.0))


@pytest.mark.parametrize("number", [3.0, math.nan, math.inf])
def test_masked_steps_are_no_steps(number):
    """They are not counted, discount nothing and end nothing, whatever they hold."""
    batch = make_batch([1.0, number, 2.0], mask=[True, False, True])
    assert seen_by([batch]) == pytest.approx(of(1.0, 2.5))


def test_a_reward_that_is_no_number_changes_nothing():
    """It is refused where it counts, and the sums in progress stay."""
    normalizer = RewardNormalizer()
    normalizer.update(make_batch([1.0]), gamma=0.5)
    with pytest.raises(ValueError, match="not finite"):
        normalizer.update(make_batch([math.nan], sequence=1), gamma=0.5)
    normalizer.update(make_batch([1.0], sequence=1), gamma=0.5)
    assert normalizer.moments.mean.item() == 1.25


def test_rewards_are_scaled_by_the_deviation_and_clipped():
    """They are not centred: no reward changes its sign."""
    normalizer = RewardNormalizer(clip=3.0)
    assert normalizer(torch.tensor([2.0, -9.0])).tolist() == [2.0, -3.0]
    normalizer.update(make_batch([1.0, 5.0], ends=[0, 1]), gamma=0.9)
    assert normalizer(torch.tensor([1.0, -4.0, 100.0])).tolist() == [0.5, -2.0, 3.0]


def test_copies_have_no_sums_in_progress():
    """Sums belong to the batches of one pool; a copy of the policy begins without."""
    normalizer = RewardNormalizer()
    normalizer.update(make_batch([1.0]), gamma=0.5)
    other = copy.deepcopy(normalizer)
    assert other._running == {}
    assert torch.equal(other.moments.mean, normalizer.moments.mean)
    assert len(normalizer._running) == 1

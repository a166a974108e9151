"""PPO: what it learns from, against plain formulas; training, saving and playing end to end."""

from __future__ import annotations

import asyncio
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from keisei import ExperienceBatch
from keisei.exceptions import ConfigurationError
from keisei.training.actor_critic import ActorCritic
from keisei.training.legal_actions import LegalActions
from keisei.training.ppo import PPO, PPOLearner, PPOParameters
from keisei.training.ppo_data import TrainingSet
from keisei.training.recurrent import RecurrentActorCritic
from keisei.training.rollouts import generalized_advantage_estimate

SPACE = spaces.Box(-1, 1, (3,), np.float32)
STEPS, ENVS = 6, 2


def make_batch(policy, seed, *, masks=None, **extra):
    """Let a policy act on random observations; step and environment are told in the last one."""
    torch.manual_seed(seed)
    observations = torch.randn(STEPS, ENVS, 3)
    ends = torch.zeros(STEPS, ENVS, dtype=torch.bool)
    ends[2, 1] = True
    keywords = {} if masks is None else {"action_mask": masks}
    data = {}
    with torch.no_grad():
        if isinstance(policy, RecurrentActorCritic):
            data["states"] = state = torch.randn_like(policy.initial_state(ENVS))
            data["episode_starts"] = torch.cat([ends[-1:], ends[:-1]])
            rows = []
            for row, start in zip(observations, data["episode_starts"], strict=True):
                *result, state = policy.act(row, state, start)
                rows.append(result)
            acted = [torch.stack(column) for column in zip(*rows, strict=True)]
        else:
            flat = {key: mask.flatten(0, 1) for key, mask in keywords.items()}
            acted = [
                tensor.unflatten(0, (STEPS, ENVS))
                for tensor in policy.act(observations.flatten(0, 1), **flat)
            ]
    data |= {
        "observations": observations,
        "actions": acted[0],
        "log_probs": acted[1],
        "values": acted[2],
        "next_values": torch.randn(STEPS, ENVS),
        "rewards": torch.randn(STEPS, ENVS),
        "terminated": ends,
        "truncated": torch.zeros_like(ends),
        "mask": torch.ones_like(ends),
        **extra,
    }
    return ExperienceBatch(data, {"episode_returns": [float(seed)]}, 12, worker_id=seed)


def train(batches, **kwargs):
    return TrainingSet.of(batches, gamma=0.9, gae_lambda=0.8, **kwargs)


def test_every_true_step_is_in_one_minibatch():
    """In random order and with its own numbers; masked steps are nowhere."""
    policy = ActorCritic(SPACE, spaces.Discrete(4))
    batches = [make_batch(policy, 0), make_batch(policy, 1)]
    mask = torch.ones(STEPS, ENVS, dtype=torch.bool)
    mask[3, 1] = False
    batches[1].data["mask"] = mask
    batches[1].data["rewards"][3, 1] = torch.nan
    expected = {}
    for batch in batches:
        estimates = generalized_advantage_estimate(batch.data, gamma=0.9, gae_lambda=0.8)
        for row in batch.data["mask"].nonzero().tolist():
            place = tuple(row)
            expected[tuple(batch.data["observations"][place].tolist())] = [
                *(batch.data[name][place].item() for name in ("actions", "log_probs")),
                *(estimate[place].item() for estimate in estimates),
            ]
    found = {}
    sizes = []
    for part in train(batches).minibatches(10):
        observations, actions = part.arguments
        sizes.append(len(actions))
        columns = (actions, part.log_probs, part.advantages, part.returns)
        for observation, *row in zip(observations.tolist(), *columns, strict=True):
            found[tuple(observation)] = [one.item() for one in row]
    assert sizes == [10, 10, 3]
    assert found == expected


@pytest.mark.parametrize("as_lists", [False, True])
def test_masks_are_judged_with_their_steps(as_lists):
    """Before anything was learned, every step has the log-probability that it was taken with."""
    policy = ActorCritic(SPACE, spaces.Discrete(4))
    batches = []
    for seed in range(2):
        masks = torch.rand(STEPS, ENVS, 4) < 0.4
        masks[..., seed] = True
        legal = LegalActions.from_mask(masks.flatten(0, 1))
        lists = {"legal_actions": legal.indices, "legal_offsets": legal.offsets}
        extra = lists if as_lists else {"action_masks": masks}
        batches.append(make_batch(policy, seed, masks=masks, **extra))
    for part in train(batches).minibatches(7):
        log_probs, _, _ = part.evaluate(policy)
        torch.testing.assert_close(log_probs, part.log_probs)
        assert log_probs.isfinite().all()


def test_memories_are_judged_over_whole_rollouts():
    """Minibatches are environments with their whole rollouts, and nothing has changed yet."""
    policy = RecurrentActorCritic(SPACE, spaces.Discrete(4), state_size=5)
    batches = [make_batch(policy, 0), make_batch(policy, 1)]
    batches[0].data["mask"][4, 0] = False
    steps = 0
    for part in train(batches).minibatches(2 * STEPS + 1):
        log_probs, _, values = part.evaluate(policy)
        torch.testing.assert_close(log_probs, part.log_probs)
        torch.testing.assert_close(values, part.returns - part.advantages)
        assert part.arguments[0].shape[:2] == (STEPS, 2)
        steps += len(log_probs)
    assert steps == 2 * STEPS * ENVS - 1


def test_the_first_step_is_that_of_the_formulas():
    """One minibatch of one epoch: the losses are those written out."""
    torch.manual_seed(0)
    policy = ActorCritic(SPACE, spaces.Discrete(4))
    batch = make_batch(policy, 3)
    with torch.no_grad():
        policy.actor_output.weight.add_(0.3 * torch.randn_like(policy.actor_output.weight))
    flat = {name: tensor.flatten(0, 1) for name, tensor in batch.data.items()}
    advantages, returns = (
        one.flatten()
        for one in generalized_advantage_estimate(batch.data, gamma=0.9, gae_lambda=0.8)
    )
    log_probs, entropies, values = policy.evaluate(flat["observations"], flat["actions"])
    ratios = (log_probs - flat["log_probs"]).exp()
    scaled = (advantages - advantages.mean()) / advantages.std()
    surrogate = torch.minimum(ratios * scaled, ratios.clamp(0.9, 1.1) * scaled)
    expected = {
        "policy_loss": -surrogate.mean(),
        "value_loss": (values - returns).square().mean(),
        "entropy": entropies.mean(),
        "clip_fraction": ((ratios < 0.9) | (ratios > 1.1)).float().mean(),
        "approx_kl": (ratios - 1 - ratios.log()).mean(),
    }
    parameters = PPOParameters(
        epochs=1, minibatch_size=99, gamma=0.9, gae_lambda=0.8, clip_range=0.2, decay_steps=24
    )
    learner = PPOLearner(policy, parameters)
    metrics = learner.learn([batch])
    assert metrics["learning_rate"] == parameters.learning_rate / 2  # 12 of 24 steps
    assert metrics["mean_return"] == 3.0
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert learner.num_steps == 12


@pytest.mark.parametrize("kind", [ActorCritic, RecurrentActorCritic])
def test_statistics_are_updated_once_for_each_batch(kind):
    """Of true steps alone; after the first update, the policy that acted is the one improved."""
    policy = kind(SPACE, spaces.Discrete(4), normalize_observations=True, normalize_rewards=True)
    learner = PPOLearner(policy, PPOParameters(epochs=1, minibatch_size=99, gamma=0.9))
    seen = []
    for update in range(3):
        batch = make_batch(policy, 0)
        batch.sequence = update
        batch.data["mask"][0, 0] = False
        seen.append(batch.data["observations"][batch.data["mask"]])
        metrics = learner.learn([batch])
        if update:
            assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    moments = policy.normalizer.moments
    everything = torch.cat(seen).double()
    assert moments.count == len(everything) == 33
    torch.testing.assert_close(moments.mean, everything.mean(0))
    torch.testing.assert_close(moments.variance, everything.var(0, correction=0))
    assert policy.reward_normalizer.moments.count == 33


def test_impossible_parameters_are_named_together():
    """Each with its value and what it must be; so are names that there are not."""
    with pytest.raises(ConfigurationError) as caught:
        PPOParameters(
            epochs=0, gamma=1.5, learning_rate=0.0, entropy_coefficient=-1.0, decay_steps=0
        )
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigurationError, match="lerning_rate: is no parameter of PPO"):
        PPO("CartPole-v1", lerning_rate=1.0)
    with pytest.raises(ConfigurationError, match="policy = 'cnn': must be 'mlp', or a callable"):
        PPO("CartPole-v1", policy="cnn")
    with pytest.raises(ConfigurationError, match="RecurrentActorCritic has a memory, which"):
        PPO("CartPole-v1", policy=RecurrentActorCritic)


def test_a_batch_without_a_true_step_is_an_error():
    """There is nothing to learn from, and it says so."""
    batch = make_batch(ActorCritic(SPACE, spaces.Discrete(4)), 0)
    batch.data["mask"].fill_(False)
    with pytest.raises(ConfigurationError, match="no batch holds a true step"):
        train([batch])


WORKERS = {"num_envs": 2, "rollout_length": 32}
OPTIONS = {"normalize_observations": True, "normalize_rewards": True, "hidden_sizes": [16]}


def test_training_saving_and_playing(tmp_path):
    """A file holds everything: weights, statistics, optimizer, counts; training goes on from it."""
    ppo = PPO("CartPole-v1", 1, policy_kwargs=OPTIONS, worker_kwargs=WORKERS, seed=0, epochs=2)
    before = ppo.evaluate(episodes=2, seed=1)
    report = ppo.learn(200, progress=False)
    assert report.num_steps == ppo.learner.num_steps == 256
    path = tmp_path / "ppo.pt"
    ppo.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["ppo.pt"]
    other = PPO.load(path)
    for name, tensor in ppo.policy.state_dict().items():
        assert torch.equal(other.policy.state_dict()[name], tensor), name
    assert other.policy.normalizer.moments.count == 256
    assert other.learner.training_state()["num_steps"] == 256
    assert ppo.evaluate(episodes=2, seed=1) == other.evaluate(episodes=2, seed=1)
    assert len(before.returns) == 2
    assert len(other.play(episodes=1, render_mode=None).returns) == 1
    other.learn(64, progress=False)
    assert other.learner.num_steps == 320


def make_cartpole(**kwargs):
    """Make the environment by a callable."""
    return gymnasium.make("CartPole-v1", **kwargs)


def test_callables_are_given_again(tmp_path):
    """Code is not saved: without it, loading names what is missing."""
    maker = partial(ActorCritic, hidden_sizes=(8,))
    ppo = PPO(make_cartpole, policy=maker, seed=0)
    path = tmp_path / "ppo.pt"
    ppo.save(path)
    with pytest.raises(ConfigurationError) as caught:
        PPO.load(path)
    assert [line.split(":")[0] for line in caught.value.problems] == ["env", "policy"]
    other = PPO.load(path, env=make_cartpole, policy=maker)
    assert ppo.evaluate(episodes=1, seed=0) == other.evaluate(episodes=1, seed=0)
    torch.save({"weights": 1}, path)
    with pytest.raises(ConfigurationError, match=r"is no file of PPO\.save"):
        PPO.load(path)
    with pytest.raises(ConfigurationError, match="policy_kwargs: holds what is no plain value"):
        PPO("CartPole-v1", policy_kwargs={"hidden_sizes": (np.int64(3),)}).save(path)


async def test_inside_an_event_loop_it_is_awaited():
    """learn() says what to do there, and run() does the same."""
    ppo = await asyncio.to_thread(PPO, "CartPole-v1", 1, worker_kwargs=WORKERS, epochs=1)
    with pytest.raises(RuntimeError, match=r"await ppo\.run"):
        ppo.learn(64)
    report = await ppo.run(64, progress=False)
    assert report.num_steps == 64

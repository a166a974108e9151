"""evaluate_policy: exact returns and lengths of whole episodes, without a bias to short ones."""

from __future__ import annotations

import functools
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.testing.scenarios import fail_after
from keisei.training.actor_critic import ActorCritic
from keisei.training.evaluation import (
    Evaluation,
    EvaluationWorker,
    evaluate_on_pool,
    evaluate_policy,
)
from keisei.training.recurrent import RecurrentActorCritic
from keisei.worker import WorkerContext
from training.environments import BOTH, CountingDictEnv, CountingEnv, CountingPolicy, EchoEnv

CONTEXT = WorkerContext(worker_id=0, incarnation=0, num_workers=1, seed=7)


class Playing(CountingPolicy):
    """Takes the keyword that evaluations pass, and notes how it was called."""

    def __init__(self, observation_space=None, action_space=None):
        super().__init__(observation_space, action_space)
        self.calls = []

    def act(self, observations, *, deterministic=False):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(
            (
                deterministic,
                len(next(iter(observations.values()), 0))
                if isinstance(observations, dict)
                else len(observations),
            )
        )
        return super().act(observations)


@pytest.mark.parametrize("env", [CountingEnv, CountingDictEnv])
def test_each_environment_plays_its_share(env):
    """Five episodes in two environments are three and two, whatever their lengths are."""
    policy = Playing().train()
    found = evaluate_policy(policy, env, episodes=5, num_envs=2)
    assert found == Evaluation((3.0, 6.0, 1.0, 3.0, 6.0), (2, 3, 1, 2, 3))
    assert policy.training
    # Both for the five steps of two episodes each, then one for the last.
    assert policy.calls == [(True, 2)] * 5 + [(True, 1)]
    assert found.mean_return == pytest.approx(19 / 5)
    assert found.std_return == pytest.approx(np.std([3, 6, 1, 3, 6]))
    assert found.mean_length == pytest.approx(11 / 5)


def make_uneven(envs):
    """Make the first environment with episodes of one step, the others with ten."""
    envs.append(CountingEnv(((1 if not envs else 10, BOTH),)))
    return envs[-1]


def test_short_episodes_are_not_preferred():
    """Half of the episodes are those of an environment ten times as slow as the other."""
    env = functools.partial(make_uneven, [])
    found = evaluate_policy(Playing(), env, episodes=6, num_envs=2)
    assert found.lengths == (1, 1, 1, 10, 10, 10)


def test_there_are_no_more_environments_than_episodes():
    """Nothing is made that would have nothing to play, and everything is closed."""
    envs = []
    evaluate_policy(Playing(), functools.partial(make_uneven, envs), episodes=2, num_envs=8)
    assert [env.closed for env in envs] == [1, 1]


class Doubled(gymnasium.RewardWrapper):
    """Changes the rewards above the statistics."""

    def reward(self, reward):
        return 2.0 * reward


def test_what_the_environment_tells_of_an_episode_counts():
    """Above a statistics wrapper, rewards may be what is good for learning."""

    def make():
        return Doubled(gymnasium.wrappers.RecordEpisodeStatistics(CountingEnv()))

    assert evaluate_policy(Playing(), make, episodes=2) == Evaluation((3.0, 6.0), (2, 3))
    found = evaluate_policy(Playing(), lambda: Doubled(CountingEnv()), episodes=2)
    assert found == Evaluation((6.0, 12.0), (2, 3))


def test_the_same_seed_gives_the_same_episodes():
    """Environments have seeds of their own, and another seed gives other episodes."""
    torch.manual_seed(0)
    with gymnasium.make("CartPole-v1") as env:
        policy = ActorCritic(env.observation_space, env.action_space)
    runs = [
        evaluate_policy(policy, "CartPole-v1", episodes=6, num_envs=3, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0].returns == tuple(map(float, runs[0].lengths))


ACTIONS = {
    "discrete": spaces.Discrete(3, start=5),
    "multi-discrete": spaces.MultiDiscrete([3, 2], start=[1, 4]),
    "multi-binary": spaces.MultiBinary(4),
    "box": spaces.Box(-0.01, 0.01, (2, 2), np.float64),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_actions_are_those_of_the_space(name, deterministic):
    """Every environment gets actions that its space holds: clipped, in its dtype, and its own."""
    observations = spaces.Box(-1, 1, (3,), np.float32)

    def make():
        return gymnasium.wrappers.TimeLimit(EchoEnv(observations, ACTIONS[name]), 5)

    policy = ActorCritic(observations, ACTIONS[name])
    found = evaluate_policy(policy, make, episodes=3, num_envs=2, deterministic=deterministic)
    assert found.lengths == (5, 5, 5)


class Memory(nn.Module):
    """Counts the steps of each episode in its state, and takes that count as its action."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def initial_state(self, num_envs):
        return {"count": torch.full((num_envs, 1), 99)}

    def act(self, observations, state, episode_starts, *, deterministic=False):
        count = torch.where(episode_starts[:, None], 0, state["count"] + 1)
        zeros = torch.zeros(len(observations))
        return count[:, 0], zeros, zeros, {"count": count}


class Strict(CountingEnv):
    """Insists that the action is the number of steps of the episode so far."""

    def step(self, action):
        assert action == self._observation[1]
        return super().step(action)


def test_memories_begin_with_their_episodes():
    """The state of each environment is its own, in episodes of uneven lengths and to the end."""
    envs = []

    def make():
        envs.append(Strict(((2 + len(envs), BOTH), (1, BOTH))))
        return envs[-1]

    found = evaluate_policy(Memory(), make, episodes=7, num_envs=3)
    assert found.lengths == (2, 1, 2, 3, 1, 4, 1)


def test_recurrent_policies_play():
    """A RecurrentActorCritic plays as any other policy, whatever others play beside it."""
    torch.manual_seed(0)
    with gymnasium.make("CartPole-v1") as env:
        policy = RecurrentActorCritic(env.observation_space, env.action_space)
    found = evaluate_policy(policy, "CartPole-v1", episodes=4, num_envs=2, seed=0)
    assert found == evaluate_policy(policy, "CartPole-v1", episodes=4, num_envs=2, seed=0)


def test_what_cannot_be_evaluated_is_refused():
    """Counts, policies that cannot be asked, and what is no environment."""
    for counts in ({"episodes": 0}, {"num_envs": 0}, {"episodes": 1.5}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(counts))} = .*at least 1"):
            evaluate_policy(Playing(), CountingEnv, **counts)
    with pytest.raises(ConfigurationError, match=r"CountingPolicy.act takes no 'deterministic'"):
        evaluate_policy(CountingPolicy(), CountingEnv)
    found = evaluate_policy(CountingPolicy(), CountingEnv, episodes=1, deterministic=False)
    assert found == Evaluation((3.0,), (2,))
    with pytest.raises(ConfigurationError, match="env made 3: "):
        evaluate_policy(Playing(), lambda: 3)


def test_a_worker_plays_one_episode_in_each_environment():
    """In every collect, progress being told at every step."""
    calls = []
    worker = EvaluationWorker(CountingEnv, Playing, 2)
    worker.setup(replace(CONTEXT, _progress=functools.partial(calls.append, 1)))
    for expected in ([3.0, 3.0], [6.0, 6.0], [1.0, 1.0]):
        experience = worker.collect()
        assert experience.data["returns"].tolist() == expected
        assert experience.num_steps == experience.data["lengths"].sum()
    assert len(calls) >= 12
    worker.teardown()


async def test_a_pool_plays_whole_rounds():
    """Two workers of two environments: round by round, and no more than was asked for."""
    policy = Playing()
    async with fail_after(60):
        found = await evaluate_on_pool(
            policy,
            CountingEnv,
            episodes=6,
            envs_per_worker=2,
            config={"num_workers": 2, "backend": "inline"},
        )
    assert found == Evaluation((3.0,) * 4 + (6.0,) * 2, (2,) * 4 + (3,) * 2)
    assert policy.calls == []


async def test_workers_play_with_the_weights_they_are_sent():
    """Real processes, a policy that always loses or wins as its weights say."""
    torch.manual_seed(0)
    with gymnasium.make("CartPole-v1") as env:
        policy = ActorCritic(env.observation_space, env.action_space)
    with torch.no_grad():
        policy.actor_output.bias[0] = 100.0  # always to the left: 8 to 10 steps
    async with fail_after(60):
        found = await evaluate_on_pool(policy, "CartPole-v1", episodes=5, config={"num_workers": 2})
    assert len(found.lengths) == 5
    assert max(found.lengths) <= 11

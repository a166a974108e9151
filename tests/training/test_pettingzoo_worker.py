"""PettingZooWorker: exact rollouts beside plain loops and tables by hand, policies, refusals."""

from __future__ import annotations

import itertools
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

pettingzoo = pytest.importorskip("pettingzoo")

from keisei.exceptions import ConfigurationError  # noqa: E402 - after the skip
from keisei.testing.scenarios import fail_after  # noqa: E402
from keisei.training.gymnasium import generalized_advantage_estimate  # noqa: E402
from keisei.training.pettingzoo import PettingZooWorker, get_policy_data  # noqa: E402
from keisei.worker import WorkerContext  # noqa: E402
from training.agent_environments import (  # noqa: E402
    ComingAndGoing,
    DigestPolicy,
    Plain,
    Scripted,
)

CONTEXT = WorkerContext(worker_id=0, incarnation=0, num_workers=1, seed=7)
SEED = int(np.random.SeedSequence(7).generate_state(1)[0]) >> 1
GAMES = {
    "connect four": partial(pettingzoo.make, "aec", "classic/connect_four_v3"),
    "tictactoe": partial(pettingzoo.make, "aec", "classic/tictactoe_v3"),
    "rock paper scissors": partial(pettingzoo.make, "aec", "classic/rps_v2"),
    "rock paper scissors, together": partial(pettingzoo.make, "parallel", "classic/rps_v2"),
    "leduc": partial(pettingzoo.make, "aec", "classic/leduc_holdem_v4"),
    "scripted": Scripted,
}


def spread(kind="parallel_env"):
    """Make a cooperative environment: agents that must cover landmarks together."""
    from mpe2 import simple_spread_v3

    return getattr(simple_spread_v3, kind)(N=3, max_cycles=7)


GAMES |= {"spread": spread, "spread, in turns": partial(spread, "env")}


def run(env, num_rollouts=1, *, policy=DigestPolicy, num_envs=1, length=8, **options):
    """Return the rollouts of a worker, as copies."""
    worker = PettingZooWorker(env, policy, num_envs, length, **options)
    worker.setup(CONTEXT)
    experiences = []
    for _ in range(num_rollouts):
        one = worker.collect()
        data = {name: tensor.clone() for name, tensor in one.data.items()}
        experiences.append((data, one.info, one.num_steps))
    worker.teardown()
    return experiences


def rows_of(data, column):
    """Return the transitions of a column, in the form of the plain loop."""
    picked = {name: tensor[data["mask"][:, column], column] for name, tensor in data.items()}
    names = ("actions", "log_probs", "values", "next_values", "rewards", "terminated", "truncated")
    return [
        (observation.numpy(), None if mask is None else mask.numpy(), *values)
        for observation, mask, *values in zip(
            picked["observations"],
            picked.get("action_masks", [None] * len(picked["mask"])),
            *(picked[name].tolist() for name in (*names, "episodes")),
            strict=True,
        )
    ]


def assert_same(found, expected):
    assert len(found) <= len(expected), "the plain loop is too short"
    for mine, theirs in zip(found, expected, strict=False):
        np.testing.assert_array_equal(mine[0], theirs.observation.astype(mine[0].dtype))
        np.testing.assert_array_equal(mine[1], theirs.mask)
        assert mine[2:6] == theirs[2:6]
        assert mine[6] == np.float32(theirs.reward)
        assert mine[7:] == theirs[7:]


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("game", GAMES)
def test_rollouts_are_those_of_a_plain_loop(game, num_envs):
    """Step by step the same observations, masks, decisions, values, rewards and ends."""
    rollouts = run(GAMES[game], 3, num_envs=num_envs)
    ended = {index: [] for index in range(num_envs)}
    for index in range(num_envs):
        policy = DigestPolicy(None, GAMES[game]().action_space(rollouts[0][1]["agents"][0]))
        plain = Plain(GAMES[game](), SEED + index, policy, num_episodes=25)
        ended[index] = plain.ended
        for number, agent in enumerate(rollouts[0][1]["agents"]):
            column = index * len(plain.rows) + number
            found = [row for data, _, _ in rollouts for row in rows_of(data, column)]
            assert len(found) >= 6
            assert_same(found, plain.rows[agent])
            assert {data["agents"][0, column].item() for data, _, _ in rollouts} == {number}
    told = [
        one
        for _, info, _ in rollouts
        for one in zip(
            info["episode_agents"], info["episode_returns"], info["episode_lengths"], strict=True
        )
    ]
    if num_envs == 1:
        assert told == ended[0][: len(told)]
    assert len(told) > 0 or game == "connect four"
    for data, _, num_steps in rollouts:
        assert data["mask"].shape == (8, num_envs * len(rollouts[0][1]["agents"]))
        assert num_steps == data["mask"].sum()


def test_rewards_between_two_turns_belong_to_the_last_action():
    """By hand: the columns of two agents, of whom the one acts twice as often."""
    ((first, info, _), (second, info_2, num_steps)) = run(Scripted, 2, length=4)
    a, b = first["rewards"].T.tolist(), second["rewards"].T.tolist()
    # a acts at turns 1, 2, 4, 5 and gets 1; 2 + 3; 4; 5 + 6; then a new episode begins.
    # b acts at turns 3 and 6 and gets 30 + 40 + 50; 60. What it got before turn 3 has no row.
    assert a == [[1, 5, 4, 11], [120, 60, 0, 0]]
    assert b == [[1, 5, 4, 11], [120, 60, 0, 0]]
    assert first["mask"].T.tolist() == [[True] * 4, [True, True, False, False]]
    assert first["terminated"].T.tolist() == [[False] * 4, [False, True, False, False]]
    assert first["truncated"].T.tolist() == [[False, False, False, True], [False] * 4]
    assert first["episodes"].T.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert second["episodes"].T.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert first["observations"][..., 0].T.tolist() == [[0, 1, 3, 4], [2, 5, 0, 0]]
    # a is truncated after the sixth turn, whose observation is worth 6000 % 97; b terminated.
    assert first["next_values"].T.tolist() == [
        [1000 % 97, 3000 % 97, 4000 % 97, 6000 % 97],
        [5000 % 97, 0, 0, 0],
    ]
    assert info["episode_agents"] == ["a", "b"]
    assert info["episode_returns"] == [21.0, 210.0]
    assert info["episode_lengths"] == [4, 2]
    assert (info_2["episode_returns"], num_steps) == ([21.0, 210.0], 6)


def test_a_decision_whose_reward_is_not_known_begins_the_next_rollout():
    """With rollouts of three turns no transition is lost, doubled, or cut in two."""
    rollouts = [data for data, _, _ in run(Scripted, 8, length=3)]
    rewards = [
        [
            value
            for data in rollouts
            for value in data["rewards"][data["mask"][:, column], column].tolist()
        ]
        for column in (0, 1)
    ]
    assert rewards[0] == ([1, 5, 4, 11] * 6)[: len(rewards[0])]
    assert rewards[1] == ([120, 60] * 6)[: len(rewards[1])]
    seen = [
        torch.cat(
            [data["observations"][data["mask"][:, column], column, 0] for data in rollouts]
        ).tolist()
        for column in (0, 1)
    ]
    assert seen[0] == ([0, 1, 3, 4] * 6)[: len(seen[0])]
    assert seen[1] == ([2, 5] * 6)[: len(seen[1])]
    assert len(rewards[0]) == 24
    assert len(rewards[1]) >= 11


def test_agents_come_and_go():
    """By hand: who is not there has no row; who leaves without a word was cut off."""
    ((data, info, num_steps),) = run(ComingAndGoing, 1, length=6)
    x, y, z = (
        {name: tensor[:, column].tolist() for name, tensor in data.items()} for column in range(3)
    )
    assert x["mask"] == [True, True, True, False, True, True]
    assert y["mask"] == [True, False, False, False, True, False]
    assert z["mask"] == [False, True, True, True, False, True]
    assert x["rewards"] == [1, 2, 4, 0, 1, 2]
    assert z["rewards"] == [0, 2, 4, 8, 0, 2]
    assert x["terminated"] == [False, False, True, False, False, False]
    assert y["truncated"] == [True, False, False, False, True, False]
    assert z["truncated"] == [False, False, False, True, False, False]
    assert x["episodes"] == [0, 0, 0, 0, 1, 1]
    assert [row for (row,) in z["observations"]] == [0, 1, 2, 3, 0, 1]
    values = [1000 * steps % 97 for steps in range(5)]
    # x goes on after the last row, so its worth is that of what it sees there.
    assert x["next_values"] == [values[1], values[2], 0, 0, values[1], values[2]]
    assert y["next_values"] == [values[1], 0, 0, 0, values[1], 0]
    assert z["next_values"] == [0, values[2], values[3], values[4], 0, values[2]]
    assert z["action_masks"] == [
        [True, True],
        [False, True],
        [True, True],
        [False, True],
        [True, True],
        [False, True],
    ]
    assert info["episode_agents"] == ["y", "x", "z", "y"]
    assert info["episode_returns"] == [1.0, 7.0, 14.0, 1.0]
    assert info["episode_lengths"] == [1, 3, 3, 1]
    assert (info["agents"], num_steps) == (["x", "y", "z"], 11)


def test_advantages_are_the_returns_of_whole_episodes():
    """With gamma and lambda of 1, an episode's first row is worth what its agent got in it."""

    class Worthless(DigestPolicy):
        def value_of(self, digest):  # a view of a parameter, which needs a gradient at all times
            self.scale.data.zero_()
            return self.scale.expand(len(digest))

    ((data, info, _),) = run(GAMES["tictactoe"], policy=Worthless, num_envs=2, length=40)
    advantages, _ = generalized_advantage_estimate(data, gamma=1.0, gae_lambda=1.0)
    firsts = []
    for column in range(4):
        mask, episodes = data["mask"][:, column], data["episodes"][:, column]
        ended = data["terminated"][:, column] | data["truncated"][:, column]
        for episode in episodes[mask & ended].unique().tolist():
            row = int((mask & (episodes == episode)).nonzero()[0])
            firsts.append((episode, column, advantages[row, column].item()))
    assert len(firsts) == len(info["episode_returns"]) >= 20
    assert sorted(value for *_, value in firsts) == sorted(info["episode_returns"])
    assert {-1.0, 1.0} <= {value for *_, value in firsts}


def test_policies_by_name_have_tensors_of_their_own():
    """Each policy sees its agents alone, under its name, and with its own spaces."""
    spaces = {"a": Discrete(3), "b": Discrete(5)}
    rollouts = run(
        partial(Scripted, action_space=spaces),
        policy={"red": DigestPolicy, "blue": DigestPolicy},
        policy_mapping={"a": "blue", "b": "red"},
        num_envs=2,
        length=4,
    )
    data, info, num_steps = rollouts[0]
    blue, red = get_policy_data(data, "blue"), get_policy_data(data, "red")
    assert {name.partition(".")[0] for name in data} == {"blue", "red"}
    assert blue["rewards"].T.tolist() == [[1, 5, 4, 11]] * 2
    assert red["rewards"].T.tolist() == [[120, 60, 0, 0]] * 2
    assert blue["agents"].unique().tolist() == [0]
    assert red["agents"].unique().tolist() == [1]
    assert red["actions"][:2, 0].tolist() == [2000 % 5, 5000 % 5]
    assert blue["actions"][:, 0].tolist() == [0, 1000 % 3, 3000 % 3, 4000 % 3]
    generalized_advantage_estimate(red, gamma=0.9, gae_lambda=0.9)
    assert (num_steps, info["agents"]) == (12, ["a", "b"])
    with pytest.raises(KeyError, match=r"no tensors of policy 'green' among blue\.observations"):
        get_policy_data(data, "green")


@pytest.mark.parametrize("mapping", [None, lambda agent: agent])
def test_policies_may_have_the_names_of_agents(mapping):
    """Then no mapping is needed; a callable does as well. The model is all of them."""
    policies = {"a": DigestPolicy, "b": DigestPolicy}
    worker = PettingZooWorker(Scripted, policies, rollout_length=4, policy_mapping=mapping)
    worker.setup(CONTEXT)
    assert set(worker.model.state_dict()) == {"a.scale", "b.scale"}
    worker.load_weights({"a.scale": torch.tensor([2.0]), "b.scale": torch.tensor([3.0])}, 1)
    data = worker.collect().data
    assert data["a.values"][:2, 0].tolist() == [0, 2 * (1000 % 97)]
    assert data["b.values"][:2, 0].tolist() == [3 * (2000 % 97), 3 * (5000 % 97)]
    worker.teardown()


def test_a_reset_forgets_the_episodes_in_progress():
    """New episodes begin everywhere, and no decision of the old ones comes to an end."""
    worker = PettingZooWorker(Scripted, DigestPolicy, 1, 2)
    worker.setup(CONTEXT)
    assert worker.collect().data["rewards"].T.tolist() == [[1, 5], [0, 0]]
    worker.reset()
    experience = worker.collect()
    assert experience.data["rewards"].T.tolist() == [[1, 5], [0, 0]]
    assert experience.data["episodes"][:, 0].tolist() == [1, 1]
    assert experience.info["episode_returns"] == []
    env = worker.envs[0]
    worker.teardown()
    assert (env.seeds, env.closed, worker.envs) == ([SEED, None], True, [])


def test_every_environment_has_its_own_arguments_and_is_progress():
    """Arguments may depend on worker and index; each construction, reset and step is told."""
    calls = []
    context = WorkerContext(3, 0, 4, 7, _progress=lambda: calls.append("progress"))

    class Counted(Scripted):
        def __init__(self, name):
            calls.append(name)
            super().__init__()

        def reset(self, **options):
            calls.append("reset")
            super().reset(**options)

        def step(self, action):
            calls.append("step")
            super().step(action)

    worker = PettingZooWorker(
        Counted,
        DigestPolicy,
        2,
        4,
        env_kwargs=lambda context, index: {"name": f"{context.worker_id}-{index}"},
    )
    worker.setup(context)
    expected = ["3-0", "progress", "3-1", "progress", "reset", "progress", "reset", "progress"]
    assert calls == expected
    worker.collect()
    followers = [after for before, after in itertools.pairwise(calls) if before == "step"]
    assert len(followers) >= 12
    assert set(followers) == {"progress"}
    worker.teardown()


def test_environments_share_no_memory_with_the_record():
    """They may write into the actions that they are given."""

    class Writing(ComingAndGoing):
        def action_space(self, agent):
            return Box(-1, 1, (2,), np.float32)

        def observation_space(self, agent):
            return Box(0, 100, (1,), np.int64)

        def sights(self, agents):
            return {agent: np.array([self.steps]) for agent in agents}

        def step(self, actions):
            for action in actions.values():
                assert action.max() <= 1.0
                action[:] = 77
            return super().step(actions)

    class Wide(nn.Module):
        def __init__(self, *spaces):
            super().__init__()

        def act(self, observations):
            size = len(observations)
            return torch.full((size, 2), 2.0), torch.zeros(size), torch.zeros(size)

        def value(self, observations):
            return torch.zeros(len(observations))

    ((data, _, _),) = run(Writing, policy=Wide, length=2)
    assert data["actions"][data["mask"]].unique().tolist() == [2.0]


def test_environments_are_named_by_id_or_module():
    """The parallel one where there is one."""
    shapes = {
        "classic/rps_v2": (8, 2),
        "classic/tictactoe_v3": (8, 2),
        "mpe2.simple_spread_v3": (8, 3),
    }
    for env, shape in shapes.items():
        assert run(env)[0][0]["rewards"].shape == shape


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        (3, {}, "env = 3: must be an id such as 'classic/connect_four_v3', the name of a module"),
        (Scripted, {"num_envs": 0}, "num_envs = 0: must be an integer of at least 1"),
        (Scripted, {"length": 1.5}, "rollout_length = 1.5: must be an integer of at least 1"),
        (Scripted, {"policy": 3}, "policy = 3: must be a module or a callable that makes one"),
        (Scripted, {"policy": {}}, "policy = {}: must hold at least one policy"),
        (
            Scripted,
            {"policy": {"a.b": DigestPolicy}},
            "policy['a.b']: names are strings without dots, and not empty",
        ),
        (
            Scripted,
            {"policy_mapping": {}},
            "policy_mapping: give policies by name, or leave it out",
        ),
        (
            Scripted,
            {"action_masks": "legal"},
            "action_masks = 'legal': must be one of 'auto', 'info', 'observation', None",
        ),
        (Scripted, {"env_kwargs": 3}, "env_kwargs = 3: must be a mapping or a callable"),
        ("classic/nonsense_v3", {}, "env = 'classic/nonsense_v3': "),
        ("no.such.module", {}, "env = 'no.such.module': No module named 'no'"),
        ("math", {}, "env = 'math': the module has no env() or parallel_env()"),
        (lambda: 3, {}, "env made 3: must be a PettingZoo environment"),
        (
            Scripted,
            {"policy": {"a": DigestPolicy}},
            "policy_mapping gives agent 'b' the policy 'b'; there are 'a'",
        ),
        (
            Scripted,
            {"policy": {"a": DigestPolicy, "c": DigestPolicy}, "policy_mapping": lambda _: "a"},
            "policy 'c' is given to no agent",
        ),
        (
            partial(Scripted, action_space={"b": Discrete(5)}),
            {},
            "agents 'a' and 'b' share a policy, but have the action spaces Discrete(3) and "
            "Discrete(5): give them policies of their own with policy_mapping",
        ),
        (
            Scripted,
            {"action_masks": "observation"},
            "action_masks = 'observation': the observation space of agent 'a' has no 'action_mask'",
        ),
        (
            partial(Scripted, action_space=dict.fromkeys("ab", Box(0, 1, (2,)))),
            {"action_masks": "info"},
            "action_masks = 'info': actions of Box(0.0, 1.0, (2,), float32) have no masks",
        ),
        (Scripted, {"policy": lambda *_: nn.Linear(1, 1)}, "policy made Linear("),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(env, options, message):
    """The error names the argument, the agent and the way out, and is not tried again."""
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        run(env, **options)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda b: (1, 2), "policy: act() returned 2 values, not actions, log_probs, values"),
        (
            lambda b: (torch.zeros(b, 1), torch.zeros(b), torch.zeros(b)),
            "policy: act() returned actions of shape (1, 1), not (1,)",
        ),
        (
            lambda b: (torch.zeros(b), torch.zeros(b), torch.zeros(b)),
            "policy: actions of torch.float32 for Discrete(3)",
        ),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_at_the_start(results, message):
    """It is tried once before anything depends on it."""

    class Policy(DigestPolicy):
        def act(self, observations):
            return results(len(observations))

    with pytest.raises(ConfigurationError, match=re.escape(message)):
        run(Scripted, policy=Policy)


def masked(**changes):
    """Make a parallel environment whose observations of step 1 are changed."""

    class Masked(ComingAndGoing):
        def sights(self, agents):
            seen = super().sights(agents)
            return {agent: {**seen[agent], **(changes if self.steps else {})} for agent in agents}

    return Masked()


@pytest.mark.parametrize(
    ("env", "options", "error", "message"),
    [
        (
            partial(Scripted, see=lambda turns: np.zeros((turns // 2 + 1,), np.float32)),
            {},
            ValueError,
            "the observation of agent 'b' of environment 0 is float32 of shape (2,); its space is "
            "Box(0.0, 100.0, (1,), float32)",
        ),
        (
            partial(masked, observation=np.zeros(1, np.float32)),
            {},
            ValueError,
            "the observation of agent 'y' of environment 0 is float32 of shape (1,)",
        ),
        (
            partial(masked, action_mask=np.zeros(2)),
            {},
            ValueError,
            "agent 'x' must act, and its action mask allows nothing",
        ),
        (
            partial(masked, action_mask=np.ones(3)),
            {},
            ValueError,
            "the action mask of agent 'x' has the shape (3,), not (2,)",
        ),
        (
            Scripted,
            {"action_masks": "info"},
            ValueError,
            "agent 'a' has no 'action_mask' in its info: give action_masks another value, or None",
        ),
        (
            partial(ComingAndGoing, forget="rewards"),
            {},
            RuntimeError,
            "the environment returned no reward for agent 'y'",
        ),
        (
            partial(ComingAndGoing, forget="observations"),
            {},
            RuntimeError,
            "the environment returned no observation for agent 'y'",
        ),
        (
            partial(Scripted, agents=["c", "b"]),
            {},
            RuntimeError,
            "agent 'c' of environment 0 is not among the possible agents: 'a', 'b'",
        ),
        (partial(Scripted, agents=[]), {}, RuntimeError, "no agent acts in 101 episodes in a row"),
        (
            partial(Scripted, vanish=True),
            {},
            RuntimeError,
            "environment 0 ended an episode without a last turn of 'a', 'b', in which the last "
            "reward is told",
        ),
    ],
)
def test_what_an_environment_does_wrong_is_told(env, options, error, message):
    """The error names the agent, the environment, and the key."""
    with pytest.raises(error, match=re.escape(message)):
        run(env, 2, **options)


async def test_a_pool_trains_several_agents(make_manager):
    """The same batches on both backends, and weights reach the policies."""

    def policy():
        return DigestPolicy(None, Discrete(7))

    worker = partial(
        PettingZooWorker, "classic/connect_four_v3", DigestPolicy, num_envs=2, rollout_length=6
    )
    pickle.dumps(worker)
    seen = {}
    for backend in ("local", "inline"):
        config = {"num_workers": 2, "mode": "sync", "seed": 11, "backend": backend}
        async with fail_after(100), make_manager(worker, model=policy(), **config) as manager:
            batches = await manager.collect()
            model = policy()
            model.scale.data.fill_(3.0)
            await manager.push_weights(model)
            batches += await manager.collect()
            seen[backend] = [{name: batch[name].clone() for name in batch} for batch in batches]
            assert [batch.num_steps for batch in batches] == [
                batch["mask"].sum().item() for batch in batches
            ]
    assert len(seen["local"]) == len(seen["inline"]) == 4
    for mine, theirs in zip(seen["local"], seen["inline"], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

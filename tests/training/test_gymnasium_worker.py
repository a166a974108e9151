"""GymnasiumWorker: exact rollouts in every autoreset mode, seeds, spaces, and refusals."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.gymnasium import (
    ActorCritic,
    GymnasiumWorker,
    generalized_advantage_estimate,
    get_observations,
)
from keisei.worker import WorkerContext
from training.environments import (
    BatchedSameStepEnv,
    CountingDictEnv,
    CountingEnv,
    CountingPolicy,
    EchoEnv,
)

CONTEXT = WorkerContext(worker_id=0, incarnation=0, num_workers=1, seed=7)
MODES = list(AutoresetMode)

# The first ten transitions of CountingEnv with CountingPolicy, by hand. The episodes are of 2
# steps (terminated), 3 (truncated), 1 (both), 2 (terminated), and one that is cut off after 2.
VALUES = [0, 1, 100, 101, 102, 200, 300, 301, 400, 401]
NEXT_VALUES = [1, 0, 101, 102, 103, 0, 301, 0, 401, 402]
REWARDS = [1, 2, 1, 2, 3, 1, 1, 2, 1, 2]
TERMINATED = [0, 1, 0, 0, 0, 1, 0, 1, 0, 0]
TRUNCATED = [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
RETURNS, LENGTHS = [3.0, 6.0, 1.0, 3.0], [2, 3, 1, 2]
# With NEXT_STEP four more steps go by for the resets.
STEPS = {mode: 14 if mode is AutoresetMode.NEXT_STEP else 10 for mode in MODES}
NEXT_STEP_MASK = [1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1]


@pytest.fixture
def make_worker():
    """Give a maker of workers that are set up, and torn down after the test."""
    workers = []

    def make(env, policy=ActorCritic, *args, context=CONTEXT, **kwargs):
        torch.manual_seed(context.seed)
        worker = GymnasiumWorker(env, policy, *args, **kwargs)
        workers.append(worker)
        worker.setup(context)
        return worker

    yield make
    for worker in workers:
        worker.teardown()


@pytest.fixture(scope="module")
def shared_heap():
    """Let multiprocessing make the heap of this process, which it keeps, before leaks count."""
    multiprocessing.RawArray("b", 1)


def real(experience, env=0):
    """Select the real transitions of one environment, as lists by name."""
    data = experience.data
    mask = data["mask"][:, env]
    return {name: tensor[:, env][mask].tolist() for name, tensor in data.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env", [CountingEnv, CountingDictEnv])
def test_every_autoreset_mode_delivers_the_same_exact_transitions(make_worker, mode, env):
    """Values, bootstrap values, rewards and ends are those worked out by hand, in every mode."""
    worker = make_worker(env, CountingPolicy, 2, STEPS[mode], autoreset_mode=mode)
    experience = worker.collect()
    for index in range(2):
        rollout = real(experience, index)
        assert rollout["values"] == VALUES
        assert rollout["next_values"] == NEXT_VALUES
        assert rollout["rewards"] == REWARDS
        assert rollout["terminated"] == [bool(x) for x in TERMINATED]
        assert rollout["truncated"] == [bool(x) for x in TRUNCATED]
        assert rollout["actions"] == [1] * 10
        assert rollout["log_probs"] == [-0.5] * 10
    assert experience.num_steps == 20


@pytest.mark.parametrize("mode", MODES)
def test_only_the_resetting_steps_of_next_step_mode_are_masked(make_worker, mode):
    """The step after an end is no transition in NEXT_STEP mode; all others deliver every step."""
    worker = make_worker(CountingEnv, CountingPolicy, 1, STEPS[mode], autoreset_mode=mode)
    mask = worker.collect().data["mask"][:, 0].int().tolist()
    assert mask == (NEXT_STEP_MASK if mode is AutoresetMode.NEXT_STEP else [1] * 10)


@pytest.mark.parametrize("mode", MODES)
def test_returns_and_lengths_are_those_of_whole_episodes(make_worker, mode):
    """Each ended episode is reported once, oldest first, for each environment."""
    worker = make_worker(CountingEnv, CountingPolicy, 2, STEPS[mode], autoreset_mode=mode)
    info = worker.collect().info
    assert info["episode_returns"] == [x for x in RETURNS for _ in range(2)]
    assert info["episode_lengths"] == [x for x in LENGTHS for _ in range(2)]
    assert info["seed"] == 7


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rollout_length", [1, 3, 4, 7])
def test_episodes_continue_across_rollouts(make_worker, mode, rollout_length):
    """Many short rollouts are one long rollout, wherever an episode is cut, resets included."""
    steps = 3 * 4 * 7
    kwargs = {"num_envs": 2, "autoreset_mode": mode}
    whole = make_worker(CountingEnv, CountingPolicy, rollout_length=steps, **kwargs).collect()
    worker = make_worker(CountingEnv, CountingPolicy, rollout_length=rollout_length, **kwargs)
    parts = []
    info = {"episode_returns": [], "episode_lengths": []}
    for _ in range(steps // rollout_length):
        part = worker.collect()
        parts.append({name: tensor.clone() for name, tensor in part.data.items()})
        for name in info:
            info[name] += part.info[name]
    for name, tensor in whole.data.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name
    assert {**info, "seed": 7, "episode_source": "rewards"} == whole.info


@pytest.mark.parametrize("mode", MODES)
def test_advantages_do_not_reach_across_episodes(make_worker, mode):
    """Estimated over the whole rollout, advantages equal those of each episode by itself."""
    gamma, gae_lambda = 0.9, 0.8
    worker = make_worker(CountingEnv, CountingPolicy, 1, STEPS[mode], autoreset_mode=mode)
    experience = worker.collect()
    estimates = generalized_advantage_estimate(experience.data, gamma=gamma, gae_lambda=gae_lambda)
    advantages, returns = (x[:, 0][experience.data["mask"][:, 0]] for x in estimates)
    deltas = [
        reward + gamma * following - value
        for reward, following, value in zip(REWARDS, NEXT_VALUES, VALUES, strict=True)
    ]
    expected = []
    for first, end in ((0, 2), (2, 5), (5, 6), (6, 8), (8, 10)):
        expected += [
            sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, end))
            for t in range(first, end)
        ]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-4)
    assert (returns - advantages).tolist() == pytest.approx(VALUES, abs=1e-4)


def test_by_default_a_reset_cannot_overwrite_a_final_observation(make_worker):
    """An environment that changes its observations in place bootstraps correctly all the same."""
    factory = functools.partial(CountingEnv, reuses_memory=True)
    rollout = real(make_worker(factory, CountingPolicy, 1, 10).collect())
    assert rollout["values"] == VALUES
    assert rollout["next_values"] == NEXT_VALUES


def test_final_observations_may_come_as_one_batch(make_worker):
    """A vector environment of its own kind may give ``final_obs`` as a batch of observations."""
    gymnasium.register("BatchedSameStep-v0", vector_entry_point=BatchedSameStepEnv)
    try:
        worker = make_worker(
            "BatchedSameStep-v0", CountingPolicy, 3, 5, vectorization="vector_entry_point"
        )
    finally:
        gymnasium.registry.pop("BatchedSameStep-v0")
    data = worker.collect().data
    assert data["values"].tolist() == [[x, x + 100, x + 200] for x in (0, 1, 0, 1, 0)]
    assert data["next_values"].tolist() == [[x, x + 100, x + 200] for x in (1, 2, 1, 2, 1)]


def test_a_vector_entry_point_keeps_its_own_mode(make_worker):
    """Gymnasium's own CartPole vector environment resets in the next step, which is masked."""
    worker = make_worker("CartPole-v1", ActorCritic, 4, 200, vectorization="vector_entry_point")
    experience = worker.collect()
    data = experience.data
    ended = data["terminated"] | data["truncated"]
    assert ended.any()
    assert torch.equal(data["mask"][1:], ~ended[:-1])
    assert experience.num_steps == int(data["mask"].sum()) < 800
    assert (data["rewards"][~data["mask"]] == 0).all()
    assert experience.info["episode_returns"] == experience.info["episode_lengths"]


@pytest.mark.usefixtures("shared_heap")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_processes_below_the_worker_give_the_same_rollouts(make_worker, mode):
    """Asynchronous vectorisation is bit-identical to stepping one by one."""
    rollouts = []
    for vectorization in ("sync", "async"):
        worker = make_worker(
            "CartPole-v1",
            ActorCritic,
            2,
            60,
            env_kwargs={"max_episode_steps": 15},
            vectorization=vectorization,
            autoreset_mode=mode,
        )
        rollouts.append(worker.collect())
    for name, tensor in rollouts[0].data.items():
        assert torch.equal(tensor, rollouts[1].data[name]), name
    assert rollouts[0].info == rollouts[1].info
    assert rollouts[0].data["truncated"].any()


def test_the_same_seed_gives_the_same_rollouts(make_worker):
    """Two workers with one seed are bit-identical, over several rollouts and a reset."""
    first, second = ([], [])
    for found in (first, second):
        worker = make_worker("CartPole-v1", ActorCritic, 3, 50)
        for _ in range(2):
            found.append({k: v.clone() for k, v in worker.collect().data.items()})
            worker.reset()
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_every_environment_has_a_seed_of_its_own(make_worker):
    """No two environments share a seed, within a worker or between workers; they fit 31 bits."""
    contexts = [CONTEXT, replace(CONTEXT, seed=2**63 - 1), replace(CONTEXT, seed=0)]
    workers = [
        make_worker("CartPole-v1", ActorCritic, 4, 1, context=context) for context in contexts
    ]
    seeds = [seed for worker in workers for seed in worker.envs.np_random_seed]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    starts = [tuple(row) for worker in workers for row in worker.collect().data["observations"][0]]
    assert len({tuple(map(float, start)) for start in starts}) == 12


def test_reset_begins_new_episodes(make_worker):
    """After reset() the next rollout starts with new episodes; the old ones are not reported."""
    worker = make_worker(CountingEnv, CountingPolicy, 1, 4)
    assert worker.collect().data["values"][:, 0].tolist() == [0, 1, 100, 101]
    worker.reset()
    experience = worker.collect()
    assert experience.data["values"][:, 0].tolist() == [200, 300, 301, 400]
    assert experience.info["episode_returns"] == [1.0, 3.0]
    assert experience.info["episode_lengths"] == [1, 2]


def test_reset_forgets_a_pending_autoreset(make_worker):
    """In NEXT_STEP mode a reset() right after an end leaves no step to be masked."""
    worker = make_worker(CountingEnv, CountingPolicy, 1, 2, autoreset_mode="NextStep")
    assert worker.collect().data["terminated"][:, 0].tolist() == [False, True]
    worker.reset()
    experience = worker.collect()
    assert experience.data["mask"].all()
    assert experience.data["values"][:, 0].tolist() == [100, 101]


def test_new_weights_are_used_by_the_next_rollout(make_worker):
    """The default load_weights reaches the policy that acts and values."""
    worker = make_worker(CountingEnv, CountingPolicy, 1, 2)
    worker.load_weights({"offset": torch.tensor(0.5)}, 2)
    data = worker.collect().data
    assert data["values"][:, 0].tolist() == [0.5, 1.5]
    assert data["next_values"][:, 0].tolist() == [1.5, 0.0]


def test_a_ready_module_is_copied(make_worker):
    """Workers in one process do not share the module that they were given, or train it."""
    policy = CountingPolicy().train()
    worker = make_worker(CountingEnv, policy, 1, 2)
    worker.load_weights({"offset": torch.tensor(0.5)}, 2)
    assert policy.offset.item() == 0.0
    assert policy.training
    assert not worker.model.training


def test_progress_is_told_by_every_environment(make_worker):
    """Each construction, reset and step of a single environment is progress."""
    calls = []
    context = replace(CONTEXT, _progress=functools.partial(calls.append, 1))
    worker = make_worker(CountingEnv, CountingPolicy, 2, 5, context=context)
    during_setup = len(calls)
    worker.collect()
    # Two constructions (the first is told twice) and two resets; in five steps each environment
    # ends two episodes.
    assert during_setup == 3 + 2
    assert len(calls) == during_setup + 2 * (5 + 2)


def test_teardown_closes_every_environment_once(make_worker):
    """The environments are closed, a second teardown does nothing, and access is refused."""
    worker = make_worker(CountingEnv, CountingPolicy, 3, 2)
    envs = worker.envs.envs
    worker.teardown()
    worker.teardown()
    assert [env.closed for env in envs] == [1, 1, 1]
    with pytest.raises(RuntimeError, match=r"between setup\(\) and teardown\(\)"):
        worker.envs  # noqa: B018 - the access is what is tested


def test_construction_is_cheap_and_picklable():
    """Nothing is made before setup, and the recipe travels to another process."""

    class Untouchable:
        def __reduce__(self):
            return list, ()

        def __call__(self, *args):
            raise AssertionError("called too early")

    GymnasiumWorker(Untouchable(), Untouchable())
    recipe = functools.partial(GymnasiumWorker, "CartPole-v1", ActorCritic, num_envs=8)
    worker = pickle.loads(pickle.dumps(recipe))()
    assert isinstance(worker, GymnasiumWorker)


OBSERVATION_SPACES = {
    "box": (spaces.Box(-1, 1, (3,), np.float32), torch.float32, 3),
    "double box": (spaces.Box(-1, 1, (2, 2), np.float64), torch.float32, 4),
    "image": (spaces.Box(0, 255, (2, 2, 3), np.uint8), torch.uint8, 12),
    "discrete": (spaces.Discrete(4, start=3), torch.int64, 4),
    "multi-discrete": (spaces.MultiDiscrete([3, 2]), torch.int64, 5),
    "multi-binary": (spaces.MultiBinary(6), torch.int8, 6),
}
ACTION_SPACES = {
    "discrete": (spaces.Discrete(3), torch.int64, ()),
    "discrete from 5": (spaces.Discrete(3, start=5), torch.int64, ()),
    "multi-discrete": (spaces.MultiDiscrete([3, 2, 4]), torch.int64, (3,)),
    "multi-discrete from 5": (
        spaces.MultiDiscrete([[3, 2], [2, 2]], start=[[5, 6], [7, 8]]),
        torch.int64,
        (2, 2),
    ),
    "box": (spaces.Box(-0.1, 0.1, (2,), np.float32), torch.float32, (2,)),
    "double box": (spaces.Box(-0.1, 0.1, (1, 2), np.float64), torch.float32, (1, 2)),
    "unbounded box": (spaces.Box(-np.inf, np.inf, (2,), np.float32), torch.float32, (2,)),
}


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_observations_of_every_space_arrive_unchanged(make_worker, name):
    """Each observation is delivered as the environment made it, in the documented dtype."""
    space, dtype, _ = OBSERVATION_SPACES[name]
    worker = make_worker(lambda: EchoEnv(space, spaces.Discrete(2)), ActorCritic, 2, 4)
    observations = worker.collect().data["observations"]
    assert observations.dtype is dtype
    assert observations.shape == (4, 2, *space.shape)
    for index, env in enumerate(worker.envs.envs):
        made = np.array(env.observations[:4], dtype=observations.numpy().dtype)
        assert np.array_equal(observations[:, index].numpy(), made)


def test_dict_observations_arrive_by_dotted_name(make_worker):
    """Each leaf of a nested Dict space is a tensor of its own, as is each entry for the policy."""
    space = spaces.Dict(
        {
            "plain": OBSERVATION_SPACES["box"][0],
            "arm": spaces.Dict({"grip": OBSERVATION_SPACES["discrete"][0]}),
        }
    )
    worker = make_worker(lambda: EchoEnv(space, spaces.Discrete(2)), ActorCritic, 2, 4)
    data = worker.collect().data
    env = worker.envs.envs[1]
    plain = np.array([made["plain"] for made in env.observations[:4]])
    grip = np.array([made["arm"]["grip"] for made in env.observations[:4]])
    assert np.array_equal(data["observations.plain"][:, 1].numpy(), plain)
    assert np.array_equal(data["observations.arm.grip"][:, 1].numpy(), grip)
    assert data["observations.arm.grip"].dtype is torch.int64
    assert "observations" not in data
    assert list(get_observations(data)) == ["arm.grip", "plain"]


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_actions_of_every_space_are_valid_and_recorded(make_worker, name):
    """The environment gets actions of its space; what is recorded is what the policy chose."""
    space, dtype, shape = ACTION_SPACES[name]
    observation_space = OBSERVATION_SPACES["box"][0]
    worker = make_worker(lambda: EchoEnv(observation_space, space), ActorCritic, 2, 50)
    actions = worker.collect().data["actions"]
    assert actions.dtype is dtype
    assert actions.shape == (50, 2, *shape)
    for index, env in enumerate(worker.envs.envs):
        taken = np.array(env.actions)
        assert taken.dtype == space.dtype
        recorded = actions[:, index].numpy()
        if isinstance(space, spaces.Box):
            assert recorded.std() > 0.5  # not clipped, or the log-probabilities would be wrong
            recorded = recorded.astype(space.dtype).clip(space.low, space.high)
        assert np.array_equal(taken, recorded)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_an_environment_may_keep_its_last_action(make_worker, name, mode):
    """The action that an environment was given does not change in its hands afterwards."""
    observation_space, space = OBSERVATION_SPACES["box"][0], ACTION_SPACES[name][0]
    worker = make_worker(
        lambda: EchoEnv(observation_space, space), ActorCritic, 2, 1, autoreset_mode=mode
    )
    (env, _) = worker.envs.envs
    kept = []
    for _ in range(20):
        worker.collect()
        kept.append(env.last_action)
    assert np.array_equal(kept, env.actions)
    assert len({np.array(action).tobytes() for action in kept}) > 1


@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_the_learner_finds_the_log_probabilities_of_the_worker(make_worker, observations, actions):
    """ActorCritic.evaluate agrees with what act and value reported during the rollout."""
    observation_space, action_space = OBSERVATION_SPACES[observations][0], ACTION_SPACES[actions][0]
    worker = make_worker(lambda: EchoEnv(observation_space, action_space), ActorCritic, 2, 4)
    data = {name: tensor.flatten(0, 1) for name, tensor in worker.collect().data.items()}
    log_probs, _, values = worker.model.evaluate(get_observations(data), data["actions"])
    torch.testing.assert_close(log_probs.detach(), data["log_probs"])
    torch.testing.assert_close(values.detach(), data["values"])


def test_delivered_tensors_can_be_trained_on(make_worker):
    """Nothing that is delivered is an inference tensor, so a learner in this process may use it."""
    data = make_worker("CartPole-v1", ActorCritic, 2, 4).collect().data
    assert not any(tensor.is_inference() for tensor in data.values())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_envs": 0}, "num_envs = 0: must be an integer of at least 1"),
        ({"rollout_length": 2.5}, "rollout_length = 2.5: must be an integer of at least 1"),
        (
            {"env": 3},
            "env = 3: must be an environment id, an EnvSpec, or a callable that makes one",
        ),
        (
            {"env": ["CartPole-v1", 3]},
            "env[1] = 3: must be an environment id, an EnvSpec, or a callable that makes one",
        ),
        (
            {"env": ["CartPole-v1"] * 2, "num_envs": 3},
            "num_envs = 3: env has 2 entries",
        ),
        (
            {"env_kwargs": 3},
            "env_kwargs = 3: must be a mapping, or a callable (context, index) that returns one",
        ),
        ({"policy": None}, "policy = None: must be a module or a callable that makes one"),
        (
            {"vectorization": "threads"},
            "vectorization = 'threads': must be one of 'sync', 'async', 'vector_entry_point'",
        ),
        (
            {"autoreset_mode": "never"},
            "autoreset_mode = 'never': must be one of 'NextStep', 'SameStep', 'Disabled'",
        ),
        (
            {"vectorization": "vector_entry_point", "env": CountingEnv},
            f"env = {CountingEnv!r}: only an id can have a vector entry point",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, problem):
    """The constructor names the argument, its value and what it must be."""
    with pytest.raises(ConfigurationError) as caught:
        GymnasiumWorker(**{"env": "CartPole-v1", "policy": ActorCritic, **arguments})
    assert caught.value.problems == (problem,)


def test_all_bad_arguments_are_listed_together():
    """One error tells of every problem."""
    with pytest.raises(ConfigurationError) as caught:
        GymnasiumWorker(None, None, 0, 0, vectorization="", autoreset_mode="")
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "num_envs",
        "env",
        "vectorization",
        "autoreset_mode",
        "rollout_length",
        "policy",
    ]


class Misfit(CountingPolicy):
    """A policy with one thing wrong with it."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def act(self, observations):
        actions, log_probs, values = super().act(observations)
        return {
            "count": (actions, values),
            "actions": (actions.float(), log_probs, values),
            "values": (actions, log_probs, values.unsqueeze(-1)),
            "value()": (actions, log_probs, values),
        }[self.wrong]

    def value(self, observations):
        values = super().value(observations)
        return values.unsqueeze(-1) if self.wrong == "value()" else values


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (Misfit("count"), "act() returned 2 tensors, not (actions, log_probs, values)"),
        (
            Misfit("actions"),
            "act() returned actions of torch.float32, which does not fit torch.int64",
        ),
        (Misfit("values"), "act() returned values of shape (2, 1), not (2,)"),
        (
            nn.Identity(),
            "policy made Identity(): must be an nn.Module with the methods act() and value()",
        ),
        (
            lambda *_: 5,
            "policy made 5: must be an nn.Module with the methods act() and value()",
        ),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_in_setup(make_worker, policy, problem):
    """The first start fails, with the reason, rather than each rollout."""
    with pytest.raises(ConfigurationError) as caught:
        make_worker(CountingEnv, policy, 2, 4)
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "problem"),
    [
        (spaces.Text(5), spaces.Discrete(2), "the observation has the space Text"),
        (
            spaces.Dict({"a": spaces.Dict({"b": spaces.Text(5)})}),
            spaces.Discrete(2),
            "observation 'a.b' has the space Text",
        ),
        (
            spaces.Dict({"a.b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}),
            spaces.Discrete(2),
            "two observations share one dotted name",
        ),
        (spaces.Dict(), spaces.Discrete(2), "the observation space is an empty Dict"),
        (spaces.Discrete(2), spaces.Dict(a=spaces.Discrete(2)), "the action space is Dict"),
        (spaces.Discrete(2), spaces.Text(2), "the action space is Text("),
        (spaces.Discrete(2), spaces.Box(0, 9, (1,), np.int64), "the action space is Box(0, 9"),
    ],
)
def test_spaces_that_are_not_supported_are_named(
    make_worker, observation_space, action_space, problem
):
    """The error names the space, its place, and a way out."""
    with pytest.raises(ConfigurationError) as caught:
        make_worker(lambda: EchoEnv(observation_space, action_space), ActorCritic, 2, 4)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_without_gymnasium_the_import_says_what_to_install():
    """The error names the extra."""
    program = "import sys; sys.modules['gymnasium'] = None; import keisei.training.gymnasium"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.stderr.splitlines()[-1] == (
        "ImportError: Gymnasium environments need gymnasium>=1.1 and numpy; "
        'install them with: pip install "keisei[gymnasium]"'
    )

"""GymnasiumWorker with all sorts of environments: vector ones, wrapped ones, careless ones."""

from __future__ import annotations

import functools
import mmap
import multiprocessing
import random
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.gymnasium import ActorCritic, GymnasiumWorker, get_observations
from keisei.worker import WorkerContext
from training.environments import TRUNCATED, CountingEnv, CountingPolicy

CONTEXT = WorkerContext(worker_id=1, incarnation=0, num_workers=2, seed=7)
MODES = list(AutoresetMode)
# The returns of CountingEnv's first episodes: 1 + 2, 1 + 2 + 3, 1, 1 + 2.
RETURNS, LENGTHS = [3.0, 6.0, 1.0, 3.0], [2, 3, 1, 2]
STEPS = {mode: 14 if mode is AutoresetMode.NEXT_STEP else 10 for mode in MODES}

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def shared_heap():
    """Let multiprocessing make the heap of this process, which it keeps, before leaks count."""
    multiprocessing.RawArray("b", 1)


@pytest.fixture
def make_worker():
    """Give a maker of workers that are set up, and torn down after the test."""
    workers = []

    def make(env, policy=CountingPolicy, *args, context=CONTEXT, **kwargs):
        torch.manual_seed(context.seed)
        worker = GymnasiumWorker(env, policy, *args, **kwargs)
        workers.append(worker)
        worker.setup(context)
        return worker

    yield make
    for worker in workers:
        worker.teardown()


# episodes


class Scaled(gymnasium.RewardWrapper):
    def reward(self, reward):
        return reward / 100


class HalfEpisodes(gymnasium.Wrapper):
    """Ends after every step, as wrappers do that make an episode of each life."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._over = terminated or truncated
        return observation, reward, True, truncated, info

    def reset(self, **kwargs):
        if getattr(self, "_over", True):
            return self.env.reset(**kwargs)
        return np.zeros(2, np.float32), {}


def recorded(wrapper):
    return wrapper(gymnasium.wrappers.RecordEpisodeStatistics(CountingEnv()))


@pytest.mark.usefixtures("shared_heap")
@forks
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_those_that_the_environment_tells(make_worker, mode, vectorization):
    """A reward wrapper above the statistics changes rewards and no returns, in every mode."""
    env = functools.partial(recorded, Scaled)
    kwargs = {"autoreset_mode": mode, "vectorization": vectorization}
    experience = make_worker(env, CountingPolicy, 1, STEPS[mode], **kwargs).collect()
    assert experience.info["episode_returns"] == RETURNS
    assert experience.info["episode_lengths"] == LENGTHS
    assert experience.info["episode_source"] == "info"
    assert experience.data["rewards"].max().item() == pytest.approx(0.03)


@pytest.mark.parametrize("rollout_length", [1, 2, 10])
def test_an_end_of_which_the_environment_tells_nothing_is_no_episode(make_worker, rollout_length):
    """One episode for each life does not shorten games, also before the first game is over."""
    env = functools.partial(recorded, HalfEpisodes)
    worker = make_worker(env, CountingPolicy, 1, rollout_length)
    infos = [worker.collect().info for _ in range(10 // rollout_length)]
    assert [r for info in infos for r in info["episode_returns"]] == RETURNS
    assert {info["episode_source"] for info in infos} == {"info"}


def test_a_vector_wrapper_tells_of_episodes(make_worker):
    """RecordEpisodeStatistics around a whole vector environment is read as well."""

    def make():
        envs = SyncVectorEnv([lambda: Scaled(CountingEnv())] * 2)
        return gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)

    info = make_worker(make, CountingPolicy, 1, 14).collect().info
    assert info["episode_returns"] == pytest.approx([x / 100 for x in RETURNS for _ in range(2)])
    assert info["episode_lengths"] == [x for x in LENGTHS for _ in range(2)]


def test_an_entry_that_is_no_episode_is_left_alone(make_worker):
    """Simulators put other things under that name: without return and length rewards count."""

    class Logging(gymnasium.Wrapper):
        def step(self, action):
            *rest, _ = self.env.step(action)
            return (*rest, {"episode": {"terrain": 3}})

    info = make_worker(lambda: Logging(CountingEnv()), CountingPolicy, 1, 10).collect().info
    assert info["episode_returns"] == RETURNS
    assert info["episode_source"] == "rewards"


# memory


class Spoiling(CountingPolicy):
    """Works in place on what it is given."""

    def act(self, observations):
        decisions = super().act(observations)
        observations.fill_(-5)
        return decisions

    def value(self, observations):
        values = super().value(observations)
        if observations.shape[0] > 0:
            observations.mul_(1)
        return values


class SpoilingValue(CountingPolicy):
    def value(self, observations):
        values = super().value(observations).clone()
        observations.fill_(-5)
        return values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [Spoiling, SpoilingValue])
def test_a_policy_that_works_in_place_changes_no_record(make_worker, policy, mode):
    """Rollouts are those of a policy that leaves its input alone, also from one to the next."""
    args = 2, 3
    expected = make_worker(CountingEnv, CountingPolicy, *args, autoreset_mode=mode)
    worker = make_worker(CountingEnv, policy, *args, autoreset_mode=mode)
    for _ in range(5):
        one, other = expected.collect().data, worker.collect().data
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.usefixtures("shared_heap")
@forks
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
def test_a_reset_does_not_change_final_observations(make_worker, mode, vectorization):
    """Environments that reuse their observation array bootstrap correctly in every mode."""
    rollouts = []
    for reuses in (False, True):
        env = functools.partial(CountingEnv, reuses_memory=reuses)
        kwargs = {"autoreset_mode": mode, "vectorization": vectorization}
        rollouts.append(make_worker(env, CountingPolicy, 2, STEPS[mode], **kwargs).collect().data)
    for name, tensor in rollouts[0].items():
        assert torch.equal(tensor, rollouts[1][name]), name


ACTION_SPACES = [
    spaces.Discrete(3),
    spaces.MultiDiscrete([3, 2]),
    spaces.Box(-9, 9, (2,), np.float32),
    spaces.Box(-9, 9, (2,), np.float64),
]


class VectorClock(gymnasium.vector.VectorEnv):
    """Truncates after two steps; keeps its actions and sets them to zero in place."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - as Gymnasium has it

    def __init__(self, num_envs=2, action_space=ACTION_SPACES[0]):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 1e6, (2,), np.float32)
        self.single_action_space = action_space
        self.taken = []

    def reset(self, *, seed=None, options=None):
        self.now = 0
        return np.zeros((self.num_envs, 2), np.float32), {}

    def step(self, actions):
        self.taken.append(actions.copy())
        actions[:] = 0
        self.now += 1
        observations = np.full((self.num_envs, 2), self.now, np.float32)
        no = np.zeros(self.num_envs, bool)
        return observations, np.ones(self.num_envs), no, no.copy(), {}


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_a_vector_environment_cannot_change_recorded_actions(make_worker, space):
    """It is given a copy, in the space's dtype: what is recorded is what it got."""
    worker = make_worker(lambda: VectorClock(2, space), ActorCritic, 1, 6)
    actions = worker.collect().data["actions"].numpy()
    taken = np.array(worker.envs.taken)
    assert taken.dtype == space.dtype
    assert np.array_equal(actions.astype(space.dtype).clip(-9, 9), taken)
    assert actions.any()


# randomness


class Drawing(CountingEnv):
    """Observes a draw of each global generator."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(-9, 9, (3,), np.float32)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        draws = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return np.array(draws, np.float32), {}

    def step(self, action):
        observation, _ = self.reset()
        return observation, 0.0, False, False, {}


class Blind(nn.Module):
    def act(self, observations):
        values = self.value(observations)
        return values.long(), values, values

    def value(self, observations):
        return torch.zeros(len(get_observations({"observations": observations})))


@pytest.mark.usefixtures("shared_heap")
@forks
def test_every_process_of_an_environment_draws_for_itself(make_worker):
    """Forked environments share no generator with each other, and repeat under their seed."""

    def draws(seed):
        context = replace(CONTEXT, seed=seed)
        worker = make_worker(
            Drawing, lambda *_: Blind(), 3, 4, vectorization="async", context=context
        )
        return worker.collect().data["observations"].clone()

    first, second, other = draws(7), draws(7), draws(8)
    assert first.flatten().unique().numel() == first.numel()
    assert torch.equal(first, second)
    assert not torch.isin(first, other).any()


# values that do not fit


class Returning(CountingEnv):
    """Returns one strange observation, at its second step."""

    def __init__(self, space, first, strange):
        super().__init__(((9, TRUNCATED),))
        self.observation_space = space
        self._first, self._strange = first, strange
        self._steps = 0

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self._first, {}

    def step(self, action):
        self._steps += 1
        _, *rest = super().step(action)
        return self._strange if self._steps == 2 else self._first, *rest


BYTES = spaces.Box(0, 255, (2,), np.uint8)
FLOATS = spaces.Box(-9, 9, (2,), np.float32)
STRANGE = {
    "float in bytes": (BYTES, np.zeros(2, np.uint8), np.array([0.0, 0.8]), "float64 and holds 0.8"),
    "wrapped": (BYTES, np.zeros(2, np.uint8), np.array([0, 256]), "int64 and holds 256"),
    "nan in bytes": (BYTES, np.zeros(2, np.uint8), np.array([0, np.nan]), "holds nan"),
    "broadcast": (FLOATS, np.zeros(2, np.float32), np.zeros(1, np.float32), "shape (1,), not (2,)"),
    "scalar": (FLOATS, np.zeros(2, np.float32), 0.5, "shape (), not (2,)"),
    "text": (FLOATS, np.zeros(2, np.float32), np.array(["a", "b"]), "is <U1, not float32"),
    "half a state": (spaces.Discrete(3), 1, 1.5, "float64 and holds 1.5"),
    "missing": (
        spaces.Dict({"a": FLOATS, "b": spaces.Dict({1: FLOATS})}),
        {"a": np.zeros(2, np.float32), "b": {1: np.zeros(2, np.float32)}},
        {"a": np.zeros(2, np.float32), "b": {}},
        "observation 'b.1' of environment 1",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STRANGE)
def test_an_observation_that_does_not_fit_is_named(make_worker, name, mode):
    """The error tells the environment, the step, the value and what was expected."""
    space, first, strange, problem = STRANGE[name]
    envs = [
        functools.partial(Returning, space, first, strange if index else first)
        for index in range(2)
    ]
    worker = make_worker(envs, lambda *_: Many(), 2, 4, autoreset_mode=mode)
    with pytest.raises(ValueError, match="environment 1 at step 2 of") as caught:
        worker.collect()
    assert problem in str(caught.value)


@pytest.mark.usefixtures("shared_heap")
@forks
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Gymnasium's logger repeats the error
def test_an_observation_that_does_not_fit_is_named_by_another_process(make_worker):
    """An environment in a process of its own is checked there, before anything is cast."""
    space, first, strange, problem = STRANGE["wrapped"]
    envs = [functools.partial(Returning, space, first, one) for one in (first, strange)]
    worker = make_worker(envs, lambda *_: Many(), 2, 4, vectorization="async")
    with pytest.raises(ValueError, match="environment 1 at step 2 of its episode") as caught:
        worker.collect()
    assert problem in str(caught.value)


class Many(nn.Module):
    def act(self, observations):
        values = self.value(observations)
        return values.long(), values, values

    def value(self, observations):
        first = observations if isinstance(observations, torch.Tensor) else observations["a"]
        return torch.zeros(len(first))


@pytest.mark.parametrize(
    ("space", "observation"),
    [
        (BYTES, np.array([3, 200])),
        (BYTES, np.array([3.0, 200.0])),
        (FLOATS, np.array([3, 2])),
        (FLOATS, np.array([3.0, 2.0])),
        (FLOATS, [3.0, 2.0]),
        (FLOATS, torch.tensor([3.0, 2.0], requires_grad=True)),
        (spaces.Discrete(300), np.int32(3)),
        (spaces.Discrete(300), 3),
    ],
)
def test_values_of_another_type_that_fit_are_taken(make_worker, space, observation):
    """Whatever holds the same numbers is as good as the space's own dtype."""
    env = functools.partial(Returning, space, observation, observation)
    recorded = make_worker(env, lambda *_: Many(), 2, 3).collect().data["observations"]
    assert recorded[2, 1].flatten().tolist() == torch.as_tensor(observation).flatten().tolist()


class Breaking(gymnasium.Wrapper):
    """Puts something into environment 1 at step 2."""

    def __init__(self, env, what, value):
        super().__init__(env)
        self._what, self._value = what, value
        self._steps = 0

    def step(self, action):
        self._steps += 1
        observation, reward, *rest = self.env.step(action)
        if self._steps == 2 and self._what == "rewards":
            reward = self._value
        if self._steps == 2 and self._what == "observations":
            observation = np.array([self._value, 0], np.float32)
        return observation, reward, *rest


class NaNPolicy(CountingPolicy):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def act(self, observations):
        results = dict(
            zip(("actions", "log_probs", "values"), super().act(observations), strict=True)
        )
        broken = (observations[:, 1] == 2) & (observations[:, 0] == 0)
        results[self.what] = results[self.what].masked_fill(broken, float("nan"))
        return tuple(results.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["rewards", "observations", "log_probs", "values"])
def test_a_number_that_is_none_is_named(make_worker, what, mode):
    """NaN in a rollout raises, with the tensor, the environment and the step."""
    schedule = ((9, TRUNCATED),)
    plain = functools.partial(CountingEnv, schedule)
    if what in ("rewards", "observations"):
        broken = functools.partial(Breaking, CountingEnv(schedule), what, float("nan"))
        envs, policy = [plain, broken], CountingPolicy
    else:
        late = functools.partial(CountingEnv, ((1, TRUNCATED), *schedule))
        envs, policy = [late, plain], NaNPolicy(what)
    worker = make_worker(envs, policy, 2, 4, autoreset_mode=mode)
    step = 1 if what == "rewards" else 2
    with pytest.raises(ValueError, match=f"^{what} of environment 1 at step {step} of .* is n"):
        worker.collect()


def test_infinite_rewards_are_refused_and_infinite_observations_are_not(make_worker):
    """Nothing can be learned from an infinite return; an observation is the policy's matter."""

    def make(what):
        return Breaking(CountingEnv(((9, TRUNCATED),)), what, float("inf"))

    worker = make_worker(lambda: make("rewards"), CountingPolicy, 1, 4)
    with pytest.raises(ValueError, match=r"rewards of environment 0 at step 1 .* is inf"):
        worker.collect()
    worker = make_worker(lambda: make("observations"), lambda *_: Blind(), 1, 4)
    assert worker.collect().data["observations"][2, 0, 0].isinf()


# user code


class Learning(gymnasium.Wrapper):
    """Trains a network in step() and reset(), as curiosity does."""

    def __init__(self, env):
        super().__init__(env)
        self.net = nn.Linear(2, 2)

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        self.net(torch.as_tensor(observation)).square().mean().backward()
        assert self.net.weight.grad is not None
        return observation, reward, *rest

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.net(torch.as_tensor(observation)).sum().backward()
        return observation, info


@pytest.mark.parametrize("mode", MODES)
def test_environments_may_learn(make_worker, mode):
    """Only the policy runs in inference mode; a network in an environment has its gradients."""
    worker = make_worker(lambda: Learning(CountingEnv()), CountingPolicy, 2, 5, autoreset_mode=mode)
    assert worker.collect().data["rewards"][0].tolist() == [1, 1]


# progress


@pytest.mark.usefixtures("shared_heap")
@forks
@pytest.mark.parametrize("mode", MODES)
def test_environments_in_their_processes_tell_of_progress(make_worker, mode):
    """The constructions, resets and steps of forked environments reach the worker's supervisor."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)

    def progress():
        shared[0] += 1

    context = replace(CONTEXT, _progress=progress)
    worker = make_worker(
        CountingEnv,
        CountingPolicy,
        1,
        4,
        vectorization="async",
        autoreset_mode=mode,
        context=context,
    )
    # The environment that shows its spaces, and the one in the process; then its first reset.
    constructions_and_resets = shared[0]
    assert constructions_and_resets >= 2 + 1
    worker.collect()
    assert shared[0] >= constructions_and_resets + 2 * 4
    shared.close()


# vector environments


class Overriding(SyncVectorEnv):
    """A vector environment whose step adds to the rewards."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards + 10, *rest


@pytest.mark.parametrize("mode", MODES)
def test_an_overridden_step_is_called(make_worker, mode):
    """A subclass of SyncVectorEnv is stepped by its own step, in every mode."""
    worker = make_worker(
        lambda: Overriding([CountingEnv] * 2, autoreset_mode=mode), CountingPolicy, 1, STEPS[mode]
    )
    experience = worker.collect()
    mask = experience.data["mask"][:, 1]
    rewards = experience.data["rewards"][:, 1][mask].tolist()
    assert rewards == [11, 12, 11, 12, 13, 11, 11, 12, 11, 12]
    assert worker.envs.num_envs == 2


class TensorClock(VectorClock):
    """Returns tensors, as simulators on a device do, and terminates after two steps."""

    def step(self, actions):
        observations, rewards, _, truncated, infos = super().step(actions)
        terminated = torch.full((self.num_envs,), self.now == 2)
        self.now %= 2
        observations = torch.from_numpy(observations) * ~terminated[:, None]
        return observations, torch.as_tensor(rewards), terminated, torch.as_tensor(truncated), infos


def test_tensors_are_as_good_as_arrays(make_worker):
    """A SAME_STEP environment that returns tensors needs no final observation to terminate."""
    experience = make_worker(TensorClock, lambda *_: Blind(), 1, 4).collect()
    assert experience.data["terminated"][:, 0].tolist() == [False, True, False, True]
    assert experience.data["observations"][:, 1, 0].tolist() == [0, 1, 0, 1]
    assert experience.info["episode_returns"] == [2.0] * 4


def test_a_final_observation_that_is_needed_and_missing_is_named(make_worker):
    """After a truncation the value of the last observation is needed: the error says where."""

    class Truncating(VectorClock):
        def step(self, actions):
            observations, rewards, terminated, _, infos = super().step(actions)
            return observations, rewards, terminated, np.array([False, self.now == 3]), infos

    worker = make_worker(Truncating, lambda *_: Blind(), 1, 4)
    with pytest.raises(
        ValueError, match=r"environment 1, whose episode ended at step 2 .*final_obs"
    ):
        worker.collect()


def test_a_vector_environment_without_a_mode_is_asked_for_it(make_worker):
    """It is not guessed when it resets; told by an argument, it works."""

    class Silent(VectorClock):
        metadata = {}  # noqa: RUF012 - as Gymnasium has it

    with pytest.raises(ConfigurationError, match="Silent does not say when it resets"):
        make_worker(Silent, lambda *_: Blind(), 1, 4)
    worker = make_worker(Silent, lambda *_: Blind(), 1, 4, autoreset_mode="SameStep")
    assert worker.collect().data["rewards"].tolist() == [[1, 1]] * 4


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"autoreset_mode": "NextStep"}, "the vector environment VectorClock has its own"),
        ({"num_envs": 3}, "num_envs = 3: env makes a vector environment of 2"),
        ({"vectorization": "async"}, "env makes a vector environment, which steps"),
    ],
)
def test_arguments_that_contradict_a_vector_environment_are_refused(make_worker, kwargs, problem):
    """The start fails with one sentence that says what to leave out."""
    with pytest.raises(ConfigurationError, match=problem):
        make_worker(VectorClock, lambda *_: Blind(), **kwargs)


class Legal(CountingEnv):
    """Has infos whose arrays differ in length, at resets too."""

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return observation, {**info, "legal": np.arange(int(observation[0]) % 3 + id(self) % 2)}

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "legal": np.arange(int(rest[1])), "code": lambda: None}


@pytest.mark.usefixtures("shared_heap")
@forks
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
def test_infos_may_be_of_any_kind_and_length(make_worker, mode, vectorization):
    """What is not read is neither merged nor sent to another process."""
    kwargs = {"autoreset_mode": mode, "vectorization": vectorization}
    info = make_worker(Legal, CountingPolicy, 2, STEPS[mode], **kwargs).collect().info
    assert info["episode_returns"] == [x for x in RETURNS for _ in range(2)]


# sources


def test_keywords_may_differ_by_worker_and_index(make_worker):
    """A callable gives the arguments of each environment."""

    def kwargs(context, index):
        return {"schedule": ((context.worker_id + index + 1, TRUNCATED),)}

    worker = make_worker(CountingEnv, CountingPolicy, 3, 6, env_kwargs=kwargs)
    truncated = worker.collect().data["truncated"].int()
    assert truncated.sum(0).tolist() == [3, 2, 1]


def test_a_specification_travels_by_value(make_worker):
    """An environment that is registered in the application alone is given as its EnvSpec."""
    gymnasium.register("Mine-v0", entry_point=CountingEnv, max_episode_steps=2)
    spec = gymnasium.spec("Mine-v0")
    gymnasium.registry.pop("Mine-v0")
    data = (
        make_worker(spec, CountingPolicy, 2, 4, env_kwargs={"schedule": ((9, TRUNCATED),)})
        .collect()
        .data
    )
    assert (data["terminated"] | data["truncated"])[:, 0].tolist() == [False, True, False, True]
    with pytest.raises(ConfigurationError, match=r"gymnasium.spec\('Mine-v0'\), or a factory"):
        make_worker("Mine-v0")


def test_an_id_may_name_its_module(make_worker, monkeypatch):
    """The module is imported by the worker, and registers the environment."""
    import sys
    import types

    module = types.ModuleType("my_environments")
    monkeypatch.setitem(sys.modules, "my_environments", module)
    gymnasium.register("Other-v0", entry_point=CountingEnv)
    try:
        worker = make_worker("my_environments:Other-v0", CountingPolicy, 1, 2)
    finally:
        gymnasium.registry.pop("Other-v0")
    assert worker.collect().data["rewards"].tolist() == [[1], [2]]


def test_what_is_no_environment_is_refused(make_worker):
    """The start fails and names what the factory returned."""
    with pytest.raises(ConfigurationError, match="env made 5 for index 0"):
        make_worker(lambda: 5)


def test_environments_are_closed_when_one_cannot_be_made(make_worker):
    """A start that fails leaves no environment open."""
    made = []

    def make(schedule):
        if len(made) == 2:
            raise OSError("no port")
        made.append(CountingEnv(schedule))
        return made[-1]

    with pytest.raises(OSError, match="no port"):
        make_worker(make, CountingPolicy, 3, env_kwargs={"schedule": ((1, TRUNCATED),)})
    assert [env.closed for env in made] == [1, 1]


def test_ales_vector_environment_collects(make_worker):
    """The vector entry point of the Arcade Learning Environment delivers its frames."""
    ale_py = pytest.importorskip("ale_py")
    gymnasium.register_envs(ale_py)
    kwargs = {"vectorization": "vector_entry_point", "env_kwargs": {"num_threads": 1}}
    worker = make_worker("ALE/Pong-v5", lambda *_: Blind(), 2, 3, **kwargs)
    data = worker.collect().data
    assert data["observations"].shape == (3, 2, 4, 84, 84)
    assert data["observations"].dtype is torch.uint8

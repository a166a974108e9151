"""PettingZoo environments of both kinds, driven from decision to decision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from keisei.exceptions import ConfigurationError
from keisei.worker import WorkerContext

_MAX_EMPTY_EPISODES = 100
"""Episodes in a row in which no agent acts; more are a mistake of the environment."""

EnvSource = str | Callable[..., Any]
EnvKwargs = Mapping[str, Any] | Callable[[WorkerContext, int], Mapping[str, Any]]


class Seen(NamedTuple):
    """What an agent knows when it must act."""

    agent: Any
    observation: Any
    info: Mapping[str, Any]


class Record(Protocol):
    """Who is told what becomes of the agents of one environment."""

    def begin_episode(self) -> None:
        """Begin an episode: all agents are new."""

    def is_full(self, agent: Any) -> bool:
        """Return whether no more of this agent's decisions fit into the rollout."""

    def reward(
        self, agent: Any, reward: float, *, terminated: bool, truncated: bool, observation: Any
    ) -> None:
        """Note what followed the agent's last decision, if it took one.

        Args:
            agent: Who.
            reward: All that it got since then.
            terminated: Whether that was its end.
            truncated: Whether it was cut off.
            observation: What it saw then.
        """

    def end_step(self) -> None:
        """Note that all agents of a parallel environment have had their rewards."""


class Driver(Protocol):
    """One environment. Its agents decide, and then it goes on."""

    def begin(self, seed: int | None) -> None:
        """Begin an episode."""

    def who_acts(self) -> list[Seen]:
        """Go on until agents must act, and return them; nobody, if the rollout is full."""

    def act(self, actions: Mapping[Any, Any]) -> None:
        """Take the actions of those whom ``who_acts`` returned."""


class TurnDriver:
    """An AEC environment, whose agents act one after the other.

    A reward that comes while others act belongs to the agent's last action: it is what ``last()``
    tells at its next turn.
    """

    def __init__(self, env: Any, record: Record, progress: Callable[[], None]) -> None:
        self._env = env
        self._record = record
        self._progress = progress

    def begin(self, seed: int | None) -> None:
        """Begin an episode."""
        self._env.reset(seed=seed)
        self._record.begin_episode()
        self._progress()

    def who_acts(self) -> list[Seen]:
        """Step the agents that have ended, begin episodes, and return the agent whose turn it is.

        Raises:
            RuntimeError: Nobody acts in many episodes.
        """
        env, num_empty = self._env, 0
        while True:
            if not env.agents:
                num_empty += 1
                if num_empty > _MAX_EMPTY_EPISODES:
                    raise RuntimeError(f"no agent acts in {num_empty} episodes in a row")
                self.begin(None)
                continue
            agent = env.agent_selection
            if self._record.is_full(agent):
                return []
            observation, reward, terminated, truncated, info = env.last()
            self._record.reward(
                agent,
                float(reward),
                terminated=bool(terminated),
                truncated=bool(truncated),
                observation=observation,
            )
            if not (terminated or truncated):
                return [Seen(agent, observation, info)]
            env.step(None)
            self._progress()

    def act(self, actions: Mapping[Any, Any]) -> None:
        """Take the action of the agent whose turn it is."""
        (action,) = actions.values()
        self._env.step(action)
        self._progress()


class TogetherDriver:
    """A parallel environment, whose agents act at the same time."""

    def __init__(self, env: Any, record: Record, progress: Callable[[], None]) -> None:
        self._env = env
        self._record = record
        self._progress = progress
        self._seen: list[Seen] = []

    def begin(self, seed: int | None) -> None:
        """Begin an episode.

        Raises:
            RuntimeError: Nobody acts in many episodes.
        """
        for _ in range(_MAX_EMPTY_EPISODES):
            observations, infos = self._env.reset(seed=seed)
            self._record.begin_episode()
            self._progress()
            self._seen = self._look(list(self._env.agents), observations, infos)
            if self._seen:
                return
            seed = None
        raise RuntimeError(f"no agent acts in {_MAX_EMPTY_EPISODES} episodes in a row")

    def who_acts(self) -> list[Seen]:
        """Return every agent that is there; nobody, if the rollout is full."""
        if any(self._record.is_full(seen.agent) for seen in self._seen):
            return []
        return self._seen

    def following(self) -> list[Seen]:
        """Return what the agents see that would act next."""
        return self._seen

    def act(self, actions: Mapping[Any, Any]) -> None:
        """Take the actions of all agents.

        An agent that is not there any more, without a word about its end, was cut off: it may come
        back as a new one.

        Raises:
            RuntimeError: The environment tells nothing about an agent that acted.
        """
        results = self._env.step(dict(actions))
        self._progress()
        observations, rewards, terminations, truncations, infos = results
        there = list(self._env.agents)
        stays = {
            agent
            for agent in there
            if not (terminations.get(agent, False) or truncations.get(agent, False))
        }
        for agent in actions:
            terminated = bool(terminations.get(agent, False))
            left = not terminated and agent not in stays
            self._record.reward(
                agent,
                float(_told(rewards, agent, "reward")),
                terminated=terminated,
                truncated=bool(truncations.get(agent, False)) or left,
                observation=None if terminated else _told(observations, agent, "observation"),
            )
        self._record.end_step()
        self._seen = self._look([one for one in there if one in stays], observations, infos)
        if not self._seen:
            self.begin(None)

    @staticmethod
    def _look(agents: list[Any], observations: Any, infos: Any) -> list[Seen]:
        return [
            Seen(agent, _told(observations, agent, "observation"), infos.get(agent) or {})
            for agent in agents
        ]


def _told(values: Mapping[Any, Any], agent: Any, what: str) -> Any:
    try:
        return values[agent]
    except KeyError:
        raise RuntimeError(f"the environment returned no {what} for agent {agent!r}") from None


def takes_turns(env: Any) -> bool:
    """Return whether an environment is of the AEC kind.

    Raises:
        ConfigurationError: It is of neither kind.
    """
    if callable(getattr(env, "last", None)) and callable(getattr(env, "agent_iter", None)):
        return True
    if callable(getattr(env, "step", None)) and hasattr(env, "possible_agents"):
        return False
    raise ConfigurationError(
        [
            f"env made {env!r}: must be a PettingZoo environment, AECEnv or ParallelEnv, with "
            "possible_agents; for one of Gymnasium use GymnasiumWorker"
        ]
    )


@dataclass(frozen=True)
class AgentEnvMaker:
    """A picklable recipe for environments of several agents.

    Attributes:
        env: An id such as ``"classic/connect_four_v3"``, a module, or a callable.
        num_envs: How many.
        env_kwargs: Arguments for each, or what gives them for the worker and the index.
    """

    env: Any
    num_envs: int
    env_kwargs: Any

    def find_problems(self) -> Iterator[str]:
        """Say what cannot work, one line for each problem."""
        if not isinstance(self.env, str) and not callable(self.env):
            yield (
                f"env = {self.env!r}: must be an id such as 'classic/connect_four_v3', the name of "
                "a module, or a callable that makes an environment"
            )
        if not callable(self.env_kwargs) and not isinstance(self.env_kwargs, Mapping):
            yield f"env_kwargs = {self.env_kwargs!r}: must be a mapping or a callable"

    def make(self, context: WorkerContext) -> list[Any]:
        """Make the environments.

        Raises:
            ConfigurationError: The module cannot be imported, or makes no environments.
        """
        make = _maker_of(self.env) if isinstance(self.env, str) else self.env
        envs = []
        for index in range(self.num_envs):
            given = self.env_kwargs
            envs.append(make(**(given(context, index) if callable(given) else given)))
            context.progress()
        return envs


def _maker_of(name: str) -> Callable[..., Any]:
    """Return what makes an environment that is named by its id or its module.

    Raises:
        ConfigurationError: There is no such id or module, or it makes no environments.
    """
    try:
        if "/" in name:
            return _registered(name)
        module = importlib.import_module(name)
    except ImportError as error:
        remedy = ""
        if (error.name or "").partition(".")[0] == "pettingzoo":
            remedy = '; install PettingZoo with: pip install "keisei[pettingzoo]"'
        raise ConfigurationError([f"env = {name!r}: {error}{remedy}"]) from error
    for kind in ("parallel_env", "env"):
        make = getattr(module, kind, None)
        if callable(make):
            found: Callable[..., Any] = make
            return found
    raise ConfigurationError([f"env = {name!r}: the module has no env() or parallel_env()"])


def _registered(name: str) -> Callable[..., Any]:
    import pettingzoo
    from pettingzoo.env_registry.exceptions import PettingZooRegistryError

    told = ""
    for kind in ("parallel", "aec"):
        try:
            found = pettingzoo.spec(kind, name)
        except PettingZooRegistryError as error:
            told = str(error)
        else:
            return partial(pettingzoo.make, kind, found)
    raise ConfigurationError([f"env = {name!r}: {told}"])

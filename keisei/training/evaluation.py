"""evaluate_policy: whole episodes with a policy that acts deterministically, here or on a pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.parallel.parallel_manager import ParallelManager
from keisei.training.playing import Player
from keisei.training.policy_base import PolicyMaker, make_policy
from keisei.training.spaces import gymnasium, np
from keisei.worker import Experience, Worker, WorkerContext

EnvSource = str | Callable[..., gymnasium.Env[Any, Any]]
"""An environment id for ``gymnasium.make``, or a callable that returns an environment."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Whole episodes.

    Attributes:
        returns: Undiscounted sums of rewards, in double precision, or what the environment told as
            ``info["episode"]``; by environment, then in order of time.
        lengths: Steps of the same episodes.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean_return(self) -> float:
        """The mean of ``returns``."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """The population standard deviation of ``returns``."""
        return float(np.std(self.returns))

    @property
    def mean_length(self) -> float:
        """The mean of ``lengths``."""
        return float(np.mean(self.lengths))


def evaluate_policy(
    policy: nn.Module,
    env: EnvSource,
    *,
    episodes: int = 10,
    num_envs: int = 1,
    seed: int | None = None,
    deterministic: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play whole episodes in this process.

    Each environment plays its fixed share of them, so short episodes count no more than long ones.
    The policy plays in evaluation mode, without gradients, and is left as it was. Blocks: call it
    in a thread from a coroutine.

    Args:
        policy: A ``Policy``, recurrent or not. Its ``act`` takes ``deterministic``.
        env: What to play.
        episodes: How many in all.
        num_envs: Environments that are stepped in turn, the policy acting for all at once.
        seed: Of the environments; each has its own. The same seed, policy and ``num_envs`` give the
            same episodes if the policy is deterministic. ``None`` draws one.
        deterministic: Whether the policy takes its likeliest actions.
        env_kwargs: Arguments for every environment.

    Raises:
        ConfigurationError: ``episodes`` or ``num_envs`` is not positive.
        ValueError: The policy's outputs are not finite; see ``ActorCritic.act``.
    """
    _check_counts(episodes=episodes, num_envs=num_envs)
    num_envs = min(num_envs, episodes)
    shares = [len(range(index, episodes, num_envs)) for index in range(num_envs)]
    with Player(env, num_envs, env_kwargs or {}, seed, deterministic=deterministic) as player:
        played = player.play(policy, shares)
    return _evaluation_of([episode for share in played for episode in share])


async def evaluate_on_pool(
    policy: nn.Module,
    env: EnvSource,
    *,
    episodes: int = 100,
    envs_per_worker: int = 1,
    deterministic: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play whole episodes on a pool of its own.

    In each round every environment of every worker plays one episode, so no worker's or
    environment's episodes are there more often than another's because they are short; what the last
    round has beyond ``episodes`` is left out by its place in the pool. A worker that fails plays
    its round again. When cancelled, every worker is ended.

    Args:
        policy: As for ``evaluate_policy``; the workers have copies.
        env: What to play; it travels to the workers.
        episodes: How many in all.
        envs_per_worker: Environments of each worker.
        deterministic: Whether the policy takes its likeliest actions.
        env_kwargs: Arguments for every environment.
        config: Of the pool: ``num_workers``, ``seed`` …; the mode is ``"sync"``.

    Raises:
        ConfigurationError: An argument that cannot work.
        PoolExhausted: Workers failed too often.
        WorkerStartError: A worker cannot start: the environment or the policy cannot be made.
    """
    _check_counts(episodes=episodes, envs_per_worker=envs_per_worker)
    worker = partial(
        EvaluationWorker,
        env,
        policy,
        envs_per_worker,
        deterministic=deterministic,
        env_kwargs=dict(env_kwargs or {}),
    )
    settings = {**(config or {}), "mode": "sync"}
    found: list[tuple[float, int]] = []
    async with ParallelManager(worker, model=policy, config=settings) as manager:
        while len(found) < episodes:
            for batch in await manager.collect():
                pair = (batch.data["returns"].tolist(), batch.data["lengths"].tolist())
                found += zip(*pair, strict=True)
    return _evaluation_of(found[:episodes])


class EvaluationWorker(Worker):
    """Plays one whole episode in each of its environments in every ``collect``.

    An experience has ``returns`` (``float64 [N]``) and ``lengths`` (``int64 [N]``); ``num_steps``
    is the sum of the lengths.

    Args:
        env: What to play.
        policy: A module, which is copied, or a callable that makes one from the two spaces.
        num_envs: Environments of this worker.
        deterministic: Whether the policy takes its likeliest actions.
        env_kwargs: Arguments for every environment.
    """

    def __init__(
        self,
        env: EnvSource,
        policy: nn.Module | PolicyMaker,
        num_envs: int = 1,
        *,
        deterministic: bool = True,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._env, self._policy, self._num_envs = env, policy, num_envs
        self._deterministic, self._env_kwargs = deterministic, dict(env_kwargs or {})
        self._player: Player | None = None

    def setup(self, context: WorkerContext) -> None:
        """Make the environments and the policy."""
        self._player = player = Player(
            self._env,
            self._num_envs,
            self._env_kwargs,
            context.seed,
            deterministic=self._deterministic,
            progress=context.progress,
        )
        env = player.envs[0]
        policy = make_policy(self._policy, env.observation_space, env.action_space)
        self.model = policy.to(context.device).eval()

    def collect(self) -> Experience:
        """Play one episode in each environment."""
        if self._player is None or self.model is None:
            raise RuntimeError("collect() was called before setup()")
        played = self._player.play(self.model, [1] * self._num_envs)
        returns, lengths = zip(*[share[0] for share in played], strict=True)
        data = {
            "returns": torch.tensor(returns, dtype=torch.float64),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
        }
        return Experience(data, num_steps=sum(lengths))

    def teardown(self) -> None:
        """Close the environments."""
        if self._player is not None:
            self._player.close()


def _check_counts(**counts: int) -> None:
    problems = [
        f"{name} = {value!r}: must be an integer of at least 1"
        for name, value in counts.items()
        if type(value) is not int or value < 1
    ]
    if problems:
        raise ConfigurationError(problems)


def _evaluation_of(played: Sequence[tuple[float, int]]) -> Evaluation:
    returns, lengths = zip(*played, strict=True)
    return Evaluation(returns, lengths)

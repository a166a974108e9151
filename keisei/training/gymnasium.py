"""Rollouts from any Gymnasium environment: ``GymnasiumWorker`` and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.actions import make_action_filter
from keisei.training.actor_critic import ActorCritic, Policy
from keisei.training.checks import check_numbers
from keisei.training.episodes import EpisodeLog
from keisei.training.infos import tells_episodes
from keisei.training.policy_base import make_policy
from keisei.training.rollout_buffer import RolloutBuffer
from keisei.training.rollouts import (
    Observations,
    generalized_advantage_estimate,
    get_observations,
)
from keisei.training.sources import (
    EnvKwargs,
    EnvSource,
    OpenEnvs,
    Source,
    find_count_problems,
)
from keisei.training.spaces import AutoresetMode, Space, VectorEnv, np, observation_leaves
from keisei.training.stepping import make_stepper
from keisei.worker import Experience, Worker, WorkerContext

__all__ = [
    "ActorCritic",
    "GymnasiumWorker",
    "Observations",
    "Policy",
    "generalized_advantage_estimate",
    "get_observations",
]


class GymnasiumWorker(Worker):
    """Collects rollouts of ``rollout_length`` steps from ``num_envs`` environments.

    Episodes continue from one rollout to the next. Each rollout has the following tensors, on the
    CPU and aliased to the worker's buffer, which the next ``collect`` overwrites (the pool copies
    them before). ``T`` is the rollout length and ``N`` the number of environments.

    ======================= ============== =====================================================
    ``observations``        space's dtype  ``[T, N, *shape]``, floats as ``float32``; for a
                                           ``Dict`` space one ``observations.<name>`` for each
                                           leaf, with dotted names where it is nested
    ``actions``             space's dtype  ``[T, N, *shape]`` as the policy returned them, floats
                                           as ``float32``; before clipping to a ``Box``
    ``log_probs``           ``float32``    ``[T, N]`` of those actions
    ``values``              ``float32``    ``[T, N]`` of the observations
    ``next_values``         ``float32``    ``[T, N]`` values of the observations that the actions
                                           led to: 0 after a termination, that of the episode's
                                           last observation after a truncation
    ``rewards``             ``float32``    ``[T, N]``
    ``terminated``          ``bool``       ``[T, N]``
    ``truncated``           ``bool``       ``[T, N]``
    ``mask``                ``bool``       ``[T, N]``; where false the step only reset an
                                           environment and is no transition: leave it out of
                                           the loss. All true unless the mode is ``NEXT_STEP``
    ``next_observations``   as before      ``[T, N, *shape]``, with ``next_observations=True``: what
                                           each action led to, at an end the episode's last
                                           observation, so that a row is a whole transition;
                                           named by leaves as ``observations`` is
    ======================= ============== =====================================================

    ``generalized_advantage_estimate`` takes these tensors as they are. ``num_steps`` counts the
    true entries of ``mask``. ``info`` has the worker's ``seed``, and of the episodes that ended in
    the rollout, oldest first:

    ======================= =====================================================================
    ``episode_returns``     ``list[float]``, undiscounted
    ``episode_lengths``     ``list[int]``, in steps
    ``episode_source``      ``"info"`` if the environments tell of their episodes, as Gymnasium's
                            ``RecordEpisodeStatistics`` does in ``info["episode"]``: then only
                            those count, whatever wrappers above do to rewards and ends.
                            ``"rewards"`` if the worker adds up the rewards that it gets
    ======================= =====================================================================

    Policies and environments are given copies, so nothing that they do in place changes the record.
    Only the policy runs in ``torch.inference_mode``; environments may learn in ``step`` and
    ``reset``. An observation that does not fit its space (another shape, or values that its dtype
    cannot hold) and a number that is NaN raise, with the environment, the name and the step.

    The same ``context.seed`` gives the same rollouts, bit by bit, if the policy draws from torch's
    global generator, as ``ActorCritic`` does, and the pool (or the caller) seeded that.

    Args:
        env: An environment id for ``gymnasium.make`` (also ``"module:Id-v0"``), an ``EnvSpec``, or
            a callable that returns an environment or a vector environment, such as a wrapped one
            or one of EnvPool; or a sequence with one of these (no vector environment) per index.
        policy: A callable ``policy(observation_space, action_space)``, given the spaces of one
            environment, that returns an ``nn.Module`` which is a ``Policy``; the class
            ``ActorCritic`` is one. Or such a module, which is copied.
        num_envs: Environments in this worker. A callable's vector environment has its own number.
        rollout_length: Steps of each environment in one rollout.
        env_kwargs: Arguments for every environment; or a callable ``(context, index)`` that gives
            those of one, for ports, folders, scenarios or names by worker and index.
        vectorization: ``"sync"`` steps the environments one after the other, ``"async"`` gives
            each a process of its own below the worker's, with generators of its own, and
            ``"vector_entry_point"`` takes the vector environment that is registered with the id.
        autoreset_mode: A ``gymnasium.vector.AutoresetMode`` or its value. Experience is correct in
            all of them. By default ``DISABLED``: the worker resets environments itself, so no
            step is wasted and no final observation can be overwritten by the reset. A vector
            environment has its own mode; give it here only if its metadata does not.
        next_observations: Deliver ``next_observations``, for off-policy learners.

    Raises:
        ConfigurationError: An argument that cannot work.
    """

    def __init__(  # noqa: PLR0913 - each is an option that many users leave alone
        self,
        env: Source | Sequence[Source],
        policy: Callable[[Space[Any], Space[Any]], nn.Module] | nn.Module,
        num_envs: int = 1,
        rollout_length: int = 128,
        *,
        env_kwargs: EnvKwargs | None = None,
        vectorization: str = "sync",
        autoreset_mode: AutoresetMode | str | None = None,
        next_observations: bool = False,
    ) -> None:
        self._source = EnvSource(
            env,
            num_envs,
            {} if env_kwargs is None else env_kwargs,
            vectorization,
            autoreset_mode,
            frozenset({"episode"}),
        )
        problems = list(self._source.find_problems())
        problems += find_count_problems(rollout_length=rollout_length)
        if not callable(policy):
            problems.append(f"policy = {policy!r}: must be a module or a callable that makes one")
        if problems:
            raise ConfigurationError(problems)
        self._policy = policy
        self._rollout_length = rollout_length
        self._next_observations = next_observations
        self._opened: OpenEnvs | None = None

    @property
    def envs(self) -> VectorEnv[Any, Any, Any]:
        """The vector environment.

        Raises:
            RuntimeError: It does not exist before ``setup`` and after ``teardown``.
        """
        if self._opened is None:
            raise RuntimeError("the environments exist only between setup() and teardown()")
        return self._opened.envs

    def setup(self, context: WorkerContext) -> None:
        """Build environments and policy, begin episodes, and try the policy on them once.

        The construction and the first reset of each single environment are progress.

        Raises:
            ConfigurationError: The environments cannot be made as told, their spaces are not
                supported, or the policy does not fit them.
            ValueError: A first observation does not fit its space.
        """
        self.context = context
        self._opened = opened = self._source.open(context)
        envs = opened.envs
        make_action_filter(envs.single_action_space)  # refuses what has no tensors
        self._buffer = buffer = RolloutBuffer(
            observation_leaves(envs.single_observation_space),
            envs.single_action_space,
            self._rollout_length,
            envs.num_envs,
            next_observations=self._next_observations,
        )
        self._episodes = EpisodeLog(envs.num_envs, is_told=tells_episodes(envs))
        self._stepper = make_stepper(opened, buffer, self._episodes, context.progress)
        self.model = model = self._make_policy(envs).to(context.device).eval()
        self._act, self._value = model.act, model.value
        # 31 bits, since environments exist that hand their seed on to a 32-bit generator.
        self._stepper.begin(int(np.random.SeedSequence(context.seed).generate_state(1)[0]) >> 1)
        self._check_policy()

    def collect(self) -> Experience:
        """Take ``rollout_length`` steps in every environment.

        Raises:
            ValueError: An observation does not fit its space, or a number of the rollout is NaN;
                names the environment, the tensor and the step.
        """
        buffer, act, step = self._buffer, self._act, self._stepper.step
        device, inference_mode = self.context.device, torch.inference_mode()
        buffer.begin()
        for row in range(self._rollout_length):
            with inference_mode:  # the policy's, not the environments': those may learn in step()
                buffer.write_decisions(row, *act(buffer.policy_input(row, device)))
            step(row)
        with inference_mode:
            values = self._value(buffer.bootstrap_input(device))
        data = buffer.finish(values)
        check_numbers(data, buffer.scores)
        info = {**self._episodes.take(), "seed": self.context.seed}
        return Experience(data, info, num_steps=int(np.count_nonzero(buffer.mask)))

    def reset(self) -> None:
        """Begin new episodes in all environments; those in progress are not reported."""
        self._stepper.begin(None)

    def teardown(self) -> None:
        """Close the environments."""
        if self._opened is not None:
            self._opened.envs.close()
            self._opened = None
            vars(self).pop("_stepper", None)  # it holds the environments too

    def _make_policy(self, envs: VectorEnv[Any, Any, Any]) -> Any:
        spaces = (envs.single_observation_space, envs.single_action_space)
        policy: Any = make_policy(self._policy, *spaces)
        if isinstance(policy, nn.Module) and isinstance(policy, Policy):
            return policy
        raise ConfigurationError(
            [f"policy made {policy!r}: must be an nn.Module with the methods act() and value()"]
        )

    def _check_policy(self) -> None:
        """Find misfits now, where an error stops the start for good and is not retried."""
        buffer, device = self._buffer, self.context.device
        with torch.inference_mode():
            decisions = self._act(buffer.policy_input(-1, device))
            values = self._value(buffer.policy_input(-1, device))
        problems = buffer.find_misfits(decisions, values)
        if problems:
            raise ConfigurationError(problems)

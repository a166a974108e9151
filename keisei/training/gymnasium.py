"""Rollouts from any Gymnasium environment: ``GymnasiumWorker`` and what belongs to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.actor_critic import ActorCritic, Policy
from keisei.training.episodes import EpisodeLog
from keisei.training.rollout_buffer import RolloutBuffer
from keisei.training.rollouts import (
    Observations,
    generalized_advantage_estimate,
    get_observations,
)
from keisei.training.spaces import (
    AutoresetMode,
    Space,
    SyncVectorEnv,
    VectorEnv,
    gymnasium,
    np,
    observation_leaves,
)
from keisei.training.vectorization import (
    VectorEnvMaker,
    autoreset_mode_of,
    find_count_problems,
    make_action_filter,
)
from keisei.worker import Experience, Worker, WorkerContext

__all__ = [
    "ActorCritic",
    "GymnasiumWorker",
    "Observations",
    "Policy",
    "generalized_advantage_estimate",
    "get_observations",
]

_Array = np.ndarray[Any, Any]


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
    ======================= ============== =====================================================

    ``generalized_advantage_estimate`` takes these tensors as they are. ``info`` has the returns
    (``float``, undiscounted) and lengths of the episodes that ended in the rollout, oldest first,
    as ``episode_returns`` and ``episode_lengths``, and the worker's ``seed``. ``num_steps`` counts
    the true entries of ``mask``.

    The same ``context.seed`` gives the same rollouts, bit by bit, if the policy draws from torch's
    global generator, as ``ActorCritic`` does, and the pool (or the caller) seeded that.

    Args:
        env: An environment id for ``gymnasium.make``, or a callable that returns an environment.
        policy: A callable ``policy(observation_space, action_space)``, given the spaces of one
            environment, that returns an ``nn.Module`` which is a ``Policy``; the class
            ``ActorCritic`` is one. Or such a module, which is copied.
        num_envs: Environments in this worker.
        rollout_length: Steps of each environment in one rollout.
        env_kwargs: Arguments for every environment.
        vectorization: ``"sync"`` steps the environments one after the other, ``"async"`` gives
            each a process of its own below the worker's, and ``"vector_entry_point"`` takes the
            vector environment that is registered with the id.
        autoreset_mode: A ``gymnasium.vector.AutoresetMode`` or its value. Experience is correct in
            all of them. By default ``DISABLED``: the worker resets environments itself, so no
            step is wasted and no final observation can be overwritten by the reset. A vector
            entry point has its own mode.

    Raises:
        ConfigurationError: An argument that cannot work.
    """

    def __init__(
        self,
        env: str | Callable[..., gymnasium.Env[Any, Any]],
        policy: Callable[[Space[Any], Space[Any]], nn.Module] | nn.Module,
        num_envs: int = 1,
        rollout_length: int = 128,
        *,
        env_kwargs: Mapping[str, Any] | None = None,
        vectorization: str = "sync",
        autoreset_mode: AutoresetMode | str | None = None,
    ) -> None:
        self._make_envs = VectorEnvMaker(
            env, num_envs, dict(env_kwargs or {}), vectorization, autoreset_mode
        )
        problems = list(self._make_envs.find_problems())
        problems += find_count_problems(rollout_length=rollout_length)
        if not callable(policy):
            problems.append(f"policy = {policy!r}: must be a module or a callable that makes one")
        if problems:
            raise ConfigurationError(problems)
        self._policy = policy
        self._rollout_length = rollout_length
        self._envs: VectorEnv[Any, Any, Any] | None = None

    @property
    def envs(self) -> VectorEnv[Any, Any, Any]:
        """The vector environment.

        Raises:
            RuntimeError: It does not exist before ``setup`` and after ``teardown``.
        """
        if self._envs is None:
            raise RuntimeError("the environments exist only between setup() and teardown()")
        return self._envs

    def setup(self, context: WorkerContext) -> None:
        """Build environments and policy, begin episodes, and try the policy on them once.

        Raises:
            ConfigurationError: The spaces are not supported, or the policy does not fit them.
        """
        self.context = context
        self._envs = envs = self._make_envs()
        context.progress()
        self._mode = autoreset_mode_of(envs)
        self._leaves = observation_leaves(envs.single_observation_space)
        action_space = envs.single_action_space
        self._filter_actions = make_action_filter(action_space)
        self._buffer = RolloutBuffer(
            self._leaves, action_space, self._rollout_length, envs.num_envs
        )
        self._episodes = EpisodeLog(envs.num_envs)
        self.model = model = self._make_policy(envs).to(context.device).eval()
        self._act, self._value = model.act, model.value
        # 31 bits, since environments exist that hand their seed on to a 32-bit generator.
        seed = int(np.random.SeedSequence(context.seed).generate_state(1)[0]) >> 1
        self._resetting: _Array | None = None
        self._step = self._step_together
        if isinstance(envs, SyncVectorEnv) and self._mode is AutoresetMode.DISABLED:
            self._step, self._each = self._step_each, envs.envs
        self._begin_episodes(seed)
        self._check_policy()

    def collect(self) -> Experience:
        """Take ``rollout_length`` steps in every environment."""
        buffer, act, step, progress = self._buffer, self._act, self._step, self.context.progress
        with torch.inference_mode():
            buffer.begin()
            for row in range(self._rollout_length):
                buffer.write_decisions(row, *act(self._on_device(buffer.policy_inputs[row])))
                step(row)
                progress()
            values = self._value(self._on_device(buffer.bootstrap_inputs()))
            data = buffer.finish(values)
        info = {**self._episodes.take(), "seed": self.context.seed}
        return Experience(data, info, num_steps=int(np.count_nonzero(buffer.mask)))

    def reset(self) -> None:
        """Begin new episodes in all environments; those in progress are not reported."""
        self._begin_episodes(None)

    def teardown(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None

    def _begin_episodes(self, seed: int | None) -> None:
        observations, _ = self.envs.reset(seed=seed)
        self._buffer.write_observations(-1, observations)
        self._episodes.begin()
        self._resetting = None

    def _step_each(self, row: int) -> None:
        """Step environments of this process one by one, and reset each that ended.

        What ``SyncVectorEnv.step`` does beyond this, above all gathering infos that nobody reads,
        takes longer than an actor's forward pass.
        """
        buffer = self._buffer
        actions = self._filter_actions(buffer.actions[row])
        rewards, terminated, truncated = [], [], []
        ended = []
        for index, (env, action) in enumerate(zip(self._each, actions, strict=True)):
            observation, reward, has_terminated, was_truncated, _ = env.step(action)
            if has_terminated or was_truncated:
                ended.append(index)
                if not has_terminated:
                    buffer.add_final_observation(row, index, observation)
                observation, _ = env.reset()
            buffer.write_observation(row + 1, index, observation)
            rewards.append(float(reward))
            terminated.append(has_terminated)
            truncated.append(was_truncated)
        buffer.rewards[row] = rewards
        buffer.terminated[row] = terminated
        buffer.truncated[row] = truncated
        self._episodes.add(rewards)
        if ended:
            self._episodes.end(ended)

    def _step_together(self, row: int) -> None:
        """Step a vector environment of any kind and mode."""
        buffer = self._buffer
        actions = self._filter_actions(buffer.actions[row])
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        if self._resetting is not None:
            buffer.mask[row] = running = ~self._resetting
            rewards = rewards * running
            terminated, truncated = terminated & running, truncated & running
            self._resetting = None
        buffer.rewards[row] = rewards
        buffer.terminated[row] = terminated
        buffer.truncated[row] = truncated
        self._episodes.add(rewards)
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            observations = self._end_episodes(row, observations, terminated, truncated, infos)
        buffer.write_observations(row + 1, observations)

    def _end_episodes(
        self, row: int, observations: Any, terminated: _Array, truncated: _Array, infos: Any
    ) -> Any:
        """Account for episodes that ended at ``row``, and return what the next step starts from.

        In ``NEXT_STEP`` mode the final observation is the next row's, and so is its value: the
        step that begins there only resets the environment, and is masked.
        """
        ended = terminated | truncated
        envs = np.flatnonzero(ended).tolist()
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resetting = ended
            self._episodes.end(envs, pause=1)
            return observations
        self._episodes.end(envs)
        finals = infos["final_obs"] if self._mode is AutoresetMode.SAME_STEP else observations
        for env in envs:
            if not terminated[env]:
                self._buffer.add_final_observation(row, env, _pick(finals, env))
        if self._mode is AutoresetMode.DISABLED:
            observations, _ = self.envs.reset(options={"reset_mask": ended})
        return observations

    def _on_device(self, observations: Observations) -> Observations:
        device = self.context.device
        if device == "cpu":
            return observations
        if isinstance(observations, torch.Tensor):
            return observations.to(device)
        return {name: tensor.to(device) for name, tensor in observations.items()}

    def _make_policy(self, envs: VectorEnv[Any, Any, Any]) -> Any:
        if isinstance(self._policy, nn.Module):
            policy: Any = copy.deepcopy(self._policy)
        else:
            policy = self._policy(envs.single_observation_space, envs.single_action_space)
        if isinstance(policy, nn.Module) and isinstance(policy, Policy):
            return policy
        raise ConfigurationError(
            [f"policy made {policy!r}: must be an nn.Module with the methods act() and value()"]
        )

    def _check_policy(self) -> None:
        """Find misfits now, where an error stops the start for good and is not retried."""
        observations = self._on_device(self._buffer.policy_inputs[-1])
        with torch.inference_mode():
            problems = self._buffer.find_misfits(self._act(observations), self._value(observations))
        if problems:
            raise ConfigurationError(problems)


def _pick(observations: Any, env: int) -> Any:
    """Take one environment's observation out of a batch, or out of an array of observations."""
    if isinstance(observations, Mapping):
        return {key: _pick(child, env) for key, child in observations.items()}
    return observations[env]

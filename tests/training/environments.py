"""Environments and policies whose every number is known beforehand."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

TERMINATED, TRUNCATED, BOTH = "terminated", "truncated", "both"

# Episodes 0, 1, 2; then it starts over.
SCHEDULE = ((2, TERMINATED), (3, TRUNCATED), (1, BOTH))


class CountingEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Observes (episode, step), rewards the n-th step of an episode with n.

    Episodes follow a schedule of lengths and ends. With ``reuses_memory`` each observation is the
    same array, changed in place, as careless environments do it.
    """

    def __init__(
        self, schedule: tuple[tuple[int, str], ...] = SCHEDULE, *, reuses_memory: bool = False
    ) -> None:
        self.observation_space = spaces.Box(0.0, 1e6, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._schedule = schedule
        self._reuses_memory = reuses_memory
        self._observation = np.array([-1, 0], np.float32)
        self.closed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._observation[0] += 1
        self._observation[1] = 0
        return self._observe(), {}

    def step(self, action: np.int64) -> Any:
        length, end = self._schedule[int(self._observation[0]) % len(self._schedule)]
        self._observation[1] += 1
        ended = int(self._observation[1]) == length
        reward = float(self._observation[1])
        terminated = ended and end != TRUNCATED
        truncated = ended and end != TERMINATED
        return self._observe(), reward, terminated, truncated, {"nested": {"step": reward}}

    def close(self) -> None:
        self.closed += 1

    def _observe(self) -> np.ndarray:
        return self._observation if self._reuses_memory else self._observation.copy()


class CountingDictEnv(gymnasium.ObservationWrapper[Any, Any, Any]):
    """The same, with a nested ``Dict`` observation of a ``Discrete`` and a ``Box``."""

    def __init__(self) -> None:
        super().__init__(CountingEnv())
        self.observation_space = spaces.Dict(
            {
                "episode": spaces.Discrete(1000),
                "inner": spaces.Dict({"step": spaces.Box(0.0, 1e6, (1,), np.float64)}),
            }
        )

    def observation(self, observation: np.ndarray) -> Any:
        return {
            "episode": np.int64(observation[0]),
            "inner": {"step": observation[1:].astype(np.float64)},
        }


class BatchedSameStepEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """A vector environment of its own kind: one clock, truncation after 2 steps, batched finals."""

    metadata: ClassVar[dict[str, Any]] = {
        "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP
    }

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0.0, 1e6, (2,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = gymnasium.vector.utils.batch_space(
            self.single_observation_space, num_envs
        )
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self._step = 0
        return self._observe(0), {}

    def step(self, actions: Any) -> Any:
        self._step += 1
        truncated = np.full(self.num_envs, self._step % 2 == 0)
        infos = {"final_obs": self._observe(2), "_final_obs": truncated} if truncated[0] else {}
        ones = np.ones(self.num_envs, np.float32)
        return self._observe(self._step % 2), ones, ~truncated & False, truncated, infos

    def _observe(self, step: int) -> np.ndarray:
        envs = np.arange(self.num_envs, dtype=np.float32)
        return np.stack([envs, np.full_like(envs, step)], axis=1)


class EchoEnv(gymnasium.Env[Any, Any]):
    """Observes samples of any space, insists on valid actions, keeps the last, and never ends."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.actions: list[Any] = []
        self.last_action: Any = None
        self.observations: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.actions.append(np.copy(action))
        self.last_action = action
        return self._observe(), 0.0, False, False, {}

    def _observe(self) -> Any:
        self.observations.append(self.observation_space.sample())
        return self.observations[-1]


class CountingPolicy(nn.Module):
    """Values (episode, step) at 100 x episode + step; always takes action 1."""

    def __init__(self, observation_space: Any = None, action_space: Any = None) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def act(self, observations: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = self.value(observations)
        return torch.ones_like(values, dtype=torch.int64), values * 0 - 0.5, values

    def value(self, observations: Any) -> torch.Tensor:
        if isinstance(observations, dict):
            episode, step = observations["episode"], observations["inner.step"][:, 0]
        else:
            episode, step = observations.unbind(-1)
        return 100 * episode + step + self.offset

"""The work itself, the same for every system: environments, policy, rollouts, weights, fields."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.cases import Throughput, Work

FIELDS = ("obs", "action", "reward", "terminated", "truncated")
POLICY_FIELDS = (*FIELDS, "log_prob", "value")
SHOGI_FIELDS = ("obs", "legal")
PIXELS = (4, 84, 84)
SHOGI_PLANES = (46, 9, 9)
SHOGI_MOVES = 13_527
HIDDEN = 64
WEIGHT_TENSORS = 8

Arrays = dict[str, NDArray[Any]]


class PixelEnv(gymnasium.Env[NDArray[np.uint8], int]):
    """Observations of four 84x84 frames, a step that costs nothing, episodes that never end."""

    def __init__(self) -> None:
        """Draw the frame that every step returns."""
        self.observation_space = gymnasium.spaces.Box(0, 255, PIXELS, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(4)
        self._frame = np.random.default_rng(0).integers(0, 256, PIXELS, dtype=np.uint8)
        self._info: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Return the frame."""
        super().reset(seed=seed)
        return self._frame, self._info

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Return the frame."""
        return self._frame, 1.0, False, False, self._info


def make_env(work: Work) -> gymnasium.Env[Any, Any]:
    """Return the environment of ``work``, without Gymnasium's checker, which would be measured."""
    if work == "pixel":
        return PixelEnv()
    return gymnasium.make("CartPole-v1", disable_env_checker=True)


def num_actions(work: Work) -> int:
    """Return the number of discrete actions."""
    return 4 if work == "pixel" else 2


def fields(work: Work) -> tuple[str, ...]:
    """Return the names that every batch of ``work`` must have."""
    if work == "shogi":
        return SHOGI_FIELDS
    return POLICY_FIELDS if work == "cartpole+mlp" else FIELDS


class ActorCritic(nn.Module):
    """Actor and critic for CartPole, each with two layers of 64."""

    def __init__(self, observations: int = 4, actions: int = 2) -> None:
        """Build both networks."""
        super().__init__()
        self.actor = _mlp(observations, actions)
        self.critic = _mlp(observations, 1)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (n, actions) and values (n,) for float32 observations (n, 4)."""
        return self.actor(obs), self.critic(obs).squeeze(-1)

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample actions; return them with their log-probabilities and the values, each (n,)."""
        logits, values = self(obs)
        log_probs = logits.log_softmax(-1)
        actions = torch.multinomial(log_probs.exp(), 1)
        return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1), values

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """Return the values (n,)."""
        values: torch.Tensor = self.critic(obs).squeeze(-1)
        return values


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, outputs),
    )


def state_of_size(num_bytes: int, fill: float | None = None) -> dict[str, torch.Tensor]:
    """Return float32 tensors of ``num_bytes`` together: random, or all ``fill``."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, num_bytes // 4 // WEIGHT_TENSORS)
    return {
        f"layer{index}.weight": (
            torch.randn(count, generator=generator) if fill is None else torch.full((count,), fill)
        )
        for index in range(WEIGHT_TENSORS)
    }


class Rollout(Protocol):
    """One worker's loop: every call makes one batch."""

    def collect(self) -> Arrays:
        """Return one batch; arrays are reused by the next call unless made ``fresh``."""
        ...


def make_rollout(case: Throughput, worker_id: int, *, fresh: bool = False) -> Rollout:
    """Return the loop of ``case`` for one worker.

    With ``fresh`` it allocates new arrays for each batch, for systems that serialise later.
    """
    torch.set_num_threads(1)
    seed = case.seed * 1000 + worker_id
    if case.work == "shogi":
        return ShogiRollout(case.batch, seed)
    if case.work == "cartpole+mlp":
        return PolicyRollout(case, seed, fresh=fresh)
    return RandomRollout(case, seed, fresh=fresh)


class RandomRollout:
    """One environment and random actions, all drawn at once for a batch."""

    def __init__(self, case: Throughput, seed: int, *, fresh: bool) -> None:
        """Build the environment."""
        self._env = make_env(case.work)
        self._rng = np.random.default_rng(seed)
        self._actions = num_actions(case.work)
        self._length, self._fresh, self._record = case.batch, fresh, case.record
        self._obs, _ = self._env.reset(seed=seed)
        self._arrays = self._allocate()

    def _allocate(self) -> Arrays:
        space = self._env.observation_space
        assert space.shape is not None
        return {
            "obs": np.empty((self._length, *space.shape), space.dtype),
            "action": np.empty(self._length, np.int64),
            "reward": np.empty(self._length, np.float32),
            "terminated": np.empty(self._length, np.bool_),
            "truncated": np.empty(self._length, np.bool_),
        }

    def collect(self) -> Arrays:
        """Step the environment for one batch."""
        if not self._record:
            return self._bare()
        if self._fresh:
            self._arrays = self._allocate()
        arrays, env, obs = self._arrays, self._env, self._obs
        arrays["action"][:] = self._rng.integers(self._actions, size=self._length)
        all_obs, rewards = arrays["obs"], []
        terminations, truncations = [], []
        for index, action in enumerate(arrays["action"].tolist()):
            all_obs[index] = obs
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
            if terminated or truncated:
                obs, _ = env.reset()
        arrays["reward"][:] = rewards
        arrays["terminated"][:] = terminations
        arrays["truncated"][:] = truncations
        self._obs = obs
        return arrays

    def _bare(self) -> Arrays:
        """Step and keep nothing: the cost of the environment and the action alone."""
        env = self._env
        for action in self._rng.integers(self._actions, size=self._length).tolist():
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return self._arrays


class PolicyRollout:
    """Several environments and one policy: sampled actions, log-probabilities and values."""

    def __init__(self, case: Throughput, seed: int, *, fresh: bool) -> None:
        """Build environments and policy."""
        torch.manual_seed(seed)
        self._envs = [make_env(case.work) for _ in range(case.envs)]
        self._policy = ActorCritic()
        self._length = case.batch // case.envs
        self._fresh = fresh
        first = [env.reset(seed=seed + index)[0] for index, env in enumerate(self._envs)]
        self._obs = np.stack(first)
        self._arrays = self._allocate()

    def _allocate(self) -> Arrays:
        shape = (self._length, len(self._envs))
        arrays: Arrays = {
            "obs": np.empty((*shape, 4), np.float32),
            "action": np.empty(shape, np.int64),
            "terminated": np.empty(shape, np.bool_),
            "truncated": np.empty(shape, np.bool_),
        }
        arrays |= {name: np.empty(shape, np.float32) for name in ("reward", "log_prob", "value")}
        return arrays

    @torch.inference_mode()
    def collect(self) -> Arrays:
        """Step all environments for one batch."""
        if self._fresh:
            self._arrays = self._allocate()
        arrays, obs = self._arrays, self._obs
        for time in range(self._length):
            actions, log_probs, values = self._policy.act(torch.from_numpy(obs))
            arrays["obs"][time] = obs
            arrays["action"][time] = actions.numpy()
            arrays["log_prob"][time] = log_probs.numpy()
            arrays["value"][time] = values.numpy()
            for index, (env, action) in enumerate(zip(self._envs, actions.tolist(), strict=True)):
                obs[index], reward, terminated, truncated, _ = env.step(action)
                arrays["reward"][time, index] = reward
                arrays["terminated"][time, index] = terminated
                arrays["truncated"][time, index] = truncated
                if terminated or truncated:
                    obs[index], _ = env.reset()
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}


class ShogiRollout:
    """Finished batches of the size of shogi games: the only cost is that of moving them."""

    def __init__(self, batch: int, seed: int) -> None:
        """Draw the batch that every call returns."""
        rng = np.random.default_rng(seed)
        self._arrays: Arrays = {
            "obs": rng.random((batch, *SHOGI_PLANES), np.float32),
            "legal": rng.random((batch, SHOGI_MOVES), np.float32) < 0.01,  # about 100 moves
        }

    def collect(self) -> Arrays:
        """Return the batch."""
        return self._arrays


def as_tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Wrap the arrays as tensors, without copying."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

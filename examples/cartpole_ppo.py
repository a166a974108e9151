"""PPO on CartPole: the policy and the learner of ``train_cartpole.py``.

A module of its own, so that worker processes import this and not the plots and progress bars of
the program. The algorithm is Schulman et al., "Proximal Policy Optimization Algorithms" (2017),
with the details of Huang et al., "The 37 Implementation Details of Proximal Policy Optimization"
(2022).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium
import torch
from torch.nn import functional

from keisei.training.gymnasium import (
    ActorCritic,
    GymnasiumWorker,
    generalized_advantage_estimate,
)

if TYPE_CHECKING:
    from keisei import ExperienceBatch


@dataclass(frozen=True)
class Hyperparameters:
    """What defines a run; the defaults solve CartPole in the least wall time."""

    env_id: str = "CartPole-v1"
    num_workers: int = 2
    envs_per_worker: int = 4
    rollout_length: int = 32
    max_steps: int = 150_000
    seed: int = 0
    epochs: int = 20
    minibatch_size: int = 256
    gamma: float = 0.98
    gae_lambda: float = 0.8
    learning_rate: float = 1e-3
    clip_range: float = 0.2
    decay_steps: int = 100_000
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    max_grad_norm: float = 0.5
    solved_return: float = 475.0
    solved_episodes: int = 100


def make_worker(parameters: Hyperparameters) -> partial[GymnasiumWorker]:
    """Give what ``ParallelManager`` makes its workers from."""
    return partial(
        GymnasiumWorker,
        parameters.env_id,
        ActorCritic,
        num_envs=parameters.envs_per_worker,
        rollout_length=parameters.rollout_length,
    )


def make_policy(parameters: Hyperparameters) -> ActorCritic:
    """Build the learner's policy with the seed's own initial weights."""
    torch.manual_seed(parameters.seed)
    with gymnasium.make(parameters.env_id) as env:
        return ActorCritic(env.observation_space, env.action_space)


class PPOLearner:
    """Learns from one batch of each worker at a time.

    Attributes:
        policy: Changed in place by ``learn``.
        recent_returns: Of the last ``solved_episodes`` episodes, oldest first.
        num_steps: Environment steps learned from so far.
    """

    def __init__(self, policy: ActorCritic, parameters: Hyperparameters) -> None:
        self.policy = policy
        self.parameters = parameters
        self.recent_returns: deque[float] = deque(maxlen=parameters.solved_episodes)
        self.num_steps = 0
        self._weights = list(policy.parameters())
        self._optimizer = torch.optim.Adam(
            self._weights, lr=parameters.learning_rate, eps=1e-5, fused=True
        )

    @property
    def mean_return(self) -> float:
        """The mean return of the recent episodes; 0 before the first one ended."""
        return sum(self.recent_returns) / max(len(self.recent_returns), 1)

    @property
    def solved(self) -> bool:
        """Whether the window of recent episodes is full and good enough."""
        is_full = len(self.recent_returns) == self.parameters.solved_episodes
        return is_full and self.mean_return >= self.parameters.solved_return

    def state_dict(self) -> dict[str, Any]:
        """Give the weights that the workers are to use."""
        return self.policy.state_dict()

    def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, float]:
        """Update the policy with one round of rollouts."""
        parameters = self.parameters
        for batch in batches:
            self.recent_returns.extend(batch.info["episode_returns"])
            self.num_steps += batch.num_steps
        names = batches[0].data
        data = {name: torch.cat([b.data[name] for b in batches], dim=1) for name in names}
        advantages, returns = generalized_advantage_estimate(
            data, gamma=parameters.gamma, gae_lambda=parameters.gae_lambda
        )
        flat = [
            tensor.flatten(0, 1)
            for tensor in (
                data["observations"],
                data["actions"],
                data["log_probs"],
                advantages,
                returns,
            )
        ]
        progress = min(self.num_steps / parameters.decay_steps, 0.9)
        for group in self._optimizer.param_groups:
            group["lr"] = parameters.learning_rate * (1.0 - progress)
        clip_range = parameters.clip_range * (1.0 - progress)
        size = parameters.minibatch_size
        count = len(flat[0])
        for _ in range(parameters.epochs):
            if count <= size:
                self._update(*flat, clip_range)
            else:
                for index in torch.randperm(count).split(size):
                    self._update(*[t[index] for t in flat], clip_range)
        return {"mean_return": self.mean_return}

    def _update(self, observations, actions, old_log_probs, advantages, returns, clip_range):
        parameters = self.parameters
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_probs, entropies, values = self.policy.evaluate(observations, actions)
        ratios = torch.exp(log_probs - old_log_probs)
        clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
        loss = -torch.minimum(ratios * advantages, clipped * advantages).mean()
        loss = loss + parameters.value_coefficient * functional.mse_loss(values, returns)
        if parameters.entropy_coefficient:
            loss = loss - parameters.entropy_coefficient * entropies.mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, parameters.max_grad_norm)
        self._optimizer.step()

"""PPO on CartPole: the worker, the policy and the learner of ``train_cartpole.py``.

A module of its own, so that the worker processes import this and not the plots and the progress
display of the program. The algorithm is that of Schulman et al., "Proximal Policy Optimization
Algorithms" (2017), with the details that Huang et al. list in "The 37 Implementation Details of
Proximal Policy Optimization" (2022).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import gymnasium
import torch
from torch.nn import functional

from keisei.training.gymnasium import (
    ActorCritic,
    GymnasiumWorker,
    generalized_advantage_estimate,
    get_observations,
)

if TYPE_CHECKING:
    from keisei import ExperienceBatch


@dataclass(frozen=True)
class Hyperparameters:
    """What defines a run.

    Rollouts are longer and steps larger than in the RL Zoo's set for this task (32 steps, 20 epochs
    of 256, learning rate 1e-3): as many environment steps then need a fifth of the updates.

    Attributes:
        decay_steps: Environment steps after which learning rate and clip range would be zero; they
            fall linearly to a tenth and stay there.
        max_steps: Environment steps after which the run gives up.
        solved_return: The mean return of the last ``solved_episodes`` episodes that is enough.
    """

    env_id: str = "CartPole-v1"
    seed: int = 0
    num_workers: int = 2
    envs_per_worker: int = 4
    rollout_length: int = 256
    max_steps: int = 150_000
    epochs: int = 8
    minibatch_size: int = 512
    gamma: float = 0.98
    gae_lambda: float = 0.95
    learning_rate: float = 4e-3
    clip_range: float = 0.2
    decay_steps: int = 100_000
    value_coefficient: float = 0.5
    max_grad_norm: float = 0.5
    solved_return: float = 475.0
    solved_episodes: int = 100


def make_worker(parameters: Hyperparameters) -> partial[GymnasiumWorker]:
    """Give what a pool makes its workers from."""
    return partial(
        GymnasiumWorker,
        parameters.env_id,
        ActorCritic,
        num_envs=parameters.envs_per_worker,
        rollout_length=parameters.rollout_length,
    )


def make_policy(parameters: Hyperparameters) -> ActorCritic:
    """Build the learner's policy; its initial weights depend on the seed alone."""
    torch.manual_seed(parameters.seed)
    with gymnasium.make(parameters.env_id) as env:
        return ActorCritic(env.observation_space, env.action_space)


class PPOLearner:
    """Learns from rounds of rollouts, one batch from each worker.

    Attributes:
        policy: Changed in place by ``learn``.
        num_steps: Environment steps that were learned from.
        recent_returns: Of the last ``solved_episodes`` episodes, oldest first.
    """

    def __init__(self, policy: ActorCritic, parameters: Hyperparameters) -> None:
        self.policy = policy
        self.num_steps = 0
        self.recent_returns: deque[float] = deque(maxlen=parameters.solved_episodes)
        self._parameters = parameters
        self._weights = list(policy.parameters())
        self._optimizer = torch.optim.Adam(
            self._weights, lr=parameters.learning_rate, eps=1e-5, fused=True
        )

    @property
    def mean_return(self) -> float:
        """The mean of ``recent_returns``; 0 before the first episode ended."""
        return sum(self.recent_returns) / max(len(self.recent_returns), 1)

    @property
    def solved(self) -> bool:
        """Whether there are enough recent episodes, with a mean return that is enough."""
        is_full = len(self.recent_returns) == self._parameters.solved_episodes
        return is_full and self.mean_return >= self._parameters.solved_return

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Give the weights for the workers; not copies."""
        return self.policy.state_dict()

    def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, float]:
        """Update the policy with one round; the batches are free again afterwards.

        Returns:
            Metrics: ``mean_return``, ``policy_loss``, ``value_loss``, ``entropy``, and
            ``learning_rate``.
        """
        for batch in batches:
            self.num_steps += batch.num_steps
            self.recent_returns.extend(batch.info["episode_returns"])
        progress = min(self.num_steps / self._parameters.decay_steps, 0.9)
        learning_rate = self._parameters.learning_rate * (1 - progress)
        clip_range = self._parameters.clip_range * (1 - progress)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        losses = self._update(self._join(batches), clip_range)
        return {"mean_return": self.mean_return, **losses, "learning_rate": learning_rate}

    def _join(self, batches: Sequence[ExperienceBatch]) -> list[torch.Tensor]:
        """Join batches ``[T, N, ...]`` to the columns ``[B, ...]`` of a training set."""
        names = batches[0].data
        data = {name: torch.cat([batch.data[name] for batch in batches], dim=1) for name in names}
        estimates = generalized_advantage_estimate(
            data, gamma=self._parameters.gamma, gae_lambda=self._parameters.gae_lambda
        )
        columns = (get_observations(data), data["actions"], data["log_probs"], *estimates)
        return [column.flatten(0, 1) for column in columns]

    def _update(self, columns: list[torch.Tensor], clip_range: float) -> dict[str, float]:
        """Take one optimizer step for each minibatch of each epoch; report the last losses."""
        for _ in range(self._parameters.epochs):
            order = torch.randperm(len(columns[0]))
            for rows in order.split(self._parameters.minibatch_size):
                minibatch = [column[rows] for column in columns]
                policy_loss, value_loss, entropy = self._losses(minibatch, clip_range)
                loss = policy_loss + self._parameters.value_coefficient * value_loss
                self._optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._weights, self._parameters.max_grad_norm)
                self._optimizer.step()
        named = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        return {name: tensor.item() for name, tensor in named.items()}

    def _losses(
        self, minibatch: list[torch.Tensor], clip_range: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        observations, actions, old_log_probs, advantages, returns = minibatch
        log_probs, entropies, values = self.policy.evaluate(observations, actions)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratios = (log_probs - old_log_probs).exp()
        clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
        policy_loss = -torch.minimum(ratios * advantages, clipped * advantages).mean()
        return policy_loss, functional.mse_loss(values, returns), entropies.detach().mean()

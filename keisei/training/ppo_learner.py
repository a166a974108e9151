"""PPOLearner: proximal policy optimisation on the rollouts of a pool.

The algorithm is that of Schulman et al., "Proximal Policy Optimization Algorithms" (2017), with the
details that Huang et al. list in "The 37 Implementation Details of Proximal Policy Optimization"
(2022): advantages normalised by minibatch, a clipped objective, a clipped gradient norm, Adam with
an epsilon of 1e-5, and a step size and clip range that fall linearly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from keisei.exceptions import ConfigurationError
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.ppo_data import TrainingSet

LEAST_LEFT = 0.1
"""The share of step size and clip range at which their linear fall stops."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


_RULES: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "an integer of at least 1": (("epochs", "minibatch_size", "return_window"), _is_count),
    "None or an integer of at least 1": (
        ("decay_steps",),
        lambda value: value is None or _is_count(value),
    ),
    "from 0 to 1": (("gamma", "gae_lambda"), lambda value: 0 <= value <= 1),
    "positive": (("learning_rate", "clip_range", "max_grad_norm"), lambda value: value > 0),
    "at least 0": (("value_coefficient", "entropy_coefficient"), lambda value: value >= 0),
}


@dataclass(frozen=True, kw_only=True)
class PPOParameters:
    """What PPO does with the experience it gets.

    Attributes:
        epochs: Passes over each update's steps.
        minibatch_size: Steps of one gradient step. Where a policy has a memory, whole rollouts of
            as many environments as come closest from below, and at least one.
        gamma: The discount factor, 0 … 1.
        gae_lambda: The weight of longer returns in the advantages, 0 … 1.
        learning_rate: Of Adam, at the start.
        clip_range: Largest wanted change of a probability, as a ratio, at the start.
        decay_steps: Environment steps after which learning rate and clip range would be zero; they
            fall linearly to a tenth and stay there. ``None`` keeps them as they are.
        value_coefficient: Weight of the values' loss.
        entropy_coefficient: Weight of the entropy that is wanted.
        max_grad_norm: Longest gradient; a longer one is scaled down to it.
        return_window: Episodes whose mean return is told.

    Raises:
        ConfigurationError: A value that cannot work; all such values are named.
    """

    epochs: int = 10
    minibatch_size: int = 256
    gamma: float = 0.99
    gae_lambda: float = 0.95
    learning_rate: float = 1e-3
    clip_range: float = 0.2
    decay_steps: int | None = None
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    max_grad_norm: float = 0.5
    return_window: int = 100

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)!r}: must be {rule}"
            for rule, (names, is_fine) in _RULES.items()
            for name in names
            if not is_fine(getattr(self, name))
        ]
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the parameters."""
        return tuple(field.name for field in fields(cls))


class PPOLearner:
    """Learns from rollouts of ``GymnasiumWorker``, one batch or more from each worker.

    It takes what the batches hold: action masks or lists of legal actions, the memory of recurrent
    policies, a mask of true steps. Where the policy normalises observations or rewards, it updates
    the statistics: those of observations after the update that learned from them, so that the
    policy that is improved is the one that acted; before it in the first.

    Args:
        policy: Has ``evaluate`` as ``ActorCritic`` or ``RecurrentActorCritic``; changed in place.
        parameters: How to learn.

    Attributes:
        policy: The policy.
        num_steps: Environment steps that were learned from.
        recent_returns: Of the last ``return_window`` episodes, oldest first.
    """

    def __init__(self, policy: nn.Module, parameters: PPOParameters | None = None) -> None:
        self.policy: Any = policy
        self.parameters = PPOParameters() if parameters is None else parameters
        self.num_steps = 0
        self.recent_returns: deque[float] = deque(maxlen=self.parameters.return_window)
        self._weights = list(policy.parameters())
        self._optimizer = torch.optim.Adam(
            self._weights, lr=self.parameters.learning_rate, eps=1e-5, fused=True
        )

    @property
    def mean_return(self) -> float:
        """The mean of ``recent_returns``; 0 before the first episode ended."""
        return sum(self.recent_returns) / max(len(self.recent_returns), 1)

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Give the weights for the workers; not copies."""
        weights: Mapping[str, torch.Tensor] = self.policy.state_dict()
        return weights

    def training_state(self) -> dict[str, Any]:
        """Give what training needs to go on, beside the weights: plain values and tensors."""
        return {
            "num_steps": self.num_steps,
            "recent_returns": list(self.recent_returns),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``training_state`` gave."""
        self.num_steps = state["num_steps"]
        self.recent_returns = deque(state["recent_returns"], maxlen=self.parameters.return_window)
        self._optimizer.load_state_dict(dict(state["optimizer"]))

    def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, float]:
        """Update the policy with the batches, which are free again afterwards.

        Returns:
            Metrics: ``mean_return``, ``learning_rate``, and of the last minibatch ``policy_loss``,
            ``value_loss``, ``entropy``, ``approx_kl`` (Schulman's low-variance estimate) and
            ``clip_fraction``.

        Raises:
            ValueError: Observations or rewards that are normalised are not finite, or nothing is
                allowed at a true step.
            ConfigurationError: There is no true step in any batch.
        """
        for batch in batches:
            self.num_steps += batch.num_steps
            self.recent_returns.extend(batch.info.get("episode_returns", ()))
        left = self._share_left()
        for group in self._optimizer.param_groups:
            group["lr"] = self.parameters.learning_rate * left
        steps = TrainingSet.of(
            batches,
            gamma=self.parameters.gamma,
            gae_lambda=self.parameters.gae_lambda,
            reward_normalizer=getattr(self.policy, "reward_normalizer", None),
        )
        normalizer = getattr(self.policy, "normalizer", None)
        is_first = normalizer is not None and not normalizer.moments.count
        if is_first:
            self.policy.update_statistics(steps.true_observations())
        losses = self._update(steps, self.parameters.clip_range * left)
        if normalizer is not None and not is_first:
            self.policy.update_statistics(steps.true_observations())
        rate = self.parameters.learning_rate * left
        return {"mean_return": self.mean_return, **losses, "learning_rate": rate}

    def _share_left(self) -> float:
        if self.parameters.decay_steps is None:
            return 1.0
        return max(1 - self.num_steps / self.parameters.decay_steps, LEAST_LEFT)

    def _update(self, steps: TrainingSet, clip_range: float) -> dict[str, float]:
        """Take one optimizer step for each minibatch of each epoch; report the last losses."""
        parameters = self.parameters
        for _ in range(parameters.epochs):
            for minibatch in steps.minibatches(parameters.minibatch_size):
                log_probs, entropies, values = minibatch.evaluate(self.policy)
                advantages = minibatch.advantages
                # Of a single step there is no deviation.
                deviation = advantages.std() if len(advantages) > 1 else 1.0
                advantages = (advantages - advantages.mean()) / (deviation + 1e-8)
                changes = log_probs - minibatch.log_probs
                ratios = changes.exp()
                clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
                policy_loss = -torch.minimum(ratios * advantages, clipped * advantages).mean()
                value_loss = functional.mse_loss(values, minibatch.returns)
                entropy = entropies.mean()
                loss = policy_loss + parameters.value_coefficient * value_loss
                if parameters.entropy_coefficient:
                    loss = loss - parameters.entropy_coefficient * entropy
                self._optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(self._weights, parameters.max_grad_norm)
                self._optimizer.step()
        with torch.no_grad():
            named = {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": entropy,
                "approx_kl": (ratios - 1 - changes).mean(),
                "clip_fraction": ((ratios - 1).abs() > clip_range).float().mean(),
            }
            return {name: tensor.item() for name, tensor in named.items()}

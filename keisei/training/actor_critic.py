"""What a policy must offer to ``GymnasiumWorker``, and one that fits most environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from keisei.training.legal_actions import LegalActions
from keisei.training.policy_base import SpacePolicy
from keisei.training.rollouts import Observations
from keisei.training.spaces import Space
from keisei.training.twin_layers import TwinNetwork, output_layer

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Policy(Protocol):
    """What ``GymnasiumWorker`` asks of a policy, beside being an ``nn.Module``.

    Observations arrive with one leading batch dimension, in the space's dtype (floats as
    ``float32``); for a ``Dict`` space as a mapping of dotted names to tensors.
    """

    def act(self, observations: Observations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample actions.

        Where a feature is on, its keyword is passed too, and the policy must take it: masks as
        ``action_mask`` or ``legal_actions``, and ``deterministic`` in evaluations; see
        ``ActorCritic.act``.

        Returns:
            Actions ``[B, *action_shape]`` that the action space holds (those for a ``Box`` may
            lie outside: the worker clips them for the environment only), their log-probabilities
            ``[B]``, and the values of the observations ``[B]``.
        """
        ...

    def value(self, observations: Observations) -> torch.Tensor:
        """Estimate the values ``[B]`` of observations."""
        ...


class ActorCritic(SpacePolicy):
    """Separate actor and critic networks with tanh, orthogonally initialised.

    Initialisation and the free log standard deviation follow Huang et al., "The 37 Implementation
    Details of Proximal Policy Optimization" (2022). Discrete observations are one-hot encoded, all
    leaves of a ``Dict`` are flattened and joined; values are not rescaled, so wrap image
    environments accordingly.

    The two networks share no weights, but their hidden layers have the same sizes and run as one
    batched product, since with networks of this size the number of calls is what costs.

    A ``Dict`` observation with a key ``"action_mask"`` that fits the action space is not part of
    the network's input: it is the mask wherever none is passed. The weights are the same whether
    the observation space has that key or not.

    Args:
        observation_space: Of one environment: whatever ``GymnasiumWorker`` supports.
        action_space: Of one environment: ``Discrete``, ``MultiDiscrete``, ``MultiBinary`` or a
            ``Box`` of floats.
        hidden_sizes: Units of the hidden layers, of the actor and of the critic alike.
        normalize_observations: Whether ``Box`` leaves are centred and scaled by statistics of
            what the learner has seen, and clipped to ±10; one-hot codes and bits stay. The learner
            calls ``update_statistics``.
        normalize_rewards: Whether there is a ``reward_normalizer`` for the learner, whose
            statistics are pushed and saved with the weights.

    Raises:
        ConfigurationError: A space of another kind.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            normalize_observations=normalize_observations,
            normalize_rewards=normalize_rewards,
        )
        sizes = [self._encoder.size, *hidden_sizes]
        self.hidden = TwinNetwork(sizes)
        self.actor_output = output_layer(sizes[-1], self.head.num_inputs, gain=0.01)
        self.critic_output = output_layer(sizes[-1], 1, gain=1.0)

    def act(
        self,
        observations: Observations,
        *,
        deterministic: bool = False,
        action_mask: torch.Tensor | None = None,
        legal_actions: LegalActions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample actions from torch's global generator; see ``Policy.act``.

        Args:
            observations: ``[B, *shape]``, or a mapping of such tensors.
            deterministic: Take the likeliest actions: the mean for a ``Box``, the first of several
                that are equally likely.
            action_mask: ``bool [B, n]``, true where an action is allowed, n being the number of
                logits: that of a ``Discrete`` space's actions, or the sum of ``nvec``, part by part
                in its order. Actions, log-probabilities and entropies are those of the distribution
                over allowed actions alone.
            legal_actions: The same as lists of indices, for ``Discrete`` spaces with very many.

        Raises:
            ValueError: The network's outputs are not finite, as after a step that was too large, or
                no action is allowed in some row, or a mask does not fit.
        """
        outputs, values = self(observations)
        if action_mask is None and legal_actions is None and not self._has_mask:
            actions, log_probs = self.head.sample(outputs, deterministic=deterministic)
        else:
            allowed = self._allowed(observations, action_mask, legal_actions)
            actions, log_probs = self.head.sample(
                outputs, deterministic=deterministic, allowed=allowed
            )
        return actions, log_probs, values

    def value(self, observations: Observations) -> torch.Tensor:
        """Estimate the values ``[B]`` of observations; see ``Policy.value``."""
        values: torch.Tensor = self(observations)[1]
        return values

    def evaluate(
        self,
        observations: Observations,
        actions: torch.Tensor,
        *,
        action_mask: torch.Tensor | None = None,
        legal_actions: LegalActions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge actions that were taken, with gradients, for the learner.

        Args:
            observations: ``[B, *shape]``, or a mapping of such tensors.
            actions: ``[B, *action_shape]`` as ``act`` returned them.
            action_mask: As ``act`` was given it.
            legal_actions: As ``act`` was given them.

        Returns:
            Log-probabilities, entropies and values, each ``[B]``. Log-probability and entropy of
            an action with several parts are the sums over the parts. An action that is not allowed
            has the log-probability minus infinity.

        Raises:
            ValueError: Nothing is allowed in some row, or a mask does not fit.
        """
        outputs, values = self(observations)
        allowed = self._allowed(observations, action_mask, legal_actions)
        log_probs, entropies = self.head.evaluate(outputs, actions, allowed=allowed)
        return log_probs, entropies, values

    def forward(self, observations: Observations) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the actor's outputs ``[B, n]`` (logits, or means) and the values ``[B]``."""
        features = self._features(observations)
        actor, critic = self.hidden(features.expand(2, -1, -1)).unbind()
        return self.actor_output(actor), self.critic_output(critic).squeeze(-1)

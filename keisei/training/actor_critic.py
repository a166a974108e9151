"""What a policy must offer to ``GymnasiumWorker``, and one that fits most environments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from keisei.training.action_heads import make_action_head
from keisei.training.rollouts import Observations
from keisei.training.spaces import (
    Box,
    Discrete,
    MultiDiscrete,
    Space,
    observation_leaves,
)


@runtime_checkable
class Policy(Protocol):
    """What ``GymnasiumWorker`` asks of a policy, beside being an ``nn.Module``.

    Observations arrive with one leading batch dimension, in the space's dtype (floats as
    ``float32``); for a ``Dict`` space as a mapping of dotted names to tensors.
    """

    def act(self, observations: Observations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample actions.

        Returns:
            Actions ``[B, *action_shape]`` that the action space holds (those for a ``Box`` may
            lie outside: the worker clips them for the environment only), their log-probabilities
            ``[B]``, and the values of the observations ``[B]``.
        """
        ...

    def value(self, observations: Observations) -> torch.Tensor:
        """Estimate the values ``[B]`` of observations."""
        ...


class ActorCritic(nn.Module):
    """Separate actor and critic networks with tanh, orthogonally initialised.

    Initialisation and the free log standard deviation follow Huang et al., "The 37 Implementation
    Details of Proximal Policy Optimization" (2022). Discrete observations are one-hot encoded, all
    leaves of a ``Dict`` are flattened and joined; values are not rescaled, so wrap image
    environments accordingly.

    The two networks share no weights, but their hidden layers have the same sizes and run as one
    batched product, since with networks of this size the number of calls is what costs.

    Args:
        observation_space: Of one environment: whatever ``GymnasiumWorker`` supports.
        action_space: Of one environment: ``Discrete``, ``MultiDiscrete`` or a ``Box`` of floats.
        hidden_sizes: Units of the hidden layers, of the actor and of the critic alike.

    Raises:
        ConfigurationError: A space of another kind.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        hidden_sizes: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self._encoder = _Encoder(observation_space)
        self.head = make_action_head(action_space)
        sizes = [self._encoder.size, *hidden_sizes]
        layers = [(_TwinLinear(*pair), nn.Tanh()) for pair in pairwise(sizes)]
        self.hidden = nn.Sequential(*chain.from_iterable(layers))
        self.actor_output = _output_layer(sizes[-1], self.head.num_inputs, gain=0.01)
        self.critic_output = _output_layer(sizes[-1], 1, gain=1.0)

    def act(self, observations: Observations) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample actions from torch's global generator; see ``Policy.act``."""
        outputs, values = self(observations)
        actions, log_probs = self.head.sample(outputs)
        return actions, log_probs, values

    def value(self, observations: Observations) -> torch.Tensor:
        """Estimate the values ``[B]`` of observations; see ``Policy.value``."""
        values: torch.Tensor = self(observations)[1]
        return values

    def evaluate(
        self, observations: Observations, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge actions that were taken, with gradients, for the learner.

        Args:
            observations: ``[B, *shape]``, or a mapping of such tensors.
            actions: ``[B, *action_shape]`` as ``act`` returned them.

        Returns:
            Log-probabilities, entropies and values, each ``[B]``. Log-probability and entropy of
            an action with several parts are the sums over the parts.
        """
        outputs, values = self(observations)
        log_probs, entropies = self.head.evaluate(outputs, actions)
        return log_probs, entropies, values

    def forward(self, observations: Observations) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the actor's outputs ``[B, n]`` (logits, or means) and the values ``[B]``."""
        features = self._encoder(observations)
        actor, critic = self.hidden(features.expand(2, -1, -1)).unbind()
        return self.actor_output(actor), self.critic_output(critic).squeeze(-1)


class _TwinLinear(nn.Module):
    """One linear layer of the actor and one of the critic: ``[2, B, inputs]`` to ``outputs``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(2, 1, outputs))
        for weight in self.weight.unbind():
            nn.init.orthogonal_(weight, math.sqrt(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


def _output_layer(inputs: int, outputs: int, *, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class _Encoder:
    """Turns observations of any supported space into one ``float32`` vector each."""

    def __init__(self, space: Space[Any]) -> None:
        self._leaves = observation_leaves(space)
        self.size = sum(_encoded_size(leaf.space) for leaf in self._leaves)
        only = self._leaves[0].space
        self._is_plain = len(self._leaves) == 1 and isinstance(only, Box) and len(only.shape) == 1

    def __call__(self, observations: Observations) -> torch.Tensor:
        """Encode ``[..., *shape]`` as ``[..., size]``."""
        if isinstance(observations, Mapping):
            parts = [_encode(observations[leaf.path], leaf.space) for leaf in self._leaves]
            return torch.cat(parts, dim=-1)
        if self._is_plain:
            return observations.float()
        return _encode(observations, self._leaves[0].space)


def _encoded_size(space: Space[Any]) -> int:
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, MultiDiscrete):
        return int(space.nvec.sum())
    return math.prod(space.shape or ())


def _encode(tensor: torch.Tensor, space: Space[Any]) -> torch.Tensor:
    if isinstance(space, Discrete):
        return functional.one_hot(tensor.long() - int(space.start), int(space.n)).float()
    shape = space.shape or ()
    flat = tensor.reshape(*tensor.shape[: tensor.dim() - len(shape)], math.prod(shape))
    if isinstance(space, MultiDiscrete):
        digits = (flat.long() - torch.from_numpy(space.start).flatten().to(flat.device)).unbind(-1)
        sizes = space.nvec.flatten().tolist()
        parts = [functional.one_hot(d, n).float() for d, n in zip(digits, sizes, strict=True)]
        return torch.cat(parts, dim=-1)
    return flat.float()

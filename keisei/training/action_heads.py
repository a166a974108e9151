"""How network outputs become actions: sampling, log-probabilities and entropies by action space.

Written on plain tensors: objects of ``torch.distributions`` would cost more than the networks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from keisei.exceptions import ConfigurationError
from keisei.training.spaces import Box, Discrete, MultiDiscrete, Space, np

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class ActionHead(nn.Module):
    """Turns the actor's outputs into actions, and judges actions that were taken.

    Attributes:
        num_inputs: Outputs that the actor must have.
    """

    num_inputs: int

    def sample(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw actions from torch's global generator.

        Args:
            outputs: The actor's, ``[..., num_inputs]``.

        Returns:
            Actions ``[..., *action_shape]`` and their log-probabilities ``[...]``.
        """
        raise NotImplementedError

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the log-probabilities of ``actions`` and the entropies, each ``[...]``."""
        raise NotImplementedError


class CategoricalHead(ActionHead):
    """One choice among ``n``, by logits."""

    def __init__(self, n: int, start: int) -> None:
        super().__init__()
        self.num_inputs = n
        self._start = start

    def sample(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw by the Gumbel-max trick, with exponential noise as in ``torch.multinomial``."""
        log_probs = functional.log_softmax(outputs, dim=-1)
        noise = torch.empty_like(log_probs).exponential_().log_()
        choices = (log_probs - noise).argmax(-1, keepdim=True)
        chosen = log_probs.gather(-1, choices).squeeze(-1)
        actions = choices.squeeze(-1)
        return (actions + self._start if self._start else actions), chosen

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[...]``."""
        log_probs = functional.log_softmax(outputs, dim=-1)
        choices = (actions.long() - self._start).unsqueeze(-1)
        chosen = log_probs.gather(-1, choices).squeeze(-1)
        return chosen, -(log_probs.exp() * log_probs).sum(-1)


class MultiCategoricalHead(ActionHead):
    """Several independent choices, one for each entry of ``nvec``."""

    def __init__(self, space: MultiDiscrete) -> None:
        super().__init__()
        self._shape = space.nvec.shape
        self._sizes: list[int] = space.nvec.flatten().tolist()
        starts: list[int] = space.start.flatten().tolist()
        self._parts = [CategoricalHead(n, s) for n, s in zip(self._sizes, starts, strict=True)]
        self.num_inputs = sum(self._sizes)

    def sample(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw each part by itself."""
        pairs = zip(self._parts, torch.split(outputs, self._sizes, dim=-1), strict=True)
        drawn, log_probs = zip(*[part.sample(logits) for part, logits in pairs], strict=True)
        actions = torch.stack(drawn, dim=-1).reshape(*outputs.shape[:-1], *self._shape)
        return actions, torch.stack(log_probs, dim=-1).sum(-1)

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[..., *nvec.shape]``; both results are sums over the parts."""
        logits = torch.split(outputs, self._sizes, dim=-1)
        chosen = actions.reshape(*outputs.shape[:-1], len(self._sizes)).unbind(-1)
        triples = zip(self._parts, logits, chosen, strict=True)
        judged = [part.evaluate(logits, choices) for part, logits, choices in triples]
        log_probs, entropies = zip(*judged, strict=True)
        return torch.stack(log_probs, dim=-1).sum(-1), torch.stack(entropies, dim=-1).sum(-1)


class GaussianHead(ActionHead):
    """Independent normal distributions; their deviations do not depend on the observation."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        self.num_inputs = math.prod(shape)
        self.log_std = nn.Parameter(torch.zeros(self.num_inputs))

    def sample(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw around the means; nothing is clipped or squashed."""
        noise = torch.randn_like(outputs)
        actions = torch.addcmul(outputs, noise, self.log_std.exp())
        return actions.reshape(*outputs.shape[:-1], *self._shape), self._log_probs(noise)

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[..., *shape]``; both results are sums over the components."""
        noise = (actions.reshape(outputs.shape) - outputs) / self.log_std.exp()
        log_probs = self._log_probs(noise)
        entropy = (self.log_std + (0.5 + _HALF_LOG_TAU)).sum()
        return log_probs, entropy.expand_as(log_probs)

    def _log_probs(self, noise: torch.Tensor) -> torch.Tensor:
        return (-0.5 * noise.square() - self.log_std - _HALF_LOG_TAU).sum(-1)


def make_action_head(space: Space[Any]) -> ActionHead:
    """Make the head for an action space: ``Discrete``, ``MultiDiscrete`` or a ``Box`` of floats.

    Raises:
        ConfigurationError: A space of another kind.
    """
    if isinstance(space, Discrete):
        return CategoricalHead(int(space.n), int(space.start))
    if isinstance(space, MultiDiscrete):
        return MultiCategoricalHead(space)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        return GaussianHead(space.shape)
    raise ConfigurationError(
        [
            f"the action space is {space}: ActorCritic supports Discrete, MultiDiscrete and Box of "
            "floats; transform the actions, or give a policy of your own"
        ]
    )

"""How network outputs become actions: sampling, log-probabilities and entropies by action space.

Written on plain tensors: objects of ``torch.distributions`` would cost more than the networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from keisei.exceptions import ConfigurationError
from keisei.training.legal_actions import LegalActions, evaluate_legal, sample_legal
from keisei.training.sampling import (
    Allowed,
    check_allowed,
    check_numbers,
    fitting_mask,
    masked_logits,
    name_of,
)
from keisei.training.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space, np

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class ActionHead(nn.Module):
    """Turns the actor's outputs into actions, and judges actions that were taken.

    Attributes:
        num_inputs: Outputs that the actor must have.
        takes_masks: Whether some of the actions can be forbidden.
    """

    num_inputs: int
    takes_masks = False

    def sample(
        self,
        outputs: torch.Tensor,
        *,
        deterministic: bool = False,
        allowed: Allowed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw actions from torch's global generator.

        Args:
            outputs: The actor's, ``[..., num_inputs]``.
            deterministic: Take the likeliest actions instead.
            allowed: Which actions may be taken, ``None`` being all: a mask ``[..., num_inputs]``
                that is true where one is allowed, or lists of legal ones for outputs ``[B, n]``.

        Returns:
            Actions ``[..., *action_shape]`` and their log-probabilities ``[...]`` among those
            that are allowed.

        Raises:
            ValueError: There is a row in which the outputs are not numbers or nothing is allowed,
                or ``allowed`` does not fit.
        """
        raise NotImplementedError

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor, *, allowed: Allowed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the log-probabilities of ``actions`` and the entropies, each ``[...]``.

        Both are those of the distribution over what is ``allowed``; the log-probability of any
        other action is minus infinity.

        Raises:
            ValueError: Nothing is allowed in a row, or ``allowed`` does not fit.
        """
        raise NotImplementedError

    def _refuse(self, allowed: Allowed | None, kind: str) -> None:
        if allowed is not None:
            raise ValueError(f"{kind} actions take no {name_of(allowed)}: leave it out")


class CategoricalHead(ActionHead):
    """One choice among ``n``, by logits."""

    takes_masks = True

    def __init__(self, n: int, start: int) -> None:
        super().__init__()
        self.num_inputs = n
        self._start = start

    def sample(
        self,
        outputs: torch.Tensor,
        *,
        deterministic: bool = False,
        allowed: Allowed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw by the Gumbel-max trick, with exponential noise as in ``torch.multinomial``."""
        actions, log_probs = self.draw(outputs, deterministic, allowed)
        check_numbers(log_probs, outputs, allowed)
        return actions, log_probs

    def draw(
        self, outputs: torch.Tensor, deterministic: bool, allowed: Allowed | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same, but leave it to the caller to check the log-probabilities."""
        if isinstance(allowed, LegalActions):
            actions, chosen = sample_legal(outputs, allowed, deterministic=deterministic)
            return actions + self._start, chosen
        logits = outputs if allowed is None else masked_logits(outputs, allowed)
        log_probs = logits.log_softmax(-1)
        if deterministic:
            choices = log_probs.argmax(-1, keepdim=True)
        else:
            noise = torch.empty_like(log_probs).exponential_().log_()
            choices = noise.sub_(log_probs).argmin(-1, keepdim=True)
        chosen = log_probs.gather(-1, choices).squeeze(-1)
        actions = choices.squeeze(-1)
        return (actions + self._start if self._start else actions), chosen

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor, *, allowed: Allowed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[...]``."""
        choices = actions.long() - self._start
        if isinstance(allowed, LegalActions):
            check_allowed(allowed)
            return evaluate_legal(outputs, allowed, choices)
        if allowed is None:
            log_probs = finite = outputs.log_softmax(-1)
        else:
            check_allowed(allowed)
            log_probs = masked_logits(outputs, allowed).log_softmax(-1)
            # A probability of 0 must not become 0 times infinity, nor in the gradient.
            finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
        chosen = log_probs.gather(-1, choices.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_probs.exp() * finite).sum(-1)


class MultiCategoricalHead(ActionHead):
    """Several independent choices, one for each entry of ``nvec``."""

    takes_masks = True

    def __init__(self, space: MultiDiscrete) -> None:
        super().__init__()
        self._shape = space.nvec.shape
        self._sizes: list[int] = space.nvec.flatten().tolist()
        starts: list[int] = space.start.flatten().tolist()
        self._parts = [CategoricalHead(n, s) for n, s in zip(self._sizes, starts, strict=True)]
        self.num_inputs = sum(self._sizes)

    def sample(
        self,
        outputs: torch.Tensor,
        *,
        deterministic: bool = False,
        allowed: Allowed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw each part by itself; a mask has the parts side by side, as the outputs have."""
        masks = self._masks(allowed, outputs)
        for mask in masks:
            if mask is not None:
                check_allowed(mask)
        triples = zip(self._parts, self._split(outputs), masks, strict=True)
        pairs = [part.draw(logits, deterministic, mask) for part, logits, mask in triples]
        drawn, parts = zip(*pairs, strict=True)
        actions = _shaped(torch.stack(drawn, dim=-1), self._shape)
        log_probs = torch.stack(parts, dim=-1).sum(-1)
        check_numbers(log_probs, outputs, allowed)
        return actions, log_probs

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor, *, allowed: Allowed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[..., *nvec.shape]``; both results are sums over the parts."""
        chosen = actions.reshape(*outputs.shape[:-1], len(self._sizes)).unbind(-1)
        masks = self._masks(allowed, outputs)
        parts = zip(self._parts, self._split(outputs), chosen, masks, strict=True)
        judged = [
            part.evaluate(logits, choices, allowed=mask) for part, logits, choices, mask in parts
        ]
        log_probs, entropies = zip(*judged, strict=True)
        return torch.stack(log_probs, dim=-1).sum(-1), torch.stack(entropies, dim=-1).sum(-1)

    def _split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(tensor, self._sizes, dim=-1)

    def _masks(
        self, allowed: Allowed | None, outputs: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        if allowed is None:
            return [None] * len(self._sizes)
        if isinstance(allowed, LegalActions):
            raise ValueError("MultiDiscrete actions take an action_mask, no legal_actions")
        return self._split(fitting_mask(allowed, outputs))


class BernoulliHead(ActionHead):
    """Independent choices between 0 and 1, by the logits of 1."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        self.num_inputs = math.prod(shape)

    def sample(
        self,
        outputs: torch.Tensor,
        *,
        deterministic: bool = False,
        allowed: Allowed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw each component by itself."""
        self._refuse(allowed, "MultiBinary")
        bounds = 0.5 if deterministic else torch.rand_like(outputs)
        actions = outputs.sigmoid() > bounds
        log_probs = self._log_probs(outputs, actions)
        check_numbers(outputs, outputs)
        return _shaped(actions.to(torch.int8), self._shape), log_probs

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor, *, allowed: Allowed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[..., *shape]`` of 0 and 1; both results are sums over the components."""
        self._refuse(allowed, "MultiBinary")
        log_probs = self._log_probs(outputs, actions.reshape(outputs.shape) != 0)
        # The larger of the two probabilities and its logit's size tell the entropy of either sign.
        size = outputs.abs()
        entropies = functional.softplus(-size) + size.clamp(max=1e4) * (-size).sigmoid()
        return log_probs, entropies.sum(-1)

    @staticmethod
    def _log_probs(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return functional.logsigmoid(torch.where(actions, logits, -logits)).sum(-1)


class GaussianHead(ActionHead):
    """Independent normal distributions; their deviations do not depend on the observation."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        self.num_inputs = math.prod(shape)
        self.log_std = nn.Parameter(torch.zeros(self.num_inputs))

    def sample(
        self,
        outputs: torch.Tensor,
        *,
        deterministic: bool = False,
        allowed: Allowed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw around the means; nothing is clipped or squashed."""
        self._refuse(allowed, "Box")
        log_std = self.log_std
        if deterministic:
            actions, noise = outputs, torch.zeros_like(outputs)
        else:
            noise = torch.randn_like(outputs)
            actions = torch.addcmul(outputs, noise, log_std.exp())
        check_numbers(actions, outputs)
        return _shaped(actions, self._shape), _normal_log_probs(noise, log_std)

    def evaluate(
        self, outputs: torch.Tensor, actions: torch.Tensor, *, allowed: Allowed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge actions ``[..., *shape]``; both results are sums over the components."""
        self._refuse(allowed, "Box")
        noise = (actions.reshape(outputs.shape) - outputs) / self.log_std.exp()
        log_probs = _normal_log_probs(noise, self.log_std)
        entropy = (self.log_std + (0.5 + _HALF_LOG_TAU)).sum()
        return log_probs, entropy.expand_as(log_probs)


def _normal_log_probs(noise: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    return (-0.5 * noise.square() - log_std - _HALF_LOG_TAU).sum(-1)


def _shaped(actions: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Give flat actions ``[..., n]`` the shape that one action has."""
    return actions if len(shape) == 1 else actions.reshape(*actions.shape[:-1], *shape)


def make_action_head(space: Space[Any]) -> ActionHead:
    """Make the head for an action space.

    Args:
        space: ``Discrete``, ``MultiDiscrete``, ``MultiBinary`` or a ``Box`` of floats.

    Raises:
        ConfigurationError: A space of another kind.
    """
    if isinstance(space, Discrete):
        return CategoricalHead(int(space.n), int(space.start))
    if isinstance(space, MultiDiscrete):
        return MultiCategoricalHead(space)
    if isinstance(space, MultiBinary):
        return BernoulliHead(space.shape)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        return GaussianHead(space.shape)
    raise ConfigurationError(
        [
            f"the action space is {space}: ActorCritic supports Discrete, MultiDiscrete, "
            "MultiBinary and Box of floats; transform the actions, or give a policy of your own"
        ]
    )

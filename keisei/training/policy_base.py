"""What policies share: how they are made, and the parts that follow from their spaces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from keisei.training.action_heads import make_action_head
from keisei.training.encoding import ACTION_MASK, Encoder, without_action_mask
from keisei.training.legal_actions import LegalActions
from keisei.training.normalization import RewardNormalizer
from keisei.training.rollouts import Observations
from keisei.training.sampling import Allowed, one_of
from keisei.training.spaces import Space

PolicyMaker = Callable[[Space[Any], Space[Any]], nn.Module]
"""Makes a policy from the spaces of observations and actions, as ``ActorCritic`` does."""


def make_policy(
    source: nn.Module | PolicyMaker, observation_space: Space[Any], action_space: Space[Any]
) -> nn.Module:
    """Copy a module, or make one for the spaces of one environment."""
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    return source(observation_space, action_space)


class SpacePolicy(nn.Module):
    """The parts of a policy that follow from its spaces: head, encoder, mask and normalisation.

    Args:
        observation_space: Of one environment. A fitting ``"action_mask"`` is no observation.
        action_space: Of one environment.
        normalize_observations: Whether there is a ``normalizer`` of encoded observations.
        normalize_rewards: Whether there is a ``reward_normalizer`` for the learner.

    Raises:
        ConfigurationError: A space of another kind.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        normalize_observations: bool,
        normalize_rewards: bool,
    ) -> None:
        super().__init__()
        self.head = make_action_head(action_space)
        observation_space, self._has_mask = without_action_mask(observation_space, self.head)
        self._encoder = Encoder(observation_space)
        self.normalizer = self._encoder.make_normalizer() if normalize_observations else None
        self.reward_normalizer = RewardNormalizer() if normalize_rewards else None

    def update_statistics(self, observations: Observations) -> None:
        """Count observations for their normalisation, if there is any; for the learner alone.

        Args:
            observations: ``[..., *shape]``, or a mapping of such tensors: each once, and only those
                of true steps.

        Raises:
            ValueError: A number is not finite; nothing is changed.
        """
        if self.normalizer is not None:
            self.normalizer.update(self._encoder(observations))

    def _features(self, observations: Observations) -> torch.Tensor:
        features = self._encoder(observations)
        return features if self.normalizer is None else self.normalizer(features)

    def _allowed(
        self,
        observations: Observations,
        action_mask: torch.Tensor | None,
        legal_actions: LegalActions | None,
    ) -> Allowed | None:
        allowed = one_of(action_mask, legal_actions)
        if allowed is None and self._has_mask and isinstance(observations, Mapping):
            return observations.get(ACTION_MASK)
        return allowed

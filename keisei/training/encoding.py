"""How observations of any supported space become one vector each, and where masks lie in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from keisei.training.action_heads import ActionHead
from keisei.training.normalization import ObservationNormalizer
from keisei.training.rollouts import Observations
from keisei.training.spaces import (
    Box,
    Dict,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Space,
    np,
    observation_leaves,
)

ACTION_MASK = "action_mask"
"""The key of a ``Dict`` observation under which environments tell which actions they allow."""


def without_action_mask(space: Space[Any], head: ActionHead) -> tuple[Space[Any], bool]:
    """Leave the action mask out of an observation space.

    Args:
        space: The observation space of one environment.
        head: Whose logits the mask must fit: an array of integers or booleans with one entry each.

    Returns:
        The space without it, and whether there was one. A ``Dict`` that holds nothing else stays
        as it is: there is something to observe then.
    """
    if not (isinstance(space, Dict) and head.takes_masks and ACTION_MASK in space.spaces):
        return space, False
    mask = space.spaces[ACTION_MASK]
    fits = (
        isinstance(mask, MultiBinary | Box | MultiDiscrete)
        and mask.shape == (head.num_inputs,)
        and not np.issubdtype(mask.dtype, np.floating)
    )
    others = {key: one for key, one in space.spaces.items() if key != ACTION_MASK}
    if not fits or not others:
        return space, fits
    return Dict(others), True


class Encoder:
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

    def make_normalizer(self) -> ObservationNormalizer:
        """Make a normaliser of the encoded vectors that scales what comes from ``Box`` leaves."""
        spaces = [leaf.space for leaf in self._leaves]
        parts = [torch.full((_encoded_size(one),), isinstance(one, Box)) for one in spaces]
        return ObservationNormalizer(self.size, is_scaled=torch.cat(parts))


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

"""Gymnasium's spaces as the library sees them: supported kinds, named leaves, tensor dtypes.

The one place where Gymnasium is imported; the rest of the library works without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

try:
    import gymnasium
    import numpy as np
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
except ImportError as error:
    raise ImportError(
        "Gymnasium environments need gymnasium>=1.1 and numpy; "
        'install them with: pip install "keisei[gymnasium]"'
    ) from error

from keisei.exceptions import ConfigurationError

__all__ = [
    "AsyncVectorEnv",
    "AutoresetMode",
    "Box",
    "Dict",
    "Discrete",
    "EnvSpec",
    "Leaf",
    "MultiBinary",
    "MultiDiscrete",
    "Space",
    "SyncVectorEnv",
    "VectorEnv",
    "gymnasium",
    "np",
    "observation_leaves",
    "tensor_dtype",
]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of an observation.

    Attributes:
        path: ``""`` for a plain space; the keys, as text, joined by dots for a leaf of a ``Dict``
            space.
        keys: The keys that lead to it from the whole observation.
        space: Its space, for one environment.
    """

    path: str
    keys: tuple[Any, ...]
    space: Box | Discrete | MultiDiscrete | MultiBinary

    def take_from(self, observation: Any) -> Any:
        """Take this leaf out of an observation, or out of a batch of them; nothing is copied."""
        for key in self.keys:
            observation = observation[key]
        return observation


def observation_leaves(space: Space[Any]) -> tuple[Leaf, ...]:
    """List the arrays of an observation, in the space's own order.

    Args:
        space: The observation space of one environment: ``Box``, ``Discrete``, ``MultiDiscrete``,
            ``MultiBinary``, or a ``Dict`` of these, nested or not.

    Raises:
        ConfigurationError: A space of another kind, or two leaves with the same path.
    """
    leaves: list[Leaf] = []
    problems: list[str] = []

    def visit(node: Space[Any], keys: tuple[Any, ...]) -> None:
        path = ".".join(map(str, keys))
        if isinstance(node, Dict):
            for key, child in node.spaces.items():
                visit(child, (*keys, key))
        elif isinstance(node, Box | Discrete | MultiDiscrete | MultiBinary):
            leaves.append(Leaf(path, keys, node))
        else:
            where = f"observation {path!r}" if path else "the observation"
            problems.append(
                f"{where} has the space {node}: convert it to Box, Discrete, MultiDiscrete, "
                "MultiBinary or Dict, for example with gymnasium.wrappers.FlattenObservation"
            )

    visit(space, ())
    if not leaves and not problems:
        problems.append("the observation space is an empty Dict: there is nothing to observe")
    if len({leaf.path for leaf in leaves}) != len(leaves):
        problems.append("two observations share one dotted name: rename a key of the Dict space")
    if problems:
        raise ConfigurationError(problems)
    return tuple(leaves)


def tensor_dtype(space: Space[Any]) -> torch.dtype:
    """Give the dtype of a space's tensors: floats become ``float32``, all else stays as it is."""
    if space.dtype is None or np.issubdtype(space.dtype, np.floating):
        return torch.float32
    return torch.from_numpy(np.empty(0, space.dtype)).dtype

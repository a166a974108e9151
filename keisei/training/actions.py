"""What recorded actions go through on their way to the environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keisei.exceptions import ConfigurationError
from keisei.training.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space, np

_Array = np.ndarray[Any, Any]


def make_action_filter(
    space: Space[Any], *, one_by_one: bool = False
) -> Callable[[_Array], _Array]:
    """Return a function that makes recorded actions ``[N, *shape]`` into those to be taken.

    ``Box`` actions are clipped. The result is a new array of the space's dtype: environments keep
    their last action or change it in place, and the record is overwritten by the next rollout.

    Args:
        space: The action space of one environment.
        one_by_one: Each environment is given an element of the result. Where that is a number, and
            not a view, the record need not be copied.

    Raises:
        ConfigurationError: Actions of this space are not arrays.
    """
    if isinstance(space, Box):
        low, high, dtype = space.low, space.high, space.dtype
        return lambda actions: np.minimum(np.maximum(actions, low), high).astype(dtype, copy=False)
    if isinstance(space, MultiDiscrete | MultiBinary | Discrete):
        if one_by_one and isinstance(space, Discrete):
            return _unchanged
        dtype = space.dtype
        return lambda actions: actions.astype(dtype)
    raise ConfigurationError(
        [
            f"the action space is {space}: convert it to Box, Discrete, MultiDiscrete or "
            "MultiBinary, for example with gymnasium.wrappers.TransformAction"
        ]
    )


def _unchanged(actions: _Array) -> _Array:
    return actions

"""Arrays that environments return: converted to NumPy, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from keisei.training.spaces import Leaf, np

_Array = np.ndarray[Any, Any]

_ARRAYS = frozenset({np.ndarray, np.int64, np.float32, np.float64})
"""What has a shape and a dtype without a conversion."""

Where = Callable[[int], str]
"""Says for the index of an environment which one it is, and at which step; for errors."""


def to_array(value: Any) -> _Array:
    """Return ``value`` as an array; a tensor may lie on any device and require a gradient."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return np.asarray(value)


class LeafFit:
    """Copies one leaf of the observations, and refuses what does not fit its space.

    The shape must be that of the space. Floats take every number; integers and booleans take
    values of another dtype only where none of them changes.
    """

    def __init__(self, leaf: Leaf, dtype: np.dtype[Any]) -> None:
        """Prepare to copy.

        Args:
            leaf: The leaf.
            dtype: Of the arrays that are written.
        """
        self._leaf = leaf
        self._dtype = dtype
        self._shape: tuple[int, ...] = leaf.space.shape or ()
        self._fitting = {dtype}
        self._name = f"observation {leaf.path!r}" if leaf.path else "observation"
        # NumPy's "same_kind" lets integers wrap round.
        is_float = np.issubdtype(dtype, np.floating)
        self._casting: Any = "same_kind" if is_float else "safe"

    def copy_each(self, row: _Array, observations: Sequence[Any], where: Where) -> None:
        """Copy the observations of N environments into ``row``, ``[N, *shape]``."""
        shape, dtype, fitting = self._shape, self._dtype, self._fitting
        is_leaf = not self._leaf.keys
        for env, observation in enumerate(observations):
            value = observation if is_leaf else self._take(observation, env, where)
            if type(value) in _ARRAYS and value.shape == shape:
                found = value.dtype
                if found is dtype or found in fitting:
                    row[env] = value
                    continue
            row[env] = self.fitted(value, env, where)

    def copy_batch(self, row: _Array, observations: Any, where: Where) -> None:
        """Copy a batch of N observations into ``row``, ``[N, *shape]``."""
        batch = to_array(self._take(observations, 0, where))
        if batch.shape == row.shape:
            try:
                np.copyto(row, batch, casting=self._casting)
                return
            except TypeError:
                pass  # another dtype; whether its values fit is found below
        if batch.shape[:1] != row.shape[:1]:
            raise ValueError(
                f"the {self._name} of the vector environment, {where(0)}, has the shape "
                f"{batch.shape}, not {row.shape}"
            )
        for env, value in enumerate(batch):
            row[env] = self.fitted(value, env, where)

    def copy_one(self, observation: Any, env: int, where: Where) -> _Array:
        """Return a copy of one environment's leaf."""
        return np.array(self.check(observation, env, where), copy=True)

    def check(self, observation: Any, env: int, where: Where) -> _Array:
        """Return one environment's leaf as an array that fits, or raise; see ``fitted``."""
        return self.fitted(self._take(observation, env, where), env, where)

    def fitted(self, value: Any, env: int, where: Where) -> _Array:
        """Return ``value`` as an array that fits, or raise.

        Raises:
            ValueError: It does not fit; names the leaf, the environment and the step.
        """
        array = to_array(value)
        if array.shape != self._shape:
            raise ValueError(
                f"the {self._name} of {where(env)} has the shape {array.shape}, not {self._shape} "
                "as its space says"
            )
        if np.can_cast(array.dtype, self._dtype, self._casting):
            self._fitting.add(array.dtype)
            return array.astype(self._dtype, copy=False)
        if array.dtype.kind in "biuf":
            with np.errstate(invalid="ignore"):
                cast = array.astype(self._dtype)
            if np.array_equal(cast, array):
                return cast
            example = array[cast != array].flat[0] if array.shape else array
            raise ValueError(
                f"the {self._name} of {where(env)} is {array.dtype} and holds {example}, which "
                f"{self._dtype} of its space cannot hold: correct the space or the observation"
            )
        raise ValueError(
            f"the {self._name} of {where(env)} is {array.dtype}, not {self._dtype} as in its space"
        )

    def _take(self, observation: Any, env: int, where: Where) -> Any:
        try:
            return self._leaf.take_from(observation)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"the {self._name} of {where(env)} is missing: the environment returned "
                f"{type(observation).__name__} without it"
            ) from error

"""How one worker gets its vector environment, and what it may be given to make it from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from keisei.exceptions import ConfigurationError
from keisei.training.spaces import (
    AsyncVectorEnv,
    AutoresetMode,
    Box,
    Discrete,
    MultiBinary,
    MultiDiscrete,
    Space,
    SyncVectorEnv,
    VectorEnv,
    gymnasium,
    np,
)

_Array = np.ndarray[Any, Any]

_VECTORIZATIONS = ("sync", "async", "vector_entry_point")


@dataclass(frozen=True)
class VectorEnvMaker:
    """A picklable recipe for a vector environment; it is cheap until it is called.

    Attributes:
        env: An environment id, or a callable that returns an environment.
        num_envs: How many environments.
        env_kwargs: Arguments for each of them.
        vectorization: ``"sync"``, ``"async"`` or ``"vector_entry_point"``.
        autoreset_mode: A mode, its value, or ``None`` for ``DISABLED``.
    """

    env: str | Callable[..., gymnasium.Env[Any, Any]]
    num_envs: int
    env_kwargs: Mapping[str, Any]
    vectorization: str
    autoreset_mode: AutoresetMode | str | None

    def find_problems(self) -> Iterator[str]:
        """Say what cannot work, one line for each problem: key, value, remedy."""
        is_id = isinstance(self.env, str)
        yield from find_count_problems(num_envs=self.num_envs)
        if not is_id and not callable(self.env):
            yield f"env = {self.env!r}: must be an environment id or a callable that makes one"
        if self.vectorization not in _VECTORIZATIONS:
            known = ", ".join(map(repr, _VECTORIZATIONS))
            yield f"vectorization = {self.vectorization!r}: must be one of {known}"
        modes = [mode.value for mode in AutoresetMode]
        if self.vectorization == "vector_entry_point":
            if not is_id:
                yield f"env = {self.env!r}: only an id can have a vector entry point"
            if self.autoreset_mode is not None:
                yield f"autoreset_mode = {self.autoreset_mode!r}: a vector entry point has its own"
        elif self.autoreset_mode not in (None, *modes, *AutoresetMode):
            known = ", ".join(map(repr, modes))
            yield f"autoreset_mode = {self.autoreset_mode!r}: must be one of {known}"

    def __call__(self) -> VectorEnv[Any, Any, Any]:
        """Make it. Observations may be views that the next call of the environment overwrites."""
        kwargs = dict(self.env_kwargs)
        if not isinstance(self.env, str):
            make: Callable[[], gymnasium.Env[Any, Any]] = partial(self.env, **kwargs)
        elif self.vectorization == "vector_entry_point":
            return gymnasium.make_vec(
                self.env, self.num_envs, vectorization_mode="vector_entry_point", **kwargs
            )
        else:
            make = partial(gymnasium.make, self.env, **kwargs)
        kind = AsyncVectorEnv if self.vectorization == "async" else SyncVectorEnv
        mode = AutoresetMode(self.autoreset_mode or AutoresetMode.DISABLED)
        return kind([make] * self.num_envs, copy=False, autoreset_mode=mode)


def find_count_problems(**counts: object) -> Iterator[str]:
    """Say which of the named values is not an integer of at least 1, one line for each."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            yield f"{name} = {value!r}: must be an integer of at least 1"


def autoreset_mode_of(envs: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """Read a vector environment's mode; without one it is ``NEXT_STEP``, as Gymnasium has it."""
    return AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))


def make_action_filter(space: Space[Any]) -> Callable[[_Array], _Array]:
    """Make what recorded actions ``[N, *shape]`` go through on their way to the environments.

    ``Box`` actions are clipped. The result is a new array wherever an environment gets a view of
    it: some remember their last action, and the record is overwritten by the next rollout.

    Raises:
        ConfigurationError: Actions of this space are not arrays.
    """
    if isinstance(space, Box):
        low, high, dtype = space.low, space.high, space.dtype
        return lambda actions: np.minimum(np.maximum(actions, low), high).astype(dtype, copy=False)
    if isinstance(space, MultiDiscrete | MultiBinary):
        return np.copy
    if isinstance(space, Discrete):
        return _unchanged
    raise ConfigurationError(
        [
            f"the action space is {space}: convert it to Box, Discrete, MultiDiscrete or "
            "MultiBinary, for example with gymnasium.wrappers.TransformAction"
        ]
    )


def _unchanged(actions: _Array) -> _Array:
    return actions

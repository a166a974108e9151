"""Single environments in the care of a vector environment: made, seeded, watched, and copied from.

Gymnasium's vector environments merge infos into arrays, cast observations to the space's dtype and
keep references to arrays that the next reset changes. ``HostedEnv`` stands between, so that what
reaches the worker is what the environment returned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keisei.child.forked import ForkedProcess
from keisei.training.arrays import LeafFit
from keisei.training.spaces import Leaf, gymnasium, np, tensor_dtype

INFO = "keisei.info"
"""Where the infos of hosted environments stand, unmerged."""


class Boxed:
    """The info of one step of one environment; an object that Gymnasium does not look into."""

    __slots__ = ("info",)

    def __init__(self, info: Mapping[str, Any]) -> None:
        self.info = info


class HostedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Passes an environment on, and tells of each step; other attributes are the environment's.

    Observations must fit the space, and the last one of an episode is a copy. Of the infos only
    ``keys`` are passed on, boxed, so that they may be of any kind and length.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        index: int,
        keys: frozenset[str],
        progress: Callable[[], None],
    ) -> None:
        super().__init__(env)
        self._index = index
        self._keys = keys
        self._progress = progress
        self._num_steps = 0
        self._fits: Sequence[LeafFit] = ()

    def fit(self, leaves: Sequence[Leaf]) -> None:
        """Refuse observations that do not fit these leaves from now on."""

        def dtype_of(leaf: Leaf) -> np.dtype[Any]:
            is_float = tensor_dtype(leaf.space).is_floating_point
            return np.dtype(np.float32 if is_float else leaf.space.dtype)

        self._fits = [LeafFit(leaf, dtype_of(leaf)) for leaf in leaves]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset the environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._progress()
        self._num_steps = 0
        self._check(observation)
        return observation, {INFO: self._boxed(info)}

    def step(self, action: Any) -> Any:
        """Step the environment."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._progress()
        self._num_steps += 1
        self._check(observation)
        if terminated or truncated:
            observation = copy.deepcopy(observation)
        return observation, float(reward), terminated, truncated, {INFO: self._boxed(info)}

    def _boxed(self, info: Mapping[str, Any]) -> Boxed:
        keys = self._keys
        return Boxed({key: info[key] for key in keys if key in info} if info else {})

    def _check(self, observation: Any) -> None:
        for fit in self._fits:
            fit.check(observation, self._index, self._where)

    def _where(self, env: int) -> str:
        return f"environment {env} at step {self._num_steps} of its episode"


class EnvMaker:
    """Makes the environment with one index, in this process or in one forked from it.

    In a process of the environment's own the global generators are seeded first: after the fork
    they would draw the same in all of them.
    """

    def __init__(self, make: Callable[[], Any], index: int, seed: int) -> None:
        self._make = make
        self._seed = [seed, index]
        self._forked = ForkedProcess()
        self._made: list[Any] = []

    def keep(self, env: Any) -> None:
        """Return ``env`` from the next call in this process."""
        self._made = [env]

    def __call__(self) -> Any:
        """Make the environment."""
        if self._forked.is_here():
            words = np.random.SeedSequence(self._seed).generate_state(1, np.uint64)
            self._forked.begin(int(words[0]) >> 1)
        elif self._made:
            return self._made.pop()
        return self._make()

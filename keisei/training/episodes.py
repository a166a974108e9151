"""Returns and lengths of the episodes of a vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keisei.training.spaces import np


class _Ended:
    """Episodes that ended, oldest first."""

    def __init__(self) -> None:
        self.returns: list[float] = []
        self.lengths: list[int] = []

    def add(self, total: float, length: int) -> None:
        self.returns.append(total)
        self.lengths.append(length)


class EpisodeLog:
    """Adds rewards up, in double precision, and notes each episode as it ends.

    An environment may tell of its episodes itself; from then on only those count: above its
    statistics, rewards may be scaled and episodes cut. Lengths come from one clock for all
    environments, so a step costs a single addition.
    """

    def __init__(self, num_envs: int, *, is_told: bool = False) -> None:
        """Begin.

        Args:
            num_envs: How many environments.
            is_told: Whether the environments are known to tell of their episodes.
        """
        self._returns = np.zeros(num_envs)
        self._starts = [0] * num_envs
        self._clock = 0
        self._is_told = is_told
        self._counted, self._told = _Ended(), _Ended()

    def begin(self) -> None:
        """Begin new episodes everywhere; those in progress are forgotten."""
        self._returns.fill(0.0)
        self._starts = [self._clock] * len(self._starts)

    def add(self, rewards: np.ndarray[Any, Any] | Sequence[float]) -> None:
        """Count one step with rewards ``[N]``."""
        self._returns += rewards
        self._clock += 1

    def end(self, envs: Sequence[int], *, pause: int = 0) -> None:
        """Note that the episodes of ``envs`` ended with the last step.

        Args:
            envs: Indices of the environments.
            pause: Steps that follow before their next episode's first one.
        """
        for env in envs:
            self._counted.add(self._returns[env].item(), self._clock - self._starts[env])
            self._returns[env] = 0.0
            self._starts[env] = self._clock + pause

    def tell(self, total: float, length: int) -> None:
        """Note an episode of which an environment told itself."""
        self._is_told = True
        self._told.add(total, length)

    def take(self) -> dict[str, Any]:
        """Hand over what ended since the last call: returns and lengths, oldest first.

        ``episode_source`` is "info" if the environments told, and "rewards" if they were counted.
        """
        ended = self._told if self._is_told else self._counted
        self._counted, self._told = _Ended(), _Ended()
        return {
            "episode_returns": ended.returns,
            "episode_lengths": ended.lengths,
            "episode_source": "info" if self._is_told else "rewards",
        }

"""Returns and lengths of the episodes of a vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keisei.training.spaces import np


class EpisodeLog:
    """Adds rewards up, in double precision, and notes each episode as it ends.

    Lengths come from one clock for all environments, so a step costs a single addition.
    """

    def __init__(self, num_envs: int) -> None:
        self._returns = np.zeros(num_envs)
        self._starts = [0] * num_envs
        self._clock = 0
        self._ended_returns: list[float] = []
        self._ended_lengths: list[int] = []

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
            self._ended_returns.append(self._returns[env].item())
            self._ended_lengths.append(self._clock - self._starts[env])
            self._returns[env] = 0.0
            self._starts[env] = self._clock + pause

    def take(self) -> dict[str, list[float] | list[int]]:
        """Hand over what ended since the last call: returns and lengths, oldest first."""
        taken: dict[str, list[float] | list[int]] = {
            "episode_returns": self._ended_returns,
            "episode_lengths": self._ended_lengths,
        }
        self._ended_returns, self._ended_lengths = [], []
        return taken

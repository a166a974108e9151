"""Keisei workers that do the shared work, in a module that the fork server can import."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cases import Bandwidth, Throughput
from benchmarks.work import ActorCritic, make_rollout
from keisei import Experience, Worker, WorkerContext

if TYPE_CHECKING:
    import torch


def make_policy(observation_space: Any, action_space: Any) -> ActorCritic:
    """Return the shared networks, for CartPole's spaces only."""
    return ActorCritic(observation_space.shape[0], int(action_space.n))


class RolloutWorker(Worker):
    """Runs the loop of a throughput case."""

    def __init__(self, case: Throughput) -> None:
        """Keep the case; the loop is built in the worker's process."""
        self._case = case

    def setup(self, context: WorkerContext) -> None:
        """Build environment and policy."""
        self._rollout = make_rollout(self._case, context.worker_id)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Take the weights; random actions need none."""

    def collect(self) -> Experience:
        """Return one batch; its arrays are copied before the next call."""
        return Experience(self._rollout.collect(), num_steps=self._case.batch)


class ArrayWorker(Worker):
    """Returns the same array again and again, at the pace of its case."""

    def __init__(self, case: Bandwidth) -> None:
        """Keep the case."""
        self._case = case

    def setup(self, context: WorkerContext) -> None:
        """Draw the array."""
        size = (1, self._case.num_bytes)
        self._array = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)

    def collect(self) -> Experience:
        """Return the array as one step."""
        if self._case.interval:
            time.sleep(self._case.interval)
        return Experience({"obs": self._array}, num_steps=1)


class TinyWorker(Worker):
    """Makes a tiny batch every ``interval`` seconds, echoes commands, and checks weights.

    A state dict that is not the same value in every element counts as torn.
    """

    def __init__(self, interval: float = 0.0, check: bool = False) -> None:
        """Keep the interval."""
        self._interval, self._check = interval, check
        self._torn = self._loaded = 0

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Take the weights as they are: they were copied already."""
        if self._check:
            first = next(iter(weights.values()))[0]
            self._loaded += 1
            self._torn += not all(bool((tensor == first).all()) for tensor in weights.values())

    def collect(self) -> dict[str, Any]:
        """Wait, and return a tiny batch."""
        if self._interval:
            time.sleep(self._interval)
        return {"obs": np.zeros((1, 4), np.float32)}

    def on_command(self, command: str, data: Any) -> Any:
        """Answer "echo" with its data and "torn" with (versions loaded, versions torn)."""
        if command == "echo":
            return data
        if command == "torn":
            return self._loaded, self._torn
        return super().on_command(command, data)

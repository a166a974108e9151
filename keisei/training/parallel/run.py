"""What ``ParallelManager.run`` needs of a learner, and what it reports."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from keisei import events
from keisei.events import Incident
from keisei.exceptions import ManagerStateError
from keisei.supervision.shutdown import to_completion
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.model_sync import ModelSynchronizer

if TYPE_CHECKING:
    import torch

    from keisei.training.parallel.parallel_manager import ParallelManager


class Learner(Protocol):
    """Turns experience into better weights, in the application's process."""

    def learn(self, batches: Sequence[ExperienceBatch]) -> Any:
        """Learn from one update's batches.

        ``def`` runs in a thread of its own, so the event loop never waits for it; ``async def``
        is awaited. A mapping that it returns is shown as metrics.
        """
        ...

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the weights; pushed every ``sync_interval`` updates, never during ``learn``."""
        ...


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did.

    Attributes:
        num_updates: Calls of ``learn``.
        num_steps: Environment steps delivered to it.
        num_batches: Batches delivered to it.
        seconds: From the start of ``run`` to the end of the last update.
        weights_version: The newest version.
        num_restarts: Workers started in the place of failed ones.
        incidents: Every failure, oldest first.
        metrics: What the last ``learn`` returned, if it was a mapping.
        reason: Why it ended: "max_steps", "max_seconds" or "request_stop".
    """

    num_updates: int
    num_steps: int
    num_batches: int
    seconds: float
    weights_version: int
    num_restarts: int
    incidents: tuple[Incident, ...]
    metrics: Mapping[str, float]
    reason: str

    @property
    def steps_per_second(self) -> float:
        """Environment steps per second over the whole run."""
        return self.num_steps / self.seconds if self.seconds > 0 else 0.0


class TrainingLoop:
    """Collect, learn, push, until a limit is reached or somebody asks to stop."""

    def __init__(
        self,
        manager: ParallelManager,
        learner: Learner,
        *,
        max_steps: int | None,
        max_seconds: float | None,
        steps_per_update: int | None,
    ) -> None:
        self._manager = manager
        self._learner = learner
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._steps_per_update = steps_per_update
        self._synchronizer = ModelSynchronizer(manager.config.sync_interval)
        self._thread = ThreadPoolExecutor(1, "keisei-learner")
        self._started = time.monotonic()
        self._updates = 0
        self._steps = 0
        self._batches = 0
        self._metrics: Mapping[str, float] = {}

    async def run(self) -> RunReport:
        """Run to the end.

        When cancelled, an update that is being learned in a thread is finished first.
        """
        try:
            if self._manager.weights_version == 0:
                await self._manager.push_weights(self._learner.state_dict())
            before = time.monotonic()
            while (reason := self._reason_to_end()) is None:
                batches = await self._manager.collect_update(
                    self._steps_per_update, self._seconds_left()
                )
                if not batches:
                    continue
                await self._update(batches, before)
                before = time.monotonic()
            return self._report(reason)
        finally:
            self._thread.shutdown(wait=True)

    async def _update(self, batches: list[ExperienceBatch], before: float) -> None:
        steps = sum(batch.num_steps for batch in batches)
        staleness = sum(batch.staleness for batch in batches) / len(batches)
        self._batches += len(batches)
        outcome = await self._learn(batches)
        del batches
        self._updates += 1
        self._steps += steps
        if isinstance(outcome, Mapping):
            self._metrics = dict(outcome)
        if self._synchronizer.should_sync(self._updates):
            await self._push()
            self._synchronizer.mark_sync_completed(self._updates)
        stats = self._manager.stats()
        self._manager.publish_update(
            events.UpdateCompleted(
                update=self._updates,
                num_steps=self._steps,
                steps_per_second=steps / max(time.monotonic() - before, 1e-9),
                weights_version=stats.weights_version,
                num_workers=stats.num_ready,
                num_restarts=stats.num_restarts,
                staleness=staleness,
                metrics=self._metrics,
            )
        )

    async def _push(self) -> None:
        try:
            await self._manager.push_weights(self._learner.state_dict())
        except ManagerStateError:
            if not self._manager.is_stop_requested:  # by stop() from another task: an orderly end
                raise

    async def _learn(self, batches: list[ExperienceBatch]) -> Any:
        learn = self._learner.learn
        if inspect.iscoroutinefunction(learn):
            return await learn(batches)
        loop = asyncio.get_running_loop()

        async def in_thread() -> Any:
            return await loop.run_in_executor(self._thread, learn, batches)

        outcome = await to_completion(in_thread())
        return await outcome if inspect.isawaitable(outcome) else outcome  # a wrapped "async def"

    def _reason_to_end(self) -> str | None:
        if self._manager.is_stop_requested:
            return "request_stop"
        if self._max_steps is not None and self._steps >= self._max_steps:
            return "max_steps"
        left = self._seconds_left()
        if left is not None and left <= 0:
            return "max_seconds"
        return None

    def _seconds_left(self) -> float | None:
        if self._max_seconds is None:
            return None
        return self._max_seconds - (time.monotonic() - self._started)

    def _report(self, reason: str) -> RunReport:
        stats = self._manager.stats()
        return RunReport(
            num_updates=self._updates,
            num_steps=self._steps,
            num_batches=self._batches,
            seconds=time.monotonic() - self._started,
            weights_version=stats.weights_version,
            num_restarts=stats.num_restarts,
            incidents=tuple(self._manager.incidents),
            metrics=self._metrics,
            reason=reason,
        )

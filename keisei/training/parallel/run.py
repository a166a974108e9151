"""What ``ParallelManager.run`` needs of a learner and of the pool, and what it reports."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from keisei import events
from keisei.config import ParallelConfig
from keisei.events import Incident
from keisei.exceptions import ManagerStateError
from keisei.naming import public
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.evaluation import Evaluation, Evaluations, Moment
from keisei.training.parallel.learning import LearnerCalls
from keisei.training.parallel.metrics import MetricNumbers
from keisei.training.parallel.model_sync import ModelSynchronizer
from keisei.training.parallel.stats import PoolStats
from keisei.training.parallel.weights_source import HasStateDict, copy_of

if TYPE_CHECKING:
    import torch


@public
class Learner(Protocol):
    """Turns experience into better weights, in the application's process.

    Whatever a method raises ends ``run()`` with that error, once the workers are gone. Only
    StopIteration, StopAsyncIteration, GeneratorExit and CancelledError arrive as a
    ``RuntimeError`` that names them and has them as its cause: raised as they are, they would be
    taken for the end of an iterator or for a cancellation.
    """

    def learn(self, batches: Sequence[ExperienceBatch]) -> Any:
        """Learn from one update's batches.

        ``def`` runs in a thread of the learner's own, so the event loop never waits for it;
        ``async def`` runs on the event loop. A mapping that it returns is shown as metrics: its
        numbers go to observers, in ``UpdateCompleted``, and all of it into the ``RunReport``.

        When the run is cancelled or should end, an update that is being learned is waited for,
        for a bounded time: see ``ParallelManager.run``.
        """
        ...

    def state_dict(self) -> Mapping[str, torch.Tensor] | Awaitable[Mapping[str, torch.Tensor]]:
        """Return the weights.

        Called where ``learn`` is called, never during ``learn``: before the first experience is
        collected, unless the manager was given a model, and after every ``sync_interval`` updates.
        """
        ...


class TrainedPool(Protocol):
    """What the training loop asks of the pool that collects for it."""

    @property
    def config(self) -> ParallelConfig:
        """How the pool is set up."""
        ...

    @property
    def is_stop_requested(self) -> bool:
        """Whether somebody asked for the end."""
        ...

    @property
    def incidents(self) -> Sequence[Incident]:
        """Every failure so far, oldest first."""
        ...

    @property
    def synchronizer(self) -> ModelSynchronizer:
        """Says when weights are due."""
        ...

    async def wait_over(self) -> None:
        """Return when a stop was requested or the pool has failed for good."""
        ...

    async def collect_update(
        self, min_steps: int | None, seconds: float | None
    ) -> list[ExperienceBatch]:
        """Return the batches of the next update; none when it is time to end."""
        ...

    async def push_weights(self, weights: HasStateDict | Mapping[str, torch.Tensor]) -> int:
        """Publish weights and return their version."""
        ...

    def stats(self) -> PoolStats:
        """Return the pool in numbers."""
        ...

    def publish_update(self, event: events.Event) -> None:
        """Pass the event of an update or an evaluation on to observers and event streams."""
        ...


@public
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
        metrics: What the last ``learn`` returned, if it was a mapping; not only its numbers.
        reason: Why it ended: "max_steps", "max_seconds" or "request_stop".
        evaluations: What each evaluation beside it has found, oldest first.
    """

    num_updates: int
    num_steps: int
    num_batches: int
    seconds: float
    weights_version: int
    num_restarts: int
    incidents: tuple[Incident, ...]
    metrics: Mapping[str, Any]
    reason: str
    evaluations: tuple[events.EvaluationCompleted, ...] = ()

    @property
    def steps_per_second(self) -> float:
        """Environment steps per second over the whole run."""
        return self.num_steps / self.seconds if self.seconds > 0 else 0.0


class TrainingLoop:
    """Collect, learn, push, until a limit is reached or a stop is requested."""

    def __init__(
        self,
        pool: TrainedPool,
        learner: Learner,
        *,
        max_steps: int | None,
        max_seconds: float | None,
        steps_per_update: int | None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self._pool = pool
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._steps_per_update = steps_per_update
        self._calls = LearnerCalls(
            learner,
            grace=pool.config.shutdown_timeout,
            wait_over=pool.wait_over,
            seconds_left=self._seconds_left,
        )
        self._at_boundary = asyncio.Lock()
        self._evaluations: Evaluations | None = None
        if evaluation is not None:
            grace = pool.config.shutdown_timeout
            self._evaluations = Evaluations(evaluation, grace=grace, publish=pool.publish_update)
        self._numbers = MetricNumbers()
        self._started = time.monotonic()
        self._updated = self._started
        self._synced_before = 0  # a pool may be run several times
        self._updates = 0
        self._steps = 0
        self._batches = 0
        self._metrics: Mapping[str, Any] = {}

    async def run(self) -> RunReport:
        """Run to the end.

        Raises:
            LearnerTimeout: The learner did not return in time when the run should end.
            BaseException: Whatever the learner raised.
        """
        async with self._calls:
            self._updated = time.monotonic()
            self._synced_before = self._pool.synchronizer.last_sync_step
            try:
                while (reason := self._reason_to_end()) is None:
                    await self._update()
                if self._evaluations is not None:
                    await self._evaluations.finish()
            finally:
                if self._evaluations is not None:
                    await self._evaluations.close()
            return self._report(reason)

    async def _update(self) -> None:
        batches = await self._pool.collect_update(self._steps_per_update, self._seconds_left())
        if not batches:
            return
        steps = sum(batch.num_steps for batch in batches)
        staleness = sum(batch.staleness for batch in batches) / len(batches)
        returns, lengths = self._numbers.episodes_of(batch.info for batch in batches)
        self._batches += len(batches)
        async with self._at_boundary:
            outcome = await self._calls.learn(batches)
            del batches  # their memory is free for the workers while the weights are pushed
            self._updates += 1
            self._steps += steps
            numbers = await self._numbers_of(outcome)
            step = self._synced_before + self._updates
            if self._pool.synchronizer.should_sync(step):
                await self._push()
                self._pool.synchronizer.mark_sync_completed(step)
        stats = self._pool.stats()
        self._pool.publish_update(
            events.UpdateCompleted(
                update=self._updates,
                num_steps=self._steps,
                steps_per_second=steps / max(time.monotonic() - self._updated, 1e-9),
                weights_version=stats.weights_version,
                num_workers=stats.num_ready,
                num_restarts=stats.num_restarts,
                staleness=staleness,
                metrics=numbers,
                episode_returns=returns,
                episode_lengths=lengths,
            )
        )
        if self._evaluations is not None:
            self._evaluations.raise_error()
            if self._evaluations.is_due(self._updates):
                moment = Moment(self._updates, self._steps, stats.weights_version)
                self._evaluations.begin(await self.weights(), moment)
        self._updated = time.monotonic()

    async def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the learner's weights on the CPU, from between two updates.

        Waits for an update that is being learned. The copy is made in the learner's thread.

        Raises:
            WeightsError: They hold something that is no dense tensor.
            LearnerTimeout: The run has ended meanwhile.
            BaseException: Whatever the learner raised.
        """
        async with self._at_boundary:
            source = await self._calls.state_dict()
            copied = functools.partial(copy_of, source)
            weights: dict[str, torch.Tensor] = await self._calls.aside(copied, "state_dict")
            return weights

    async def _numbers_of(self, outcome: Any) -> dict[str, float]:
        """Keep what ``learn`` returned, if it was a mapping, and return the numbers in it.

        They are read in the learner's thread if that may take a while: a tensor on a device has
        its value only when everything that was queued there before is done.
        """
        metrics = outcome if isinstance(outcome, Mapping) else self._metrics
        if self._numbers.are_plain(metrics):
            self._metrics = dict(metrics)
            return self._numbers.of(metrics)
        read = functools.partial(self._numbers.copy_and_numbers_of, metrics)
        numbers: dict[str, float]
        self._metrics, numbers = await self._calls.aside(read, "learn")
        return numbers

    async def _push(self) -> None:
        weights = await self._calls.state_dict()
        try:
            await self._pool.push_weights(weights)
        except ManagerStateError:
            if not self._pool.is_stop_requested:  # by stop() from another task: an orderly end
                raise

    def _reason_to_end(self) -> str | None:
        if self._pool.is_stop_requested:
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
        stats = self._pool.stats()
        return RunReport(
            num_updates=self._updates,
            num_steps=self._steps,
            num_batches=self._batches,
            seconds=time.monotonic() - self._started,
            weights_version=stats.weights_version,
            num_restarts=stats.num_restarts,
            incidents=tuple(self._pool.incidents),
            metrics=self._metrics,
            reason=reason,
            evaluations=tuple(self._evaluations.completed) if self._evaluations else (),
        )


async def first_weights(
    learner: Learner, *, grace: float, wait_over: Callable[[], Coroutine[Any, Any, None]]
) -> HasStateDict | Mapping[str, torch.Tensor]:
    """Return the learner's weights for the start of a pool that was given no model.

    Args:
        learner: Its ``state_dict`` is called as in a run.
        grace: Seconds that it may go on after a cancellation or when the pool is over.
        wait_over: Returns when the pool is over before it has started.
    """
    async with LearnerCalls(learner, grace=grace, wait_over=wait_over) as calls:
        return await calls.state_dict()

"""Evaluation beside training: copies of the learner's weights, judged while it goes on learning."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from keisei.events import EvaluationCompleted, EvaluationFailed, Event
from keisei.exceptions import ConfigurationError
from keisei.ipc.threads import in_thread
from keisei.naming import public
from keisei.training.parallel.learning import LearnerThread, Outcome
from keisei.training.parallel.metrics import MetricNumbers

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("keisei.evaluation")

_PACE = 2.0
"""At an orderly end an evaluation may take as many times as long as the longest one before it."""

Evaluate = Callable[[dict[str, "torch.Tensor"]], Any]
"""Judges weights: a plain function, which runs in a thread, or a coroutine function."""


@public
@dataclass(frozen=True, slots=True)
class Evaluation:
    """How ``run(evaluate=...)`` evaluates, where a function alone does not say enough.

    Attributes:
        function: Gets the weights: tensors by name on the CPU, its own copy, from the end of an
            update. Returns metrics as a mapping, or nothing. ``def`` runs in a thread of its own,
            ``async def`` on the event loop.
        every: Updates from the beginning of one evaluation to that of the next, at least. While
            one runs, none begins.
        timeout: Seconds that an evaluation may take; more is an error in it. ``None`` is no limit.
        on_error: What an error in it does: "raise" ends the run with it, "tell" leaves it at the
            event ``EvaluationFailed`` and a line in the log.
    """

    function: Evaluate
    every: int = 1
    timeout: float | None = None
    on_error: Literal["raise", "tell"] = "raise"

    def __post_init__(self) -> None:
        problems = []
        function: object = self.function
        if not callable(function):
            problems.append(f"evaluate = {function!r}: must be callable with the weights")
        if self.every < 1:
            problems.append(f"evaluate_every = {self.every}: must be at least 1 update")
        if self.timeout is not None and self.timeout <= 0:
            problems.append(f"timeout = {self.timeout}: must be positive, or None for no limit")
        if self.on_error not in ("raise", "tell"):
            problems.append(f"on_error = {self.on_error!r}: must be 'raise' or 'tell'")
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def of(cls, evaluate: Evaluate | Evaluation | None, every: int | None) -> Evaluation | None:
        """Return what the arguments of ``run`` say.

        Raises:
            ConfigurationError: They contradict each other, or say what cannot be.
        """
        if evaluate is None:
            if every is not None:
                raise ConfigurationError([f"evaluate_every = {every}: there is no evaluate=..."])
            return None
        if not isinstance(evaluate, Evaluation):
            return cls(evaluate, 1 if every is None else every)
        if every is not None:
            raise ConfigurationError(
                [f"evaluate_every = {every}: an Evaluation has its own, Evaluation(every=...)"]
            )
        return evaluate


@dataclass(frozen=True, slots=True)
class Moment:
    """The end of an update, whose weights are evaluated."""

    update: int
    num_steps: int
    weights_version: int


class Evaluations:
    """The evaluations of one run, one at a time.

    Attributes:
        completed: What they found, in order.
    """

    def __init__(self, plan: Evaluation, *, grace: float, publish: Callable[[Event], None]) -> None:
        """Start nothing yet.

        Args:
            plan: What to do.
            grace: Seconds that one may still take when the run ends.
            publish: Told of each one that ends.
        """
        self.completed: list[EvaluationCompleted] = []
        self._plan = plan
        self._grace = grace
        self._publish = publish
        self._numbers = MetricNumbers()
        self._thread = LearnerThread()
        self._running: asyncio.Task[None] | None = None
        self._moment = Moment(0, 0, 0)
        self._count = 0
        self._began = 0.0
        self._longest = 0.0
        self._last = 0
        self._error: BaseException | None = None

    def is_due(self, update: int) -> bool:
        """Return whether one is to begin after this update: never while one runs."""
        return self._running is None and update - self._last >= self._plan.every

    def begin(self, weights: dict[str, torch.Tensor], moment: Moment) -> None:
        """Begin an evaluation of ``weights``, which become its own."""
        self._last = moment.update
        self._moment = moment
        self._count += 1
        self._began = time.monotonic()
        self._running = asyncio.create_task(
            self._evaluate(weights), name=f"keisei-evaluation-{self._count}"
        )

    def raise_error(self) -> None:
        """Raise the error of an evaluation, once, if that is to end the run."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def _evaluate(self, weights: dict[str, torch.Tensor]) -> None:
        """Evaluate and tell what came of it. Only the run cancels this task."""
        outcome = await self._outcome(weights)
        self._running = None
        self._longest = max(self._longest, time.monotonic() - self._began)
        try:
            value = outcome.get("evaluate", "the run's")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the user's
            self._failed(error)
            return
        self._completed(value)

    async def _outcome(self, weights: dict[str, torch.Tensor]) -> Outcome:
        """Call the function and read the numbers of its metrics, which may lie on a device."""
        try:
            async with asyncio.timeout(self._plan.timeout) as limit:
                outcome = await self._called(weights)
                metrics = outcome.value
                if not isinstance(metrics, Mapping) or self._numbers.are_plain(metrics):
                    return outcome
                read = functools.partial(self._numbers.of, metrics)
                return Outcome(await in_thread(read))
        except TimeoutError as error:
            if not limit.expired():
                return Outcome(error=error)
            self._leave_thread()
            return Outcome(
                error=TimeoutError(f"the evaluation took longer than {self._plan.timeout:g} s")
            )

    async def _called(self, weights: dict[str, torch.Tensor]) -> Outcome:
        function = self._plan.function
        if inspect.iscoroutinefunction(function):
            outcome = Outcome.of(lambda: function(weights))
        else:
            outcome = await self._thread.call(functools.partial(function, weights))
        if outcome.error is None and inspect.isawaitable(outcome.value):
            return await _awaited(outcome.value)
        return outcome

    def _leave_thread(self) -> None:
        """Take another thread for the next one, if the present one is still busy."""
        if self._thread.is_busy:
            self._thread.close()
            self._thread = LearnerThread()

    def _completed(self, value: Any) -> None:
        metrics = value if isinstance(value, Mapping) else {}
        event = EvaluationCompleted(
            evaluation=self._count,
            update=self._moment.update,
            num_steps=self._moment.num_steps,
            weights_version=self._moment.weights_version,
            seconds=time.monotonic() - self._began,
            metrics=self._numbers.of(metrics),
        )
        self.completed.append(event)
        self._publish(event)

    def _failed(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        logger.error(
            "evaluation %d, of update %d, has failed: %s",
            self._count,
            self._moment.update,
            text,
            exc_info=error if self._plan.on_error == "tell" else None,
        )
        self._publish(EvaluationFailed(self._count, self._moment.update, text))
        if self._plan.on_error == "raise":
            self._error = error

    # the end

    async def finish(self) -> None:
        """Wait for the one that runs at an orderly end; abandon it when that takes too long.

        It has the grace, or twice as long as the longest one so far if that is longer.

        Raises:
            BaseException: Its error, if that is to end the run.
        """
        running = self._running
        if running is not None:
            patience = max(self._grace, _PACE * self._longest)
            await asyncio.wait([running], timeout=patience)
            if not running.done():
                await self._abandon(f"it had not ended {patience:.3g} s after the run")
        self.raise_error()

    async def close(self) -> None:
        """End the one that runs, for a bounded time, and the thread if it is idle."""
        await self._abandon("the run has ended")
        self._thread.close()

    async def _abandon(self, why: str) -> None:
        """Cancel the one that runs. A thread cannot be ended: it is left alone with its call."""
        running, self._running = self._running, None
        if running is None:
            return
        running.cancel()
        try:
            await asyncio.wait([running], timeout=self._grace)
        finally:
            logger.warning("evaluation %d was abandoned: %s", self._count, why)
            self._publish(EvaluationFailed(self._count, self._moment.update, f"abandoned: {why}"))


async def _awaited(work: Any) -> Outcome:
    """Wait for what a function returned, and keep its value or its error."""
    task = asyncio.current_task()
    try:
        return Outcome(await work)
    except asyncio.CancelledError as error:
        if task is not None and task.cancelling():
            raise
        return Outcome(error=error)
    except BaseException as error:  # noqa: BLE001 - raised where the outcome is looked at
        return Outcome(error=error)


__all__ = ["Evaluation", "Evaluations", "Moment"]

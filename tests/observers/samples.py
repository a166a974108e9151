"""One event of every kind, for the tests of observers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from keisei.events import (
    EvaluationCompleted,
    EvaluationFailed,
    Event,
    ExitCause,
    Incident,
    PoolEscalated,
    PoolPaused,
    PoolResumed,
    PoolScaled,
    PoolStarted,
    PoolStopped,
    SettingsChanged,
    SettingsRefused,
    UpdateCompleted,
    WeightsPushed,
    WorkerExited,
    WorkerGivenUp,
    WorkerIncident,
    WorkerReady,
    WorkerStarted,
    WorkerSuspected,
)

INCIDENT = Incident(
    worker_id=1,
    incarnation=0,
    cause=ExitCause.USER_ERROR,
    detail="ValueError: no",
    exitcode=1,
    phase="collect",
    traceback="Traceback (most recent call last):\n  …\nValueError: no\n",
    stderr="bad things\nhappen\n",
)
SUMMARY = (
    "worker 1 (incarnation 0) ended by user error during collect (exit code 1): "
    "ValueError: no; restarted"
)


def update(number: int, num_steps: int, **metrics: float) -> UpdateCompleted:
    return UpdateCompleted(
        update=number,
        num_steps=num_steps,
        steps_per_second=2345.6,
        weights_version=number + 1,
        num_workers=2,
        num_restarts=1,
        staleness=0.5,
        metrics=metrics,
    )


class Unfriendly:
    """A value whose every conversion fails."""

    def _fail(self, *arguments: object) -> Any:
        raise RuntimeError("no")

    __str__ = __repr__ = __format__ = __float__ = __int__ = __bool__ = __hash__ = __eq__ = _fail  # type: ignore[assignment]
    __getattr__ = __len__ = __lt__ = __iter__ = _fail


ODD_VALUES = [None, "text", "\udcff", float("nan"), 10**400, [1], {"a": 1}, b"", Unfriendly()]


def odd_events() -> Iterator[Event]:
    """Yield every event with each of its fields, and all of them, of a kind that it never has."""
    for event in EVERY_EVENT:
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        for value in ODD_VALUES:
            for name in fields:
                yield type(event)(**{**fields, name: value})
            yield type(event)(**dict.fromkeys(fields, value))
    for value in ODD_VALUES:
        yield update(1, 1, mean_return=value)  # type: ignore[arg-type]


EVERY_EVENT: tuple[Event, ...] = (
    WorkerStarted(1, 0, 4711),
    WorkerReady(1, 0, 4711),
    PoolStarted(2),
    WeightsPushed(3, 1024),
    update(1, 12288, mean_return=21.5),
    WorkerSuspected(1, 0, "collect", 2.5, stacks="Thread 1\n  at f\n"),
    WorkerIncident(INCIDENT),
    WorkerGivenUp(1, INCIDENT),
    PoolEscalated(INCIDENT),
    PoolPaused(),
    PoolResumed(),
    PoolScaled(1),
    SettingsChanged(4, ("level", "map"), (0, 2)),
    SettingsRefused(2, 1, 4, "it refused: ValueError: no", "Trace\n  …\n"),
    WorkerExited(1, 0, ExitCause.REQUESTED),
    EvaluationCompleted(2, 8, 2048, 9, 1.5, {"win_rate": 0.75}),
    EvaluationFailed(3, 12, "ValueError: no"),
    PoolStopped(0),
)

"""One event of every kind, for the tests of observers."""

from __future__ import annotations

from keisei.events import (
    Event,
    ExitCause,
    Incident,
    PoolEscalated,
    PoolPaused,
    PoolResumed,
    PoolScaled,
    PoolStarted,
    PoolStopped,
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
    WorkerExited(1, 0, ExitCause.REQUESTED),
    PoolStopped(0),
)

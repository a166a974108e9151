"""LogObserver: every event of a pool as a record of the standard library's logging."""

from __future__ import annotations

import logging

from keisei.events import (
    Event,
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

__all__ = ["LogObserver", "describe"]


class LogObserver:
    """Writes one record for each event.

    Failures of workers are warnings, given-up slots errors, the end of the whole pool critical;
    the ordinary life of the pool is "info", and what happens once per update is "debug". The first
    line of a record says it all; tracebacks, stacks and standard error follow below. The event
    itself is the record's attribute ``event``, for structured handlers.

    Args:
        logger: Where to write; ``None`` is the logger "keisei".
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logging.getLogger("keisei") if logger is None else logger

    def on_event(self, event: Event) -> None:
        """Write ``event`` if its level is enabled."""
        level, text = describe(event)
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", text, extra={"event": event})


def describe(event: Event) -> tuple[int, str]:
    """Return the logging level and the text of ``event``."""
    match event:
        case WorkerStarted():
            return logging.DEBUG, f"{_who(event)} started as process {event.pid}"
        case WorkerReady():
            return logging.INFO, f"{_who(event)} is ready"
        case WorkerExited():
            return logging.INFO, f"{_who(event)} ended: {event.cause}"
        case WorkerSuspected():
            text = f"{_who(event)} made no progress in {event.phase} for {event.seconds:.1f} s"
            return logging.WARNING, _with_blocks(text, ("stacks", event.stacks))
        case WorkerIncident():
            blocks = ("traceback", event.incident.traceback), ("stderr", event.incident.stderr)
            return logging.WARNING, _with_blocks(event.incident.summary, *blocks)
        case WorkerGivenUp():
            text = f"worker {event.worker_id} is given up: {event.incident.summary}"
            return logging.ERROR, text
        case PoolEscalated():
            return logging.CRITICAL, f"the pool is stopping: {event.incident.summary}"
        case _:
            return _describe_pool(event)


def _describe_pool(event: Event) -> tuple[int, str]:
    match event:
        case PoolStarted():
            return logging.INFO, f"the pool started with {_count(event.num_workers, 'worker')}"
        case PoolScaled():
            return logging.INFO, f"the pool has {_count(event.num_workers, 'worker')} now"
        case PoolPaused():
            return logging.INFO, "the pool is paused"
        case PoolResumed():
            return logging.INFO, "the pool goes on"
        case PoolStopped():
            return logging.INFO, f"the pool stopped after {_count(event.num_incidents, 'incident')}"
        case WeightsPushed():
            return logging.DEBUG, f"weights version {event.version}: {event.num_bytes} bytes"
        case UpdateCompleted():
            metrics = "".join(f", {name} {value:.4g}" for name, value in event.metrics.items())
            return logging.DEBUG, (
                f"update {event.update}: {event.num_steps} steps, "
                f"{event.steps_per_second:.0f} steps/s, weights version {event.weights_version}, "
                f"staleness {event.staleness:.2f}{metrics}"
            )
        case _:
            return logging.DEBUG, repr(event)


def _who(event: WorkerStarted | WorkerReady | WorkerExited | WorkerSuspected) -> str:
    return f"worker {event.worker_id} (incarnation {event.incarnation})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _with_blocks(text: str, *blocks: tuple[str, str | None]) -> str:
    """Add each block that is not empty below ``text``, indented, under its title."""
    lines = [text]
    for title, block in blocks:
        if block and block.strip():
            lines += [f"  {title}:", *(f"    {line}" for line in block.rstrip().splitlines())]
    return "\n".join(lines)

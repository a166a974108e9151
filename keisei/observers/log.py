"""LogObserver: every event of a pool as a record of the standard library's logging."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

from keisei.events import (
    EvaluationCompleted,
    EvaluationFailed,
    Event,
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

__all__ = ["LogObserver", "describe", "format_number"]


class LogObserver:
    """Writes one record for each event.

    Failures of workers are warnings, given-up slots errors, and a failure of the whole pool is
    critical. Starts, ends, pauses and changes of size are "info"; updates and weights are "debug".
    The first line of a record is a summary; tracebacks, stacks and standard error follow below it.
    The event itself is the record's attribute ``event``. Its fields are attributes too, for
    structured handlers and formatters, as ``to_dict()`` has them: ``worker_id``, ``metrics``,
    ``incident`` …; its type is ``event_type``.

    Args:
        logger: Where to write; ``None`` is the logger "keisei".
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logging.getLogger("keisei") if logger is None else logger

    def on_event(self, event: Event) -> None:
        """Write ``event`` if its level is enabled."""
        level, text = describe(event)
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", text, extra={**_fields_of(event), "event": event})


_RESERVED = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""Attributes of a record that are logging's own."""


def _fields_of(event: Event) -> dict[str, Any]:
    fields = event.to_dict()
    fields["event_type"] = fields.pop("type")
    return {name: value for name, value in fields.items() if name not in _RESERVED}


def describe(event: Event) -> tuple[int, str]:
    """Return the logging level and the text of ``event``.

    Raises nothing, whatever the event's fields hold: an event that cannot be described is named
    by its class. The text can be encoded, also where a field holds lone surrogates.
    """
    try:
        level, text = _describe(event)
    except Exception as error:  # noqa: BLE001 - a field of a wrong kind; the observer must live on
        name = type(event).__qualname__
        level, text = logging.WARNING, f"{name} cannot be described: {type(error).__qualname__}"
    return level, text.encode("utf-8", "backslashreplace").decode()


def format_number(value: object, spec: str, otherwise: str | None = None) -> str:
    """Return ``value`` formatted, or ``otherwise`` if it has no such format.

    Args:
        value: A number, as it should be.
        spec: A format specification, such as ".1f".
        otherwise: In place of a value of another kind; ``None`` shows its ``repr``, shortened.
    """
    try:
        return format(value, spec)
    except Exception:  # noqa: BLE001 - code of the value's class
        return reprlib.repr(value) if otherwise is None else otherwise


def _describe(event: Event) -> tuple[int, str]:
    match event:
        case WorkerStarted():
            return logging.DEBUG, f"{_who(event)} started as process {event.pid}"
        case WorkerReady():
            return logging.INFO, f"{_who(event)} is ready"
        case WorkerExited():
            return logging.INFO, f"{_who(event)} ended: {event.cause}"
        case WorkerSuspected():
            text = f"{_who(event)} {_describe_suspicion(event)}"
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
        case _:
            return _describe_learning(event)


def _describe_learning(event: Event) -> tuple[int, str]:
    match event:
        case UpdateCompleted():
            return logging.DEBUG, (
                f"update {event.update}: {event.num_steps} steps, "
                f"{format_number(event.steps_per_second, '.0f')} steps/s, "
                f"weights version {event.weights_version}, "
                f"staleness {format_number(event.staleness, '.2f')}{_listed(event.metrics)}"
            )
        case EvaluationCompleted():
            return logging.INFO, (
                f"evaluation {event.evaluation} of update {event.update}, "
                f"{format_number(event.seconds, '.1f')} s{_listed(event.metrics)}"
            )
        case EvaluationFailed():
            return logging.WARNING, (
                f"evaluation {event.evaluation} of update {event.update} has failed: {event.error}"
            )
        case _:
            return _describe_what_was_told(event)


def _describe_what_was_told(event: Event) -> tuple[int, str]:
    match event:
        case WeightsPushed():
            return logging.DEBUG, f"weights version {event.version}: {event.num_bytes} bytes"
        case SettingsChanged():
            ids = event.worker_ids
            whose = "all workers" if ids is None else f"workers {', '.join(map(str, ids))}"
            names = ", ".join(event.names)
            return logging.INFO, f"settings version {event.version} of {whose}: {names}"
        case SettingsRefused():
            text = f"{_who(event)}: {event.detail}"
            return logging.WARNING, _with_blocks(text, ("traceback", event.traceback))
        case _:
            return logging.DEBUG, repr(event)


def _listed(metrics: Mapping[str, float]) -> str:
    return "".join(f", {name} {format_number(value, '.4g')}" for name, value in metrics.items())


def _describe_suspicion(event: WorkerSuspected) -> str:
    seconds = format_number(event.seconds, ".1f")
    if event.state == "T":
        return (
            f"is stopped by a signal (state T), in {event.phase} for {seconds} s; "
            "SIGCONT lets it go on"
        )
    state = f" (state {event.state})" if event.state else ""
    return f"made no progress in {event.phase} for {seconds} s{state}"


def _who(
    event: WorkerStarted | WorkerReady | WorkerExited | WorkerSuspected | SettingsRefused,
) -> str:
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

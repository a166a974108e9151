"""What the pool tells observers and event streams, as frozen values."""

from __future__ import annotations

import dataclasses
import enum
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import time as wall_clock
from typing import Any

from keisei.jsonable import jsonable
from keisei.naming import public


class ExitCause(enum.StrEnum):
    """Why a worker's process ended."""

    GOODBYE = "goodbye"
    """It ended in an orderly way, after a request to stop."""
    REQUESTED = "requested"
    """The pool ended it while stopping or scaling down."""
    RECYCLED = "recycled"
    """The pool replaced it on purpose, or on request; not a failure."""
    USER_ERROR = "user error"
    """A hook raised; the traceback tells where."""
    START_FAILED = "start failed"
    """It never became ready."""
    SIGNAL = "signal"
    """A signal that the pool did not send ended it."""
    EXIT = "exit"
    """It exited by itself without saying goodbye."""
    HANG = "hang"
    """It made no progress within its deadline, and the pool killed it."""
    PROTOCOL = "protocol error"
    """It closed a queue or sent invalid bytes while alive, and the pool killed it."""
    LOST = "lost"
    """It is gone, and its exit code is unknown."""
    ABANDONED = "abandoned"
    """SIGKILL did not end it, and the pool left it behind."""

    @property
    def is_failure(self) -> bool:
        """Whether this end counts against the restart intensity."""
        return self not in (ExitCause.GOODBYE, ExitCause.REQUESTED, ExitCause.RECYCLED)


class Remedy(enum.StrEnum):
    """What the pool did about an incident."""

    RESTARTED = "restarted"
    GAVE_UP = "slot given up"
    ESCALATED = "pool stopped"
    NONE = "nothing: the pool was stopping"


def signal_name(exitcode: int | None) -> str | None:
    """Return the signal's name for a negative exit code, ``None`` for any other."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


@public
@dataclass(frozen=True, slots=True)
class Incident:
    """The record of one failure.

    Attributes:
        worker_id: The slot that failed.
        incarnation: The process of that slot.
        cause: Why it ended.
        detail: More about the cause, in one line; may be empty.
        exitcode: Exit code, minus the signal's number after a signal, ``None`` if unknown.
        phase: Its activity at its end: "start", "load_weights", "collect", "command", "idle" …
        traceback: Remote traceback or native stack, as text, or ``None``.
        weights_version: The version that it had applied; 0 is none.
        experiences_lost: Experiences that it had begun and not finished.
        commands_lost: Commands that were sent to it and that it never answered.
        remedy: What the pool did about it.
        delay: Seconds of back-off before the replacement starts.
        monotonic: ``time.monotonic()`` in seconds when the end was noticed.
        last_command: The name of the last command that it began, or ``None``.
        rss: Its resident memory in bytes when that was last read, or ``None``.
        stderr: The last lines that it wrote to its standard error, or "".
        time: Wall clock, seconds since 1970, when the record was made; it does not count when two
            records are compared.
    """

    worker_id: int
    incarnation: int
    cause: ExitCause
    detail: str = ""
    exitcode: int | None = None
    phase: str = ""
    traceback: str | None = None
    weights_version: int = 0
    experiences_lost: int = 0
    commands_lost: int = 0
    remedy: Remedy = Remedy.RESTARTED
    delay: float = 0.0
    monotonic: float = 0.0
    last_command: str | None = None
    rss: int | None = None
    stderr: str = ""
    time: float = field(default_factory=wall_clock, kw_only=True, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as what JSON has, with "summary" and "signal_name" beside its fields.

        As in ``Event.to_dict``.
        """
        return {
            **_fields_of(self),
            "signal_name": jsonable(self._safely("signal_name")),
            "summary": jsonable(self._safely("summary")),
        }

    def _safely(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except Exception:  # noqa: BLE001 - a field of a wrong kind
            return None

    @property
    def signal_name(self) -> str | None:
        """The name of the signal that ended it, such as "SIGKILL", or ``None``."""
        return signal_name(self.exitcode)

    @property
    def summary(self) -> str:
        """What happened, in one line."""
        how = self.signal_name or (
            "exit code unknown" if self.exitcode is None else f"exit code {self.exitcode}"
        )
        where = f" during {self.phase}" if self.phase else ""
        detail = f": {self.detail}" if self.detail else ""
        return (
            f"worker {self.worker_id} (incarnation {self.incarnation}) ended by {self.cause}"
            f"{where} ({how}){detail}; {self.remedy}"
        )


def _fields_of(value: Any) -> dict[str, Any]:
    return {one.name: jsonable(getattr(value, one.name)) for one in dataclasses.fields(value)}


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events.

    Attributes:
        time: Wall clock, seconds since 1970, when the event was made. It is for people and logs: it
            may step. It does not count when two events are compared.
    """

    time: float = field(default_factory=wall_clock, kw_only=True, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the event as what JSON has: "type", its class's name, and each field by its name.

        ``json.dumps(event.to_dict(), allow_nan=False)`` always works: NaN and infinity are
        ``None``, enumerations their values, exceptions and unknown objects text.
        """
        return {"type": type(self).__name__, **_fields_of(self)}


@dataclass(frozen=True, slots=True)
class PoolStarted(Event):
    """Every slot has a ready worker."""

    num_workers: int


@dataclass(frozen=True, slots=True)
class PoolStopped(Event):
    """Every worker is gone."""

    num_incidents: int


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    """A process was started; its worker is not ready yet."""

    worker_id: int
    incarnation: int
    pid: int | None


@dataclass(frozen=True, slots=True)
class WorkerReady(Event):
    """A worker finished ``setup`` and has the newest weights."""

    worker_id: int
    incarnation: int
    pid: int | None


@dataclass(frozen=True, slots=True)
class WorkerSuspected(Event):
    """A worker may be hanging: half of its deadline passed without progress, or it was stopped.

    Attributes:
        worker_id: The slot.
        incarnation: The process of that slot.
        phase: Its activity: "start", "collect", "command" …
        seconds: Time since its last progress.
        stacks: The stacks of its threads, if it could write them, or "".
        state: The process state as the kernel names it, one letter, or "" if it is unknown. "T" is
            a process that a signal has stopped; it does nothing until SIGCONT.
    """

    worker_id: int
    incarnation: int
    phase: str
    seconds: float
    stacks: str = ""
    state: str = ""


@dataclass(frozen=True, slots=True)
class WorkerExited(Event):
    """A worker ended in an orderly way, or because the pool asked for it."""

    worker_id: int
    incarnation: int
    cause: ExitCause


@dataclass(frozen=True, slots=True)
class WorkerIncident(Event):
    """A worker failed; the incident says how, and what the pool did about it."""

    incident: Incident


@dataclass(frozen=True, slots=True)
class WorkerGivenUp(Event):
    """The pool will not fill this slot again; the other slots go on."""

    worker_id: int
    incident: Incident


@dataclass(frozen=True, slots=True)
class PoolEscalated(Event):
    """The restart intensity was exceeded; the pool is stopping."""

    incident: Incident


@dataclass(frozen=True, slots=True)
class WeightsPushed(Event):
    """A version of the weights of a name was published."""

    version: int
    num_bytes: int
    name: str = "main"


@dataclass(frozen=True, slots=True)
class SettingsChanged(Event):
    """``configure`` has changed settings; workers are being told.

    Attributes:
        version: The new version.
        names: The settings that were given.
        worker_ids: The slots, ascending; ``None`` is all, those to come included.
    """

    version: int
    names: tuple[str, ...]
    worker_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SettingsRefused(Event):
    """A worker's ``configure`` raised; the worker and its slot keep the former settings.

    Attributes:
        worker_id: The slot.
        incarnation: The process of that slot.
        version: The version that it refused.
        detail: What it raised, in one line.
        traceback: Its traceback, as text, or ``None``.
    """

    worker_id: int
    incarnation: int
    version: int
    detail: str
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class PoolPaused(Event):
    """Every worker has finished its experience and waits for ``resume``."""


@dataclass(frozen=True, slots=True)
class PoolResumed(Event):
    """Workers collect again."""


@dataclass(frozen=True, slots=True)
class PoolScaled(Event):
    """The number of slots changed."""

    num_workers: int


@dataclass(frozen=True, slots=True)
class UpdateCompleted(Event):
    """The learner of ``run()`` finished one update.

    Attributes:
        update: 1, 2, 3 …
        num_steps: Environment steps delivered so far.
        steps_per_second: Over the time since the update before.
        weights_version: The newest version.
        num_workers: Workers that are ready now.
        num_restarts: Restarts since the pool started.
        staleness: Mean policy lag of the update's batches, in versions.
        metrics: The numbers among the metrics that ``learn`` returned, as plain floats.
        episode_returns: Undiscounted returns of the episodes that ended in the update's batches, as
            workers report them in ``info["episode_returns"]``.
        episode_lengths: Their lengths in steps, from ``info["episode_lengths"]``.
    """

    update: int
    num_steps: int
    steps_per_second: float
    weights_version: int
    num_workers: int
    num_restarts: int
    staleness: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    episode_returns: tuple[float, ...] = ()
    episode_lengths: tuple[int, ...] = ()

    @property
    def mean_return(self) -> float | None:
        """The mean of ``episode_returns``; ``None`` if no episode ended."""
        return _mean(self.episode_returns)

    @property
    def mean_length(self) -> float | None:
        """The mean of ``episode_lengths``; ``None`` if no episode ended."""
        return _mean(self.episode_lengths)


@dataclass(frozen=True, slots=True)
class EvaluationCompleted(Event):
    """An evaluation beside ``run()`` has ended.

    Attributes:
        evaluation: 1, 2, 3 …
        update: The update whose weights were evaluated.
        num_steps: Environment steps delivered up to that update.
        weights_version: The newest version then.
        seconds: How long it took.
        metrics: The numbers among the metrics that it returned, as plain floats.
    """

    evaluation: int
    update: int
    num_steps: int
    weights_version: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationFailed(Event):
    """An evaluation beside ``run()`` has raised, or was abandoned at the end of the run."""

    evaluation: int
    update: int
    error: str


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

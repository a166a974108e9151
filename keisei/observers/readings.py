"""What metric systems are told of a pool: each instrument once, with its unit and its readings.

``keisei.observers.prometheus`` and ``keisei.observers.opentelemetry`` name them by their own
conventions. Readings are taken when they are asked for; between two of them nothing is done.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from keisei.events import Event, UpdateCompleted, WeightsPushed, WorkerIncident
from keisei.observers import Observer

Labels = Mapping[str, str]
Readings = Sequence[tuple[float, Labels]]
_ATTEMPTS = 5
_STATES = ("waiting", "starting", "running", "backoff", "ending", "stopped", "given up")


class Kind(enum.Enum):
    """How a value moves."""

    COUNTER = "counter"
    """It only grows, but for restarts of what it counts."""
    GAUGE = "gauge"


class WatchedPool(Protocol):
    """What is asked of a manager."""

    def add_observer(self, observer: Observer) -> None:
        """Pass events on to ``observer``."""
        ...

    def stats(self) -> Any:
        """Return the pool in numbers; raises before the start."""
        ...

    @property
    def workers(self) -> Sequence[Any]:
        """Every slot."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether every wanted slot has a ready worker."""
        ...


@dataclass(slots=True)
class Seen:
    """What events have told so far."""

    incidents: Counter[str] = field(default_factory=Counter)
    update: UpdateCompleted | None = None
    updates: int = 0
    episodes: int = 0
    mean_return: float | None = None
    mean_length: float | None = None

    def note(self, event: Event) -> None:
        """Count ``event``."""
        if isinstance(event, WorkerIncident):
            self.incidents[event.incident.cause.value] += 1
        elif isinstance(event, UpdateCompleted):
            self.update = event
            self.updates += 1
            self.episodes += len(event.episode_returns)
            if event.episode_returns:
                self.mean_return, self.mean_length = event.mean_return, event.mean_length


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool at one moment; ``stats`` is ``None`` before its start and when it is gone."""

    stats: Any
    workers: Sequence[Any]
    is_healthy: bool
    seen: Seen


@dataclass(frozen=True, slots=True)
class Instrument:
    """One thing that is measured.

    Attributes:
        name: Dotted, without prefix and unit: "pool.steps".
        kind: Counter or gauge.
        unit: By UCUM, as OpenTelemetry has it: "s", "By", "{step}", "1".
        description: One sentence.
        read: Returns its values with their labels.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    read: Callable[[Snapshot], Readings]


class PoolReader:
    """Takes snapshots of one manager, in any thread; does not keep it alive.

    Args:
        manager: A ``ParallelManager``; events are counted from now on.
    """

    def __init__(self, manager: WatchedPool) -> None:
        self._manager = weakref.ref(manager)
        self._seen = Seen()
        self._lock = threading.Lock()
        manager.add_observer(self)

    def on_event(self, event: Event) -> None:
        """Count ``event``."""
        if not isinstance(event, WeightsPushed):
            with self._lock:
                self._seen.note(event)

    def snapshot(self) -> Snapshot:
        """Return the pool as it is now; raises nothing."""
        manager = self._manager()
        with self._lock:
            seen = replace(self._seen, incidents=Counter(self._seen.incidents))
        for _ in range(_ATTEMPTS if manager is not None else 0):
            try:
                assert manager is not None  # noqa: S101 - for the type checker
                stats, workers = manager.stats(), tuple(manager.workers)
                return Snapshot(stats, workers, manager.is_healthy, seen)
            except Exception:  # noqa: BLE001, S112 - not started, or changed beside this thread
                continue
        return Snapshot(None, (), False, seen)


def _of_stats(name: str) -> Callable[[Snapshot], Readings]:
    def read(snapshot: Snapshot) -> Readings:
        return [(float(getattr(snapshot.stats, name)), {})] if snapshot.stats is not None else []

    return read


def _of_workers(value: Callable[[Any, Snapshot], float]) -> Callable[[Snapshot], Readings]:
    def read(snapshot: Snapshot) -> Readings:
        return [
            (float(value(one, snapshot)), {"worker": str(one.worker_id)})
            for one in snapshot.workers
        ]

    return read


def _of_update(value: Callable[[Seen], float | None]) -> Callable[[Snapshot], Readings]:
    def read(snapshot: Snapshot) -> Readings:
        found = value(snapshot.seen)
        return [] if found is None else [(float(found), {})]

    return read


def _states(snapshot: Snapshot) -> Iterator[tuple[float, Labels]]:
    for one in snapshot.workers:
        for state in _STATES:
            labels = {"worker": str(one.worker_id), "state": state.replace(" ", "_")}
            yield float(one.state == state), labels


def _lag(one: Any, snapshot: Snapshot) -> float:
    newest = snapshot.stats.weights_version if snapshot.stats is not None else 0
    return float(max(0, newest - one.weights_version))


def _metrics(snapshot: Snapshot) -> Readings:
    update = snapshot.seen.update
    if update is None:
        return []
    return [(value, {"metric": name}) for name, value in update.metrics.items()]


def _incidents(snapshot: Snapshot) -> Readings:
    return [(count, {"cause": cause}) for cause, count in sorted(snapshot.seen.incidents.items())]


C, G = Kind.COUNTER, Kind.GAUGE
INSTRUMENTS: tuple[Instrument, ...] = (
    Instrument(
        "pool.healthy",
        G,
        "1",
        "Whether the pool runs and every wanted slot has a ready worker.",
        lambda snapshot: [(float(snapshot.is_healthy), {})],
    ),
    Instrument("pool.uptime", G, "s", "Time since the pool's start.", _of_stats("seconds")),
    Instrument("pool.workers", G, "{worker}", "Slots that are wanted.", _of_stats("num_workers")),
    Instrument(
        "pool.workers.ready", G, "{worker}", "Workers that are ready.", _of_stats("num_ready")
    ),
    Instrument("pool.paused", G, "1", "Whether the pool is paused.", _of_stats("is_paused")),
    Instrument("pool.batches", C, "{batch}", "Batches delivered.", _of_stats("num_batches")),
    Instrument("pool.steps", C, "{step}", "Environment steps delivered.", _of_stats("num_steps")),
    Instrument(
        "pool.batches.queued",
        G,
        "{batch}",
        "Batches that wait for the learner.",
        _of_stats("num_queued"),
    ),
    Instrument(
        "pool.batches.dropped",
        C,
        "{batch}",
        "Batches discarded by overflow or staleness.",
        _of_stats("num_dropped"),
    ),
    Instrument(
        "pool.experiences.lost",
        C,
        "{experience}",
        "Experiences that workers had begun when they died.",
        _of_stats("num_lost"),
    ),
    Instrument(
        "pool.restarts",
        C,
        "{restart}",
        "Processes started in the place of others.",
        _of_stats("num_restarts"),
    ),
    Instrument("pool.incidents", C, "{incident}", "Failures of workers, by cause.", _incidents),
    Instrument(
        "weights.version", G, "{version}", "The newest version.", _of_stats("weights_version")
    ),
    Instrument("weights.pushes", C, "{push}", "Weights pushed.", _of_stats("num_pushes")),
    Instrument("weights.pushed", C, "By", "Bytes of weights pushed.", _of_stats("bytes_pushed")),
    Instrument(
        "weights.not_finite",
        C,
        "{push}",
        "Pushes that held NaN or infinity, with check_finite.",
        _of_stats("num_not_finite"),
    ),
    Instrument(
        "worker.state",
        G,
        "1",
        "1 for the state that a slot is in, 0 for the others.",
        lambda snapshot: list(_states(snapshot)),
    ),
    Instrument(
        "worker.incarnation",
        G,
        "{process}",
        "The number of the process in a slot, from 0.",
        _of_workers(lambda one, _: one.incarnation),
    ),
    Instrument(
        "worker.age",
        G,
        "s",
        "Time since a worker became ready.",
        _of_workers(lambda one, _: one.age),
    ),
    Instrument(
        "worker.experiences",
        C,
        "{experience}",
        "Experiences that the process in a slot has delivered.",
        _of_workers(lambda one, _: one.experiences),
    ),
    Instrument(
        "worker.weights.lag",
        G,
        "{version}",
        "Versions by which a worker's weights are older than the newest.",
        _of_workers(_lag),
    ),
    Instrument(
        "worker.failures",
        G,
        "{failure}",
        "Failures of a slot within the restart window.",
        _of_workers(lambda one, _: one.num_failures),
    ),
    Instrument(
        "learner.updates",
        C,
        "{update}",
        "Updates of the learner.",
        _of_update(lambda seen: seen.updates),
    ),
    Instrument(
        "learner.rate",
        G,
        "{step}/s",
        "Environment steps in each second of the last update.",
        _of_update(lambda seen: seen.update.steps_per_second if seen.update else None),
    ),
    Instrument(
        "learner.staleness",
        G,
        "{version}",
        "Mean policy lag of the last update's batches.",
        _of_update(lambda seen: seen.update.staleness if seen.update else None),
    ),
    Instrument("learner.metric", G, "1", "The learner's metrics of the last update.", _metrics),
    Instrument(
        "episodes",
        C,
        "{episode}",
        "Episodes that ended in updates' batches.",
        _of_update(lambda seen: seen.episodes),
    ),
    Instrument(
        "episode.return",
        G,
        "1",
        "Mean return of the last update in which episodes ended.",
        _of_update(lambda seen: seen.mean_return),
    ),
    Instrument(
        "episode.length",
        G,
        "{step}",
        "Mean length of the last update's episodes.",
        _of_update(lambda seen: seen.mean_length),
    ),
)
"""All that is measured, in the order in which it is shown."""

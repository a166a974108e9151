"""The panel that people watch: a pool's figures as lines of text that fit any width.

It knows nothing of terminals. ``keisei.observers.progress`` draws it in one, or in a notebook.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from keisei.events import (
    Event,
    ExitCause,
    Incident,
    PoolPaused,
    PoolResumed,
    PoolScaled,
    PoolStarted,
    Remedy,
    UpdateCompleted,
    WeightsPushed,
    WorkerExited,
    WorkerGivenUp,
    WorkerIncident,
    WorkerReady,
    WorkerStarted,
    WorkerSuspected,
)
from keisei.observers.log import format_number

_MOST_POINTS = 1024
_MOST = 2**63


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters that a panel is drawn with."""

    full: str
    empty: str
    levels: str
    states: dict[str, str]
    dash: str
    dot: str

    def fits(self, encoding: str) -> bool:
        """Return whether ``encoding`` has all of them."""
        text = "".join((self.full, self.empty, self.levels, *self.states.values(), self.dash))
        try:
            (text + self.dot).encode(encoding)
        except (LookupError, UnicodeError):
            return False
        return True


_NAMES = ("ready", "starting", "stuck", "died", "given up")
UNICODE = Glyphs("━", "─", "▁▂▃▄▅▆▇█", dict(zip(_NAMES, "●◌?✗-", strict=True)), "–", "·")
ASCII = Glyphs("#", "-", "_.-=*#", dict(zip(_NAMES, "o.?x-", strict=True)), "-", "|")


def glyphs_for(encoding: str) -> Glyphs:
    """Return the characters for a screen of this encoding."""
    return UNICODE if UNICODE.fits(encoding) else ASCII


@dataclass(slots=True)
class WorkerView:
    """One slot, as it is shown."""

    state: str
    incarnation: int = 0
    reason: str = ""

    def text(self, worker_id: int) -> str:
        """Return the slot in words, such as "1 died (SIGKILL)"."""
        again = f" again ({self.incarnation})" if self.state == "ready" and self.incarnation else ""
        reason = f" ({self.reason})" if self.reason else ""
        return f"{worker_id} {self.state}{again}{reason}"


class Curve:
    """The values of a run, with ever fewer points for each stretch of it as it grows."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._stride = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Add the next value; what is not finite has no place on a curve."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        self._values.append(sum(self._pending) / len(self._pending))
        self._pending.clear()
        if len(self._values) >= _MOST_POINTS:
            pairs = zip(self._values[::2], self._values[1::2], strict=True)
            self._values = [(first + second) / 2 for first, second in pairs]
            self._stride *= 2

    def drawn(self, width: int, levels: str) -> str:
        """Return the whole curve in at most ``width`` characters, the oldest at the left."""
        points = self._resampled(width)
        if not points:
            return ""
        low, high = min(points), max(points)
        span = (high - low) or 1.0
        top = len(levels) - 1
        return "".join(levels[round(top * ((value - low) / span))] for value in points)

    def _resampled(self, width: int) -> list[float]:
        values = self._values
        if width < 1 or len(values) <= width:
            return values[-max(0, width) :] if width > 0 else []
        edges = [place * len(values) // width for place in range(width + 1)]
        parts = [values[start:end] for start, end in itertools.pairwise(edges)]
        return [sum(part) / len(part) for part in parts]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest value; ``None`` without any."""
        return (min(self._values), max(self._values)) if self._values else None


@dataclass(slots=True)
class Panel:
    """A pool's figures, kept up to date by events, and drawn at any width.

    Attributes:
        total_steps: Steps that are the goal; ``None`` has no bar and no time left.
        return_key: The metric that is shown as the return; without it the mean return of the
            update's episodes is.
    """

    total_steps: int | None = None
    return_key: str = "mean_return"
    num_steps: int = 0
    num_workers: int = 0
    restarts: int = 0
    version: int = 0
    update: UpdateCompleted | None = None
    paused: bool = False
    shown_return: float | None = None
    workers: dict[int, WorkerView] = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)
    ready: set[int] = field(default_factory=set)

    def note(self, event: Event) -> bool:
        """Update the figures from ``event``; return whether they should be drawn at once."""
        match event:
            case UpdateCompleted():
                self._note_update(event)
                return False
            case WeightsPushed():
                self.version = _count(event.version)
                return False
            case PoolStarted() | PoolScaled():
                self.num_workers = _count(event.num_workers)
                for worker_id in [one for one in self.workers if one >= self.num_workers]:
                    del self.workers[worker_id]
            case PoolPaused():
                self.paused = True
            case PoolResumed():
                self.paused = False
            case _:
                return self._note_worker(event)
        return True

    def _note_update(self, event: UpdateCompleted) -> None:
        self.num_steps = _count(event.num_steps)
        self.version = _count(event.weights_version)
        self.restarts = _count(event.num_restarts)
        self.update = event
        value = _number(event.metrics.get(self.return_key))
        value = _number(event.mean_return) if value is None else value
        if value is not None:
            self.shown_return = value
            self.curve.add(value)

    def _note_worker(self, event: Event) -> bool:
        match event:
            case WorkerStarted():
                return self._put(event.worker_id, event.incarnation, "starting")
            case WorkerReady():
                self.ready.add(_count(event.worker_id))
                return self._put(event.worker_id, event.incarnation, "ready")
            case WorkerSuspected():
                reason = f"{event.phase!s:.20} {event.seconds:.0f} s"
                return self._put(event.worker_id, event.incarnation, "stuck", reason)
            case WorkerIncident():
                return self._note_incident(event.incident)
            case WorkerGivenUp():
                return self._put(event.worker_id, event.incident.incarnation, "given up")
            case WorkerExited():
                self.ready.discard(event.worker_id)
                if event.cause is ExitCause.RECYCLED:
                    return self._put(event.worker_id, event.incarnation, "starting")
                self.workers.pop(event.worker_id, None)
        return False

    def _note_incident(self, incident: Incident) -> bool:
        self.ready.discard(incident.worker_id)
        self.restarts += incident.remedy is Remedy.RESTARTED
        state = "given up" if incident.remedy is Remedy.GAVE_UP else "died"
        reason = incident.signal_name or str(incident.cause)
        self._put(incident.worker_id, incident.incarnation, state, reason)
        return True

    def _put(self, worker_id: object, incarnation: object, state: str, reason: str = "") -> bool:
        """Note the state of a slot; return whether it must be shown at once.

        The first starts of a large pool come by the hundred; they are shown in due time.
        """
        number = _count(incarnation)
        self.workers[_count(worker_id)] = WorkerView(state, number, reason)
        return number > 0 or state not in ("starting", "ready")

    # as text

    def lines(self, width: int, seconds: float, glyphs: Glyphs = UNICODE) -> list[str]:
        """Return the panel; no line is wider than ``width``, and their number stays the same.

        Args:
            width: Columns, at least 1.
            seconds: Since the start.
            glyphs: What it is drawn with.
        """
        lines = [] if self.total_steps is None else [self._bar(width, seconds, glyphs)]
        lines.append(_fitted(self._figures(seconds, glyphs), width, f" {glyphs.dot} "))
        lines.append(self._curve(width, glyphs))
        lines.append(self._workers(width, glyphs))
        return [line[:width] for line in lines]

    def _bar(self, width: int, seconds: float, glyphs: Glyphs) -> str:
        total = max(1, self.total_steps or 1)
        done = min(1.0, max(0.0, self.num_steps / total))
        left = self._seconds_left(seconds)
        tail = f" {100 * done:3.0f}% {'' if left is None else clock(left) + ' left'}".rstrip()
        room = width - len(tail)
        if room < 4:  # noqa: PLR2004 - a bar of less shows nothing
            return tail.strip()
        full = round(room * done)
        return glyphs.full * full + glyphs.empty * (room - full) + tail

    def _seconds_left(self, seconds: float) -> float | None:
        if self.total_steps is None or self.num_steps <= 0 or seconds <= 0:
            return None
        return max(0, self.total_steps - self.num_steps) * seconds / self.num_steps

    def _figures(self, seconds: float, glyphs: Glyphs) -> list[str]:
        """The figures, the most important first."""
        update = self.update
        rate = (
            format_number(update.steps_per_second, ",.0f", glyphs.dash) if update else glyphs.dash
        )
        goal = "" if self.total_steps is None else f" of {self.total_steps:,}"
        parts = ["paused"] if self.paused else []
        return [
            *parts,
            f"{self.num_steps:,}{goal} steps",
            f"{rate} steps/s",
            clock(seconds),
            f"weights {self.version}",
            f"restarts {self.restarts}",
        ]

    def _curve(self, width: int, glyphs: Glyphs) -> str:
        value = format_number(self.shown_return, ".1f", glyphs.dash)
        head = f"return {value} "
        bounds = self.curve.bounds
        if bounds is None:
            return head.rstrip()
        tail = f" {bounds[0]:.1f} to {bounds[1]:.1f}"
        room = width - len(head) - len(tail)
        if room < 8:  # noqa: PLR2004 - the bounds go before the curve does
            tail, room = "", width - len(head)
        return head + self.curve.drawn(room, glyphs.levels) + tail

    def _workers(self, width: int, glyphs: Glyphs) -> str:
        count = f"{len(self.ready)}/{max(self.num_workers, len(self.ready))}"
        head = f"workers {count}"
        ordered = sorted(self.workers.items())
        words = f" {glyphs.dot} ".join(view.text(worker_id) for worker_id, view in ordered)
        marks = "".join(glyphs.states.get(view.state, "?") for _, view in ordered)
        odd = [view.text(worker_id) for worker_id, view in ordered if view.state != "ready"]
        for text in (words, f"{marks} {', '.join(odd)}".rstrip(), marks):
            if text and len(head) + 2 + len(text) <= width:
                return f"{head}  {text}"
        return _fitted([head, *odd], width, f" {glyphs.dot} ")


def clock(seconds: float) -> str:
    """Return a time as "1:05" or "2:01:05"."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60}:{rest % 60:02}"
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else text


def _fitted(parts: Sequence[str], width: int, between: str) -> str:
    """Join as many of ``parts``, the first ones, as fit into ``width``."""
    line = parts[0] if parts else ""
    for part in parts[1:]:
        if len(line) + len(between) + len(part) > width:
            break
        line += between + part
    return line


def _count(value: object) -> int:
    """Return a count that arithmetic can take; anything else is an error."""
    number = int(value)  # type: ignore[call-overload]
    if not 0 <= number < _MOST:
        raise ValueError(f"{number!r:.20} is no count")
    return int(number)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)

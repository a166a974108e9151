"""View: the state of a pool as the page shows it, made at most once per interval for everybody."""

from __future__ import annotations

import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio.lowlevel

from keisei.events import Event, Incident, PoolEscalated, UpdateCompleted
from keisei.observers.page.curves import Curves
from keisei.observers.page.ports import PoolNumbers, ShownManager, SlotInfo

SHOWN_INCIDENTS = 30
AT_ONCE = 16
"""Rows that are made between two turns of the event loop, in a third of a millisecond."""
_MAX_TEXT = 6000
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
"""Colours and movements of a terminal, and control characters but for tab and newline."""
_SAMPLE_GAP = 1.0


class View:
    """Follows a pool by its events and looks at it when asked; an observer.

    Without an open page it takes a sample for the curves with an event, once a second at most.
    Its methods may be called from several threads.

    Attributes:
        token: Tells this page from the one of a later process at the same address.
    """

    def __init__(self, manager: ShownManager, clock: Callable[[], float] = time.monotonic) -> None:
        self.token = secrets.token_hex(8)
        self._manager = manager
        self._clock = clock
        self._lock = threading.Lock()
        self._curves = Curves()
        self._failure: str | None = None
        self._notice: tuple[int, str] = (0, "")
        self._sampled_at = -math.inf
        self._counted: tuple[float, int, int] | None = None
        self._rates: dict[str, float | None] = {"steps/s": None, "batches/s": None}
        self._sequence = 0

    # what happens

    def on_event(self, event: Event) -> None:
        """Take in what an event tells."""
        if isinstance(event, PoolEscalated):
            self._failure = event.incident.summary
        now = self._clock()
        is_update = isinstance(event, UpdateCompleted)
        if not is_update and now - self._sampled_at < _SAMPLE_GAP:
            return
        with self._lock:
            if isinstance(event, UpdateCompleted):
                self._learned(event, now)
            if now - self._sampled_at >= _SAMPLE_GAP:
                self._sample(now)

    def _learned(self, event: UpdateCompleted, now: float) -> None:
        if self._counted is None:
            self._sample(now)
        if self._counted is not None:
            at = self._counted[0] + now - self._sampled_at
            values = {f"learner: {name}": value for name, value in event.metrics.items()}
            self._curves.add(at, {"return": return_of(event), "staleness": event.staleness})
            self._curves.add(at, values)

    def tell(self, notice: str) -> None:
        """Show a sentence on every open page."""
        self._notice = (self._notice[0] + 1, cleaned(notice)[:500])

    def _sample(self, now: float) -> PoolNumbers | None:
        """Look at the pool's numbers and continue the curves."""
        stats = self._stats()
        self._sampled_at = now
        if stats is None:
            return None
        before, self._counted = self._counted, (stats.seconds, stats.num_steps, stats.num_batches)
        if before is not None and stats.seconds > before[0]:
            seconds = stats.seconds - before[0]
            self._rates = {
                "steps/s": (stats.num_steps - before[1]) / seconds,
                "batches/s": (stats.num_batches - before[2]) / seconds,
            }
            self._curves.add(stats.seconds, self._rates, seconds)
        levels = {"queued": stats.num_queued, "ready": stats.num_ready}
        self._curves.add(stats.seconds, levels)
        return stats

    def _stats(self) -> PoolNumbers | None:
        try:
            return self._manager.stats()
        except RuntimeError:  # it was never started
            return None

    # what is shown

    async def state(self) -> dict[str, Any]:
        """Return the pool's present state as what JSON has; continues the curves.

        The event loop turns after every few workers.
        """
        with self._lock:
            stats = self._sample(self._clock())
            self._sequence += 1
            news = self._curves.news()
        newest = stats.weights_version if stats is not None else 0
        rows = []
        for info in self._manager.iter_workers():
            rows.append(row_of(info, newest))
            if len(rows) % AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
        return {
            "token": self.token,
            "sequence": self._sequence,
            "state": self._describe(stats),
            "failure": self._failure,
            "notice": list(self._notice),
            "numbers": numbers_of(stats),
            "rates": self._rates,
            "curves": news,
            "workers": rows,
        }

    def _describe(self, stats: PoolNumbers | None) -> str:
        state = self._manager.state
        if state == "running":
            if self._failure is not None:
                return "failed"
            return "paused" if stats is not None and stats.is_paused else state
        return state

    def curves(self) -> dict[str, Any]:
        """Return the history as what JSON has."""
        with self._lock:
            return self._curves.to_dict()

    def incidents(self) -> list[dict[str, Any]]:
        """Return the newest incidents as what JSON has, the newest first; long texts are cut."""
        return newest_incidents(self._manager.incidents)


def newest_incidents(incidents: Sequence[Incident]) -> list[dict[str, Any]]:
    """Return the newest incidents, the newest first, each with its number from 1."""
    first = max(0, len(incidents) - SHOWN_INCIDENTS)
    shown = [incident_of(number, one) for number, one in enumerate(incidents[first:], first + 1)]
    return shown[::-1]


def incident_of(number: int, incident: Incident) -> dict[str, Any]:
    """Return one incident as the page shows it."""
    return {
        "number": number,
        "time": incident.time,
        "worker": incident.worker_id,
        "incarnation": incident.incarnation,
        "cause": str(incident.cause),
        "summary": shortened(incident.summary),
        "traceback": shortened(incident.traceback or ""),
        "stderr": shortened(incident.stderr),
    }


def row_of(info: SlotInfo, newest: int) -> list[Any]:
    """Return the values of a slot's row: worker, state, phase, "for", "age", "lag" and so on.

    They come in the order of the page's columns, ``html._HEADINGS``, and of its script.
    "for" is the time since its main loop last moved, "age" since its process became ready, both in
    seconds; "lag" the versions that its weights are behind ``newest``, ``None`` where it has none.
    """
    has_process = bool(info.phase)
    lag = newest - info.weights_version if has_process and newest else None
    return [
        info.worker_id,
        info.state,
        info.phase,
        round(info.seconds_since_progress, 1) if has_process else None,
        round(info.age) if has_process else None,
        lag,
        max(0, info.incarnation),
        info.experiences,
        info.num_failures,
        info.pid,
        info.device,
    ]


def numbers_of(stats: PoolNumbers | None) -> dict[str, Any] | None:
    """Return the pool's numbers as the page shows them; ``None`` before the start."""
    if stats is None:
        return None
    return {
        "seconds": round(stats.seconds, 1),
        "workers": stats.num_workers,
        "ready": stats.num_ready,
        "batches": stats.num_batches,
        "steps": stats.num_steps,
        "queued": stats.num_queued,
        "dropped": stats.num_dropped,
        "lost": stats.num_lost,
        "restarts": stats.num_restarts,
        "incidents": stats.num_incidents,
        "version": stats.weights_version,
    }


def return_of(event: UpdateCompleted) -> float | None:
    """Return the mean return that an update tells: that of its episodes, or of the learner."""
    if event.mean_return is not None:
        return event.mean_return
    named = [name for name in event.metrics if "return" in name.lower()]
    return event.metrics["mean_return" if "mean_return" in named else named[0]] if named else None


def cleaned(text: str) -> str:
    """Return ``text`` without what would command a terminal."""
    return _ESCAPES.sub("", text)


def shortened(text: str) -> str:
    """Return ``text`` for the page: its end, which tells most, if it is long."""
    text = cleaned(text)
    return text if len(text) <= _MAX_TEXT else f"…{text[-_MAX_TEXT:]}"

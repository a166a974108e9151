"""RichProgress: a live display of a pool at work; needs the extra ``progress``."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

try:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.text import Text
except ImportError as error:
    raise ImportError(
        'keisei.observers.progress needs rich: pip install "keisei[progress]"'
    ) from error

from keisei.events import (
    Event,
    PoolEscalated,
    PoolPaused,
    PoolResumed,
    PoolScaled,
    PoolStarted,
    PoolStopped,
    Remedy,
    UpdateCompleted,
    WeightsPushed,
    WorkerExited,
    WorkerGivenUp,
    WorkerIncident,
    WorkerReady,
    WorkerSuspected,
)
from keisei.observers.log import describe, format_number

__all__ = ["RichProgress"]

_STYLES: dict[type[Event], str] = {
    WorkerSuspected: "yellow",
    WorkerIncident: "yellow",
    WorkerGivenUp: "red",
    PoolEscalated: "red",
}
"""Events that are written above the display, and how."""


class RichProgress:
    """Shows steps, steps per second, return, weights version, workers and restarts.

    On a terminal the lines are kept up to date in place, and incidents scroll past above them.
    Elsewhere, such as in a file, a plain line is written from time to time. It draws during events
    only: there is no thread, and an idle pool costs nothing.

    The display begins with the first event and ends with ``PoolStopped``. Used as a context
    manager, it also restores the terminal when the body raises.

    Args:
        total_steps: Steps that make a full bar; ``None`` shows no bar.
        return_key: Which of the learner's metrics is shown as the return.
        console: Where to write; ``None`` is standard output.
        refresh_interval: Least seconds between two drawings on a terminal.
        line_interval: Least seconds between two plain lines elsewhere.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        return_key: str = "mean_return",
        console: Console | None = None,
        refresh_interval: float = 0.1,
        line_interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._return_key = return_key
        self._console = Console() if console is None else console
        self._interval = refresh_interval if self._console.is_terminal else line_interval
        self._clock = clock
        self._live: Live | None = None
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last figures on the screen and restore the terminal; may be called again."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def on_event(self, event: Event) -> None:
        """Update the figures, and draw them if the last drawing is long enough ago."""
        try:
            self._start()
            urgent = self._noted(event)
            if (style := _STYLES.get(type(event))) is not None:
                self._print(event, style)
            if isinstance(event, PoolStopped):
                self._draw()
                self.close()
                self._begin()
            elif urgent or self._clock() - self._drawn >= self._interval:
                self._draw()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Reset all figures: the next event is the first of a new run."""
        self._started: float | None = None
        self._drawn = 0.0
        self._ready: set[int] = set()
        self._num_workers = 0
        self._restarts = 0
        self._version = 0
        self._num_steps = 0
        self._update: UpdateCompleted | None = None
        self._paused = False

    def _start(self) -> None:
        if self._started is not None:
            return
        self._started = self._drawn = self._clock()
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, auto_refresh=False
            )
            self._live.start(refresh=True)

    def _noted(self, event: Event) -> bool:
        """Update the figures; an event with a field of a wrong kind leaves them as they are."""
        try:
            return self._note(event)
        except Exception:  # noqa: BLE001 - code of a field's class; the display must live on
            return False

    def _note(self, event: Event) -> bool:
        """Update the figures from ``event``; return whether they must be drawn at once."""
        match event:
            case UpdateCompleted():
                self._num_steps = int(event.num_steps)
                self._update = event
                self._version = int(event.weights_version)
                self._restarts = int(event.num_restarts)
                return False
            case WeightsPushed():
                self._version = int(event.version)
                return False
            case WorkerReady():
                self._ready.add(event.worker_id)
                return False
            case WorkerExited():
                self._ready.discard(event.worker_id)
                return False
            case WorkerIncident():
                self._ready.discard(event.incident.worker_id)
                self._restarts += event.incident.remedy is Remedy.RESTARTED
            case WorkerSuspected() | WorkerGivenUp() | PoolEscalated():
                pass
            case PoolStarted() | PoolScaled():
                self._num_workers = int(event.num_workers)
            case PoolPaused():
                self._paused = True
            case PoolResumed():
                self._paused = False
            case _:
                return False
        return self._live is not None

    def _print(self, event: Event, style: str) -> None:
        """Write the first line of an event above the display."""
        _, text = describe(event)
        line = self._encodable(text.partition("\n")[0])
        self._console.print(Text(line, style=style), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """Replace the characters that the console's encoding does not have."""
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _draw(self) -> None:
        self._drawn = self._clock()
        if self._live is not None:
            self._live.refresh()
        else:
            self._console.print(Text(self._line()), soft_wrap=True)

    def _render(self) -> RenderableType:
        line = Text(self._line(), style="bold")
        if self._total_steps is None:
            return line
        bar = ProgressBar(total=self._total_steps, completed=self._num_steps)
        return Group(Padding(bar, 0), line)  # a bar alone does not end its line

    def _line(self) -> str:
        update = self._update
        rate = format_number(update.steps_per_second, ",.0f", "–") if update else "–"
        value = self._return_of(update) if update else "–"
        seconds = int(self._clock() - (self._started or 0.0))
        parts = [
            f"{self._num_steps:,} steps",
            f"{rate} steps/s",
            f"return {value}",
            f"weights {self._version}",
            f"workers {len(self._ready)}/{max(self._num_workers, len(self._ready))}",
            f"restarts {self._restarts}",
            f"{seconds // 60}:{seconds % 60:02}",
        ]
        return self._encodable(" · ".join([*parts, "paused"] if self._paused else parts))

    def _return_of(self, update: UpdateCompleted) -> str:
        """Return the learner's return as text; a dash where it is missing or no number."""
        try:
            return format_number(update.metrics[self._return_key], ".1f", "–")
        except Exception:  # noqa: BLE001 - there is no such metric, or code of the mapping failed
            return "–"

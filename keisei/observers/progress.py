"""RichProgress: a live display of a pool at work; needs the extra ``progress``."""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from keisei.observers.missing import missing

try:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text
except ImportError as error:
    raise missing("keisei.observers.progress", "rich", "progress") from error

from keisei.events import (
    Event,
    PoolEscalated,
    PoolStopped,
    WorkerGivenUp,
    WorkerIncident,
    WorkerSuspected,
)
from keisei.observers.log import describe, format_number
from keisei.observers.panel import UNICODE, Panel, glyphs_for

__all__ = ["RichProgress"]

_STYLES: dict[type[Event], str] = {
    WorkerSuspected: "yellow",
    WorkerIncident: "yellow",
    WorkerGivenUp: "red",
    PoolEscalated: "red",
}
"""Events that are written above the display, and how."""


class RichProgress:
    """Shows steps, speed, time left, the curve of the return, weights, and each worker's state.

    On a terminal a few lines are kept up to date in place, none wider than the terminal, and
    incidents scroll past above them. In a notebook they are one output that changes. Elsewhere,
    such as in a file or on a terminal that cannot move its cursor, a plain line is written from
    time to time. Colours follow ``NO_COLOR`` and the console's own settings. It draws during
    events only: there is no thread, and an idle pool costs nothing.

    The display begins with the first event and ends with ``PoolStopped``. Used as a context
    manager, it also restores the terminal when the body raises.

    Args:
        total_steps: Steps that make a full bar; ``None`` shows no bar.
        return_key: Which of the learner's metrics is shown as the return; where there is none of
            that name, the mean return of the episodes that workers report is.
        console: Where to write; ``None`` is the notebook's output or standard output.
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
        self._in_notebook = console is None and _is_notebook()
        self._console = Console() if console is None else console
        in_place = self._console.is_terminal and not self._console.is_dumb_terminal
        self._in_place = in_place and not self._in_notebook
        moves = self._in_place or self._in_notebook
        self._interval = refresh_interval if moves else line_interval
        self._clock = clock
        self._live: Live | None = None
        self._output: Any = None
        self._above: list[str] = []
        self._glyphs = UNICODE if self._in_notebook else glyphs_for(self._console.encoding)
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
        self._panel = Panel(self._total_steps, self._return_key)
        self._output = None
        self._above = []

    def _start(self) -> None:
        if self._started is not None:
            return
        self._started = self._drawn = self._clock()
        if self._in_notebook:
            self._output = _shown(self._as_html())
        elif self._in_place:
            self._live = Live(
                get_renderable=lambda: self, console=self._console, auto_refresh=False
            )
            self._live.start(refresh=True)

    def _noted(self, event: Event) -> bool:
        """Update the figures; an event with a field of a wrong kind leaves them as they are."""
        try:
            urgent = self._panel.note(event)
        except Exception:  # noqa: BLE001 - code of a field's class; the display must live on
            return False
        return urgent and (self._live is not None or self._output is not None)

    def _print(self, event: Event, style: str) -> None:
        """Write the first line of an event above the display."""
        _, text = describe(event)
        line = self._encodable(text.partition("\n")[0])
        if self._output is not None:
            self._above.append(line)
        else:
            self._console.print(Text(line, style=style), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """Replace the characters that the console's encoding does not have."""
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _draw(self) -> None:
        self._drawn = self._clock()
        if self._output is not None:
            with contextlib.suppress(Exception):  # the notebook's front end is gone
                self._output.update(_html(self._as_html()))
        elif self._live is not None:
            self._live.refresh()
        else:
            self._console.print(Text(self._line()), soft_wrap=True)

    def _seconds(self) -> float:
        return self._clock() - (self._started or 0.0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._panel.lines(options.max_width, self._seconds(), self._glyphs):
            yield Text(self._encodable(line), no_wrap=True, overflow="crop", end="\n")

    def _as_html(self) -> str:
        lines = [*self._above[-_MOST_ABOVE:], *self._panel.lines(80, self._seconds())]
        return f"<pre style='line-height:1.25'>{html.escape(chr(10).join(lines))}</pre>"

    def _line(self) -> str:
        panel, update = self._panel, self._panel.update
        rate = format_number(update.steps_per_second, ",.0f", "–") if update else "–"
        seconds = int(self._seconds())
        parts = [
            f"{panel.num_steps:,} steps",
            f"{rate} steps/s",
            f"return {self._last_return()}",
            f"weights {panel.version}",
            f"workers {len(panel.ready)}/{max(panel.num_workers, len(panel.ready))}",
            f"restarts {panel.restarts}",
            f"{seconds // 60}:{seconds % 60:02}",
        ]
        return self._encodable(" · ".join([*parts, "paused"] if panel.paused else parts))

    def _last_return(self) -> str:
        """Return the newest update's return as text; a dash where it has none."""
        update = self._panel.update
        if update is None:
            return "–"
        try:
            value = update.metrics.get(self._return_key, update.mean_return)
            return format_number(value, ".1f", "–")
        except Exception:  # noqa: BLE001 - code of the mapping failed
            return "–"


_MOST_ABOVE = 10
"""Incidents that a notebook's output shows above the figures."""


def _is_notebook() -> bool:
    """Return whether this is a kernel whose front end shows rich outputs."""
    shell = sys.modules.get("IPython")
    current = shell.get_ipython() if shell is not None else None
    return current is not None and hasattr(current, "kernel")


def _html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)


def _shown(text: str) -> Any:
    """Show ``text`` as a new output and return the handle that changes it."""
    from IPython.display import display

    return display(_html(text), display_id=True)

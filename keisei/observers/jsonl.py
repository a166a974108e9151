"""JsonLinesObserver: every event as a line of JSON in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from keisei.events import Event
from keisei.observers.background import BackgroundObserver
from keisei.observers.files import AppendedFile

__all__ = ["JsonLinesObserver"]


class JsonLinesObserver(BackgroundObserver):
    """Appends ``event.to_dict()`` of each event to a file, one line each, in UTF-8.

    A thread writes; the loop never waits. A full disk costs the lines for which there is no room,
    is told once, and leaves no half of a line.

    Args:
        path: The file, which is appended to; its folder is made.
        events: The kinds of events that are written; ``Event`` is all of them.
        max_pending: See ``BackgroundObserver``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        events: type[Event] | tuple[type[Event], ...] = Event,
        max_pending: int = 10_000,
    ) -> None:
        super().__init__(max_pending=max_pending)
        self.wanted = events if isinstance(events, tuple) else (events,)
        self._path = Path(path).absolute()
        self._file: AppendedFile | None = None

    @property
    def target(self) -> str:
        """The file."""
        return str(self._path)

    def open(self) -> None:
        """Open the file; a line that was cut, by a kill or a crash, is ended first."""
        self._file = AppendedFile(self._path)
        self._file.end_line()

    def write(self, event: Event) -> None:
        """Append one line."""
        if self._file is not None:
            line = json.dumps(event.to_dict(), allow_nan=False, ensure_ascii=False)
            self._file.append(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

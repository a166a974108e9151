"""CsvObserver: one row for each update of the learner."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from keisei.events import Event, UpdateCompleted
from keisei.observers.background import BackgroundObserver
from keisei.observers.figures import figures_of
from keisei.observers.files import AppendedFile

__all__ = ["CsvObserver"]

_FIRST = ("time", "update", "num_steps")


class CsvObserver(BackgroundObserver):
    """Appends a row for each update: time, counters, the pool's figures, episodes and metrics.

    The first line names the columns. A metric that appears later adds a column at the end: the
    file is written anew, under another name, and takes the place of the old one at once. A file
    that exists is appended to, so a resumed run goes on in it. NaN is "nan", a missing value
    nothing. A thread writes; the loop never waits. A full disk costs the rows for which there is
    no room, is told once, and leaves no half of a row.

    Args:
        path: The file; its folder is made.
        max_pending: See ``BackgroundObserver``.
    """

    wanted = (UpdateCompleted,)

    def __init__(self, path: str | os.PathLike[str], *, max_pending: int = 10_000) -> None:
        super().__init__(max_pending=max_pending)
        self._path = Path(path).absolute()
        self._file: AppendedFile | None = None
        self._columns: list[str] = []

    @property
    def target(self) -> str:
        """The file."""
        return str(self._path)

    def open(self) -> None:
        """Open the file, and take its columns over if it has some; a cut row is ended first."""
        self._file = AppendedFile(self._path)
        self._file.end_line()
        self._columns = _columns_of(self._path)

    def write(self, event: Event) -> None:
        """Append one row."""
        assert isinstance(event, UpdateCompleted)  # noqa: S101 - what is wanted
        row = figures_of(event)
        row |= {"time": event.time, "update": event.update, "num_steps": event.num_steps}
        if any(name not in self._columns for name in row):
            self._widen(row)
        if self._file is not None:
            self._file.append(_line([row.get(name, "") for name in self._columns]))

    def _widen(self, row: Mapping[str, object]) -> None:
        """Add the columns that ``row`` needs."""
        wanted = [*self._columns, *(name for name in row if name not in self._columns)]
        if not self._columns:
            wanted = [*_FIRST, *(name for name in wanted if name not in _FIRST)]
        if self._file is not None and self._file.is_empty:
            self._file.append(_line(wanted))
        else:
            self._rewrite(wanted)
        self._columns = wanted

    def _rewrite(self, columns: Sequence[str]) -> None:
        """Write the file anew with more columns; if that fails it stays as it is."""
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with self._path.open(newline="", encoding="utf-8") as old, new.open("wb") as file:
                file.write(_line(columns))
                for cells in itertools.islice(csv.reader(old), 1, None):
                    file.write(_line([*cells, *[""] * (len(columns) - len(cells))]))
            new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        self.close()
        self._file = AppendedFile(self._path)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _columns_of(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])
    except FileNotFoundError:
        return []

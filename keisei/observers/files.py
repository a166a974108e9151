"""A file that is appended to, a whole record at a time, whatever the disk does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


class AppendedFile:
    """Appends records so that a full disk leaves whole records and nothing else.

    Args:
        path: The file; its folder is made. What is in it stays.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def append(self, record: bytes) -> None:
        """Write all of ``record``, or nothing.

        Raises:
            OSError: The disk is full, for example; the file is as it was before.
        """
        left = memoryview(record)
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError:
            self._undo()
            raise
        self._size += len(record)

    def end_line(self) -> None:
        """End a line that was cut, by a kill or a crash, when the file was written last."""
        if self.is_empty:
            return
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            is_cut = file.read(1) != b"\n"
        if is_cut:
            self.append(b"\n")

    def _undo(self) -> None:
        try:
            self._file.truncate(self._size)
        except OSError:  # a pipe or a device: what it took is gone
            return

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been written to the file, now or earlier."""
        return self._size == 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

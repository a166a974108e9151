"""LineView: the lines of the processes that are there now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from keisei.protocol.line import Line
from keisei.supervision.incarnation import Incarnation


class LineView(Mapping[int, Line]):
    """A view of a supervisor's table: the lines of its processes, by worker id.

    It has what the table has at the moment of each look.
    """

    def __init__(
        self, incarnations: Mapping[int, Incarnation], holds: Callable[[int], bool]
    ) -> None:
        """Look at ``incarnations``, as far as ``holds`` is true for a worker id."""
        self._incarnations = incarnations
        self._holds = holds

    def __getitem__(self, worker_id: int) -> Line:
        one = self._incarnations[worker_id]
        if one.line is None or not self._holds(worker_id):
            raise KeyError(worker_id)
        return one.line

    def get(self, worker_id: int, default: Any = None) -> Any:
        """Return a line, or ``default`` if there is none: every batch's path."""
        one = self._incarnations.get(worker_id)
        if one is None or one.line is None or not self._holds(worker_id):
            return default
        return one.line

    def __contains__(self, worker_id: object) -> bool:
        return isinstance(worker_id, int) and self.get(worker_id) is not None

    def now(self) -> dict[int, Line]:
        """Return the lines that there are at this moment, in the order of the slots."""
        return {
            worker_id: one.line
            for worker_id, one in sorted(self._incarnations.items())
            if one.line is not None and self._holds(worker_id)
        }

    def __iter__(self) -> Iterator[int]:
        return iter(self.now())

    def __len__(self) -> int:
        return len(self.now())

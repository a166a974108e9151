"""LineView: the lines of the processes that are there now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
        line = self._incarnations[worker_id].line
        if line is None or not self._holds(worker_id):
            raise KeyError(worker_id)
        return line

    def __iter__(self) -> Iterator[int]:
        return iter([worker_id for worker_id in sorted(self._incarnations) if worker_id in self])

    def __len__(self) -> int:
        return sum(worker_id in self for worker_id in self._incarnations)

"""Parse what arrives in a worker's experience queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from keisei.ipc import serialize
from keisei.ipc.layout import Layout, Views
from keisei.ipc.ring import Place, RingReader
from keisei.protocol import messages

_NO_VIEWS = Views(Layout((), 0))
_HEAVY = 1 << 16


class ProtocolError(Exception):
    """A peer sent something that makes no sense."""


class PendingBatch(NamedTuple):
    """An experience that a worker has committed and nobody has taken.

    It owns its memory: to let go of it gives the cell back unread.
    """

    worker_id: int
    incarnation: int
    memory: Any
    views: Views
    info: Mapping[str, Any]
    num_steps: int
    sequence: int
    version: int
    seed: int


class BatchParser:
    """The application's side of one incarnation's experience queue."""

    def __init__(self, worker_id: int, incarnation: int) -> None:
        self.received = 0
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._ring = RingReader()
        self._views = _NO_VIEWS

    @staticmethod
    def is_heavy(payload: memoryview) -> bool:
        """Return whether parsing this frame is worth a thread."""
        return len(payload) > _HEAVY

    def parse(
        self, payload: memoryview, fds: list[int], *, outstanding: int, newest_version: int
    ) -> PendingBatch:
        """Return the experience that a frame announces."""
        try:
            frame: messages.ExperienceFrame = messages.unpack(payload)
            if frame.new_segment:
                self._ring.add(frame.segment, fds[0])
            if frame.layout is not None:
                self._views = Views(frame.layout)
            views = self._views
            place = Place(frame.segment, frame.slot, frame.stride, views.layout)
            self._ring.check(place)
            info = {} if frame.info is None else serialize.loads(frame.info, "Experience.info")
        except Exception as error:
            raise ProtocolError(str(error)) from error
        self.received += 1
        return PendingBatch(
            self._worker_id,
            self._incarnation,
            self._ring.slot(place),
            views,
            info,
            frame.num_steps,
            frame.sequence,
            frame.version,
            frame.seed,
        )

    def close(self) -> None:
        """Let go of the memory; batches that were delivered stay valid."""
        self._ring.close()

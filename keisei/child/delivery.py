"""Experiences on their way out: into shared memory, and a frame about each, as credits allow."""

from __future__ import annotations

import operator
import resource
import sys
from collections.abc import Callable
from typing import Any

from keisei.child.frames import send
from keisei.child.hooks import HookFailed
from keisei.exceptions import QueueEnded
from keisei.ipc import nested, serialize
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.layout import Layout
from keisei.ipc.ring import RingWriter
from keisei.ipc.status import Phase, StatusLine
from keisei.protocol import messages
from keisei.worker import Experience

_RSS_MASK = 63
"""The peak memory is noted at one experience of 64: asking costs as much as sending a frame."""
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Delivery:
    """Delivers one worker's experiences.

    Attributes:
        has_ended: The application takes no more experiences.
    """

    def __init__(self, writer: FrameWriter, status: StatusLine, cells: int, seed: int) -> None:
        """Make the memory for ``cells`` experiences that wait, one in use and one in the making."""
        self.has_ended = False
        self._writer = writer
        self._status = status
        self._seed = seed
        self._ring = RingWriter(cells + 2)
        self._told_layout: Layout | None = None
        self._told_others: tuple[tuple[int, int], ...] = ()

    def take_credits(self) -> None:
        """Take in the credits that have arrived."""
        try:
            self._writer.refresh()
        except QueueEnded:
            self.has_ended = True

    def watch_credits(self, on_credit: Callable[[], None]) -> None:
        """Take credits in as they arrive, and call ``on_credit`` then."""

        def take() -> None:
            self.take_credits()
            on_credit()

        self._writer.watch_credit(take)

    async def deliver(
        self,
        result: Any,
        version: int,
        others: tuple[tuple[int, int], ...] = (),
        settings_version: int = 0,
    ) -> None:
        """Copy what ``collect`` returned into shared memory and send the frame about it.

        Args:
            result: An ``Experience``, or a mapping of tensors, nested or not.
            version: The weights that it was collected with.
            others: Numbers and versions of the other weights that it was collected with.
            settings_version: The settings that it was collected with.

        Raises:
            HookFailed: It is no experience, or cannot travel.
            QueueEnded: The application has gone.
        """
        try:
            experience = result if isinstance(result, Experience) else Experience(result)
            ref, fds = self._ring.write(experience.data)
            info = experience.info
            committed = self._status.committed
            payload = messages.pack(
                messages.ExperienceFrame(
                    sequence=committed,
                    version=version,
                    segment=ref.segment,
                    segment_nbytes=ref.segment_nbytes if fds else 0,
                    cell=ref.cell,
                    stride=ref.stride,
                    layout=None if ref.layout is self._told_layout else ref.layout,
                    num_steps=_num_steps(experience, ref.layout),
                    info=serialize.dumps(dict(info), "Experience.info") if info else None,
                    seed=self._seed,
                    named=None if others is self._told_others else others,
                    settings_version=settings_version,
                )
            )
        except BaseException as error:
            raise HookFailed(Phase.COLLECT, error) from error
        self._status.committed = committed + 1
        if committed & _RSS_MASK == 0:
            self._status.rss = peak_memory()
        await send(self._writer, payload, fds)
        self._told_layout = ref.layout
        self._told_others = others
        if fds:
            self._ring.told()

    def close(self) -> None:
        """Give the memory back; what was delivered stays valid."""
        self._ring.close()


def peak_memory() -> int:
    """Return the most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _num_steps(experience: Experience, layout: Layout) -> int:
    if experience.num_steps is None:
        counted = nested.steps_of(experience.data)
        if counted is not None:
            return counted
        return max((field.shape[0] for field in layout.fields if field.shape), default=1)
    num_steps = operator.index(experience.num_steps)
    if num_steps < 0:
        raise ValueError(f"Experience.num_steps is {num_steps}; it must not be negative")
    return num_steps

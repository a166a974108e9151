"""The one parser of what a worker says about experiences: a claim, until all of it is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from keisei.exceptions import SerializationError
from keisei.ipc import serialize
from keisei.ipc.descriptors import Descriptors
from keisei.ipc.layout import Layout, Views
from keisei.ipc.memory import NotShared
from keisei.ipc.ring import CellRef, RingReader
from keisei.protocol import messages
from keisei.protocol.codec import MAX_INT
from keisei.protocol.errors import ProtocolError
from keisei.worker import MAIN

if TYPE_CHECKING:
    import torch

_REMEMBERED = 16
_HEAVY = 1 << 14
"""Bytes of a frame above which it is parsed in a thread: the names of some 500 tensors."""
_MANY = 1000
"""Tensors of an experience above which they are made in a thread."""
_NO_VIEWS = Views(Layout((), 0))
_NO_VERSIONS: Mapping[str, int] = MappingProxyType({})


def any_named(number: int) -> tuple[str, int]:
    """Believe any version, where nothing is known of names."""
    return str(number), MAX_INT


class PendingBatch(NamedTuple):
    """An experience that a worker has committed and that no learner has taken yet.

    It owns its cell: to let go of it gives the cell back unread.

    Attributes:
        worker_id: The slot that collected it.
        incarnation: The process of that slot.
        memory: The cell, which is free again when nothing refers to this buffer any more.
        views: Makes the tensors on ``memory``.
        tensors: Those tensors, where they are so many that the thread has made them already.
        info: The small values that came along.
        num_steps: Environment steps.
        sequence: 0, 1, 2 … within the incarnation.
        version: The weights version that it was collected with.
        seed: The worker's seed.
        versions: The version of each name of weights that the worker had; not to be altered.
        settings_version: The version of the settings that it was collected with.
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
    tensors: dict[str, torch.Tensor] | None = None
    versions: Mapping[str, int] = _NO_VERSIONS
    settings_version: int = 0

    def opened(self) -> dict[str, torch.Tensor]:
        """Return the tensors; they keep the cell."""
        return self.views.on(self.memory) if self.tensors is None else self.tensors


class BatchParser:
    """Parses the experience frames of one incarnation; belongs to the application.

    Attributes:
        received: Experiences that were accepted.
    """

    def __init__(
        self,
        worker_id: int,
        incarnation: int,
        newest_named: Callable[[int], tuple[str, int]] = any_named,
    ) -> None:
        """Begin with the first experience of an incarnation.

        Args:
            worker_id: The slot.
            incarnation: The process of that slot.
            newest_named: Tells, for the number of weights other than "main", their name and
                newest version; raises LookupError where there are none.
        """
        self._newest_named = newest_named
        self._named: dict[str, int] = {}
        self._versions: Mapping[str, int] = _NO_VERSIONS
        self._version = 0
        self.received = 0
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._ring = RingReader()
        self._views = _NO_VIEWS
        self._known: dict[Layout, Views] = {}

    def is_heavy(self, payload: memoryview) -> bool:
        """Return whether a frame is worth a thread: many tensors, or much in ``info``."""
        return len(payload) > _HEAVY or len(self._views.layout.fields) > _MANY

    def parse(
        self,
        payload: memoryview,
        fds: Descriptors,
        *,
        outstanding: int,
        newest_version: int,
        newest_settings: int = 0,
    ) -> PendingBatch:
        """Return the experience that a frame is about.

        One call at a time, frames in order; any thread. A wrong frame changes nothing here,
        and closes the frame's descriptors.

        Args:
            payload: The frame.
            fds: What came with it.
            outstanding: Experiences that the worker may still send.
            newest_version: The newest version of the weights.
            newest_settings: The newest version of the settings that the worker was told.

        Raises:
            ProtocolError: The frame is malformed, or claims what cannot be.
            OSError: This process cannot map the memory; the worker is not to blame.
        """
        frame: messages.ExperienceFrame = messages.unpack(payload, messages.EXPERIENCE, fds)
        try:
            self._check_order(frame, outstanding, newest_version, newest_settings)
            named = self._named if frame.named is None else self._checked(frame)
            views = self._views if frame.layout is None else self._views_of(frame.layout)
            if not views.layout.fields:
                raise ProtocolError("an experience has no tensors, or none before it said which")
            ref = CellRef(
                frame.segment, frame.segment_nbytes, frame.cell, frame.stride, views.layout
            )
            segment = self._ring.find(ref, fds.claim() if frame.segment_nbytes else None)
            info: Any = {} if frame.info is None else serialize.loads(frame.info, "its info")
            if type(info) is not dict:
                raise ProtocolError(f"the info of an experience is a {type(info).__qualname__}")
        except (NotShared, SerializationError) as error:
            raise ProtocolError(f"experience {frame.sequence}: {error}") from error
        finally:
            fds.close()
        memory = self._ring.take(ref, segment)
        is_heavy = self.is_heavy(payload) or len(views.layout.fields) > _MANY
        tensors = views.on(memory) if is_heavy else None
        self.received += 1
        self._views = views
        if named is not self._named or frame.version != self._version:
            self._named, self._version = named, frame.version
            main = {MAIN: frame.version} if frame.version else {}
            self._versions = MappingProxyType(main | named)
        return PendingBatch(
            self._worker_id,
            self._incarnation,
            memory,
            views,
            info,
            frame.num_steps,
            frame.sequence,
            frame.version,
            frame.seed,
            tensors,
            self._versions,
            frame.settings_version,
        )

    def _checked(self, frame: messages.ExperienceFrame) -> dict[str, int]:
        """Return the versions of named weights that a frame claims, by name."""
        named: dict[str, int] = {}
        for number, version in frame.named or ():
            try:
                name, newest = self._newest_named(number)
            except LookupError:
                raise ProtocolError(
                    f"experience {frame.sequence} names weights that there never were"
                ) from None
            if version > newest or name in named:
                raise ProtocolError(
                    f"experience {frame.sequence} was collected with version {version} of weights "
                    f"{name!r}; the newest is {newest}"
                )
            named[name] = version
        return named

    def _check_order(
        self,
        frame: messages.ExperienceFrame,
        outstanding: int,
        newest_version: int,
        newest_settings: int,
    ) -> None:
        if frame.sequence != self.received:
            raise ProtocolError(f"experience {frame.sequence} came in place of {self.received}")
        if outstanding <= 0:
            raise ProtocolError(f"experience {frame.sequence} came without a credit")
        if frame.version > newest_version:
            raise ProtocolError(
                f"experience {frame.sequence} was collected with weights version {frame.version}; "
                f"the newest is {newest_version}"
            )
        if frame.settings_version > newest_settings:
            raise ProtocolError(
                f"experience {frame.sequence} was collected with settings version "
                f"{frame.settings_version}; it was told {newest_settings}"
            )

    def _views_of(self, layout: Layout) -> Views:
        """Return the views of a layout that came; the last few are kept."""
        views = self._known.pop(layout, None) or Views(layout)
        self._known[layout] = views
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return views

    def close(self) -> None:
        """Unmap every segment at once; batches that were delivered keep theirs."""
        self._ring.close()

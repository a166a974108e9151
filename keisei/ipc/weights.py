"""Weights of one name in shared memory: published once, read by any number of workers, never torn.

K buffers and a header of 64-bit words: the newest version, and for each buffer the version that
lies in it, or 0 while it is being written. Version v lies in buffer v mod K. A reader copies the
newest buffer and looks at its stamp again (a seqlock); if the stamp moved, it reads again. The
publisher takes no lock and waits for nobody.

Memory with one buffer holds one version for good. Readers need no copy of it: they look at it
through private mappings, which share its pages until they are written.

The words tell readers; the publisher decides by numbers of its own. Readers map the memory
read-only, and where the kernel can seal it, it cannot be mapped or written otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from keisei.exceptions import WeightsError
from keisei.ipc import forks, memory, window
from keisei.ipc.board import Board
from keisei.ipc.layout import Layout, Views, describe
from keisei.ipc.memory import PAGE, round_up
from keisei.ipc.window import Access, Window

BUFFERS = 2
"""Two: what lies beside the newest version is the one before it, as ``revert`` needs."""
_LATEST = 0
_PUBLISHED = 1
_STAMPS = 8
_NUM_WORDS = _STAMPS + BUFFERS
_KEPT = 1 << 26
"""Bytes of a copy up to which a reader keeps its memory for the next one."""
_fence_lock = threading.Lock()


def _fence() -> None:
    """Order the memory accesses before and after; a lock's acquisition is a barrier."""
    with _fence_lock:
        pass


class _Arena:
    """The shared memory as either side sees it."""

    def __init__(self, shared: Window, layout: Layout, buffers: int) -> None:
        self.words = shared.words(_NUM_WORDS)
        self.buffer, stride = shared.buffer(), _stride(layout)
        starts = [PAGE + k * stride for k in range(buffers)]
        self.views = [layout.views(self.buffer, start) for start in starts]
        self.whole = [_bytes_of(self.buffer, start, layout.nbytes) for start in starts]


def _bytes_of(buffer: Any, start: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=start)


def _stride(layout: Layout) -> int:
    return round_up(layout.nbytes, PAGE)


def _size(layout: Layout, buffers: int) -> int:
    return PAGE + buffers * _stride(layout)


class WeightsPublisher:
    """The application's side; writes from one thread at a time.

    Attributes:
        layout: Names, dtypes and shapes, fixed by the first weights.
        num_bytes: Of the tensors together.
        fd: The memory's descriptor, to hand to workers; -1 when closed.
        version: The newest version; the ``before`` that it was made with is none.
        is_final: There is one buffer, for one version.
    """

    def __init__(
        self, layout: Layout, *, before: int = 0, is_final: bool = False, board: Board | None = None
    ) -> None:
        """Make the memory, shared by all workers: twice the weights' bytes, or once.

        Args:
            layout: Names, dtypes and shapes.
            before: The last version of this name in another memory; versions go on from there.
            is_final: Make one buffer, for the next version and no other.
            board: Told of every version.

        Raises:
            OSError: There is no memory for it.
        """
        self.layout = layout
        self.num_bytes = sum(field.nbytes for field in layout.fields)
        self.version = before
        self.is_final = is_final
        self._before = before
        self._board = board
        self._buffers = 1 if is_final else BUFFERS
        self._stamps = [0] * self._buffers
        self._forms: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self.fd, shared = window.create(_size(layout, self._buffers), "keisei-weights")
        self._arena: _Arena | None = _Arena(shared, layout, self._buffers)
        forks.own(self)

    @property
    def is_full(self) -> bool:
        """Whether there is no buffer for another version."""
        return self.is_final and self.version > self._before

    def check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Compare ``weights`` with the first ones.

        Raises:
            WeightsError: Keys are missing, unexpected, or of another shape or dtype.
        """
        forms = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
        if forms != self._forms:
            problems = self.layout.differences(describe(weights))
            if problems:
                raise WeightsError("these weights do not fit: " + "; ".join(problems))
            self._forms = forms

    def publish(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Copy ``weights``, already checked, into the next buffer and return its version.

        Raises:
            WeightsError: The publisher was closed.
        """
        arena = self._open_arena()
        buffer = (self.version + 1) % self._buffers
        self._stamp(arena, buffer, 0)
        _fence()
        for name, target in arena.views[buffer].items():
            source = weights[name]
            target.copy_(source.detach() if source.requires_grad else source)
        return self._announce(arena, buffer)

    def revert(self) -> int:
        """Publish the weights before the newest again, as a new version, which is returned.

        Raises:
            WeightsError: There are none, a ``publish`` that failed has overwritten them, or the
                publisher was closed.
        """
        arena = self._open_arena()
        if not self.can_revert:
            raise WeightsError("there are no weights before the newest ones to go back to")
        return self._announce(arena, (self.version - 1) % self._buffers)

    @property
    def can_revert(self) -> bool:
        """Whether the weights before the newest are still there."""
        before = self.version - 1
        return before > self._before and self._stamps[before % self._buffers] == before

    def newest(self) -> dict[str, torch.Tensor]:
        """Return a copy of the newest weights.

        Raises:
            WeightsError: The publisher was closed.
        """
        views = self._open_arena().views[self.version % self._buffers]
        return {name: view.clone() for name, view in views.items()}

    def _announce(self, arena: _Arena, buffer: int) -> int:
        """Make what lies in ``buffer`` the newest version, and return its number."""
        version = self.version + 1
        _fence()
        self._stamp(arena, buffer, version)
        _fence()
        if self._board is not None:
            self._board.publish(functools.partial(self._tell, arena, version))
        else:
            self._tell(arena, version, 0)
        return version

    def _tell(self, arena: _Arena, version: int, generation: int) -> None:
        arena.words[_PUBLISHED] = generation
        self.version = arena.words[_LATEST] = version

    def _stamp(self, arena: _Arena, buffer: int, version: int) -> None:
        self._stamps[buffer] = arena.words[_STAMPS + buffer] = version

    def _open_arena(self) -> _Arena:
        if self._arena is None:
            raise WeightsError("the memory of these weights was given back")
        return self._arena

    def close(self) -> None:
        """Unmap the memory at once; it is gone when the workers have done so too."""
        self._arena = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def disown(self) -> None:
        """Close a forked child's copy; to publish is the parent's."""
        self.close()


class _Spare:
    """Memory for a copy, used again once nothing refers to the copy: fresh pages are slow."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: memory.Region | None = None

    def take(self) -> ctypes.Array[Any]:
        """Return a buffer that is the caller's alone as long as anything refers to it."""
        block, self._free = self._free, None
        if block is None:
            fresh = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    fresh.madvise(mmap.MADV_HUGEPAGE)
            block = memory.Region(fresh)
        return memory.part(block, 0, self._nbytes, functools.partial(self._give_back, block))

    def _give_back(self, block: memory.Region) -> None:
        if self._nbytes <= _KEPT:
            self._free = block


class WeightsReader:
    """A worker's side."""

    def __init__(self, fd: int, layout: Layout, *, is_final: bool = False) -> None:
        """Map the memory; takes ``fd`` over.

        Args:
            fd: The memory's descriptor.
            layout: Names, dtypes and shapes.
            is_final: It holds one version for good.

        Raises:
            NotShared: It is not the memory of such weights.
            OSError: It cannot be mapped.
        """
        self.layout = layout
        self._is_final = is_final
        self._buffers = 1 if is_final else BUFFERS
        access = Access.COPY if is_final else Access.READ
        shared = window.attach(fd, _size(layout, self._buffers), access)
        self._arena = _Arena(shared, layout, self._buffers)
        self._views = Views(layout)
        self._spare = _Spare(layout.nbytes)
        self._held: weakref.ref[Any] | None = None
        self._held_version = 0

    @property
    def latest(self) -> int:
        """The newest version; 0 is none. One read of shared memory."""
        return self._arena.words[_LATEST]

    @property
    def published(self) -> int:
        """When the newest version was published: the board's generation then."""
        return self._arena.words[_PUBLISHED]

    def look(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return the newest weights and their version, without a copy where there is a way.

        A final version is looked at where it lies. Of any other a copy is made, which all who look
        at that version share as long as one of its tensors lives.

        Raises:
            WeightsError: None were published yet.
        """
        if self._is_final and self.latest:
            return self._views.on(self._arena.buffer, PAGE), self.latest
        held = self._held() if self._held is not None else None
        if held is None or self._held_version != self.latest:
            held = self._spare.take()
            self._held, self._held_version = weakref.ref(held), self._copy_to(held)
        return self._views.on(held), self._held_version

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> int:
        """Copy the newest weights into ``targets`` and return their version.

        They are copied in the order of ``targets``, which decides where targets overlap. Until
        this returns, ``targets`` may hold a mixture that nobody must use.

        Raises:
            WeightsError: None were published yet.
        """

        def copy(buffer: int) -> None:
            views = self._arena.views[buffer]
            for name, target in targets.items():
                target.copy_(views[name])

        with torch.no_grad():
            return self._read(copy)

    def read(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return a copy of the newest weights, the caller's own, and their version.

        Raises:
            WeightsError: None were published yet.
        """
        block = self._spare.take()
        version = self._copy_to(block)
        return self._views.on(block), version

    def _copy_to(self, block: Any) -> int:
        whole = _bytes_of(block, 0, self.layout.nbytes)
        return self._read(lambda buffer: whole.copy_(self._arena.whole[buffer]))

    def _read(self, copy: Callable[[int], object]) -> int:
        """Copy the newest buffer until it was not written to meanwhile; return its version."""
        while True:
            version = self.latest
            if not version:
                raise WeightsError("no weights were published yet")
            _fence()
            copy(version % self._buffers)
            _fence()
            if self._arena.words[_STAMPS + version % self._buffers] == version:
                return version

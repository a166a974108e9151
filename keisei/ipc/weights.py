"""Weights in one shared memory: published once, read by any number of workers, never torn.

K buffers and a header of 64-bit words: the newest version, and for each buffer the version that
lies in it, or 0 while it is being written. Version v lies in buffer v mod K. A reader copies the
newest buffer and looks at its stamp again (a seqlock); if the stamp moved, it reads again. The
publisher takes no lock and waits for nobody.

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
from collections.abc import Callable, Mapping
from typing import Any

import torch

from keisei.exceptions import WeightsError
from keisei.ipc import forks, memory
from keisei.ipc.layout import Layout, Views, describe
from keisei.ipc.memory import PAGE, round_up

BUFFERS = 2
"""Two: what lies beside the newest version is the one before it, as ``revert`` needs."""
_LATEST = 0
_STAMPS = 8
_KEPT = 1 << 26
"""Bytes of a copy up to which a reader keeps its memory for the next one."""
_fence_lock = threading.Lock()


def _fence() -> None:
    """Order the memory accesses before and after; a lock's acquisition is a barrier."""
    with _fence_lock:
        pass


class _Arena:
    """The shared memory as either side sees it."""

    def __init__(self, shared: mmap.mmap, window: Any, layout: Layout) -> None:
        """Look at ``shared`` through ``window``, a buffer on it that torch takes for writable."""
        self.words = memoryview(shared)[:PAGE].cast("Q")
        stride = _stride(layout)
        self.views = [layout.views(window, PAGE + k * stride) for k in range(BUFFERS)]
        self.whole = [_bytes_of(window, PAGE + k * stride, layout.nbytes) for k in range(BUFFERS)]


def _bytes_of(buffer: Any, start: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=start)


def _stride(layout: Layout) -> int:
    return round_up(layout.nbytes, PAGE)


def _size(layout: Layout) -> int:
    return PAGE + BUFFERS * _stride(layout)


class WeightsPublisher:
    """The application's side; writes from one thread at a time.

    Attributes:
        layout: Names, dtypes and shapes, fixed by the first weights.
        num_bytes: Of the tensors together.
        fd: The memory's descriptor, to hand to workers; -1 when closed.
        version: The newest version; 0 is none.
    """

    def __init__(self, layout: Layout) -> None:
        """Make the memory: twice the weights' bytes, shared by all workers.

        Raises:
            OSError: There is no memory for it.
        """
        self.layout = layout
        self.num_bytes = sum(field.nbytes for field in layout.fields)
        self.version = 0
        self._stamps = [0] * BUFFERS
        self._forms: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self.fd, shared = memory.create(_size(layout), "keisei-weights", writable=False)
        self._arena: _Arena | None = _Arena(shared, shared, layout)
        forks.own(self)

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
        buffer = (self.version + 1) % BUFFERS
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
        before = self.version + 1 - BUFFERS
        buffer = before % BUFFERS
        if before < 1 or self._stamps[buffer] != before:
            raise WeightsError("there are no weights before the newest ones to go back to")
        return self._announce(arena, buffer)

    def newest(self) -> dict[str, torch.Tensor]:
        """Return a copy of the newest weights.

        Raises:
            WeightsError: The publisher was closed.
        """
        views = self._open_arena().views[self.version % BUFFERS]
        return {name: view.clone() for name, view in views.items()}

    def _announce(self, arena: _Arena, buffer: int) -> int:
        """Make what lies in ``buffer`` the newest version, and return its number."""
        version = self.version + 1
        _fence()
        self._stamp(arena, buffer, version)
        _fence()
        self.version = arena.words[_LATEST] = version
        return version

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

    def __init__(self, fd: int, layout: Layout) -> None:
        """Map the memory; takes ``fd`` over.

        Raises:
            NotShared: It is not the memory of such weights.
            OSError: It cannot be mapped.
        """
        self.layout = layout
        shared = memory.attach(fd, _size(layout), writable=False)
        self._arena = _Arena(shared, memory.readable(shared), layout)
        self._views = Views(layout)
        self._spare = _Spare(layout.nbytes)

    @property
    def latest(self) -> int:
        """The newest version; 0 is none. One read of shared memory."""
        return self._arena.words[_LATEST]

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
        whole = _bytes_of(block, 0, self.layout.nbytes)
        version = self._read(lambda buffer: whole.copy_(self._arena.whole[buffer]))
        return self._views.on(block), version

    def _read(self, copy: Callable[[int], object]) -> int:
        """Copy the newest buffer until it was not written to meanwhile; return its version."""
        while True:
            version = self.latest
            if not version:
                raise WeightsError("no weights were published yet")
            _fence()
            copy(version % BUFFERS)
            _fence()
            if self._arena.words[_STAMPS + version % BUFFERS] == version:
                return version

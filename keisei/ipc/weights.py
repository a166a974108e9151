"""Weights in one shared memory: published once, read by any number of workers, never torn.

K buffers and a header of 64-bit words: the newest version, and for each buffer the version that
lies in it, or 0 while it is being written. Version v lies in buffer v mod K. A reader copies the
newest buffer and looks at its stamp again (a seqlock); if the stamp moved, it reads again. The
publisher takes no lock and waits for nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from keisei.exceptions import WeightsError
from keisei.ipc import memory
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

    def __init__(self, shared: mmap.mmap, layout: Layout) -> None:
        self.layout = layout
        self.words = memoryview(shared)[:PAGE].cast("Q")
        stride = _stride(layout)
        self.views = [layout.views(shared, PAGE + k * stride) for k in range(BUFFERS)]
        self.whole = [_bytes_of(shared, PAGE + k * stride, layout.nbytes) for k in range(BUFFERS)]

    @property
    def latest(self) -> int:
        return self.words[_LATEST]


def _bytes_of(buffer: Any, start: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=start)


def _stride(layout: Layout) -> int:
    return round_up(layout.nbytes, PAGE)


class WeightsPublisher:
    """The application's side; writes from one thread at a time.

    Attributes:
        layout: Names, dtypes and shapes, fixed by the first weights.
        num_bytes: Of the tensors together.
        fd: The memory's descriptor, to hand to workers.
    """

    def __init__(self, layout: Layout) -> None:
        """Make the memory: twice the weights' bytes, shared by all workers.

        Raises:
            OSError: There is no memory for it.
        """
        self.layout = layout
        self.num_bytes = sum(field.nbytes for field in layout.fields)
        self._forms: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self.fd, shared = memory.create(PAGE + BUFFERS * _stride(layout), "keisei-weights")
        self._arena = _Arena(shared, layout)

    @property
    def version(self) -> int:
        """The newest version; 0 is none."""
        return self._arena.latest

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
        """Copy ``weights``, already checked, into the next buffer and return its version."""
        words = self._arena.words
        version = self._arena.latest + 1
        buffer = version % BUFFERS
        words[_STAMPS + buffer] = 0
        _fence()
        for name, target in self._arena.views[buffer].items():
            source = weights[name]
            target.copy_(source.detach() if source.requires_grad else source)
        _fence()
        words[_STAMPS + buffer] = version
        _fence()
        words[_LATEST] = version
        return version

    def revert(self) -> int:
        """Publish the weights before the newest again, as a new version, which is returned.

        Raises:
            WeightsError: There are none, or a ``publish`` that failed has overwritten them.
        """
        words = self._arena.words
        version = self._arena.latest + 1
        before = version - BUFFERS
        if before < 1 or words[_STAMPS + version % BUFFERS] != before:
            raise WeightsError("there are no weights before the newest ones to go back to")
        words[_STAMPS + version % BUFFERS] = version
        _fence()
        words[_LATEST] = version
        return version

    def newest(self) -> dict[str, torch.Tensor]:
        """Return a copy of the newest weights."""
        views = self._arena.views[self._arena.latest % BUFFERS]
        return {name: view.clone() for name, view in views.items()}

    def close(self) -> None:
        """Give the memory back once the workers have done so too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Spare:
    """Memory for a copy, used again once nothing refers to the copy: fresh pages are slow."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: mmap.mmap | None = None

    def take(self) -> ctypes.Array[Any]:
        """Return a buffer that is the caller's alone as long as anything refers to it."""
        block, self._free = self._free, None
        if block is None:
            block = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    block.madvise(mmap.MADV_HUGEPAGE)
        return memory.part(block, 0, self._nbytes, functools.partial(self._give_back, block))

    def _give_back(self, block: mmap.mmap) -> None:
        if self._nbytes <= _KEPT:
            self._free = block


class WeightsReader:
    """A worker's side."""

    def __init__(self, fd: int, layout: Layout) -> None:
        """Map the memory; takes ``fd`` over."""
        self.layout = layout
        self._arena = _Arena(memory.attach(fd), layout)
        self._views = Views(layout)
        self._spare = _Spare(layout.nbytes)

    @property
    def latest(self) -> int:
        """The newest version; 0 is none. One read of shared memory."""
        return self._arena.latest

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
            version = self._arena.latest
            if not version:
                raise WeightsError("no weights were published yet")
            _fence()
            copy(version % BUFFERS)
            _fence()
            if self._arena.words[_STAMPS + version % BUFFERS] == version:
                return version


class HasStateDict(Protocol):
    """A module, a learner, or anything else that names its tensors."""

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors by name."""
        ...


def tensors_of(source: HasStateDict | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the named tensors of a module or a state dict, without copying.

    Raises:
        WeightsError: It holds something that is not a dense tensor, or nothing.
    """
    state: Mapping[str, Any] = source if isinstance(source, Mapping) else source.state_dict()
    bad = [f"{name} is {flaw}" for name, value in state.items() if (flaw := _flaw(value))]
    if bad:
        raise WeightsError("weights must be dense tensors: " + "; ".join(bad))
    if not state:
        raise WeightsError("weights must hold at least one tensor; this state dict is empty")
    return dict(state)


def _flaw(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__qualname__}"
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        return "a nested, quantized or sparse tensor"
    return "on the meta device and has no values" if value.is_meta else ""

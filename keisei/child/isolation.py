"""What a worker may treat as its own: random generators, torch's threads, event loops.

A process of its own simply has them. Inside the application's process (the inline backend) they
are swapped in around every step of a hook and out again, so that workers draw the same numbers
as they would in processes, and the application's own state is never touched.

In both, a plain hook is called where no event loop is running; see ``loops``.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections.abc import Awaitable, Generator
from typing import Any, Protocol

import torch

from keisei.child import generators
from keisei.child.loops import OutsideTheApplicationsLoop, OutsideTheLoop

if sys.modules.get("numpy") is not None:
    # torch has brought it, but not its generators; seeding would import them in every worker.
    importlib.import_module("numpy.random")


class Isolation(Protocol):
    """A context in which plain hooks are called, and driven coroutines of the others.

    Attributes:
        turn_after: Seconds of collecting after which others in the event loop get their turn.
        is_shared: Others use the event loop too, and may cancel the worker's task in it.
    """

    turn_after: float
    is_shared: bool

    def begin(self, seed: int, threads: int) -> None:
        """Seed the global generators and set torch's threads."""
        ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def drive(self, awaitable: Awaitable[Any]) -> Awaitable[Any]:
        """Return an awaitable whose steps run in the loop, with the worker's generators."""
        ...


class OwnProcess(OutsideTheLoop):
    """The worker has the process to itself."""

    turn_after = 0.005
    """A turn of the loop costs as much as all the rest between two small experiences."""
    is_shared = False

    def begin(self, seed: int, threads: int) -> None:
        """Seed ``random``, NumPy (if imported), torch, and what modules hold; set torch's threads.

        Raises:
            TypeError: A generator of a module cannot be seeded.
        """
        torch.set_num_threads(threads)
        generators.seed(seed)
        _seed(seed)

    def drive(self, awaitable: Awaitable[Any]) -> Awaitable[Any]:
        """Return ``awaitable`` itself."""
        return awaitable


class SharedProcess:
    """The worker shares the process; its state is swapped in for each step of a hook."""

    turn_after = 0.0
    is_shared = True

    def __init__(self) -> None:
        self._generators = _Generators()
        self._outside = OutsideTheApplicationsLoop()

    def begin(self, seed: int, threads: int) -> None:
        """Make the state that a fresh process would have."""
        self._generators.begin(seed, threads)

    def __enter__(self) -> None:
        """Swap the worker's state in."""
        self._generators.__enter__()
        self._outside.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        """Swap the application's state in again."""
        self._outside.__exit__(*exc_info)
        self._generators.__exit__(*exc_info)

    @types.coroutine
    def drive(self, awaitable: Awaitable[Any]) -> Generator[Any, Any, Any]:
        """Run ``awaitable``, swapping generators around each step between two suspensions."""
        steps = awaitable.__await__()
        send: Any = lambda: next(steps)  # noqa: E731 - rebound at each step
        while True:
            try:
                with self._generators:
                    future = send()
            except StopIteration as done:
                return done.value
            try:
                value = yield future
            except BaseException as error:  # noqa: BLE001 - passed on to the hook that waits
                send = _throw(steps, error)
            else:
                send = _send(steps, value)


def _throw(steps: Any, error: BaseException) -> Any:
    return lambda: steps.throw(error)


def _send(steps: Any, value: Any) -> Any:
    return lambda: next(steps) if value is None else steps.send(value)


class _Generators:
    """A context in which the worker's generators and thread count are the process's."""

    def __init__(self) -> None:
        self._mine: _GlobalState | None = None
        self._theirs: _GlobalState | None = None

    def begin(self, seed: int, threads: int) -> None:
        """Make the state that a fresh process would have."""
        theirs = _GlobalState.now()
        torch.set_num_threads(threads)
        _seed(seed)
        self._mine = _GlobalState.now()
        theirs.restore()

    def __enter__(self) -> None:
        self._theirs = _GlobalState.now()
        if self._mine is not None:
            self._mine.restore()

    def __exit__(self, *exc_info: object) -> None:
        self._mine = _GlobalState.now()
        if self._theirs is not None:
            self._theirs.restore()


class _GlobalState:
    """The global generators and thread count of this process, at one moment."""

    def __init__(self, python: Any, torch_rng: torch.Tensor, threads: int, numpy: Any) -> None:
        self._python = python
        self._torch = torch_rng
        self._threads = threads
        self._numpy = numpy

    @classmethod
    def now(cls) -> _GlobalState:
        numpy = sys.modules.get("numpy")
        return cls(
            random.getstate(),
            torch.get_rng_state(),
            torch.get_num_threads(),
            numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)

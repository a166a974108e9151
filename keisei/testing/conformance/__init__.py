"""Checks that anybody's backend can run: it does what it promises.

The promises are those of ``keisei.backends.base.Backend`` and
``keisei.supervision.process.ProcessHandle``.

::

    @pytest.mark.parametrize("check", [*BACKEND_CHECKS, *PROCESS_CHECKS])
    async def test_my_backend_conforms(check):
        await check(MyBackend)

Each check makes a backend of its own, opens it, runs real workers on it, closes it, and holds that
nothing is left: no descriptor, thread, task, process or shared file. Its name and docstring say
what it holds; what does not hold is an ``AssertionError``. Nothing waits for time; a check that
hangs fails at its limit and shows where everybody stands.

``BACKEND_CHECKS`` are for every backend. ``PROCESS_CHECKS`` need workers that are processes of this
machine, which can be sent signals; leave them out where ``pid`` is ``None``. One check takes every
descriptor of this process for a moment, and one aborts whatever start is under way in it. What
happens when the application itself is killed is not checked.

The worker of all checks is ``keisei.testing.puppet.Puppet``; ``FACTORY`` makes it, pickled, for
backends that are told beforehand. The pool in ``check_pool`` is the one under ``ParallelManager``,
which itself knows only our own backends.
"""

from __future__ import annotations

from collections.abc import Callable

from keisei.backends.base import Backend
from keisei.testing.conformance import every_backend, processes
from keisei.testing.conformance.checking import LIMIT, BackendCheck
from keisei.testing.conformance.every_backend import check_abort_of_a_start_that_hangs
from keisei.testing.conformance.stage import FACTORY
from keisei.testing.failpoints import Gate

BACKEND_CHECKS: tuple[BackendCheck, ...] = every_backend.CHECKS
"""For every backend."""

PROCESS_CHECKS: tuple[BackendCheck, ...] = processes.CHECKS
"""For backends whose workers are processes of this machine."""


async def check_backend(
    make_backend: Callable[[], Backend],
    *,
    own_process: bool = True,
    make_hanging: Callable[[Gate], Backend] | None = None,
    limit: float = LIMIT,
) -> None:
    """Run every check, one after the other; the first that fails ends it.

    Args:
        make_backend: Returns a new backend, not opened.
        own_process: Each worker is a process of its own; ``False`` leaves ``PROCESS_CHECKS`` out.
        make_hanging: For ``check_abort_of_a_start_that_hangs``; ``None`` leaves that out.
        limit: Seconds for each check.

    Raises:
        AssertionError: The backend does not do what is held; a note names the check.
    """
    for check in BACKEND_CHECKS + (PROCESS_CHECKS if own_process else ()):
        await check(make_backend, limit=limit)
    if make_hanging is not None:
        await check_abort_of_a_start_that_hangs(make_hanging, limit=limit)


__all__ = [
    "BACKEND_CHECKS",
    "FACTORY",
    "LIMIT",
    "PROCESS_CHECKS",
    "BackendCheck",
    "check_abort_of_a_start_that_hangs",
    "check_backend",
]

"""The first and last thing that runs in a new process; imports nothing heavy."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from keisei.child import surroundings
from keisei.child.process import (
    STDERR,
    Inherited,
    adopt_orphans,
    heed_signals,
    lead_own_group,
    tie_to,
)


def run(data: int, fds: list[int], lifeline: int) -> int:
    """Become the process that ``data``, a file, describes; return its exit code.

    Args:
        data: multiprocessing's preparation data and process object, pickled.
        fds: Descriptors for the process object's code; then the pipe that becomes standard error,
            and the crash file.
        lifeline: The read end of the application's lifeline pipe. To multiprocessing it is the
            parent's sentinel.
    """
    from multiprocessing import spawn

    from keisei.child.tracker import keep_apart

    *own, stderr, crash = fds
    if STDERR not in (data, lifeline, *fds):  # the application has one
        os.dup2(stderr, STDERR)
        os.close(stderr)
    lead_own_group()
    Inherited.lifeline = tie_to(lifeline)
    adopt_orphans()
    heed_signals(crash)
    keep_apart()
    for fd in (lifeline, crash, *own):
        os.set_inheritable(fd, False)
    Inherited.fds = tuple(own)
    try:
        code: int = spawn._main(data, lifeline)  # noqa: SLF001 - what "spawn" itself runs
    except BaseException as error:  # noqa: BLE001 - SystemExit of a main script too
        # Not an error of the worker: importing the main script, or what is to run, has failed.
        from keisei.child.serve import tell_failure

        tell_failure(error)
        return 1
    return code


def run_and_exit(data: int, fds: list[int], lifeline: int) -> NoReturn:
    """Do as ``run`` in a forked process, and end it with its exit code; never returns."""
    from keisei.child.ending import forget_exit_handlers

    forget_exit_handlers()
    _run_and_leave(data, fds, lifeline)


def _run_and_leave(data: int, fds: list[int], lifeline: int) -> NoReturn:
    from keisei.child.ending import leave

    code = 1
    try:
        code = run(data, fds, lifeline)
    except BaseException:  # noqa: BLE001 - there is nobody above to tell
        sys.excepthook(*sys.exc_info())
    finally:
        leave(code)


def main(data: int, report: int, lifeline: int, fds: list[int], told: tuple[Any, ...]) -> None:
    """Run a process in a fresh interpreter: the entry of the start method "spawn".

    The end of ``report``, a pipe that nothing is written to, tells of the end of this process.
    """
    surroundings.take(told, None)
    with surroundings.in_a_folder() as is_gone:
        if is_gone:
            import torch  # noqa: F401 - the worker would, and could not
    os.set_inheritable(report, False)
    _run_and_leave(data, fds, lifeline)

"""The end of a worker's process: exit handlers run, then it leaves at once.

The interpreter is not torn down: that takes longer than all the rest of an orderly end, and native
libraries crash in it.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import weakref
from multiprocessing import util
from typing import Any, NoReturn

from keisei.child import tracker
from keisei.child.process import STDERR, flush

_AFTER_FAILURE = 2.0
"""Seconds that exit handlers have where the slot waits to be filled again."""
_TRACKER_PATIENCE = 1.0


def forget_exit_handlers() -> None:
    """Drop the exit handlers that this process has inherited by a fork.

    They belong to the process that registered them, and so do the files and directories that they
    remove. Those of the standard library that are about each process are registered anew.
    """
    atexit._clear()  # noqa: SLF001 - what multiprocessing does in forked processes since 3.13
    finalize: Any = weakref.finalize
    for inherited in list(finalize._registry):  # noqa: SLF001 - there is no other list of them
        inherited.atexit = False
    # The next finalizer that is made here registers the one handler for all of them again.
    finalize._registered_with_atexit = False  # noqa: SLF001 - it was registered, and is dropped
    atexit.register(logging.shutdown)
    atexit.register(util._exit_function)  # type: ignore[attr-defined]  # noqa: SLF001 - its handler


def leave(code: int) -> NoReturn:
    """Run the exit handlers and end the process.

    After a failure they have two seconds, then their stacks are written and the process ends; at
    an orderly end the application sets the limit.
    """
    try:
        if code:
            faulthandler.dump_traceback_later(_AFTER_FAILURE, exit=True, file=STDERR)
        atexit._run_exitfuncs()  # noqa: SLF001 - what multiprocessing runs since 3.13
        tracker.clean_up(_TRACKER_PATIENCE)
        flush()
    finally:
        os._exit(code)

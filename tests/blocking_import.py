"""A module whose import never ends, except in the application itself."""

from __future__ import annotations

import os
import signal
import sys

from backend_workers import Obedient, take_hold

# The application sets this; its fork server runs with "-c", whatever it inherited.
_APPLICATION = os.environ.get("KEISEI_TEST_APPLICATION", str(os.getpid()))

if str(os.getpid()) != _APPLICATION or sys.argv[0] == "-c":
    if "KEISEI_TEST_FIFO" in os.environ:
        take_hold(os.environ["KEISEI_TEST_FIFO"])
    signal.pause()


class Unreachable(Obedient):
    """A worker that cannot be imported."""

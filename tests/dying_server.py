"""A module whose import has the fork server killed as it is about to tell of a process."""

from __future__ import annotations

import os
import signal
import sys

from keisei.child import forkserver

if sys.argv[0] == "-c":
    forkserver._report = lambda fd, number: os.kill(os.getpid(), signal.SIGKILL)

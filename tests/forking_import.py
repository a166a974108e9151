"""A module whose import forks a process that stays until it is killed."""

from __future__ import annotations

import os
import signal

if os.fork() == 0:
    while True:
        signal.pause()

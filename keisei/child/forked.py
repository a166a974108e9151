"""Processes that user code forks from a worker's: what they must not share with each other."""

from __future__ import annotations

import os

import torch

from keisei.child.isolation import OwnProcess


class ForkedProcess:
    """Tells the process in which it was made from those that were forked from it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def is_here(self) -> bool:
        """Return whether this is a forked process."""
        return os.getpid() != self._pid

    def begin(self, seed: int) -> None:
        """Seed the generators of this process, which others were forked with too."""
        OwnProcess().begin(seed, torch.get_num_threads())

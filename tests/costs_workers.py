"""Workers that count what they do, for the tests of costs; child processes import this module."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch

from keisei.worker import Experience, Worker

FIELDS = 5


class CallCounter:
    """Counts the calls of Python and C functions of this thread while it is on."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.num_python = 0

    def begin(self) -> None:
        self.calls.clear()
        self.num_python = 0
        sys.setprofile(self._on_call)

    def end(self) -> Counter[str]:
        sys.setprofile(None)
        return self.calls

    def _on_call(self, _: FrameType, event: str, what: Any) -> None:
        if event == "call":
            self.num_python += 1
        elif event == "c_call":
            self.calls[getattr(what, "__qualname__", "")] += 1


class Counted(Worker):
    """Collects small tensors; "begin" and "end" count what it does between the two."""

    def __init__(self) -> None:
        self.counter = CallCounter()
        self.data = {f"field {number}": torch.zeros(128) for number in range(FIELDS)}
        self.collected = 0

    def collect(self) -> Experience:
        self.collected += 1
        return Experience(self.data, num_steps=128)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        pass

    def on_command(self, command: str, data: Any) -> Any:
        if command == "begin":
            self.collected = 0
            self.counter.begin()
            return None
        if command == "end":
            return self.counter.end(), self.counter.num_python, self.collected
        return super().on_command(command, data)


class Steady(Counted):
    """Takes a millisecond of computing for each experience."""

    def collect(self) -> Experience:
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass
        return super().collect()

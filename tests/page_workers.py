"""The workers of the applications whose page is tested; child processes import this module."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

from keisei.worker import Experience, Worker, WorkerContext


class Paced(Worker):
    """Delivers 16 steps every few milliseconds, until it is told to fail.

    Args:
        seconds: How long a ``collect`` takes.
    """

    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds
        self.failure = ""

    def setup(self, context: WorkerContext) -> None:
        self.model = torch.nn.Linear(2, 1, bias=False)

    def collect(self) -> Experience:
        if self.failure:
            print(self.failure, "on standard error", file=sys.stderr, flush=True)  # noqa: T201
            raise RuntimeError(self.failure)
        threading.Event().wait(self.seconds)
        return Experience({"x": torch.zeros(16)}, info={"episode_returns": [1.0, 3.0]})

    def on_command(self, command: str, data: Any) -> Any:
        if command == "fail":
            self.failure = data
            return None
        return super().on_command(command, data)

"""The worker that the conformance checks command, and what they have it do."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from typing import Any

import torch

from keisei.testing.failpoints import Gate
from keisei.worker import Worker, WorkerContext


class Puppet(Worker):
    """Calls what it is told to; collects its id, a count, and the weights that it has."""

    def setup(self, context: WorkerContext) -> None:
        """Begin to count at 0."""
        self._worker_id = context.worker_id
        self._number = 0
        self._weights: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:  # noqa: ARG002 - the batch tells the version
        """Keep them."""
        self._weights = dict(weights)

    def collect(self) -> dict[str, torch.Tensor]:
        """Count, and tell."""
        self._number += 1
        counted = torch.tensor([self._worker_id, self._number])
        return {"counted": counted, **self._weights}

    def on_command(self, command: str, data: Any) -> Any:
        """Call a function, given with its arguments, and answer what it returns."""
        if command != "call":
            return super().on_command(command, data)
        function, *args = data
        return function(*args)


def stand_here(gate: Gate) -> str:
    """Stand at a gate, in a function that the stacks show."""
    gate.hold("a worker")
    return "stood there"


def leave_a_child(gate: Gate) -> int:
    """Start a process that holds all that this one holds and stands at a gate; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            gate.hold("a child")
        finally:
            os._exit(0)
    return pid


def crash_here() -> None:
    """Read from address 0, in a function that the native stack shows."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)

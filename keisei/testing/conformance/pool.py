"""A whole pool on a backend, with exact values: the last of the conformance checks."""

from __future__ import annotations

import itertools
import operator
import signal
from typing import Any

import torch

from keisei.backends.base import Backend
from keisei.config import ParallelConfig, RestartPolicy
from keisei.events import WorkerReady
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.supervision.process import ProcessHandle
from keisei.testing.conformance.checking import require_equal
from keisei.testing.puppet import Puppet
from keisei.testing.scenarios import next_event
from keisei.training.parallel.parallel_manager import ParallelManager

_LONG = 600.0


async def run_pool(backend: Backend) -> None:
    """Run a pool of two puppets in rounds; end one of them on the way.

    Raises:
        AssertionError: A batch, a reply, an incident or an id is not what it must be.
    """
    recording = _Recording(backend)
    manager = ParallelManager(Puppet, config=_config(), backend=recording)
    events = manager.events()
    async with manager:
        for _ in range(2):
            await next_event(events, WorkerReady)
        await _hold_commands(manager)
        await manager.push_weights({"weight": torch.full((2, 3), 0.5)})
        require_equal(await _round(manager), _expected(1, (0, 1), (0, 1), 0.5), "the first round")
        await manager.push_weights({"weight": torch.full((2, 3), 0.25)}, wait=True)
        require_equal(await _round(manager), _expected(2, (0, 2), (0, 2), 0.25), "the second round")
        recording.handles[0].kill()  # of worker 0: it was asked for first
        ready = await next_event(events, WorkerReady)
        require_equal((ready.worker_id, ready.incarnation), (0, 1), "who is ready after a kill")
        require_equal(
            [(one.worker_id, one.incarnation, one.exitcode) for one in manager.incidents],
            [(0, 0, -signal.SIGKILL)],
            "the incidents after one kill",
        )
        await _hold_commands(manager)
        require_equal(
            await _round(manager), _expected(2, (1, 1), (0, 3), 0.25), "the round after the restart"
        )


class _Recording:
    """The backend itself, and the processes that it started, in the order of the asking."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._asked = itertools.count()
        self.handles: dict[int, ProcessHandle] = {}
        self.open = backend.open
        self.abort_starts = backend.abort_starts
        self.aclose = backend.aclose

    async def start(self, endpoints: WorkerEndpoints, name: str) -> ProcessHandle:
        number = next(self._asked)
        self.handles[number] = handle = await self._backend.start(endpoints, name)
        return handle


def _config() -> ParallelConfig:
    return ParallelConfig(
        num_workers=2,
        mode="sync",
        start_timeout=_LONG,
        command_timeout=_LONG,
        collect_timeout=_LONG,
        shutdown_timeout=_LONG,
        restart=RestartPolicy(backoff_base=0.0, backoff_cap=0.0),
    )


async def _hold_commands(manager: ParallelManager) -> None:
    replies = await manager.send_command("call", (operator.mul, 6, 7))
    require_equal(replies, {0: 42, 1: 42}, "the replies to a command")


async def _round(manager: ParallelManager) -> list[dict[str, Any]]:
    """Return what one round has brought, as plain values."""
    return [
        {
            "who": (batch.worker_id, batch.incarnation, batch.sequence),
            "version": batch.weights_version,
            "data": {name: tensor.tolist() for name, tensor in batch.data.items()},
        }
        for batch in await manager.collect()
    ]


def _expected(
    version: int, first: tuple[int, int], second: tuple[int, int], weight: float
) -> list[dict[str, Any]]:
    """Return a round as it must be; of each worker its incarnation and the number of its batch."""
    return [
        {
            "who": (worker_id, incarnation, number - 1),
            "version": version,
            "data": {"counted": [worker_id, number], "weight": [[weight] * 3] * 2},
        }
        for worker_id, (incarnation, number) in enumerate((first, second))
    ]

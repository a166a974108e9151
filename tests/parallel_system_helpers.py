"""Learners, workers and processes of ``test_parallel_system.py``.

What goes to child processes must stand in a module that they can import, which a test module is
not where the installed package is tested.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch

from keisei.backends.local import LocalBackend
from keisei.protocol import messages
from keisei.supervision.process import ProcessHandle
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.communication import WorkerCommunicator
from keisei.training.parallel.factory import pickle_factory
from pool_workers import Modelled


def a_model() -> torch.nn.Module:
    """Return the model that workers and learners of these tests have."""
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def a_line() -> torch.nn.Module:
    """Return a model of one weight and one bias."""
    return torch.nn.Linear(1, 1)


class ModelledBy(Modelled):
    """Delivers the state dict of ``a_model``."""

    def __init__(self) -> None:
        super().__init__(a_model)


class LinearWorker(Modelled):
    """Delivers the weight of a small linear model, as one step."""

    def __init__(self) -> None:
        super().__init__(lambda: torch.nn.Linear(2, 1, bias=False))


class RecordingLearner:
    """Adds one to every weight with each update and keeps what it was given."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.updates: list[list[ExperienceBatch]] = []

    def learn(self, batches: list[ExperienceBatch]) -> dict[str, float]:
        self.updates.append([batch.clone() for batch in batches])
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1)
        return {"updates": float(len(self.updates))}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


class Processes:
    """Real processes on the endpoints of a communicator's slots, without a manager."""

    def __init__(self, communicator: WorkerCommunicator, worker: Callable[[], Any]) -> None:
        self._communicator = communicator
        self._factory = pickle_factory(worker)
        self.backend = LocalBackend(
            self._factory, start_method="forkserver", preload=None, max_concurrent_starts=2
        )
        self.handles: list[ProcessHandle] = []

    async def start(self, worker_id: int) -> ProcessHandle:
        """Start a process on the present queues of a slot."""
        endpoints = self._communicator.endpoints(worker_id)
        line = self._communicator.lines[worker_id]
        line.send(hello(self._factory, worker_id, line.incarnation, self._communicator))
        handle = await self.backend.start(endpoints, f"worker-{worker_id}.{line.incarnation}")
        self.handles.append(handle)
        return handle


@asynccontextmanager
async def worker_processes(
    communicator: WorkerCommunicator, worker: Callable[[], Any]
) -> AsyncIterator[Processes]:
    """Run a process in each slot of a communicator."""
    processes = Processes(communicator, worker)
    await processes.backend.open()
    try:
        for worker_id in range(communicator.num_workers):
            await processes.start(worker_id)
        yield processes
    finally:
        for handle in processes.handles:
            handle.kill()
        await asyncio.gather(*(handle.wait() for handle in processes.handles))
        for handle in processes.handles:
            handle.close()
        await communicator.cleanup()
        await processes.backend.aclose()


def hello(
    factory: bytes, worker_id: int, incarnation: int, communicator: WorkerCommunicator
) -> messages.Hello:
    """Say what a manager would say first."""
    return messages.Hello(
        factory=factory,
        worker_id=worker_id,
        incarnation=incarnation,
        num_workers=communicator.num_workers,
        seed=worker_id,
        device="cpu",
        weights_version=communicator.weights_version,
        threads=1,
        cells=communicator.max_queue_size,
        paused=False,
        max_experiences=None,
        max_rss=None,
    )

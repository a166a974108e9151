"""A supervised pool of worker processes for reinforcement learning, inside an asyncio program.

The public names are imported on first use: a worker's module that needs ``keisei.worker`` alone
pays for neither torch nor the pool.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if os.name != "posix":
    raise ImportError(
        "keisei needs a POSIX system: its pool rests on process groups, signals and the passing "
        "of file descriptors. On Windows use WSL 2."
    )

if TYPE_CHECKING:
    from keisei.backends.local import warm_fork_server
    from keisei.config import ParallelConfig, RestartPolicy
    from keisei.events import Incident
    from keisei.exceptions import (
        CollectTimeout,
        CommandError,
        CommandTimeout,
        ConfigurationError,
        KeiseiError,
        LearnerTimeout,
        ManagerStateError,
        PoisonedWeights,
        PoolExhausted,
        QueueBroken,
        QueueClosed,
        QueueEnded,
        QueueError,
        QueueTimeout,
        QueueWouldBlock,
        SerializationError,
        WeightsError,
        WorkerError,
        WorkerLost,
        WorkerStartError,
    )
    from keisei.ipc.queues import AsyncQueue
    from keisei.training.parallel.batch import ExperienceBatch
    from keisei.training.parallel.communication import WorkerCommunicator
    from keisei.training.parallel.evaluation import Evaluation
    from keisei.training.parallel.model_sync import ModelSynchronizer
    from keisei.training.parallel.parallel_manager import ParallelManager
    from keisei.training.parallel.run import Learner, RunReport
    from keisei.worker import Experience, Weights, Worker, WorkerContext

__version__ = "0.1.0"

__all__ = [
    "AsyncQueue",
    "CollectTimeout",
    "CommandError",
    "CommandTimeout",
    "ConfigurationError",
    "Evaluation",
    "Experience",
    "ExperienceBatch",
    "Incident",
    "KeiseiError",
    "Learner",
    "LearnerTimeout",
    "ManagerStateError",
    "ModelSynchronizer",
    "ParallelConfig",
    "ParallelManager",
    "PoisonedWeights",
    "PoolExhausted",
    "QueueBroken",
    "QueueClosed",
    "QueueEnded",
    "QueueError",
    "QueueTimeout",
    "QueueWouldBlock",
    "RestartPolicy",
    "RunReport",
    "SerializationError",
    "Weights",
    "WeightsError",
    "Worker",
    "WorkerCommunicator",
    "WorkerContext",
    "WorkerError",
    "WorkerLost",
    "WorkerStartError",
    "warm_fork_server",
]

_HOMES = {
    "AsyncQueue": "keisei.ipc.queues",
    "Evaluation": "keisei.training.parallel.evaluation",
    "Experience": "keisei.worker",
    "ExperienceBatch": "keisei.training.parallel.batch",
    "Incident": "keisei.events",
    "Learner": "keisei.training.parallel.run",
    "ModelSynchronizer": "keisei.training.parallel.model_sync",
    "ParallelConfig": "keisei.config",
    "ParallelManager": "keisei.training.parallel.parallel_manager",
    "RestartPolicy": "keisei.config",
    "RunReport": "keisei.training.parallel.run",
    "Weights": "keisei.worker",
    "Worker": "keisei.worker",
    "WorkerCommunicator": "keisei.training.parallel.communication",
    "WorkerContext": "keisei.worker",
    "warm_fork_server": "keisei.backends.local",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module; all that have no home of their own are errors."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "keisei.exceptions")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Never run: what users write against the public names, for mypy to check strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, assert_type

import torch

from keisei import (
    Experience,
    ExperienceBatch,
    Incident,
    Learner,
    ModelSynchronizer,
    ParallelConfig,
    ParallelManager,
    RestartPolicy,
    RunReport,
    Worker,
    WorkerContext,
)
from keisei.events import Event, PoolStarted, WorkerIncident
from keisei.observers import Observer, ObserverSet
from keisei.observers.log import LogObserver
from keisei.observers.page import PoolPage, pool_page
from keisei.observers.progress import RichProgress


class PlainWorker(Worker):
    """Every hook as a plain function."""

    def __init__(self, size: int = 4) -> None:
        self.size = size

    def setup(self, context: WorkerContext) -> None:
        torch.manual_seed(context.seed)
        self.model = torch.nn.Linear(self.size, 1).to(context.device)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        super().load_weights(weights, version)

    def collect(self) -> Experience:
        return Experience({"x": torch.zeros(self.size)}, info={"lucky": True}, num_steps=1)

    def reset(self) -> None: ...

    def on_command(self, command: str, data: Any) -> str:
        return f"{command}: {data}"

    def teardown(self) -> None: ...


class CoroutineWorker(Worker):
    """Every hook as a coroutine, and a plain mapping as the experience."""

    async def setup(self, context: WorkerContext) -> None:
        context.progress()

    async def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None: ...

    async def collect(self) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(1)}

    async def reset(self) -> None: ...

    async def on_command(self, command: str, data: Any) -> int:
        return len(command)

    async def teardown(self) -> None: ...


class PlainLearner:
    """Learns in a thread, and returns metrics."""

    def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, float]:
        for batch in batches:
            assert_type(batch.data["x"], torch.Tensor)
            assert_type(batch.num_steps, int)
            assert_type(batch.worker_id, int)
            assert_type(batch.incarnation, int)
            assert_type(batch.sequence, int)
            assert_type(batch.weights_version, int)
            assert_type(batch.staleness, int)
            batch.release()
        return {"loss": 0.0}

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return {}


class CoroutineLearner:
    """Learns on the event loop, and returns nothing."""

    async def learn(self, batches: Sequence[ExperienceBatch]) -> None: ...

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return {}


class AllCoroutineLearner:
    """Learns and gives its weights on the event loop."""

    async def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, Any]:
        return {"loss": torch.zeros(1), "note": "text"}

    async def state_dict(self) -> Mapping[str, torch.Tensor]:
        return {}


class Counting:
    """An observer of the user's own."""

    def __init__(self) -> None:
        self.incidents: list[Incident] = []

    def on_event(self, event: Event) -> None:
        match event:
            case PoolStarted():
                assert_type(event.num_workers, int)
            case WorkerIncident():
                self.incidents.append(event.incident)
            case _:
                pass


def values() -> None:
    """Configurations are typed by field."""
    config = ParallelConfig(num_workers=2, mode="sync", restart=RestartPolicy(max_restarts=3))
    assert_type(config.restart.max_restarts, int)
    ParallelConfig(mode="asynch")  # type: ignore[arg-type]
    ParallelConfig(num_worker=2)  # type: ignore[call-arg]
    config.num_workers = 3  # type: ignore[misc]
    assert_type(ParallelConfig.of({"num_workers": 2}), ParallelConfig)


def roles() -> None:
    """Learners and observers are recognised by their methods alone."""
    learners: list[Learner] = [PlainLearner(), CoroutineLearner(), AllCoroutineLearner()]
    observers: list[Observer] = [Counting(), LogObserver(), RichProgress(), ObserverSet()]
    manager = ParallelManager(
        partial(PlainWorker, size=8), learner=learners[0], observers=observers, config={"seed": 1}
    )
    ParallelManager(CoroutineWorker, model=torch.nn.Linear(1, 1), config=ParallelConfig())
    assert_type(manager.is_healthy, bool)
    assert_type(manager.incidents, Sequence[Incident])


def synchronizer(model: torch.nn.Module) -> None:
    """Snapshots are values with typed metadata."""
    prepared = ModelSynchronizer(compression_enabled=True).prepare_model_for_sync(model)
    assert_type(prepared.metadata.ratio, float)
    assert_type(prepared.metadata.version, int)


async def pool(manager: ParallelManager, model: torch.nn.Module) -> None:
    """The manager's calls have precise results."""
    async with manager:
        async for batch in manager.experiences():
            assert_type(batch, ExperienceBatch)
            assert_type(batch["rewards"], torch.Tensor)
            assert_type(batch["next", "rewards"], torch.Tensor)
            assert_type(ExperienceBatch.cat([batch, batch], dim=1), ExperienceBatch)
            assert_type(batch.to("cuda", non_blocking=True).pin_memory(), ExperienceBatch)
        assert_type(await manager.collect(min_steps=64, timeout=30), list[ExperienceBatch])
        assert_type(await manager.push_weights(model, wait=True, timeout=1.0), int)
        assert_type(await manager.push_weights(model.state_dict()), int)
        assert_type(await manager.send_command("ping", {"a": 1}, worker_ids=[0]), dict[int, Any])
        assert_type(await manager.configure({"level": 1}, [0]), int)
        assert_type(manager.settings_of(0), dict[str, Any])
        await manager.pause()
        await manager.resume()
        await manager.reset()
        await manager.scale(4)
        await manager.restart(0)
        async for event in manager.events():
            assert_type(event, Event)
    report = await manager.run(max_steps=1000, max_seconds=60)
    assert_type(report, RunReport)
    assert_type(report.metrics, Mapping[str, Any])
    manager.request_stop()


def pages(manager: ParallelManager) -> None:
    """A manager is what the page shows; the hook may be a coroutine function."""

    async def authorize(scope: Any, action: str) -> bool:
        return action == "pause"

    assert_type(pool_page(manager), PoolPage)
    assert_type(pool_page(manager, authorize=authorize, interval=1.0), PoolPage)
    pool_page(manager, authorize=lambda scope, action: False)

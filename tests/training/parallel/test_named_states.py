"""Any order of pushes, drops, kills and changes of size: every batch has exactly what was there."""

from __future__ import annotations

import asyncio
import errno
import resource
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keisei import ParallelManager
from keisei.events import WorkerReady
from keisei.testing.scenarios import fail_after, next_event
from named_workers import Several, weights
from pool_workers import descriptors

NAMES = ("main", "a", "b")
STEPS = st.one_of(
    st.tuples(st.just("push"), st.sampled_from((*NAMES, "unused"))),
    st.tuples(st.just("drop"), st.sampled_from(NAMES)),
    st.tuples(st.just("kill"), st.integers(0, 2)),
    st.tuples(st.just("scale"), st.integers(1, 3)),
    st.tuples(st.just("collect"), st.just(0)),
)


class Played:
    """A pool, and what every batch must say by what was done to it."""

    def __init__(self, manager: ParallelManager) -> None:
        self.manager = manager
        self.events = manager.events()
        self.count = 0
        self.versions = dict.fromkeys((*NAMES, "unused"), 0)
        self.there: dict[str, tuple[int, int]] = {}
        self.held: list[dict[str, tuple[int, int]]] = [{}, {}]

    async def push(self, name: str) -> None:
        self.count += 1
        self.versions[name] += 1
        version = await self.manager.push_weights(weights(self.count), name, wait=True)
        assert version == self.versions[name]
        self.there[name] = (version, self.count)
        if name in NAMES:
            for held in self.held:
                held[name] = self.there[name]

    async def drop(self, name: str) -> None:
        if name in self.there:
            del self.there[name]
            self.manager.drop_weights(name)

    async def kill(self, worker_id: int) -> None:
        if worker_id < len(self.held):
            running = self.manager._pool.supervisor.running(worker_id)
            running.handle.kill()
            await next_event(
                self.events,
                WorkerReady,
                lambda event: (
                    (event.worker_id, event.incarnation) == (worker_id, running.number + 1)
                ),
            )
            self.held[worker_id] = self.fresh()

    async def scale(self, num_workers: int) -> None:
        await self.manager.scale(num_workers)
        self.held = self.held[:num_workers]
        self.held += [self.fresh() for _ in range(num_workers - len(self.held))]

    def fresh(self) -> dict[str, tuple[int, int]]:
        return {name: held for name, held in self.there.items() if name in NAMES}

    async def collect(self, _: int = 0) -> None:
        batches = await self.manager.collect()
        assert [batch.worker_id for batch in batches] == list(range(len(self.held)))
        for batch, held in zip(batches, self.held, strict=True):
            assert batch.weights_versions == {name: version for name, (version, _) in held.items()}
            assert batch.weights_version == held.get("main", (0, 0))[0]
            for name in NAMES:
                value = held.get(name, (0, 0))[1]
                assert batch.data[f"model {name}"].tolist() == [value] * 3
        assert self.manager.weights_versions == {
            name: version for name, (version, _) in self.there.items()
        }


async def play(steps: list[tuple[str, object]], backend: str) -> None:
    config = {
        "backend": backend,
        "mode": "sync",
        "restart": {"max_restarts": 1000, "backoff_base": 0.0, "backoff_cap": 0.0},
    }
    manager = ParallelManager(partial(Several, NAMES), config=config)
    async with fail_after(60), manager:
        played = Played(manager)
        for what, argument in steps:
            await getattr(played, what)(argument)
        await played.collect()


@settings(max_examples=40)
@given(st.lists(STEPS, max_size=25))
def test_any_order_of_changes_leaves_every_batch_exact(steps):
    """On the inline backend, where many orders are cheap."""
    asyncio.run(play(steps, "inline"))


@pytest.mark.usefixtures("_warm_fork_server")
@settings(max_examples=5)
@given(st.lists(STEPS, min_size=10, max_size=20))
def test_any_order_of_changes_leaves_every_batch_exact_in_processes(steps):
    """The same with real processes and real kills."""
    asyncio.run(play(steps, "local"))


async def test_no_descriptors_left_is_an_error_of_the_push(make_manager):
    """It says what helps; nothing was published, and what is dropped makes room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with fail_after(60), make_manager(Several, num_workers=1) as manager:
        await manager.push_weights(weights(1), wait=True)
        await manager.pause()
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 20, hard))
        try:
            with pytest.raises(OSError, match=r"Too many open files") as caught:
                await push_many(manager, 40)
            number = len(manager.weights_versions) - 1
            assert 10 < number < 25
            assert caught.value.errno == errno.EMFILE
            assert "manager.drop_weights" in " ".join(caught.value.__notes__)
            assert list(manager.weights_versions)[1:] == [f"past/{n}" for n in range(number)]
            assert await manager.push_weights(weights(2)) == 2
            for name in ("past/0", "past/1", "past/2"):
                manager.drop_weights(name)
            assert await manager.push_weights(weights(2), f"past/{number}") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def push_many(manager, number):
    for each in range(number):
        await manager.push_weights(weights(1), f"past/{each}")


async def test_workers_keep_no_descriptor_of_a_name(make_manager):
    """However many names there are, and the application keeps one of each."""
    async with fail_after(60), make_manager(Several, num_workers=1) as manager:
        await manager.push_weights(weights(1), "past/0", wait=True)
        await manager.pause()
        before = descriptors(), await manager.send_command("descriptors")
        for number in range(1, 101):
            await manager.push_weights(weights(1), f"past/{number}")
        await manager.push_weights(weights(1), "past/100", wait=True)
        assert (descriptors() - 100, await manager.send_command("descriptors")) == before

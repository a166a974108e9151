"""Fixtures for all tests: a shared configuration, managers, warm processes, isolation."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

import pool_workers
import refusal
from keisei.backends.local import warm_fork_server
from keisei.protocol import coalescer
from keisei.training.parallel.parallel_manager import ParallelManager

pytest_plugins = ["keisei.testing.pytest_plugin"]

if refusal.VARIABLE in os.environ:
    refusal.put_in_force()  # before any call is tried, or any process started

# A starved machine makes any example slow.
settings.register_profile("keisei", deadline=None)
settings.load_profile("keisei")

_ARGUMENTS = {"model", "models", "learner", "observers", "settings"}


@pytest.fixture(autouse=True)
def _isolation(request: pytest.FixtureRequest, no_leaks: None) -> None:
    """Hold after every test: no process, descriptor, thread, task or shared file is left."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("_no_task_left")


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    """Look into the test's loop; its tasks are gone when ``no_leaks`` looks, cancelled with it."""
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        pytest.fail("\n  - ".join(["unfinished tasks:", *map(repr, left)]), pytrace=False)


@pytest.fixture(scope="session")
def _warm_fork_server() -> Iterator[None]:
    """Keep one fork server for the whole session, so that each manager starts in milliseconds."""

    async def start_once() -> None:
        async with ParallelManager(pool_workers.Counting, config={"num_workers": 1}):
            pass

    with warm_fork_server():
        asyncio.run(start_once())
        gc.collect()
        gc.freeze()  # what was imported stays; the leak check need not go through it every time
        yield
    gc.unfreeze()


@pytest.fixture
def parallel_config() -> dict[str, Any]:
    """Return what the tests' pools start from: two workers, and limits that no test waits for."""
    return {
        "num_workers": 2,
        "seed": 7,
        "start_timeout": 60.0,
        "command_timeout": 60.0,
        "collect_timeout": 60.0,
        "shutdown_timeout": 10.0,
        "restart": {"backoff_base": 0.0, "backoff_cap": 0.0},
    }


@pytest.fixture
def make_manager(
    _warm_fork_server: None, parallel_config: dict[str, Any]
) -> Callable[..., ParallelManager]:
    """Return a maker of managers, to be opened in the body of the test and so in its task."""

    def make(worker: Any, **arguments: Any) -> ParallelManager:
        own = {name: arguments.pop(name) for name in _ARGUMENTS & arguments.keys()}
        return ParallelManager(worker, config={**parallel_config, **arguments}, **own)

    return make


@pytest.fixture
def force_rests(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what has every queue of experiences rest for so many seconds after each look.

    A reader rests by itself only where a worker with much work delivers fast. The forced rests
    come as soon as a worker has more to deliver; what is longer than a test ends with its pool.
    """

    def force(seconds: float) -> None:
        def always(_: object, now: float, count: int, outstanding: int) -> float | None:
            return now + seconds if count and outstanding else None

        monkeypatch.setattr(coalescer.Coalescer, "next_look", always)

    return force

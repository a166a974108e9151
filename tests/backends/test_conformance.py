"""Our own backends pass the checks that are there for everybody's."""

from __future__ import annotations

import asyncio
import functools
import pickle
from collections.abc import Callable, Iterator

import pytest

from backend_workers import Obedient
from keisei.backends.base import Backend
from keisei.backends.forkserver import server
from keisei.backends.inline import InlineBackend
from keisei.backends.local import LocalBackend
from keisei.testing import conformance
from keisei.testing.conformance import BACKEND_CHECKS, PROCESS_CHECKS, BackendCheck
from keisei.testing.failpoints import Gate
from keisei.training.parallel.parallel_manager import ParallelManager


def local_backend(start_method: str, preload: tuple[str, ...] | None = None) -> LocalBackend:
    return LocalBackend(
        conformance.FACTORY, start_method=start_method, preload=preload, max_concurrent_starts=2
    )


MAKERS: dict[str, Callable[[], Backend]] = {
    "forkserver": functools.partial(local_backend, "forkserver"),
    "spawn": functools.partial(local_backend, "spawn"),
    "inline": InlineBackend,
}
BY_SPAWN = ("check_orderly_end", "check_pool", "check_start_that_fails", "check_stacks")
"""What is checked of each fresh interpreter in every run; the rest takes its time under stress."""


def marks(name: str, check: BackendCheck) -> list[pytest.MarkDecorator]:
    return [pytest.mark.stress] if name == "spawn" and check.__name__ not in BY_SPAWN else []


CASES = [
    pytest.param(maker, check, id=f"{name}-{check.__name__}", marks=marks(name, check))
    for name, maker in MAKERS.items()
    for check in BACKEND_CHECKS + (() if name == "inline" else PROCESS_CHECKS)
]


@pytest.fixture(autouse=True)
def _warm_again(_warm_fork_server: None) -> Iterator[None]:
    """Have the fork server that all tests share run again, where a check has aborted it."""
    yield
    if server.pid is None:
        asyncio.run(run_once())
        assert server.pid is not None


async def run_once() -> None:
    async with ParallelManager(Obedient, config={"num_workers": 1}):
        pass


@pytest.mark.parametrize(("maker", "check"), CASES)
async def test_our_backends_conform(maker: Callable[[], Backend], check: BackendCheck):
    """What is promised of a backend holds for this one."""
    await check(maker)


async def test_a_fork_server_that_hangs_is_aborted(monkeypatch):
    """The import of a preloaded module that does not end holds no start up for ever."""

    def make(gate: Gate) -> Backend:
        server.abort()  # the next one inherits the address
        monkeypatch.setenv("KEISEI_TEST_GATE", pickle.dumps(gate).hex())
        return local_backend("forkserver", preload=("held_import",))

    await conformance.check_abort_of_a_start_that_hangs(make)

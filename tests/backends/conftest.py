"""Fixtures for the tests of the backends."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(params=["forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Run the test under each start method."""
    return request.param


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Return the path of a named pipe and its reading end."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield str(path), fd
    os.close(fd)


async def wait_for_end_of(fd: int, limit: float = 2.0) -> None:
    """Wait until no process holds the writing end of a pipe any more."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(limit):
            while True:
                readable.clear()
                await readable.wait()
                with contextlib.suppress(BlockingIOError):
                    if not os.read(fd, 100):
                        return
    finally:
        loop.remove_reader(fd)

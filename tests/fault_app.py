"""An application that ends in many ways: ``python -m fault_app`` with one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from functools import partial
from typing import Any

from fault_workers import Tethered
from keisei.training.parallel.parallel_manager import ParallelManager

ENDS = {
    "os._exit": lambda: os._exit(7),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "fall off": lambda: None,
    "raise": lambda: 1 / 0,
    "sys.exit": sys.exit,
}


async def main(address: str, states: list[str], start_method: str, end: str) -> None:
    """Start a pool, say so, and end when the standard input does."""
    config: dict[str, Any] = {
        "num_workers": len(states),
        "start_method": start_method,
        "max_queue_size": 1,
        "shutdown_timeout": 1.0,
    }
    manager = ParallelManager(partial(Tethered, address, states), config=config)
    loop = asyncio.get_running_loop()
    if end == "with":
        async with manager:
            await asyncio.Event().wait()
    if end == "handler":
        with_handlers(loop, manager)
        async with manager:
            async for _ in manager.experiences():
                pass
        sys.stdout.write("clean")
        return
    told = asyncio.Event()
    loop.add_reader(0, told.set)
    starting = asyncio.create_task(manager.start())
    await told.wait()
    loop.remove_reader(0)
    ENDS[end]()
    if starting.done():
        starting.result()


def with_handlers(loop: asyncio.AbstractEventLoop, manager: ParallelManager) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, manager.request_stop)


if __name__ == "__main__":
    # A shell ignores it for what it starts in the background, such as a run of the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(main(**json.loads(sys.argv[1])))

"""Collect from an environment that is a slow service, many episodes at a time.

The program starts the service itself: an asyncio server on the loopback interface that takes
``latency`` seconds for each step, as a language model or a remote simulator would. Each worker
process plays many episodes concurrently, because its ``collect`` is a coroutine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from functools import partial

from async_environment_worker import ServiceWorker

from keisei import ParallelManager


@dataclass(frozen=True)
class Settings:
    """What the program is told."""

    num_workers: int = 2
    num_episodes: int = 32
    length: int = 20
    latency: float = 0.02
    batches: int = 8


async def serve(latency: float) -> asyncio.Server:
    """Be the slow environment: each line is a step, each answer takes ``latency`` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Episodes that are under way when the pool stops are cut off.
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                await asyncio.sleep(latency)
                reward = json.loads(line)["step"] % 2
                writer.write(json.dumps({"reward": float(reward)}).encode() + b"\n")
                await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


async def main(settings: Settings) -> None:
    """Collect some batches and tell what the concurrency was worth."""
    async with await serve(settings.latency) as server:
        port = server.sockets[0].getsockname()[1]
        worker = partial(ServiceWorker, port, settings.num_episodes, settings.length)
        config = {"num_workers": settings.num_workers, "collect_timeout": 30}
        steps = batches = 0
        async with ParallelManager(worker, config=config) as manager:
            began = time.monotonic()
            async for batch in manager.experiences():
                steps += batch.num_steps
                batches += 1
                if batches == settings.batches:
                    break
            seconds = time.monotonic() - began
            replies = await manager.send_command("hello")
    one_by_one = steps * settings.latency
    print(f"{steps} steps of {1e3 * settings.latency:.0f} ms each in {seconds:.1f} s")
    print(f"one after the other they take {one_by_one:.1f} s: {one_by_one / seconds:.0f} at a time")
    print(f"commands are answered beside the episodes: {replies}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a run of a second")
    smoke = parser.parse_args().smoke
    asyncio.run(main(Settings(num_episodes=4, length=3, batches=2) if smoke else Settings()))

"""Collect from an environment that is a slow service, many episodes at a time.

The program starts the service itself: a server on the loopback interface that takes
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

import anyio
from anyio.abc import SocketAttribute, SocketStream, TaskStatus
from anyio.streams.buffered import BufferedByteReceiveStream
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


async def serve(latency: float, *, task_status: TaskStatus[int]) -> None:
    """Be the slow environment: each line is a step, each answer takes ``latency`` seconds."""

    async def answer(stream: SocketStream) -> None:
        # Episodes that are under way when the pool stops are cut off.
        with contextlib.suppress(
            anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError
        ):
            async with stream:
                lines = BufferedByteReceiveStream(stream)
                while True:
                    step = json.loads(await lines.receive_until(b"\n", 1024))["step"]
                    await anyio.sleep(latency)
                    await stream.send(json.dumps({"reward": float(step % 2)}).encode() + b"\n")

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        task_status.started(listener.extra(SocketAttribute.local_port))  # noqa: S610 - no Django
        await listener.serve(answer)


async def main(settings: Settings) -> None:
    """Collect some batches and tell what the concurrency was worth."""
    async with anyio.create_task_group() as service:
        port = await service.start(serve, settings.latency)
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
        service.cancel_scope.cancel()
    one_by_one = steps * settings.latency
    print(f"{steps} steps of {1e3 * settings.latency:.0f} ms each in {seconds:.1f} s")
    print(f"one after the other they take {one_by_one:.1f} s: {one_by_one / seconds:.0f} at a time")
    print(f"commands are answered beside the episodes: {replies}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a run of a second")
    smoke = parser.parse_args().smoke
    asyncio.run(main(Settings(num_episodes=4, length=3, batches=2) if smoke else Settings()))

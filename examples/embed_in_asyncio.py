"""Train inside an asyncio application that goes on answering requests.

Beside ``manager.run()`` the application serves its status over TCP, asks itself for it, and
measures how late its own timers are. At the end it prints how responsive it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass

import torch
from quickstart import Reinforce
from quickstart_worker import BanditWorker

from keisei import ParallelManager


@dataclass(frozen=True)
class Settings:
    """What the application is told."""

    max_steps: int = 200_000
    num_workers: int = 2
    tick: float = 0.005


async def serve_status(manager: ParallelManager) -> asyncio.Server:
    """Answer every connection with the pool's numbers as one line of JSON."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stats = manager.stats()
        status = {"healthy": manager.is_healthy, "steps": stats.num_steps}
        writer.write(json.dumps(status).encode() + b"\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


async def ask_for_status(port: int) -> dict[str, int]:
    """Be a client of the application."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    status = json.loads(await reader.readline())
    writer.close()
    await writer.wait_closed()
    return status


async def measure_lag(tick: float, is_over: asyncio.Event) -> list[float]:
    """Return how late each tick was, in seconds."""
    loop = asyncio.get_running_loop()
    lags = []
    while not is_over.is_set():
        due = loop.time() + tick
        await asyncio.sleep(tick)
        lags.append(loop.time() - due)
    return lags


async def main(settings: Settings) -> None:
    """Train, serve and measure at the same time."""
    model = torch.nn.Linear(1, 5, bias=False)
    manager = ParallelManager(
        BanditWorker,
        model=model,
        learner=Reinforce(model),
        config={"num_workers": settings.num_workers},
    )
    trained = asyncio.Event()
    async with manager, asyncio.TaskGroup() as tasks:
        server = await serve_status(manager)
        port = server.sockets[0].getsockname()[1]
        lag = tasks.create_task(measure_lag(settings.tick, trained))
        training = tasks.create_task(manager.run(max_steps=settings.max_steps))
        training.add_done_callback(lambda _: trained.set())
        answers = 0
        while not trained.is_set():
            await ask_for_status(port)
            answers += 1
        server.close()
        await server.wait_closed()
    report, lags = training.result(), sorted(lag.result())
    print(f"trained on {report.num_steps} steps in {report.seconds:.1f} s")
    print(f"answered {answers} requests for its status meanwhile")
    print(
        f"timers were late by {1e3 * lags[len(lags) // 2]:.2f} ms (median), "
        f"{1e3 * lags[int(0.99 * len(lags))]:.2f} ms (99 of 100), {1e3 * lags[-1]:.2f} ms (worst)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a run of a second")
    smoke = parser.parse_args().smoke
    asyncio.run(main(Settings(max_steps=5_000) if smoke else Settings()))

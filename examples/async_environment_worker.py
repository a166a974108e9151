"""The worker of ``async_environment.py``: many episodes at once against a slow service."""

from __future__ import annotations

import asyncio
import json

import torch

from keisei.worker import Experience, Worker, WorkerContext


class ServiceWorker(Worker):
    """Plays ``num_episodes`` episodes at the same time; ``collect`` is a coroutine."""

    def __init__(self, port: int, num_episodes: int, length: int) -> None:
        self._port = port
        self._num_episodes = num_episodes
        self._length = length

    async def setup(self, context: WorkerContext) -> None:
        """Keep the context: every step tells it that the worker is moving."""
        self.context = context

    async def collect(self) -> Experience:
        """Play every episode to its end; while one waits for its answer the others go on."""
        rewards = await asyncio.gather(*(self._play() for _ in range(self._num_episodes)))
        return Experience(
            {"rewards": torch.tensor(rewards)},  # [episodes, length]
            num_steps=self._num_episodes * self._length,
        )

    async def on_command(self, command: str, data: object) -> str:
        """Answered at once, also in the middle of a ``collect``."""
        return f"{command} to worker {self.context.worker_id}"

    async def _play(self) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        rewards = []
        try:
            for step in range(self._length):
                writer.write(json.dumps({"step": step}).encode() + b"\n")
                await writer.drain()
                rewards.append(json.loads(await reader.readline())["reward"])
                self.context.progress()
        finally:
            writer.close()  # also when the pool stops in the middle of an episode
        return rewards

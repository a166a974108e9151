"""A worker's runtime on queues of the test's own, in the test's loop: no pool around it."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import torch

from keisei.child.isolation import SharedProcess
from keisei.child.runtime import WorkerRuntime
from keisei.ipc import serialize
from keisei.ipc.board import Board
from keisei.ipc.layout import describe
from keisei.ipc.queues import AsyncQueue
from keisei.ipc.status import StatusLine
from keisei.ipc.weights import WeightsPublisher
from keisei.protocol import messages
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.worker import Worker


class Stage:
    """The application's ends of one worker's queues."""

    def __init__(self) -> None:
        self.control: AsyncQueue[Any] = AsyncQueue()
        self.model: AsyncQueue[Any] = AsyncQueue()
        self.reply: AsyncQueue[Any] = AsyncQueue(manual=True)
        self.experience: AsyncQueue[Any] = AsyncQueue(4, manual=True)
        self.status = StatusLine()
        self.is_introduced = False
        self.board = Board()
        self.publishers: dict[str, WeightsPublisher] = {}
        ends = WorkerEndpoints(
            self.control.take_reader(),
            self.model.take_reader(),
            self.reply.take_writer(),
            self.experience.take_writer(),
            self.status,
        )
        self.task = asyncio.create_task(WorkerRuntime(ends, SharedProcess()).serve())

    async def hello(self, factory: Callable[[], Worker], weights_version: int = 0) -> None:
        """Have the worker begin; it is pickled as a pool does it."""
        hello = messages.Hello(
            factory=serialize.dumps(factory),
            worker_id=0,
            incarnation=0,
            num_workers=1,
            seed=7,
            device="cpu",
            weights_version=weights_version,
            threads=torch.get_num_threads(),
            cells=4,
            paused=False,
            max_experiences=None,
            max_rss=None,
            has_weights=True,
        )
        await self.introduce()
        await self.tell(hello)

    async def introduce(self) -> None:
        """Tell the worker of the names that there are, so that it begins."""
        for name, publisher in self.publishers.items():
            await self.tell_where(name, publisher, self.board.edition)
        frame = messages.pack(messages.Introduced(self.board.edition))
        assert self.model.writer is not None
        await self.model.writer.put(frame, fds=[self.board.fd])
        self.is_introduced = True

    async def tell_where(self, name: str, publisher: WeightsPublisher, edition: int) -> None:
        arena = messages.Arena(
            self.number_of(name), edition, publisher.is_final, name, publisher.layout
        )
        assert self.model.writer is not None
        await self.model.writer.put(messages.pack(arena), fds=[publisher.fd])

    def number_of(self, name: str) -> int:
        return 0 if name == "main" else 1 + sorted(self.publishers).index(name)

    async def tell(self, message: Any) -> None:
        assert self.control.writer is not None
        await self.control.writer.put(messages.pack(message))

    async def publish(
        self, weights: Mapping[str, torch.Tensor], acknowledge: bool = True, name: str = "main"
    ) -> int:
        """Publish a version and announce it."""
        assert self.model.writer is not None
        publisher = self.publishers.get(name)
        is_new = publisher is None
        if publisher is None:
            publisher = WeightsPublisher(describe(weights), board=self.board)
            self.publishers[name] = publisher
        version = publisher.publish(weights)
        if not self.is_introduced:
            return version
        if is_new:
            await self.tell_where(name, publisher, self.board.edition + 1)
            self.board.change_names()
        frame = messages.Announcement(self.number_of(name), version, acknowledge)
        await self.model.writer.put(messages.pack(frame))
        return version

    async def said_after_publishing(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """Publish a version, and return what the worker says to that."""
        await self.publish(weights)
        return await self.said()

    def grant(self, number: int) -> None:
        assert self.experience.reader is not None
        self.experience.reader.grant(number)

    async def said(self) -> Any:
        """Return the next message on the reply queue."""
        return await self._next(self.reply)

    async def delivered(self) -> messages.ExperienceFrame:
        """Return the next frame about an experience."""
        frame: messages.ExperienceFrame = await self._next(self.experience)
        return frame

    @staticmethod
    async def _next(queue: AsyncQueue[Any]) -> Any:
        assert queue.reader is not None
        payload, fds = await queue.reader.get()
        fds.close()
        return messages.unpack(payload, messages.REPLY | messages.EXPERIENCE)

    def close(self) -> None:
        for queue in (self.control, self.model, self.reply, self.experience):
            queue.close()
        for publisher in self.publishers.values():
            publisher.close()
        self.board.close()
        self.status.close()


@contextlib.asynccontextmanager
async def on_stage() -> AsyncIterator[Stage]:
    """Serve a worker as long as the body runs; it is cancelled then."""
    stage = Stage()
    try:
        yield stage
    finally:
        stage.task.cancel()
        await asyncio.wait([stage.task])
        stage.close()


def value_of(reply: messages.Reply) -> Any:
    return pickle.loads(reply.payload)

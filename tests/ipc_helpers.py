"""What the tests of keisei.ipc share: bounded scenarios, counting sockets, and other processes.

The functions from ``role`` on run in processes of their own, which import no more than they need.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keisei.exceptions import QueueEnded, QueueError, QueueWouldBlock
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.queues import AsyncQueue

Test = Callable[..., Awaitable[None]]


def bounded(seconds: float) -> Callable[[Test], Test]:
    """Give a test a deadline, far above what it needs on a starved machine."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        async def run(*args: Any, **kwargs: Any) -> None:
            async with asyncio.timeout(seconds):
                await test(*args, **kwargs)

        return run

    return decorate


@types.coroutine
def turn(times: int = 1) -> Generator[None, None, None]:
    """Let the loop turn."""
    for _ in range(times):
        yield


def open_fds() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def pair_of_fds() -> tuple[int, int]:
    near, far = socket.socketpair()
    return near.detach(), far.detach()


class CountingSocket(socket.socket):
    """Counts its system calls and the bytes that they move.

    Attributes:
        calls: How many there were of each.
        received: Bytes that came.
        transmitted: Bytes that went.
        most_at_once: Bytes that one call could have moved.
    """

    calls: Counter[str]
    received: int
    transmitted: int
    most_at_once: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset()

    def reset(self) -> None:
        self.calls = Counter()
        self.received = self.transmitted = self.most_at_once = 0

    def _count(self, call: str, nbytes: int) -> None:
        self.calls[call] += 1
        self.most_at_once = max(self.most_at_once, nbytes)

    def send(self, data: Any, *args: Any) -> int:
        self._count("send", len(data))
        count = super().send(data, *args)
        self.transmitted += count
        return count

    def sendmsg(self, buffers: Any, *args: Any) -> int:
        self._count("sendmsg", sum(map(len, buffers)))
        count = super().sendmsg(buffers, *args)
        self.transmitted += count
        return count

    def recv(self, size: int, *args: Any) -> bytes:
        self._count("recv", size)
        data = super().recv(size, *args)
        self.received += len(data)
        return data

    def recv_into(self, buffer: Any, *args: Any) -> int:
        self._count("recv_into", len(buffer))
        count = super().recv_into(buffer, *args)
        self.received += count
        return count

    def recvmsg(self, size: int, *args: Any) -> Any:
        self._count("recvmsg", size)
        result = super().recvmsg(size, *args)
        self.received += len(result[0])
        return result


def counting_pair() -> tuple[CountingSocket, CountingSocket]:
    near, far = socket.socketpair()
    return CountingSocket(fileno=near.detach()), CountingSocket(fileno=far.detach())


@contextmanager
def ends(credit: int | None = None, **reader: Any) -> Iterator[tuple[FrameWriter, FrameReader]]:
    """Both ends of one socket pair, closed at the end."""
    near, far = socket.socketpair()
    writer, reading = FrameWriter(near, credit), FrameReader(far, **reader)
    try:
        yield writer, reading
    finally:
        writer.close()
        reading.close()


def take_each(reader: FrameReader) -> list[bytes]:
    """Take all that is here, as a listener does."""
    payloads = []
    try:
        while True:
            payloads.append(bytes(reader.get_nowait()[0]))
    except (QueueWouldBlock, QueueEnded):
        return payloads


@contextmanager
def queue_of(maxsize: int = 0, **options: Any) -> Iterator[AsyncQueue[Any]]:
    queue: AsyncQueue[Any] = AsyncQueue(maxsize, **options)
    try:
        yield queue
    finally:
        queue.close()


@contextmanager
def parted(maxsize: int = 0) -> Iterator[tuple[AsyncQueue[Any], AsyncQueue[Any]]]:
    """Two queues in this process, one with the sending end alone, one with the receiving end."""
    whole: AsyncQueue[Any] = AsyncQueue(maxsize)
    sending: AsyncQueue[Any] = AsyncQueue.from_writer(whole.detach_writer(), maxsize)
    receiving: AsyncQueue[Any] = AsyncQueue.from_reader(whole.detach_reader(), maxsize)
    try:
        yield sending, receiving
    finally:
        sending.close()
        receiving.close()


@contextmanager
def process(
    role: Callable[..., None], *fds: int, numbers: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a function of this module in a process of its own.

    It takes ``fds`` over, gets ``numbers`` behind them as they are, and is killed at the end if
    it has not ended by itself.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"import ipc_helpers; ipc_helpers.{role.__name__}(*map(int, sys.argv[1:]))"
    )
    arguments = map(str, (*fds, *numbers))
    child = subprocess.Popen([sys.executable, "-P", "-c", code, *arguments], pass_fds=fds)
    for fd in fds:
        os.close(fd)
    try:
        yield child
    finally:
        child.kill()
        child.wait(timeout=60)


async def end_of(child: subprocess.Popen[bytes]) -> int:
    """Wait for a process's own end and return its exit code."""
    return await asyncio.to_thread(child.wait, 60)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


# roles: what other processes do


def echo(reader: int, writer: int) -> None:
    """Send back what comes, until the end."""

    async def main() -> None:
        inbox: AsyncQueue[Any] = AsyncQueue.from_reader(reader)
        outbox: AsyncQueue[Any] = AsyncQueue.from_writer(writer)
        async for item in items(inbox):
            await outbox.put(item)
        await outbox.aclose()
        inbox.close()

    asyncio.run(main())


async def items(queue: AsyncQueue[Any]) -> Any:
    """Iterate over all that comes until the writer closes its end."""
    while True:
        try:
            item = await queue.get()
        except QueueEnded:
            return
        yield item


def take_on_demand(reader: int, orders: int, writer: int, maxsize: int) -> None:
    """Take as many items as an order says, answer when they are taken."""

    async def main() -> None:
        inbox: AsyncQueue[Any] = AsyncQueue.from_reader(reader, maxsize)
        demand: AsyncQueue[int] = AsyncQueue.from_reader(orders)
        outbox: AsyncQueue[Any] = AsyncQueue.from_writer(writer)
        async for count in items(demand):
            await outbox.put([await inbox.get() for _ in range(count)])
        for queue in (inbox, demand, outbox):
            queue.close()

    asyncio.run(main())


def count_up(writer: int, allowed: int, number: int, burst: int) -> None:
    """Send 0, 1, 2 … as fast as they go, a burst at a time as it is allowed."""

    async def main() -> None:
        queue: AsyncQueue[int] = AsyncQueue.from_writer(writer)
        permits: AsyncQueue[None] = AsyncQueue.from_reader(allowed)
        for item in range(number):
            if item % burst == 0:
                await permits.get()
            await queue.put(item)
        await queue.aclose()
        permits.close()

    asyncio.run(main())


def take_all(reader: int, report: int, maxsize: int) -> None:
    """Take everything until the end, then report it."""

    async def main() -> None:
        queue: AsyncQueue[Any] = AsyncQueue.from_reader(reader, maxsize)
        outbox: AsyncQueue[Any] = AsyncQueue.from_writer(report)
        await outbox.put([item async for item in items(queue)])
        await outbox.aclose()
        queue.close()

    asyncio.run(main())


def send_one(writer: int, nbytes: int) -> None:
    """Send one frame whose bytes count 0 … 255 over and over."""

    async def main() -> None:
        frames = FrameWriter(socket.socket(fileno=writer), None)
        await frames.put((bytes(range(256)) * (nbytes // 256 + 1))[:nbytes])
        await frames.flush()
        frames.close()

    asyncio.run(main())


def flood(writer: int, nbytes: int) -> None:
    """Send frames of ``nbytes`` for ever."""

    async def main() -> None:
        frames = FrameWriter(socket.socket(fileno=writer), None)
        try:
            while True:
                await frames.put(bytes(nbytes))
        except QueueEnded:
            frames.close()

    asyncio.run(main())


def die_in_a_frame(writer: int) -> None:
    """Send three whole frames and a part of a large one, then die by SIGKILL."""

    async def main() -> None:
        frames = FrameWriter(socket.socket(fileno=writer), None)
        for number in range(3):
            frames.put_nowait(bytes([number]))
        frames.put_nowait(bytes(1 << 24))
        kill_me()

    asyncio.run(main())


def die_in_a_header(writer: int) -> None:
    """Send one whole frame and three bytes of the next header, then die by SIGKILL."""
    FrameWriter(socket.socket(fileno=writer), None).put_nowait(b"whole")
    os.write(writer, b"\x07\x00\x00")
    kill_me()


def die_between_frames(writer: int) -> None:
    """Send two whole frames, then die by SIGKILL."""
    frames = FrameWriter(socket.socket(fileno=writer), None)
    frames.put_nowait(b"first")
    frames.put_nowait(b"last")
    kill_me()


def die_as_a_reader(reader: int, taken: int) -> None:
    """Take some frames, then die by SIGKILL with the others unread."""

    async def main() -> None:
        frames = FrameReader(socket.socket(fileno=reader))
        for _ in range(taken):
            await frames.get()
        kill_me()

    asyncio.run(main())


def run_out_of_descriptors(reader: int, report: int) -> None:
    """Receive a descriptor where there is room for none; report what was raised."""
    import resource

    async def main() -> None:
        frames = FrameReader(socket.socket(fileno=reader))
        outbox: AsyncQueue[Any] = AsyncQueue.from_writer(report)
        got = [bytes((await frames.get())[0])]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        first_free = os.dup(0)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
        await outbox.put(None)
        try:
            got.append(bytes((await frames.get())[0]))
        except QueueError as error:
            got.append(repr(error))
        await outbox.put(got)
        await outbox.aclose()
        frames.close()

    asyncio.run(main())


def put_where_sigpipe_kills(writer: int) -> None:
    """Put to a reader that has gone, in an application that lets SIGPIPE end it."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    frames = FrameWriter(socket.socket(fileno=writer), None)
    try:
        frames.put_nowait(b"nobody is here")
    except QueueEnded:
        os._exit(7)


def write_into_memory(fd: int) -> None:
    """Write into shared memory, then die by SIGKILL."""
    from keisei.ipc import memory

    memory.attach(fd)[:5] = b"child"
    kill_me()


def ask_for_too_much_memory() -> None:
    """Exit with 0 if memory beyond a limit is refused with nothing left open."""
    import resource

    from keisei.ipc import memory

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    before = open_fds()
    try:
        memory.create(1 << 21)
    except OSError:
        os._exit(0 if open_fds() == before else 2)
    os._exit(1)


def report_and_die(fd: int) -> None:
    """Say things in a status line, then die by SIGKILL."""
    from keisei.ipc.status import Phase, StatusLine

    status = StatusLine(fd)
    status.enter(Phase.START)
    status.enter(Phase.COLLECT)
    status.progress()
    status.version, status.begun, status.committed = 3, 11, 10
    status.rss, status.command = 1 << 40, 7
    kill_me()


def write_experiences_and_die(writer: int, number: int) -> None:
    """Send experiences and a part of one more frame, then die by SIGKILL."""
    import torch

    from keisei.ipc import serialize
    from keisei.ipc.ring import RingWriter

    frames = FrameWriter(socket.socket(fileno=writer), None)
    ring = RingWriter(2)
    for n in range(number):
        data = {
            "steps": torch.full((1000, 9), n),
            "more": torch.arange(n, n + 500).to(torch.bfloat16),
        }
        place, fds = ring.write(data)
        frames.put_nowait(serialize.dumps(place), fds)
        ring.told()
    os.write(writer, b"\x99")
    kill_me()


def _publisher_for(writer: int, size: int) -> Any:
    """Make a publisher of two tensors, and tell the application of its memory."""
    import torch

    from keisei.ipc import serialize
    from keisei.ipc.layout import describe
    from keisei.ipc.weights import WeightsPublisher

    torch.set_num_threads(1)
    frames = FrameWriter(socket.socket(fileno=writer), None)
    names = ("first", "second")
    publisher = WeightsPublisher(describe({name: torch.zeros(size) for name in names}))
    frames.put_nowait(serialize.dumps(publisher.layout), [publisher.fd])

    def publish(value: int, kind: type[dict[str, Any]] = dict) -> None:
        tensor = torch.full((size,), float(value))
        publisher.publish(kind(dict.fromkeys(names, tensor)))

    return publish, frames


def publish_for_ever(writer: int) -> None:
    """Publish one version after the other without a pause."""
    publish, frames = _publisher_for(writer, 5000)
    publish(1)
    frames.put_nowait(b"the first version is there")
    version = 1
    while True:
        version += 1
        publish(version)


class Deadly(dict[str, Any]):
    """Ends the process by SIGKILL when its second tensor is asked for."""

    def __getitem__(self, name: str) -> Any:
        if name == "second":
            kill_me()
        return super().__getitem__(name)

    def items(self) -> Any:
        return ((name, self[name]) for name in self)


def die_publishing(writer: int) -> None:
    """Publish versions 1 and 2, then die by SIGKILL between two tensors of version 3."""
    publish, _ = _publisher_for(writer, 1000)
    publish(1)
    publish(2)
    publish(3, Deadly)


def die_reading(fd: int) -> None:
    """Read weights of two tensors, and die by SIGKILL between them."""
    import torch

    from keisei.ipc.layout import describe
    from keisei.ipc.weights import WeightsReader

    targets = {name: torch.zeros(1000) for name in ("first", "second")}
    WeightsReader(fd, describe(targets)).read_into(Deadly(targets))

"""The worker's main loop: one loop for every backend, from the hello frame to the goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import operator
import resource
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keisei.child.isolation import Isolation
from keisei.exceptions import QueueEnded, SerializationError
from keisei.ipc import failures, serialize
from keisei.ipc.frame_reader import Frame, FrameReader
from keisei.ipc.frame_writer import FrameWriter
from keisei.ipc.layout import Layout, describe
from keisei.ipc.ring import RingWriter
from keisei.ipc.status import Phase
from keisei.ipc.weights import WeightsReader
from keisei.ipc.wire import Payload
from keisei.protocol import messages
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.worker import Experience, Worker, WorkerContext

if TYPE_CHECKING:
    import torch

_STATM = Path("/proc/self/statm")
_RSS_MASK = 63
"""The peak memory is noted at one experience of 64: asking costs as much as sending a frame."""
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


_NOT_AWAITABLE = frozenset(
    {dict, Experience, type(None), bool, int, float, str, bytes, list, tuple}
)
"""What hooks nearly always return."""


class HookFailed(Exception):
    """A hook of the worker raised; carries what the application will be told."""

    def __init__(self, phase: Phase, error: BaseException) -> None:
        self.phase = phase
        self.summary = failures.summary(error)
        self.traceback = failures.trace(error)
        super().__init__(self.summary)


class WorkerRuntime:
    """Serves one incarnation: hooks are called here and nowhere else."""

    def __init__(self, endpoints: WorkerEndpoints, isolation: Isolation) -> None:
        self._ends = endpoints
        self._status = endpoints.status
        self._isolation = isolation
        self._wake = asyncio.Event()
        self._hello: messages.Hello
        self._worker: Worker
        self._ring: RingWriter
        self._weights: WeightsReader | None = None
        self._version = 0
        self._owed_version = 0
        self._is_ready = False
        self._paused = False
        self._pausing: list[int] = []
        self._stopping = False
        self._collecting: asyncio.Task[Any] | None = None
        self._told_layout: Layout | None = None
        self._turned = 0.0
        self._poll = endpoints.poll()
        self._closing = contextlib.ExitStack()
        self._closing.callback(endpoints.close)

    async def serve(self) -> int:
        """Run the worker's whole life and return its exit code.

        An error of a hook is told to the application and gives 1; an application that has gone
        gives 2. Cancelling (the inline backend's way of killing) drops everything where it is.
        """
        try:
            try:
                await self._start()
                reason = await self._work()
                await self._call(Phase.TEARDOWN, self._worker.teardown)
            except HookFailed as failure:
                await self._tell_failure(failure)
                code = 1
            else:
                await self._tell(messages.Goodbye(reason))
                code = 0
            return code
        except QueueEnded:
            return 2
        finally:
            if self._collecting is not None:
                self._collecting.cancel()
            self._closing.close()

    # the life, in order

    async def _start(self) -> None:
        frame, _ = await self._ends.control.get()
        self._hello = hello = messages.unpack(frame, messages.CONTROL)
        self._paused = hello.paused
        self._ring = RingWriter(hello.cells + 2)
        self._closing.callback(self._ring.close)
        self._ends.control.listen(self._wake.set)
        self._ends.model.listen(self._wake.set)
        self._ends.experience.watch_credit(self._on_credit)
        self._status.enter(Phase.START)
        factory = await self._call(
            Phase.START, serialize.loads, hello.factory, "the worker factory"
        )
        try:
            self._isolation.begin(hello.seed, hello.threads)
        except TypeError as error:  # a random generator of a module that cannot be seeded
            raise HookFailed(Phase.START, error) from error
        self._worker = await self._call(Phase.START, self._build, factory)
        await self._call(Phase.START, self._worker.setup, self._context())
        self._hear_announcements()
        await self._load_newest()
        await self._tell(messages.Ready(self._version, self._takes_weights()))
        self._is_ready = True

    def _takes_weights(self) -> bool:
        own = type(self._worker).load_weights is not Worker.load_weights
        return own or self._worker.model is not None

    @staticmethod
    def _build(factory: Callable[[], Any]) -> Worker:
        worker = factory()
        if not isinstance(worker, Worker):
            raise TypeError(
                f"the worker factory returned {type(worker).__qualname__}; "
                "it must return an instance of a keisei.Worker subclass"
            )
        return worker

    def _context(self) -> WorkerContext:
        hello = self._hello
        return WorkerContext(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            num_workers=hello.num_workers,
            seed=hello.seed,
            device=hello.device,
            weights_version=hello.weights_version,
            _progress=self._status.progress,
            _turn_soon=self._turn_soon,
        )

    async def _work(self) -> str:
        """Collect and obey until told to stop; return why a successor is wanted, or ""."""
        concurrent = inspect.iscoroutinefunction(self._worker.collect)
        while True:
            self._wake.clear()
            if news := self._news():
                await self._hear(news)
            if self._collecting is not None and self._collecting.done():
                finished, self._collecting = self._collecting, None
                await self._deliver(finished.result())
            if self._collecting is None:
                if self._stopping:
                    return ""
                if reason := self._worn_out():
                    return reason
                may_collect = not self._paused and self._has_credit()
                # In this order: what was published before the credit was given is loaded.
                if self._is_behind():
                    await self._load_newest()
                if self._pausing:
                    await self._stand_still()
                if may_collect:
                    self._status.begun += 1
                    if concurrent:
                        self._collecting = asyncio.create_task(self._collect())
                        self._collecting.add_done_callback(lambda _: self._wake.set())
                    else:
                        await self._deliver(await self._collect())
                        await self._let_the_loop_turn()
                        continue
            elif self._stopping:
                self._collecting.cancel()
                await asyncio.wait([self._collecting])
                self._collecting = None
                return ""
            await self._wake.wait()

    def _news(self) -> set[int]:
        """Return the descriptors of the queues in which something has arrived; one system call."""
        news = {fd for fd, _ in self._poll.poll(0)}
        for end in (self._ends.control, self._ends.model):
            if end.has_news:
                news.add(end.fileno())
        return news

    async def _hear(self, news: set[int]) -> None:
        """Take in all that has arrived, in order."""
        if self._ends.experience.fileno() in news:
            self._take_credits()
        if self._ends.model.fileno() in news:
            self._hear_announcements()
        if self._ends.control.fileno() in news:
            await self._obey()

    async def _let_the_loop_turn(self) -> None:
        """Let timers, signals and the worker's own tasks run between two experiences."""
        now = time.monotonic()
        if now - self._turned >= self._isolation.turn_after:
            await _one_turn()
            self._turned = time.monotonic()

    def _turn_soon(self) -> None:
        """Have the loop turn before the next experience, however short this one is."""
        self._turned = 0.0

    # experiences

    def _has_credit(self) -> bool:
        if not self._ends.experience.credit:
            self._take_credits()
            self._hear_announcements()  # what was told before the credit was given is known
        return bool(self._ends.experience.credit)

    def _take_credits(self) -> None:
        try:
            self._ends.experience.refresh()
        except QueueEnded:
            self._stopping = True

    def _on_credit(self) -> None:
        self._take_credits()
        self._wake.set()

    async def _collect(self) -> Any:
        return await self._call(Phase.COLLECT, self._worker.collect)

    async def _deliver(self, result: Any) -> None:
        """Copy one experience into shared memory and send the frame about it."""
        experience = result if isinstance(result, Experience) else Experience(result)
        try:
            ref, fds = self._ring.write(experience.data)
            info = experience.info
            committed = self._status.committed
            payload = messages.pack(
                messages.ExperienceFrame(
                    sequence=committed,
                    version=self._version,
                    segment=ref.segment,
                    segment_nbytes=ref.segment_nbytes if fds else 0,
                    cell=ref.cell,
                    stride=ref.stride,
                    layout=None if ref.layout is self._told_layout else ref.layout,
                    num_steps=_num_steps(experience, ref.layout),
                    info=serialize.dumps(dict(info), "Experience.info") if info else None,
                    seed=self._hello.seed,
                )
            )
        except Exception as error:
            raise HookFailed(Phase.COLLECT, error) from error
        self._status.committed = committed + 1
        if committed & _RSS_MASK == 0:
            self._status.rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        await self._send(self._ends.experience, payload, fds)
        self._told_layout = ref.layout
        if fds:
            self._ring.told()

    @staticmethod
    async def _send(writer: FrameWriter, payload: Payload, fds: Sequence[int] = ()) -> None:
        """Send a frame whole, before the next collect keeps the loop from it."""
        await writer.put(payload, fds=fds)
        if writer.is_sending:
            await writer.flush()

    def _worn_out(self) -> str:
        """Return why a successor shall take over, or ""; not before one experience."""
        hello = self._hello
        if self._status.committed == 0:
            return ""
        if hello.max_experiences is not None and self._status.committed >= hello.max_experiences:
            return f"it collected {self._status.committed} experiences"
        if hello.max_rss is not None and (rss := _resident()) > hello.max_rss:
            return f"its resident memory is {rss / 2**20:.0f} MiB"
        return ""

    # weights

    def _is_behind(self) -> bool:
        """Return whether there are newer weights, or an acknowledgement is owed."""
        weights = self._weights
        return self._owed_version > 0 or (weights is not None and weights.latest > self._version)

    async def _load_newest(self) -> None:
        """Take the newest weights, if they are newer, and acknowledge what was asked for."""
        weights = self._weights
        if weights is not None and weights.latest > self._version:
            self._status.version = weights.latest
            model = self._worker.model
            if type(self._worker).load_weights is not Worker.load_weights:
                tensors, version = weights.read()
                await self._call(Phase.LOAD_WEIGHTS, self._worker.load_weights, tensors, version)
            elif model is not None:
                version = await self._call(Phase.LOAD_WEIGHTS, self._fill, model, weights)
            else:
                version = weights.latest
            self._version = self._status.version = version
        if self._owed_version and self._version >= self._owed_version:
            self._owed_version = 0
            await self._tell(messages.Applied(self._version))

    @staticmethod
    def _fill(model: torch.nn.Module, weights: WeightsReader) -> int:
        """Copy straight into the model where it has the same tensors; else let torch complain."""
        targets = model.state_dict()
        if not describe(targets).differences(weights.layout):
            return weights.read_into(targets)
        tensors, version = weights.read()
        model.load_state_dict(tensors)
        return version

    def _hear_announcements(self) -> None:
        for payload, fds in _frames(self._ends.model):
            message = messages.unpack(payload, messages.MODEL, fds)
            if isinstance(message, messages.Arena):
                self._weights = WeightsReader(fds.claim(), message.layout)
            elif message.acknowledge:
                self._owed_version = max(self._owed_version, message.version)

    # commands

    async def _obey(self) -> None:
        """Handle every control frame that has arrived, in order."""
        for payload, fds in _frames(self._ends.control):
            message = messages.unpack(payload, messages.CONTROL, fds)
            if isinstance(message, messages.Command):
                await self._answer(message)
            elif isinstance(message, messages.Pause):
                self._paused = True
                self._pausing.append(message.sequence)
            elif isinstance(message, messages.Resume):
                self._paused = False
            else:
                self._stopping = True
        if self._ends.control.ended is not None:
            self._stopping = True

    async def _answer(self, command: messages.Command) -> None:
        self._status.command = command.sequence
        try:
            data = serialize.loads(command.payload, f"the data of command {command.name!r}")
            if command.name == "reset":
                value = await self._call(Phase.COMMAND, self._worker.reset)
            else:
                value = await self._call(Phase.COMMAND, self._worker.on_command, command.name, data)
            reply = messages.Reply(
                command.sequence, serialize.dumps(value, f"the reply to command {command.name!r}")
            )
        except HookFailed as failure:
            await self._tell(
                messages.ReplyError(command.sequence, failure.summary, failure.traceback)
            )
        except SerializationError as error:
            await self._tell(messages.ReplyError(command.sequence, str(error), ""))
        else:
            await self._tell(reply)

    async def _stand_still(self) -> None:
        """Answer those who wait for the pause; nothing is being collected now."""
        while self._pausing:
            none = serialize.dumps(None)
            await self._tell(messages.Reply(self._pausing.pop(0), none))

    # seams

    async def _call(self, phase: Phase, hook: Callable[..., Any], *args: Any) -> Any:
        """Call a hook, ``def`` or ``async def``, under its phase."""
        collecting = self._collecting
        beside_a_collect = collecting is not None and collecting is not asyncio.current_task()
        if beside_a_collect:
            self._status.progress()
        else:
            self._status.enter(phase)
        try:
            with self._isolation:
                result = hook(*args)
            if type(result) not in _NOT_AWAITABLE and inspect.isawaitable(result):
                result = await self._isolation.drive(result)
            return result
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # from outside, not the hook's own
            raise HookFailed(phase, _without_our_frames(error)) from error
        finally:
            if not beside_a_collect:
                self._status.enter(Phase.IDLE)

    async def _tell(self, message: Any) -> None:
        await self._send(self._ends.reply, messages.pack(message))

    async def _tell_failure(self, failure: HookFailed) -> None:
        await self._tell(
            messages.Failed(
                failure.phase.name.lower(),
                failure.summary,
                failure.traceback,
                during_start=not self._is_ready,
            )
        )


def _frames(reader: FrameReader) -> Iterator[Frame]:
    """Take the frames that have arrived; what comes meanwhile is the next event's."""
    with contextlib.suppress(QueueEnded):
        frame = reader.pop()
        while frame is not None:
            yield frame
            frame = reader.pop() if reader.has_news else None


def _num_steps(experience: Experience, layout: Layout) -> int:
    if experience.num_steps is None:
        return max((field.shape[0] for field in layout.fields if field.shape), default=1)
    num_steps = operator.index(experience.num_steps)
    if num_steps < 0:
        raise ValueError(f"Experience.num_steps is {num_steps}; it must not be negative")
    return num_steps


def _resident() -> int:
    """Return this process's resident memory in bytes, the peak where the present is unknown."""
    try:
        return int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _without_our_frames(error: BaseException) -> BaseException:
    """Drop the frames of this module from the traceback's top: they tell a user nothing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return error.with_traceback(trace or error.__traceback__)


@types.coroutine
def _one_turn() -> Generator[None, None, None]:
    """Let everything else that is due in this loop run once."""
    yield

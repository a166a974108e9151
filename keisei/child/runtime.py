"""The worker's main loop: one loop for every backend, from the hello frame to the goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import inspect
import time
import types
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from keisei.child.commands import Commands
from keisei.child.delivery import Delivery
from keisei.child.frames import send
from keisei.child.hooks import HookFailed, Hooks
from keisei.child.isolation import Isolation
from keisei.child.loading import Loading, why_no_weights
from keisei.child.wear import worn_out
from keisei.exceptions import QueueEnded, QueueError, WeightsError
from keisei.ipc import serialize
from keisei.ipc.status import Phase
from keisei.protocol import messages
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.worker import Worker, WorkerContext


class Step(enum.Enum):
    """What the main loop does next."""

    DELIVER = "deliver what a coroutine has collected"
    CUT_SHORT = "cancel the coroutine that collects, and end"
    END = "end"
    COLLECT = "collect an experience"
    WAIT = "wait for news"


class Collecting(enum.Enum):
    """What a ``collect`` that is a coroutine is doing."""

    NOTHING = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()


def next_step(collecting: Collecting, is_ending: bool, may_collect: bool) -> Step:
    """Decide what to do next.

    Args:
        collecting: Whether an experience is under way beside the main loop.
        is_ending: The worker was told to stop, or wants a successor.
        may_collect: There is a credit, and no pause.
    """
    if collecting is Collecting.DONE:
        return Step.DELIVER
    if collecting is Collecting.RUNNING:
        return Step.CUT_SHORT if is_ending else Step.WAIT
    if is_ending:
        return Step.END
    return Step.COLLECT if may_collect else Step.WAIT


class WorkerRuntime:
    """Serves one incarnation: hooks are called from here and nowhere else."""

    def __init__(self, endpoints: WorkerEndpoints, isolation: Isolation) -> None:
        self._ends = endpoints
        self._status = endpoints.status
        self._isolation = isolation
        self._wake = asyncio.Event()
        self._hooks = Hooks(self._status, isolation)
        self._commands = Commands(endpoints.control, self._hooks, self._status, self._tell)
        self._settings = self._commands.settings
        self._loading = Loading(endpoints.model, self._hooks, self._status, self._tell)
        self._delivery: Delivery
        self._hello: messages.Hello
        self._worker: Worker
        self._is_ready = False
        self._has_limits = False
        self._recycle = ""
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
                await self._work()
                await self._hooks.call(Phase.TEARDOWN, self._worker.teardown)
            except HookFailed as failure:
                await self._tell_failure(failure)
                code = 1
            else:
                await self._tell(messages.Goodbye(self._recycle))
                code = 0
            return code
        except QueueEnded:
            return 2
        finally:
            if self._hooks.collecting is not None:
                self._hooks.collecting.cancel()
            if self._isolation.is_shared:
                self._closing.close()
            # Else the queues end with the process, which is trusted until then: it has told why
            # it ends, but its exit handlers may take a while.

    # the start

    async def _start(self) -> None:
        frame, _ = await self._ends.control.get()
        self._hello = hello = messages.unpack(frame, messages.CONTROL)
        if hello.has_settings:
            frame, _ = await self._ends.control.get()
            settings = messages.unpack(frame, messages.CONTROL)
        if hello.has_weights:
            await self._loading.introduce()
        self._has_limits = hello.max_experiences is not None or hello.max_rss is not None
        self._commands.paused = hello.paused
        self._delivery = Delivery(self._ends.experience, self._status, hello.cells, hello.seed)
        self._closing.callback(self._delivery.close)
        self._ends.control.listen(self._wake.set)
        self._ends.model.listen(self._wake.set)
        self._delivery.watch_credits(self._wake.set)
        call = self._hooks.call
        self._status.enter(Phase.START)
        if hello.has_settings:
            await call(Phase.START, self._settings.begin, settings)
        factory = await call(Phase.START, serialize.loads, hello.factory, "the worker factory")
        try:
            self._isolation.begin(hello.seed, hello.threads)
        except TypeError as error:  # a random generator of a module that cannot be seeded
            raise HookFailed(Phase.START, error) from error
        self._worker = await call(Phase.START, self._build, factory)
        await call(Phase.START, self._worker.setup, self._context())
        takes_weights = await call(Phase.START, self._takes_weights)
        await call(Phase.START, self._loading.serve, self._worker)
        await self._loading.load_newest(self._worker)
        await self._tell(messages.Ready(self._loading.version, takes_weights))
        self._is_ready = True

    @staticmethod
    def _build(factory: Callable[[], Any]) -> Worker:
        worker = factory()
        if not isinstance(worker, Worker):
            raise TypeError(
                f"the worker factory returned {type(worker).__qualname__}; "
                "it must return an instance of a keisei.Worker subclass"
            )
        return worker

    def _takes_weights(self) -> bool:
        problem = why_no_weights(self._worker)
        if problem and self._hello.weights_version > 0:
            raise WeightsError(problem)
        return not problem

    def _context(self) -> WorkerContext:
        hello = self._hello
        loop = asyncio.get_running_loop()

        def turn_soon(callback: Callable[..., object], *args: object) -> None:
            """Have the loop turn before the next experience, and call ``callback`` then."""
            self._turned = 0.0
            loop.call_soon(callback, *args)

        return WorkerContext(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            num_workers=hello.num_workers,
            seed=hello.seed,
            device=hello.device,
            weights_version=hello.weights_version,
            settings=self._settings.values,
            _progress=self._status.progress,
            _turn_soon=turn_soon,
            _weights=functools.partial(self._loading.look, may_wait=not self._isolation.is_shared),
        )

    # the main loop

    async def _work(self) -> None:
        """Collect and obey until told to stop, or until a successor is wanted."""
        concurrent = inspect.iscoroutinefunction(self._worker.collect)
        while True:
            self._wake.clear()
            if news := self._news():
                await self._hear(news)
            step = self._decide()
            if step is Step.DELIVER:
                await self._deliver_collected()
                step = self._decide()
            if step is Step.CUT_SHORT:
                await self._cut_short()
                return
            if step is Step.END:
                return
            if self._hooks.collecting is None and (
                self._loading.is_behind or self._commands.between
            ):
                await self._catch_up()
            if step is Step.COLLECT:
                self._status.begun += 1
                if not concurrent:
                    await self._deliver(await self._collect())
                    await self._let_the_loop_turn()
                    continue
                self._hooks.collecting = asyncio.create_task(self._collect())
                self._hooks.collecting.add_done_callback(lambda _: self._wake.set())
            await self._wake.wait()

    def _decide(self) -> Step:
        task = self._hooks.collecting
        is_ending = self._commands.stopping or self._delivery.has_ended
        if task is not None:
            collecting = Collecting.DONE if task.done() else Collecting.RUNNING
            return next_step(collecting, is_ending, False)
        is_ending = is_ending or (self._has_limits and self._is_worn_out())
        may_collect = not is_ending and not self._commands.paused and self._has_credit()
        return next_step(Collecting.NOTHING, is_ending, may_collect)

    def _is_worn_out(self) -> bool:
        hello = self._hello
        self._recycle = worn_out(self._status.committed, hello.max_experiences, hello.max_rss)
        return bool(self._recycle)

    def _has_credit(self) -> bool:
        experience = self._ends.experience
        if experience.credit:
            return True
        self._delivery.take_credits()
        self._loading.take_announcements()  # what was told before the credit was given is known
        return bool(experience.credit)

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
            self._delivery.take_credits()
        if self._ends.model.fileno() in news:
            self._loading.take_announcements()
        if self._ends.control.fileno() in news:
            await self._commands.obey(self._worker)

    async def _catch_up(self) -> None:
        """Load the newest weights, apply settings and answer a pause, between two experiences.

        It comes after the look at the credits: what was published before a credit was given is
        loaded before that credit is used.
        """
        if self._loading.is_behind:
            await self._loading.load_newest(self._worker)
        await self._commands.obey_between(self._worker)
        if self._loading.is_behind:  # such as by a model that was assigned meanwhile
            await self._loading.load_newest(self._worker)

    async def _collect(self) -> Any:
        return await self._hooks.call(Phase.COLLECT, self._worker.collect)

    async def _deliver_collected(self) -> None:
        """Deliver what the coroutine that collects has returned."""
        task, self._hooks.collecting = self._hooks.collecting, None
        if task is None or task.cancelled():
            error = asyncio.CancelledError("the worker's own code has cancelled collect()")
            raise HookFailed(Phase.COLLECT, error)
        await self._deliver(task.result())

    def _deliver(self, result: Any) -> Awaitable[None]:
        """Deliver what was collected with the weights and settings that the worker has now."""
        loading = self._loading
        return self._delivery.deliver(
            result, loading.version, loading.others, self._settings.version
        )

    async def _cut_short(self) -> None:
        task = self._hooks.collecting
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self._hooks.collecting = None

    async def _let_the_loop_turn(self) -> None:
        """Let timers, signals and the worker's own tasks run between two experiences."""
        now = time.monotonic()
        if now - self._turned >= self._isolation.turn_after:
            await _one_turn()
            self._turned = time.monotonic()

    # to the application

    async def _tell(self, message: Any) -> None:
        await send(self._ends.reply, messages.pack(message))

    async def _tell_failure(self, failure: HookFailed) -> None:
        await self._tell(self._failed(failure))

    def _failed(self, failure: HookFailed) -> messages.Failed:
        return messages.Failed(
            failure.phase.name.lower(),
            failure.summary,
            failure.traceback,
            during_start=not self._is_ready,
        )

    def tell_escape(self, error: BaseException) -> None:
        """Tell of an error that has stopped the whole event loop, as of one of a hook."""
        failure = HookFailed(self._status.phase, error)
        with contextlib.suppress(QueueError):  # nothing more can be told
            self._ends.reply.put_nowait(messages.pack(self._failed(failure)))


@types.coroutine
def _one_turn() -> Generator[None, None, None]:
    """Let everything else that is due in this loop run once."""
    yield

"""Workers for the tests of what runs inside a worker's process; child processes import this."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import termios
import threading
import weakref
from collections.abc import Callable, Coroutine
from multiprocessing import resource_tracker, shared_memory, util
from pathlib import Path
from typing import Any, TypeVar

import torch

from keisei.worker import Worker, WorkerContext

T = TypeVar("T")
EXITS = "raise SystemExit(1)"


async def turned(value: T) -> T:
    """Return ``value`` after two turns of whatever loop is running."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, done.set)
    await done.wait()
    return value


class SideLoop:
    """A loop that stays "running" between the calls of a blocking interface.

    Libraries do that with a greenlet: they leave the loop in the middle of a callback. To the
    thread it is the running loop then. Here it is made so by hand.
    """

    def __init__(self) -> None:
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("the blocking interface must not be used inside a running loop")
        self.loop = asyncio.new_event_loop()
        asyncio._set_running_loop(self.loop)
        sys.set_asyncgen_hooks(firstiter=self._first, finalizer=None)
        self.generators: list[Any] = []

    def _first(self, generator: Any) -> None:
        self.generators.append(generator)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` to its end; the loop must still be the running one."""
        assert asyncio.get_running_loop() is self.loop
        asyncio._set_running_loop(None)
        try:
            return self.loop.run_until_complete(coroutine)
        finally:
            asyncio._set_running_loop(self.loop)

    def close(self) -> None:
        assert asyncio.get_running_loop() is self.loop
        asyncio._set_running_loop(None)
        sys.set_asyncgen_hooks(None, None)
        self.loop.close()


def use_run() -> int:
    return asyncio.run(turned(1))


def use_runner() -> int:
    with asyncio.Runner() as runner:
        return runner.run(turned(0)) + runner.run(turned(1))


def use_own_loop() -> int:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(turned(1))
    finally:
        loop.close()


def use_current_loop() -> int:
    """Use the loop that there is "for this thread", which Python 3.14 no longer makes."""
    try:
        loop = asyncio.get_event_loop_policy().get_event_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
    return loop.run_until_complete(turned(1))


def use_nested() -> int:
    """Run a loop in a thread of a loop."""

    async def outer() -> int:
        return await asyncio.to_thread(use_run)

    return asyncio.run(outer())


def use_anyio() -> int:
    import anyio

    return anyio.run(turned, 1)


def use_uvloop() -> int:
    import uvloop

    return uvloop.run(turned(1))


def use_a_subprocess() -> int:
    """Wait for a process, which needs a child watcher before Python 3.12."""

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", EXITS)
        return await process.wait()

    return asyncio.run(run())


def use_signal_handlers() -> int:
    """Take signals in a loop of its own, as servers do, and let the loop go."""
    loop = asyncio.new_event_loop()
    with contextlib.suppress(RuntimeError):  # not the main thread
        loop.add_signal_handler(signal.SIGUSR1, int)
    try:
        return loop.run_until_complete(turned(1))
    finally:
        loop.close()


WAYS: dict[str, Callable[[], int]] = {
    "run": use_run,
    "runner": use_runner,
    "own loop": use_own_loop,
    "current loop": use_current_loop,
    "nested": use_nested,
    "anyio": use_anyio,
    "uvloop": use_uvloop,
    "subprocess": use_a_subprocess,
    "signal handlers": use_signal_handlers,
}


class Looping(Worker):
    """Runs event loops in every plain hook, its constructor included.

    Args:
        way: One of ``WAYS``, or "side loop".
    """

    def __init__(self, way: str) -> None:
        self.way = way
        self.counts = {"factory": use_run()}

    def use(self, hook: str) -> None:
        used = self.side.call(turned(1)) if self.way == "side loop" else WAYS[self.way]()
        self.counts[hook] = self.counts.get(hook, 0) + used

    def setup(self, context: WorkerContext) -> None:
        if self.way == "side loop":
            self.side = SideLoop()
        self.use("setup")

    def load_weights(self, weights: Any, version: int) -> None:
        self.use("load_weights")

    def collect(self) -> Any:
        self.use("collect")
        return {"collected": torch.tensor([self.counts["collect"]])}

    def reset(self) -> None:
        self.use("reset")

    def on_command(self, command: str, data: Any) -> Any:
        self.use("on_command")
        return dict(self.counts)

    def teardown(self) -> None:
        self.use("teardown")
        if self.way == "current loop":
            asyncio.get_event_loop().close()
        if self.way == "side loop":
            self.side.close()


class LoopingBesideACoroutine(Looping):
    """The same, with a ``collect`` in the worker's own loop that leaves a task running there."""

    async def collect(self) -> Any:  # type: ignore[override]
        loop = asyncio.get_running_loop()
        if "loop" not in vars(self):
            self.loop = loop
            self.background = asyncio.create_task(self.count())
            self.ticks = 0
        assert loop is self.loop, "its own loop is not what it was"
        assert asyncio.current_task() is not None
        seen = [number async for number in numbers()]
        self.counts["collect"] = self.counts.get("collect", 0) + 1
        await turned(None)
        return {"collected": torch.tensor([self.counts["collect"]]), "seen": torch.tensor(seen)}

    def teardown(self) -> None:
        super().teardown()
        self.background.cancel()

    async def count(self) -> None:
        while True:
            self.ticks = await turned(self.ticks + 1)


async def numbers() -> Any:
    for number in range(3):
        yield await turned(number)


class RaisesIn(Worker):
    """Raises in one hook, which is a coroutine if asked for.

    Args:
        hook: Its name.
        error: What is raised.
        is_coroutine: Whether the hook is ``async def``.
    """

    def __init__(self, hook: str, error: type[BaseException], is_coroutine: bool) -> None:
        def fail(*_: Any) -> Any:
            raise error("on purpose")

        async def fail_later(*_: Any) -> Any:
            await turned(None)
            raise error("on purpose")

        setattr(self, hook, fail_later if is_coroutine else fail)

    def collect(self) -> Any:
        return {"x": torch.zeros(1)}


class RaisesThroughTheLoop(Worker):
    """Awaits a task that raises what asyncio lets through its loop."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    async def fail(self) -> None:
        await turned(None)
        raise self.error("on purpose")

    async def collect(self) -> Any:  # type: ignore[override]
        await asyncio.gather(self.fail())


class CancelsItself(Worker):
    """Cancels the task that its own ``collect`` runs in."""

    async def collect(self) -> Any:  # type: ignore[override]
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await turned(None)


def write(path: str, word: str) -> None:
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(word + "\n")


class Leaving(Worker):
    """Registers all that Python runs at an interpreter's end; each writes a word into a file.

    Args:
        path: The file, without the incarnation's number.
        fails: Raise in the second ``collect``.
    """

    def __init__(self, path: str, fails: bool = False) -> None:
        self.path = path
        self.fails = fails
        self.collected = 0

    def setup(self, context: WorkerContext) -> None:
        self.path = f"{self.path}.{context.incarnation}"
        atexit.register(write, self.path, "atexit")
        weakref.finalize(Path, write, self.path, "finalize")
        util.Finalize(None, write, (self.path, "multiprocessing"), exitpriority=1)
        threading._register_atexit(write, self.path, "threading")  # type: ignore[attr-defined]
        atexit.register(lambda: write(self.path, f"loop {use_run()}"))
        atexit.register(lambda: 1 / 0)
        self.folder = tempfile.TemporaryDirectory(prefix="child-")
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.pool.submit(int).result()

    def collect(self) -> Any:
        self.collected += 1
        if self.fails and self.collected == 2:
            raise ValueError("on purpose")
        return {"x": torch.zeros(1)}

    def on_command(self, command: str, data: Any) -> Any:
        return self.folder.name

    def teardown(self) -> None:
        write(self.path, "teardown")


class LeavesUnwillingly(Leaving):
    """Has an exit handler that never returns, after those that write."""

    def setup(self, context: WorkerContext) -> None:
        atexit.register(threading.Event().wait)
        super().setup(context)


class Sharing(Worker):
    """Makes named shared memory and never gives it back.

    Args:
        where: "here", in a "spawn", "fork" or "forkserver" child of multiprocessing, or "nowhere".
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.name = ""
        self.tracker: int | None = None

    def setup(self, context: WorkerContext) -> None:
        if self.where == "here":
            self.memory = shared_memory.SharedMemory(create=True, size=4096)
            self.name = self.memory.name
        elif self.where != "nowhere":
            ctx: Any = multiprocessing.get_context(self.where)
            ours, theirs = ctx.Pipe()
            self.child = ctx.Process(target=share_and_stay, args=(theirs,), daemon=True)
            self.child.start()
            self.name, self.tracker = ours.recv()
        self.tracker = self.tracker or tracker_pid()

    def collect(self) -> Any:
        return {"x": torch.zeros(1)}

    def on_command(self, command: str, data: Any) -> Any:
        return os.getpid(), self.name, self.tracker


def tracker_pid() -> int | None:
    """Return the resource tracker that this process has started."""
    return resource_tracker._resource_tracker._pid


def share_and_stay(connection: Any) -> None:
    """Make named shared memory, tell its name and the tracker, and end only by a signal."""
    memory = shared_memory.SharedMemory(create=True, size=4096)
    connection.send((memory.name, tracker_pid()))
    signal.pause()


class AtATerminal(Worker):
    """Uses the controlling terminal in one of many ways, once an experience.

    Args:
        use: "write", "configure", "read", or "child".
    """

    def __init__(self, use: str) -> None:
        self.use = use

    def collect(self) -> Any:
        outcome = 0
        terminal = os.open("/dev/tty", os.O_RDWR)
        try:
            if self.use == "write":
                os.write(terminal, b"a word\n")
            elif self.use == "configure":
                termios.tcsetattr(terminal, termios.TCSADRAIN, termios.tcgetattr(terminal))
            elif self.use == "child":
                os.set_inheritable(terminal, True)
                words = f"import os; os.write({terminal}, b'a word\\n')"
                program = (sys.executable, "-S", "-c", words)
                outcome = os.spawnv(os.P_WAIT, sys.executable, program)
            else:
                os.read(terminal, 1)
        except OSError as error:
            outcome = error.errno or -1
        finally:
            os.close(terminal)
        return {"outcome": torch.tensor([outcome])}


class Orphaning(Worker):
    """Starts a process whose own child outlives it, and tells whose child that is then."""

    def collect(self) -> Any:
        return {"x": torch.zeros(1)}

    def on_command(self, command: str, data: Any) -> Any:
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            if os.fork() == 0:
                os.setsid()
                os.write(tell, b"%d" % os.getpid())
                signal.pause()
            os._exit(0)
        os.waitpid(pid, 0)
        orphan = int(os.read(told, 64))
        parent = Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(orphan, signal.SIGKILL)
        return int(parent) == os.getpid()


class SharesMuch(Worker):
    """Delivers 40 MB each time, which stays in shared memory, and keeps nothing of its own."""

    def setup(self, context: WorkerContext) -> None:
        self.data = torch.zeros(10_000_000)

    def collect(self) -> Any:
        return {"x": self.data}


class Holding(Worker):
    """Holds a model and delivers what it makes of nothing.

    Args:
        make_model: Returns the model.
    """

    def __init__(self, make_model: Callable[[], Any]) -> None:
        self.make_model = make_model

    def setup(self, context: WorkerContext) -> None:
        self.model = self.make_model()

    def collect(self) -> Any:
        return {"x": torch.zeros(1)}


class Nameless(Holding):
    """Calls its network ``net``, as other libraries do."""

    def setup(self, context: WorkerContext) -> None:
        self.net = self.make_model()


class Agent:
    """What some libraries call a model: it has a network, and no ``load_state_dict``."""


class Delegating(Nameless):
    """Overrides ``load_weights`` and leaves the work to the default, which has no model."""

    def load_weights(self, weights: Any, version: int) -> None:
        super().load_weights(weights, version)


class TakesThemLate(Nameless):
    """Sets a ``load_weights`` of its own on itself."""

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        self.load_weights = self.take  # type: ignore[method-assign]
        self.version = 0

    def take(self, weights: Any, version: int) -> None:
        self.net.load_state_dict(dict(weights))
        self.version = version

    def collect(self) -> Any:
        return {"version": torch.tensor([self.version])}


class NotReady(Worker):
    """Its ``model`` is a property that raises."""

    @property
    def model(self) -> Any:  # type: ignore[override]
        raise LookupError("there is no model yet")

    def collect(self) -> Any:
        return {"x": torch.zeros(1)}

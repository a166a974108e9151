"""Faults at exact places: arm a failpoint, and the worker that reaches it fails there.

::

    worker = armed(MyWorker, Failpoint("collect", kill, worker_id=1, hit=3))
    async with ParallelManager(worker, config=config) as manager:
        ...  # worker 1 is killed when it is about to collect its third experience

A *place* is a name. Every hook of a worker is a place: "setup", "collect", "reset", "on_command",
"configure", "teardown", and "load_weights" where it is overridden, each reached before the hook is
called.
"committed" is reached when the experience of a ``def collect`` has been sent. A worker's own code
has as many more as it likes, by calling ``failpoint("name")``, which costs next to nothing
where nothing is armed.

A *fault* is any picklable callable without arguments: one of the functions below, a
``functools.partial`` of one, or a bound ``Gate.hold``. Those that would end or stop the whole
process refuse to where it is the application's, which it is under the inline backend.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import os
import secrets
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keisei.child.process import Inherited
from keisei.ipc import ancestry
from keisei.worker import Worker, WorkerContext

ARM = "keisei.testing.arm"
"""The command that arms more failpoints in an ``armed`` worker; its data is a list of them."""

_HOOKS = ("load_weights", "configure", "reset", "teardown")
_EXPERIENCE = 3  # its place among what WorkerEndpoints.detach() gives away
_QUEUES = 4
_HEADER = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Failpoint:
    """One fault at one place.

    Attributes:
        place: The name of the place.
        fault: What happens there.
        worker_id: In which slot; ``None`` in all.
        incarnation: In which process of the slot; ``None`` in all.
        hit: At which arrival after arming, from 1 on; ``None`` at every one.
    """

    place: str
    fault: Callable[[], object]
    worker_id: int | None = None
    incarnation: int | None = 0
    hit: int | None = 1


def armed(factory: Callable[[], Worker], *failpoints: Failpoint) -> Callable[[], Worker]:
    """Return a picklable factory of the same workers, with failpoints armed in them."""
    return functools.partial(_build, factory, failpoints)


def failpoint(place: str) -> None:
    """Say that a place is reached; the fault that is armed for it, if any, happens here.

    Call it in a hook, in a coroutine or task of one, or in ``asyncio.to_thread``.
    """
    armory = _armory.get()
    if armory is not None:
        armory.reach(place)


class _Armory:
    """The failpoints armed in one worker, and how often each was reached since."""

    def __init__(self, context: WorkerContext) -> None:
        self._worker = (context.worker_id, context.incarnation)
        self.turn_soon = context._turn_soon  # noqa: SLF001 - a worker of one's own has no use for it
        self._armed: list[_Armed] = []

    def arm(self, failpoints: Iterable[Failpoint]) -> None:
        worker_id, incarnation = self._worker
        self._armed += [
            _Armed(one)
            for one in failpoints
            if one.worker_id in (None, worker_id) and one.incarnation in (None, incarnation)
        ]

    def reach(self, place: str) -> None:
        here = [one for one in self._armed if one.failpoint.place == place]
        for one in here:
            one.hits += 1
        for one in here:
            if one.failpoint.hit in (None, one.hits):
                one.failpoint.fault()


@dataclass(slots=True)
class _Armed:
    failpoint: Failpoint
    hits: int = 0


# Of the worker in whose task this is: under the inline backend several share a process.
_armory: ContextVar[_Armory | None] = ContextVar("keisei_armory", default=None)


def _build(factory: Callable[[], Worker], failpoints: tuple[Failpoint, ...]) -> Worker:
    worker = factory()
    replacing: dict[str, Callable[..., Any]] = {
        place: _reaching(place, getattr(worker, place))
        for place in _HOOKS
        if place != "load_weights" or type(worker).load_weights is not Worker.load_weights
    }
    replacing["setup"] = functools.partial(_setup, worker.setup, failpoints)
    replacing["collect"] = _collecting(worker.collect)
    replacing["on_command"] = _commanded(worker.on_command)
    vars(worker).update(replacing)
    return worker


def _setup(hook: Callable[..., Any], failpoints: tuple[Failpoint, ...], context: Any) -> Any:
    armory = _Armory(context)
    armory.arm(failpoints)
    _armory.set(armory)
    failpoint("setup")
    return hook(context)


def _reaching(place: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    def reach_and_call(*args: Any) -> Any:
        failpoint(place)
        return hook(*args)

    return reach_and_call


def _collecting(hook: Callable[[], Any]) -> Callable[[], Any]:
    """Stay what the hook is, ``def`` or ``async def``: the runtime asks."""
    if inspect.iscoroutinefunction(hook):

        async def reach_and_await() -> Any:
            failpoint("collect")
            return await hook()

        return reach_and_await

    def reach_and_call() -> Any:
        failpoint("collect")
        result = hook()
        armory = _armory.get()
        if armory is not None:
            armory.turn_soon(failpoint, "committed")  # the frame is sent before the loop turns
        return result

    return reach_and_call


def _commanded(hook: Callable[..., Any]) -> Callable[..., Any]:
    def arm_or_call(command: str, data: Any) -> Any:
        armory = _armory.get()
        if command == ARM and armory is not None:
            return armory.arm(data)
        failpoint("on_command")
        return hook(command, data)

    return arm_or_call


# faults


def throw(error: BaseException) -> None:
    """Raise ``error``, a picklable exception."""
    raise error


def kill() -> None:
    """End this process by SIGKILL."""
    _only_in_a_process_of_its_own("kill")
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop this process by SIGSTOP; it goes on at SIGCONT."""
    _only_in_a_process_of_its_own("stop")
    os.kill(os.getpid(), signal.SIGSTOP)


def exit_now(code: int = 0) -> None:
    """End this process by ``os._exit``, without a goodbye."""
    _only_in_a_process_of_its_own("exit")
    os._exit(code)


def segfault() -> None:
    """Read from address 0."""
    _only_in_a_process_of_its_own("segfault")
    ctypes.string_at(0)


def hang() -> None:
    """Stay in Python for ever; other threads run."""
    _only_in_a_process_of_its_own("hang")
    while True:
        pass


def hold_gil() -> None:
    """Stay in C for ever and keep the interpreter's lock: no other thread runs Python."""
    _only_in_a_process_of_its_own("hold_gil")
    while True:
        ctypes.PyDLL(None).pause()


def garbage() -> None:
    """Send a frame of nonsense to the application, and go on."""
    _only_in_a_process_of_its_own("garbage")
    nonsense = secrets.token_bytes(64)
    os.write(Inherited.fds[_EXPERIENCE], _HEADER.pack(len(nonsense)) + nonsense)


def torn_frame() -> None:
    """Send the first part of a frame to the application, and end by SIGKILL in its middle."""
    _only_in_a_process_of_its_own("torn_frame")
    os.write(Inherited.fds[_EXPERIENCE], _HEADER.pack(1 << 20) + bytes(1000))
    kill()


def close_queues() -> None:
    """Close every queue to the application, and go on."""
    _only_in_a_process_of_its_own("close_queues")
    for fd in Inherited.fds[:_QUEUES]:
        with socket.socket(fileno=os.dup(fd)) as queue:
            queue.shutdown(socket.SHUT_RDWR)


def _only_in_a_process_of_its_own(fault: str) -> None:
    if not Inherited.fds:
        raise RuntimeError(
            f"the fault {fault!r} would hit the application: this worker is not in a process of "
            "its own (the inline backend?)"
        )


# gates


class Visitor:
    """One caller that is held at a gate.

    Attributes:
        label: What it said about itself.
        pid: Its process.
    """

    def __init__(self, connection: socket.socket, label: str, pid: int) -> None:
        self._connection = connection
        self.label = label
        self.pid = pid

    def release(self) -> None:
        """Let it go on."""
        self._connection.close()

    async def gone(self) -> None:
        """Wait until its process has ended, or is not held any more for another reason."""
        await asyncio.get_running_loop().sock_recv(self._connection, 1)


class Gate:
    """Holds each worker that reaches it until the test lets it go.

    ::

        with Gate() as gate:
            worker = armed(MyWorker, Failpoint("collect", gate.hold))
            ...
            visitor = await gate.visitor()  # the worker stands there, now
            visitor.release()

    The application makes it and waits for visitors; pickled copies, in any process, call
    ``hold`` or await ``wait``. An open gate, or a gate whose maker has gone, holds no worker.
    """

    def __init__(self) -> None:
        """Make a gate; close it in the end, which opens it."""
        self._visitors: list[Visitor] = []
        self._folder: str | None = None
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX)
        name = f"keisei-gate-{secrets.token_hex(8)}"
        if sys.platform == "linux":
            self._address = f"\0{name}"  # a name that no file system has
        else:
            self._folder = tempfile.mkdtemp(prefix=ancestry.prefix("keisei-gate"))
            self._address = str(Path(self._folder) / "gate")
        self._listener.setblocking(False)
        self._listener.bind(self._address)
        self._listener.listen(128)

    def __reduce__(self) -> tuple[Any, ...]:
        return _gate_at, (self._address,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.open()

    # the application's side

    async def visitor(self) -> Visitor:
        """Wait until somebody stands at the gate, and return who; first come, first served.

        Raises:
            RuntimeError: The gate is open.
        """
        if self._listener is None:
            raise RuntimeError("nobody stands at a gate that is open")
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._listener)
        connection.setblocking(False)
        said = await loop.sock_recv(connection, 4096)
        pid, _, label = said.decode().partition(" ")
        visitor = Visitor(connection, label, int(pid))
        self._visitors.append(visitor)
        return visitor

    def open(self) -> None:
        """Let everybody go on, now and from now on; may be called again."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for visitor in self._visitors:
            visitor.release()
        self._visitors.clear()
        if self._folder is not None:
            Path(self._address).unlink()
            Path(self._folder).rmdir()
            self._folder = None

    # the side of those who are held

    def hold(self, label: object = "") -> None:
        """Stand at the gate until it lets go; blocks this thread.

        Args:
            label: Shown to the test as ``str(label)``; without a newline, below 4 KB.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(self._address)
                connection.sendall(f"{os.getpid()} {label}".encode())
                connection.recv(1)
            except (ConnectionError, FileNotFoundError):
                return  # the gate is open

    async def wait(self, label: object = "") -> None:
        """Stand at the gate until it lets go, without blocking the loop. Safe to cancel."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, self._address)
                await loop.sock_sendall(connection, f"{os.getpid()} {label}".encode())
                await loop.sock_recv(connection, 1)
            except (ConnectionError, FileNotFoundError):
                return  # the gate is open


def _gate_at(address: str) -> Gate:
    """Make the copy of a gate that only those who are held use."""
    gate = Gate.__new__(Gate)
    gate._address = address  # noqa: SLF001 - its own class
    return gate

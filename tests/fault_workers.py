"""Workers and faults for the tests of the catalogue; child processes import this module."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from keisei.child.process import Inherited
from keisei.ipc.layout import describe
from keisei.ipc.weights import WeightsPublisher
from keisei.protocol import messages
from keisei.protocol.endpoints import REPLY
from keisei.testing import failpoints
from keisei.testing.failpoints import Gate
from keisei.worker import Experience, Worker, WorkerContext
from pool_workers import Counting

# exceptions that are hard to tell about


class NotAnException(BaseException):
    """Passes every ``except Exception``."""


class NeedsArguments(Exception):
    """Cannot be rebuilt from its ``args``."""

    def __init__(self, first: int, *, second: int) -> None:
        super().__init__()
        self.sum = first + second


class Frozen(Exception):
    """Refuses attributes, such as ``__notes__``, as a frozen dataclass does."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class Speechless(Exception):
    """Raises when it is asked what it says."""

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class Unpicklable(Exception):
    """Ends the process that pickles it."""

    def __reduce__(self) -> NoReturn:
        raise SystemExit(5)


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1) + 1


def chain() -> NoReturn:
    """Raise an error that is its own cause."""
    error = ValueError("a circle")
    error.__cause__ = error
    raise error


def run_out_of_memory() -> object:
    """Allocate more address space than this process may have."""
    used = address_pages() * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    return bytearray(1 << 30)


def address_pages() -> int:
    """Return the pages of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0])


ERRORS: dict[str, Any] = {
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "StopIteration": lambda: StopIteration(7),
    "StopAsyncIteration": StopAsyncIteration,
    "NotAnException": lambda: NotAnException("of its own kind"),
    "NeedsArguments": lambda: NeedsArguments(1, second=2),
    "Frozen": lambda: Frozen("stiff"),
    "Speechless": Speechless,
    "Unpicklable": lambda: Unpicklable("held fast"),
    "ExceptionGroup": lambda: ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
    "surrogates": lambda: ValueError("\udcff"),
    "huge": lambda: ValueError("x" * (8 << 20)),
}


def throw_named(name: str) -> NoReturn:
    error: BaseException = ERRORS[name]()
    raise error


# faults of the whole process


def abort() -> None:
    ctypes.CDLL(None).abort()


def c_exit(code: int) -> None:
    ctypes.CDLL(None)._exit(code)


def exit_through_c(code: int) -> None:
    """Call ``exit`` of the C library, which runs what was registered with ``atexit`` there."""
    ctypes.PyDLL(None).exit(code)


def kill_others(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kill_own_group() -> None:
    os.killpg(0, signal.SIGKILL)


def deadlock() -> None:
    """Wait for ever for a lock, while another thread is as lively as can be."""
    threading.Thread(target=_spin, daemon=True).start()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _spin() -> NoReturn:
    while True:
        threading.Event().wait(0.01)


def ignore_signals() -> None:
    """Ignore every signal that can be ignored, then block what remains."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def ignore_signals_and_hang() -> NoReturn:
    ignore_signals()
    while True:
        pass


def shout() -> None:
    """Write 10 MB to each standard stream, from Python and past it."""
    line = b"x" * 99 + b"\n"
    for _ in range(50_000):
        os.write(1, line)
        os.write(2, line)
    for _ in range(50_000):
        sys.stdout.write(line.decode())
        sys.stderr.write(line.decode())
    ctypes.CDLL(None).puts(b"from C")


SHOUTED = "y" * 99
NUM_SHOUTED = 100_000


def shout_and_die(last_line: bytes) -> None:
    """Write 10 MB to standard error, from Python and past it, then crash."""
    for _ in range(NUM_SHOUTED // 2):
        os.write(2, f"{SHOUTED}\n".encode())
        sys.stderr.write(f"{SHOUTED}\n")
    sys.stderr.flush()
    os.write(2, last_line)
    os.kill(os.getpid(), signal.SIGSEGV)


def complain_and_exit() -> NoReturn:
    os.write(2, b"no display\n")
    os._exit(1)


def close_standard_streams() -> None:
    for fd in (0, 1, 2):
        os.close(fd)


def replace_standard_streams() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def fork_a_child_that_stays() -> int:
    """Leave a child behind that has inherited every descriptor of this process."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    return pid


def start_a_daemon() -> int:
    """Leave a process behind that leads a session of its own, holding no descriptor of ours."""
    import subprocess

    code = "import signal; signal.pause()"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid


def set_an_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    signal.pause()


def unsettle() -> None:
    """Change about everything of its own process that a library might rely on."""
    import random
    import time

    os.chdir("/")
    os.umask(0o777)
    os.environ.clear()
    sys.path.clear()
    random.seed(0)
    torch.manual_seed(0)
    time.time = lambda: 0.0  # type: ignore[assignment]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asyncio.set_event_loop(asyncio.new_event_loop())
    sys.setrecursionlimit(200)
    threading.Thread(target=_spin, daemon=True).start()


def steal_descriptors() -> None:
    """Close every descriptor from 3 on."""
    os.closerange(3, 1000)


def shut_down_at(fd: int) -> None:
    os.close(fd)


# workers


class Growing(Counting):
    """Keeps 8 MiB more with every experience."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[bytearray] = []

    def experience(self) -> Experience:
        self.kept.append(bytearray(b"x") * (8 << 20))
        return super().experience()


class Talkative(Counting):
    """Sends experiences whose frame is larger than what the operating system buffers."""

    def experience(self) -> Experience:
        made = super().experience()
        return Experience(made.data, {"text": bytes([self.number % 256]) * 2_000_000})


class Failing(Counting):
    """Fails at its start where it is told to.

    Args:
        where: "factory", "setup" or "import".
        how: What happens there.
    """

    def __init__(self, where: str, how: Any) -> None:
        super().__init__()
        self.where, self.how = where, how
        if where == "factory":
            how()

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        if self.where == "setup":
            self.how()


class CrashesWhenUnpickled:
    """A factory with ``ballast`` that ends the process that unpickles it by SIGSEGV."""

    def __init__(self, ballast: int) -> None:
        self.ballast = bytes(ballast)

    def __reduce__(self) -> tuple[Any, ...]:
        return _crash, (self.ballast,)

    def __call__(self) -> Worker:
        raise NotImplementedError


def _crash(_: bytes) -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError


class Stopped(Counting):
    """Stands at a gate, by turns, wherever a stop may find it."""

    def __init__(self, gate: Gate, place: str) -> None:
        super().__init__(gate=None)
        self.at, self.place = gate, place
        if place == "factory":
            gate.hold(place)

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        if self.place == "setup":
            self.at.hold("setup")

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        super().load_weights(weights, version)
        if self.place == "load_weights":
            self.at.hold("load_weights")


class HeldWhenUnpickled:
    """A factory at whose unpickling the worker stands at a gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __reduce__(self) -> tuple[Any, ...]:
        return _hold_at, (self.gate,)

    def __call__(self) -> Worker:
        return Counting()


def _hold_at(gate: Gate) -> HeldWhenUnpickled:
    gate.hold("unpickling")
    return HeldWhenUnpickled(gate)


class Poisoned(Counting):
    """Fails by ``how`` on weights that are not finite; tells the weights that it has."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how
        self.value = 0.0

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        super().load_weights(weights, version)
        self.value = float(weights["w"][0])
        if not torch.isfinite(weights["w"]).all():
            self.how()

    def experience(self) -> Experience:
        made = super().experience()
        return Experience({**made.data, "value": torch.tensor([self.value])}, made.info)


class Large(Worker):
    """Delivers tensors as large as it is told by a command."""

    size = 0

    def on_command(self, command: str, data: Any) -> Any:
        self.size = data

    def collect(self) -> Experience:
        data = torch.empty(self.size, dtype=torch.uint8)
        if self.size:
            data[0], data[-1] = 1, 2
        return Experience({"data": data, "empty": torch.empty(0, 4)}, num_steps=1)


class Slow(Counting):
    """Is slow but moves: ``collect`` takes ``turns`` visits to a gate, with progress between."""

    def __init__(self, gate: Gate, turns: int) -> None:
        super().__init__()
        self.visits, self.turns = gate, turns

    def collect(self) -> Experience:
        if self.number == 0 and self.context.incarnation == 0:
            for turn in range(self.turns):
                self.visits.hold(turn)
                self.context.progress()
        return self.experience()


class Leaving(Counting):
    """Touches what the application must not lose: threads, children, tasks and files."""

    async def setup(self, context: WorkerContext) -> None:  # type: ignore[override]
        super().setup(context)
        threading.Thread(target=_spin, name="not a daemon").start()
        self.pid = fork_a_child_that_stays()
        self.task = asyncio.get_running_loop().create_task(self._stay())

    async def _stay(self) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


class CannotPickle:
    """Raises ``error`` when it is pickled."""

    def __init__(self, error: str) -> None:
        self.error = error

    def __reduce__(self) -> NoReturn:
        throw_named(self.error) if self.error in ERRORS else None
        raise TypeError("it stays here")


class Bomb:
    """Raises SystemExit where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return throw_named, ("SystemExit",)


def _unsendable(error: str) -> object:
    return Bomb() if error == "bomb" else CannotPickle(error)


class Replying(Counting):
    """Answers with what is asked of it, however hard to send."""

    def on_command(self, command: str, data: Any) -> Any:
        match command:
            case "reply":
                return _unsendable(data)
            case "throw":
                return throw_named(data)
            case "large":
                return bytes(data)
        return super().on_command(command, data)


class BadInfo(Counting):
    """The second experience of worker 1 has an ``info`` that cannot be sent, or received."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error = error

    def experience(self) -> Experience:
        made = super().experience()
        if self.number == 2 and (self.context.worker_id, self.context.incarnation) == (1, 0):
            return Experience(made.data, {"info": _unsendable(self.error)})
        return made


def _generator() -> Any:
    yield {"x": torch.zeros(1)}


async def _coroutine_of_none() -> None: ...


NOT_EXPERIENCES: dict[str, tuple[Any, str]] = {
    "None": (lambda: None, "must be a mapping of names to tensors or arrays, not NoneType"),
    "generator": (_generator, "not generator"),
    "coroutine": (_coroutine_of_none, "not NoneType"),
    "list": (lambda: [torch.zeros(1)], "not list"),
    "empty": (dict, "must hold at least one tensor"),
    "float": (lambda: {"x": 1.0}, "experience['x'] is float"),
    "object array": (lambda: {"x": _object_array()}, "dtype object"),
    "key": (lambda: {1: torch.zeros(1)}, "experience keys must be strings, not 1"),
    "sparse": (lambda: {"x": torch.eye(2).to_sparse()}, "sparse"),
    "meta": (lambda: {"x": torch.zeros(1, device="meta")}, "meta device"),
    "steps": (lambda: Experience({"x": torch.zeros(1)}, num_steps=-1), "must not be negative"),
    "steps of a kind": (lambda: Experience({"x": torch.zeros(1)}, num_steps="2"), "str"),
    "info": (lambda: Experience({"x": torch.zeros(1)}, info=5), "int"),
}


def _object_array() -> Any:
    import numpy as np

    return np.array([object()])


class BadResult(Counting):
    """The second experience of worker 1 is none."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.result = name

    def collect(self) -> Any:
        if self.number == 1 and (self.context.worker_id, self.context.incarnation) == (1, 0):
            return NOT_EXPERIENCES[self.result][0]()
        return super().collect()


def finite() -> Poisoned:
    return Poisoned(int)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4,), value)}


def close_queues_and_hang() -> NoReturn:
    failpoints.close_queues()
    failpoints.hang()
    raise AssertionError


def _send(payload: bytes, head: int | None = None) -> None:
    header = struct.pack("<Q", len(payload) if head is None else head)
    os.write(Inherited.fds[3], header + payload)


def _send_reply(payload: bytes) -> None:
    """Send a frame, of whatever size, where replies are expected."""
    reply = Inherited.fds[REPLY]
    rest = memoryview(struct.pack("<Q", len(payload)) + payload)
    while rest:
        select.select([], [reply], [])
        rest = rest[os.write(reply, rest) :]


def large_nonsense() -> NoReturn:
    """Answer with two megabytes that are no frame, and stay."""
    _send_reply(b"\xff" * (2 << 20))
    failpoints.hang()
    raise AssertionError


def large_pickle_of_another_thing() -> NoReturn:
    _send_reply(pickle.dumps([42, bytes(2 << 20)]))
    failpoints.hang()
    raise AssertionError


def large_bomb() -> NoReturn:
    """Answer with what would end the process that unpickles it."""
    _send_reply(pickle.dumps([Bomb(), bytes(2 << 20)]))
    failpoints.hang()
    raise AssertionError


def large_message_of_another_kind() -> NoReturn:
    """Answer with what an application says to a worker."""
    _send_reply(whole(messages.pack(messages.Command(1, "echo", bytes(2 << 20)))))
    failpoints.hang()
    raise AssertionError


def whole(frame: Any) -> bytes:
    """Return a packed frame as one piece."""
    return b"".join(frame) if isinstance(frame, tuple) else bytes(frame)


LARGE_LIES = [
    large_nonsense,
    large_pickle_of_another_thing,
    large_bomb,
    large_message_of_another_kind,
]


def _frame_about(**lie: Any) -> bytes:
    truth = {
        "sequence": 0,
        "version": 0,
        "segment": 0,
        "segment_nbytes": 0,
        "cell": 0,
        "stride": 64,
        "layout": describe({"x": torch.zeros(1)}),
        "num_steps": 1,
        "info": None,
        "seed": 0,
    }
    return messages.pack(messages.ExperienceFrame(**truth | lie))


def another_thing() -> None:
    """Send an integer where an experience is expected."""
    _send(pickle.dumps(42))


def a_bomb() -> None:
    _send(pickle.dumps(Bomb()))


def a_missing_segment() -> None:
    """Speak of memory that was never shared."""
    _send(_frame_about(segment=77))


def a_cell_beyond_the_segment() -> None:
    """Speak of memory beyond the end of what is shared."""
    _send(_frame_about(cell=1000))


def a_descriptor_that_is_missing() -> None:
    _send(_frame_about(segment=1, segment_nbytes=8192))


def a_field_beyond_the_cell() -> None:
    """Speak of a tensor that is larger than its cell."""
    _send(_frame_about(layout=describe({"x": torch.zeros(1 << 20)})))


def no_layout_that_was_told() -> None:
    _send(_frame_about(layout=None))


def a_message_without_its_fields() -> None:
    _send(pickle.dumps((13, 1, 2)))


def an_enormous_length() -> None:
    """Announce a frame of 2^54 bytes, which nobody has memory for."""
    _send(b"", 1 << 54)


def an_endless_frame() -> None:
    """Announce more than is ever sent, and go on as usual: all that follows is its body."""
    _send(b"", 1 << 30)


LIES = [
    another_thing,
    a_bomb,
    a_missing_segment,
    a_cell_beyond_the_segment,
    a_descriptor_that_is_missing,
    a_field_beyond_the_cell,
    no_layout_that_was_told,
    a_message_without_its_fields,
    an_enormous_length,
]


def burn_10() -> None:
    """Start ten processes that burn whatever processors there are; they die with this one."""
    for _ in range(10):
        if os.fork() == 0:
            failpoints.hang()


class Tethered(Counting):
    """Holds a connection that ends with it and its child, and says when it is where it shall be.

    Args:
        address: Of a listening socket.
        states: Of each worker: "starting", "busy", "C", "stopped", or "idle" without a credit.
    """

    def __init__(self, address: str, states: Sequence[str]) -> None:
        super().__init__()
        self.states = states
        self.tether = socket.socket(socket.AF_UNIX)
        self.tether.connect(f"\0{address}")

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        fork_a_child_that_stays()
        if self.states[context.worker_id] == "starting":
            self.tether.send(b"x")
            deadlock()

    def collect(self) -> Experience:
        if self.number == 0:
            self.tether.send(b"x")
            match self.states[self.context.worker_id]:
                case "busy":
                    failpoints.hang()
                case "C":
                    failpoints.hold_gil()
                case "stopped":
                    failpoints.stop()
        return self.experience()


# weights and memory


class Summing(Worker):
    """Tells the least and the largest of the weights that it has; zeros before the first."""

    range = torch.zeros(2)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.range = torch.stack([weights["w"].min(), weights["w"].max()])

    def collect(self) -> Experience:
        return Experience({"range": self.range}, num_steps=1)


class Varying(Counting):
    """Needs more memory at its second experience than at its first."""

    def experience(self) -> Experience:
        made = super().experience()
        return Experience({**made.data, "ballast": torch.zeros(1 + 100_000 * (self.number > 1))})


def die_while_publishing(reader: socket.socket) -> NoReturn:
    """Publish version 1, hand its memory over, and be killed when half of version 2 is copied."""
    copy = torch.Tensor.copy_

    def half(target: torch.Tensor, source: torch.Tensor, *args: Any) -> None:
        copy(target.reshape(-1)[: target.numel() // 2], source.reshape(-1)[: target.numel() // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        publisher = WeightsPublisher(describe(weights(0.0)))
        publisher.publish(weights(1.0))
        socket.send_fds(reader, [b"!"], [publisher.fd])
        torch.Tensor.copy_ = half  # type: ignore[method-assign,assignment]
        publisher.publish(weights(2.0))
    finally:
        os._exit(1)


def fill_shared_memory() -> None:
    """Have every request for shared memory refused, as a full tmpfs does."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = refuse


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

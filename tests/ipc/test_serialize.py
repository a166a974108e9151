"""serialize: values as frames, tensors as plain bytes, and errors that name the value."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import mmap
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc_helpers import open_fds, turn
from keisei.exceptions import SerializationError
from keisei.ipc import serialize
from keisei.ipc.wire import nbytes_of
from torch_helpers import DTYPES


def round_trip(value):
    return serialize.loads(serialize.dumps(value))


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor whose bytes are all different where the dtype allows."""
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return (torch.arange(count) % 3 == 0).view(shape)
    raw = torch.arange(count * dtype.itemsize).to(torch.uint8)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> list[int]:
    """Return a tensor's bytes: NaN equals NaN, and -0 differs from 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


# tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_any_kind_arrives_bit_for_bit(dtype):
    """Every dtype and every shape, empty and 0-dimensional ones included, keeps all its bits."""
    for shape in [(), (1,), (3, 5), (2, 3, 4), (0,), (3, 0, 2)]:
        tensor = sample(dtype, *shape)
        copy = round_trip(tensor)
        assert (copy.dtype, copy.shape, copy.device.type) == (dtype, shape, "cpu")
        assert bits(copy) == bits(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[::2, 1::2],
        lambda t: t[:, 2],
        lambda t: t[1, 1],
        lambda t: t[0].expand(3, 6),
        lambda t: t.flip(0),
        lambda t: torch.as_strided(t, (2, 2), (1, 3), 4),
        lambda t: torch.complex(t, t + 1).conj(),
        lambda t: torch.complex(t, t + 1).conj().imag,
        torch._neg_view,
    ],
)
def test_a_view_of_any_kind_arrives_dense(view):
    """Strided, expanded, conjugate and negated views arrive contiguous with their values."""
    tensor = view(torch.arange(24.0).view(4, 6))
    copy = round_trip(tensor)
    assert copy.is_contiguous()
    assert not copy.is_conj()
    assert not copy.is_neg()
    assert torch.equal(copy, tensor)


def test_a_slice_travels_without_the_rest_of_its_storage():
    """A small view of a large tensor is a small frame."""
    assert len(serialize.dumps(torch.zeros(1_000_000)[:10])) < 1000


def test_an_arrived_tensor_is_its_receivers_own():
    """What arrives can be written to, and shares memory with nothing else."""
    tensor = torch.arange(5)
    frame = serialize.dumps(tensor)
    first, second = serialize.loads(frame), serialize.loads(frame)
    first += 10
    assert (tensor.tolist(), second.tolist()) == ([0, 1, 2, 3, 4],) * 2
    assert first.tolist() == [10, 11, 12, 13, 14]


def test_a_tensor_arrives_without_its_graph():
    """Leaves and results that require gradients arrive as plain values."""
    leaf = torch.ones(3, requires_grad=True)
    for tensor in (leaf, leaf * 2):
        copy = round_trip(tensor)
        assert (copy.requires_grad, copy.grad_fn) == (False, None)
        assert torch.equal(copy, tensor)


def test_a_module_arrives_with_its_parameters():
    """Parameters stay parameters, with their requires_grad, so a module can go on learning."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module[0].bias.requires_grad_(False)
    copy = round_trip(module)
    assert [name for name, _ in copy.named_parameters()] == [
        name for name, _ in module.named_parameters()
    ]
    assert [p.requires_grad for p in copy.parameters()] == [True, False, True, True]
    assert all(type(p) is torch.nn.Parameter for p in copy.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    copy(torch.ones(4, 3)).sum().backward()
    assert copy[1].bias.grad.tolist() == [4.0, 4.0]


def test_tensors_inside_containers_arrive():
    """Tensors keep their places in nested values, and one that is there twice stays one."""
    shared = torch.arange(3)
    value = {"a": [shared, (torch.zeros(2), {"b": shared})], "c": {1, 2}, "d": None}
    copy = round_trip(value)
    assert copy["a"][0].tolist() == [0, 1, 2]
    assert copy["a"][1][0].tolist() == [0.0, 0.0]
    assert copy["a"][1][1]["b"] is copy["a"][0]
    assert (copy["c"], copy["d"]) == ({1, 2}, None)


def test_a_tensor_needs_no_descriptor_and_no_shared_memory():
    """Sending tensors opens nothing and leaves no file, as torch's own way would."""
    shared = Path("/dev/shm")
    before, files = open_fds(), set(shared.glob("torch*"))
    copies = [round_trip(torch.full((1000,), float(n))) for n in range(50)]
    assert open_fds() == before
    assert set(shared.glob("torch*")) == files
    assert not any(copy.is_shared() for copy in copies)


def test_a_frame_outlives_its_sender(tmp_path):
    """A tensor of a process that has ended is read as well as ever."""
    path = tmp_path / "frame"
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import os, torch\n"
        "from keisei.ipc import serialize\n"
        "frame = serialize.dumps({'weights': torch.arange(1000.0)})\n"
        "open(sys.argv[1], 'wb').write(frame)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code, path], check=False, timeout=60)
    assert ended.returncode == -9
    assert torch.equal(serialize.loads(path.read_bytes())["weights"], torch.arange(1000.0))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), r"torch\.sparse_coo tensor cannot travel"),
        (lambda: torch.zeros(2, device="meta"), r"NotImplementedError"),
    ],
)
def test_a_tensor_that_cannot_travel_is_named(make, reason):
    """Sparse tensors, and those without values, are refused with the reason."""
    with pytest.raises(SerializationError, match=rf"^the batch cannot be pickled \(.*{reason}"):
        serialize.dumps([make()], "the batch")


def test_frames_without_tensors_need_no_torch():
    """The module works, both ways, in a process that never loads torch."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from keisei.ipc import serialize\n"
        "value = {'a': [1, 2.5, b'x', (None, True)], 'b': 'text' * 1000}\n"
        "assert serialize.loads(serialize.dumps(value)) == value\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


# values of other kinds


@pytest.mark.parametrize(
    "value",
    [None, True, 7, -(2**70), 1.5, "text \ud800", b"bytes", (), [1], {"a": 1}, {1}, range(3)],
)
def test_plain_values_arrive_equal(value):
    """Plain values keep their type and value, from any kind of buffer."""
    frame = serialize.dumps(value)
    for data in (frame, bytearray(frame), memoryview(frame)):
        copy = serialize.loads(data)
        assert (type(copy), copy) == (type(value), value)


class Raising:
    """Raises what it was given while it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self):
        raise self.error


class Unwilling(BaseException):
    """Not even an Exception."""


def raise_at_load(error: BaseException) -> None:
    raise error


class RaisingAtLoad:
    """Raises what it was given while it is rebuilt."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self):
        return raise_at_load, (self.error,)


class Mute(Exception):
    """Cannot even say what happened."""

    def __str__(self) -> str:
        raise ValueError("nothing to say")


def told(error: BaseException) -> str:
    """Return how Python's own traceback names an error."""
    return traceback.format_exception_only(error)[-1].strip()


ERRORS = [SystemExit(3), ValueError("no"), RecursionError("deep"), Unwilling("never"), Mute()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_pickling_raises_is_one_error(error):
    """Even SystemExit in ``__reduce__`` becomes a SerializationError that says what and why."""
    expected = f"the command cannot be pickled ({told(error)})"
    with pytest.raises(SerializationError) as caught:
        serialize.dumps({"inside": [Raising(error)]}, "the command")
    assert str(caught.value) == expected
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_rebuilding_raises_is_one_error(error):
    """Even SystemExit while unpickling becomes a SerializationError that says what and why."""
    frame = serialize.dumps(RaisingAtLoad(error))
    with pytest.raises(SerializationError) as caught:
        serialize.loads(frame, "the reply")
    assert str(caught.value) == f"the reply cannot be unpickled ({told(error)})"


@pytest.mark.parametrize("value", [lambda: None, threading.Lock(), open_fds.__globals__])
def test_what_has_no_pickle_is_an_error(value):
    """Lambdas, locks and namespaces with modules are refused as SerializationError."""
    with pytest.raises(SerializationError, match=r"^value cannot be pickled \("):
        serialize.dumps([value])


def test_an_endless_value_is_an_error():
    """A value that is nested too deeply is refused, and the next one is packed as ever."""
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(SerializationError, match="RecursionError"):
        serialize.dumps(value)
    while value:
        value = value.pop()  # a deep list must be taken apart by hand, too
    assert round_trip([1]) == [1]


class Interrupting:
    """Has the user's Ctrl-C come while it is pickled, or rebuilt."""

    def __init__(self, direction: str) -> None:
        self.direction = direction

    def __reduce__(self):
        if self.direction == "dumps":
            signal.raise_signal(signal.SIGINT)
        return signal.raise_signal, (signal.SIGINT,)


def interrupting(direction: str):
    if direction == "dumps":
        return lambda: serialize.dumps(Interrupting(direction))
    frame = pickle.dumps(Interrupting(direction))
    return lambda: serialize.loads(frame)


@pytest.mark.parametrize("direction", ["dumps", "loads"])
def test_a_ctrl_c_stays_one(direction):
    """The signal's KeyboardInterrupt passes through: it is no error of the value."""
    with pytest.raises(KeyboardInterrupt):
        interrupting(direction)()


@pytest.mark.parametrize("form", ["function", "method", "partial"])
@pytest.mark.parametrize("direction", ["dumps", "loads"])
def test_a_ctrl_c_stays_one_with_any_handler(direction, form):
    """Handlers in Python, such as that of ``asyncio.run``, may raise it too."""

    class Handler:
        def handle(self, number, frame, more=None):
            raise KeyboardInterrupt

    def handle(number, frame):
        raise KeyboardInterrupt

    method = Handler().handle
    handler = {"function": handle, "method": method, "partial": partial(method, more=1)}[form]
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupting(direction)()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("large", [False, True])
def test_an_interrupt_that_a_value_raises_is_an_error_of_the_value(large):
    """It ends nothing but the attempt, on the main thread and on others."""
    value = [Raising(KeyboardInterrupt()), bytes(200_000 if large else 1)]
    with pytest.raises(SerializationError, match=r"cannot be pickled \(KeyboardInterrupt\)$"):
        serialize.dumps(value)
    frame = whole(serialize.dumps([RaisingAtLoad(KeyboardInterrupt()), value[1]]))
    with pytest.raises(SerializationError, match=r"cannot be unpickled \(KeyboardInterrupt\)$"):
        serialize.loads(frame)
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(serialize.loads, frame).exception(timeout=60)
    assert type(error) is SerializationError


@pytest.mark.parametrize(
    "data",
    [b"", b"nonsense", serialize.dumps({"a": 1})[:-3], b"cno_such_module\nthing\n."],
)
def test_bytes_that_are_no_frame_are_an_error(data):
    """Nonsense, a cut frame, and a class that is not here are refused as SerializationError."""
    with pytest.raises(SerializationError, match=r"^value cannot be unpickled \("):
        serialize.loads(data)


# large values


def whole(payload):
    return b"".join(payload) if isinstance(payload, tuple) else payload


def arrived(payload) -> memoryview:
    """Return a frame as its receiver has it, in memory of its own."""
    return memoryview(bytearray(whole(payload)))


def fortran():
    return np.asfortranarray(np.arange(120_000.0).reshape(300, 400))


LARGE_VALUES = {
    "tensor": lambda: torch.arange(100_000),
    "tensor of one byte each": lambda: torch.arange(300_000).to(torch.uint8),
    "strided tensor": lambda: torch.arange(400_000.0).view(400, 1000)[::2, 1::3].T,
    "array": lambda: np.arange(100_000),
    "Fortran array": fortran,
    "strided array": lambda: fortran()[::2, ::-1],
    "read-only array": lambda: np.frombuffer(bytes(range(256)) * 1000, dtype=np.uint8),
    "array of records": lambda: np.zeros(20_000, dtype=[("a", "f4"), ("b", "M8[ns]")]),
    "array of another byte order": lambda: np.arange(50_000, dtype=">i4"),
    "array of objects": lambda: np.array([{"a": 1}, None, 3] * 1000),
    "masked array": lambda: np.ma.masked_greater(np.arange(50_000), 77),
    "bytes": lambda: bytes(range(256)) * 10_000,
    "bytearray": lambda: bytearray(range(256)) * 1000,
    "text": lambda: "\N{MUSICAL SYMBOL G CLEF}x\ud800" * 50_000,
    "many small ones": lambda: [torch.full((3,), n) for n in range(2000)],
    "many numbers": lambda: list(range(200_000)),
    "everything": lambda: {
        "a": [torch.zeros(50_000), bytes(100_000)],
        "b": (np.ones(70_000), "text"),
        3: {"nested": torch.ones(3), "none": None},
    },
}


def same(one, other) -> bool:
    """Compare values of any kind, with their types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ma.MaskedArray):
        return bool((one.filled(-1) == other.filled(-1)).all())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", LARGE_VALUES)
def test_a_large_value_arrives_as_it_was(name):
    """Of any kind, from a frame that can be written to and from one that cannot."""
    value = LARGE_VALUES[name]()
    assert serialize.is_large(value)
    payload = serialize.dumps(value)
    assert same(serialize.loads(arrived(payload)), value)
    assert same(serialize.loads(whole(payload)), value)
    assert same(serialize.loads(payload), value)


@pytest.mark.parametrize("name", ["tensor", "strided tensor", "array", "strided array"])
def test_a_large_buffer_is_a_view_of_its_frame(name):
    """It is aligned, can be written to, and nothing was copied since it arrived."""
    frame = arrived(serialize.dumps(LARGE_VALUES[name]()))
    value = serialize.loads(frame)
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    start = np.frombuffer(frame, dtype=np.uint8).ctypes.data
    assert start <= array.ctypes.data < start + len(frame)
    assert (array.ctypes.data - start) % 64 == 0
    assert array.flags.writeable
    array[0] = 1


def test_a_large_value_is_told_as_it_was():
    """What changes after it was packed, or while it is being sent, changes nothing in its frame."""
    value = [torch.zeros(50_000), np.zeros(50_000), bytearray(100_000)]
    payload = serialize.dumps(value)
    for part in value:
        part[:] = b"x" * 100_000 if isinstance(part, bytearray) else 7
    copy = serialize.loads(arrived(payload))
    assert [int(part[-1]) for part in copy] == [0, 0, 0]


def test_large_bytes_are_not_copied_when_they_are_packed():
    """They cannot change, so the frame has the object itself."""
    value = bytes(100_000)
    assert any(part is value for part in serialize.dumps([value, {"again": value}]))


def test_a_buffer_that_is_there_twice_arrives_once():
    """Tensors, arrays and bytes that are shared inside a value are shared on arrival."""
    for one in (torch.zeros(50_000), np.zeros(50_000), bytes(100_000), bytearray(100_000)):
        payload = serialize.dumps({"a": one, "b": [one]})
        assert len(whole(payload)) < 1.5 * len(memoryview(one).cast("B") if not isinstance(
            one, torch.Tensor
        ) else one.numpy().tobytes())  # fmt: skip
        copy = serialize.loads(arrived(payload))
        assert copy["a"] is copy["b"][0]


def test_a_large_value_cut_anywhere_is_an_error():
    """Heads, lengths, buffers and pickles that are cut are refused, and so is what follows."""
    frame = whole(serialize.dumps([bytes(70_000), torch.zeros(20_000)]))
    for end in [*range(200), 70_000, 100_000, len(frame) - 1]:
        with pytest.raises(SerializationError):
            serialize.loads(memoryview(frame)[:end])
    with pytest.raises(SerializationError):
        serialize.loads(frame + b"\0")
    assert len(serialize.loads(frame)) == 2


@settings(max_examples=300)
@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_any_changed_byte_of_a_large_value_is_an_error_or_a_value(position, change):
    """Whatever its head, its lengths and its buffers say, nothing else is raised."""
    frame = bytearray(FRAME_OF_NUMBERS)
    frame[position % HEAD_OF_NUMBERS] ^= change
    with suppress(SerializationError):
        serialize.loads(memoryview(frame))


FRAME_OF_NUMBERS = whole(serialize.dumps([bytes(20_000), bytes(70_000)]))
HEAD_OF_NUMBERS = 20_100  # all but the pickle, which is trusted


# what is large


class Holder:
    def __init__(self, held) -> None:
        self.held = held


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held) -> None:
        self.held = held


class Unwatchable:
    @property
    def nbytes(self):
        raise RuntimeError("nothing to see here")


@dataclass
class Record:
    held: object
    number: int = 1


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)
BIG = torch.zeros(20_000)


@pytest.mark.parametrize(
    "value",
    [
        BIG,
        BIG.numpy(),
        bytes(70_000),
        "x" * 70_000,
        bytearray(70_000),
        1 << 600_000,
        [[[[[[[[BIG]]]]]]]],
        {"a": {"b": {"c": {"d": {"e": {"f": BIG}}}}}},
        {"x" * 70_000: 1},
        [bytes(1000)] * 100,
        [torch.zeros(1) for _ in range(1001)],
        dict.fromkeys(range(501)),
        set(range(1001)),
        deque(range(1001)),
        [[0] * 100 for _ in range(11)],
        Holder(BIG),
        Slotted(BIG),
        Record(Slotted([Holder(BIG)])),
        partial(print, BIG),
        partial(print, key=BIG),
        ValueError("x" * 70_000),
        torch.nn.Linear(200, 200),
        np.array([{"any": "thing"}, None]),
        np.zeros((300, 300))[::2],
        memoryview(bytes(70_000)),
        Unwatchable(),
        ENDLESS,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_large_by_its_bytes_or_by_its_count(value):
    """However deep the bytes lie, in whatever object, and however small each object is."""
    assert serialize.is_large(value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        12,
        1.5,
        "text",
        b"bytes",
        [],
        {},
        {"a": [1, 2, (3, {4})], "b": torch.zeros(10)},
        torch.zeros(16_000),
        torch.zeros(0, 1 << 40),
        np.zeros(8000),
        [0] * 900,
        Holder(Slotted(Record(1))),
        (print, len, Holder, "x"),
        ValueError("no"),
        dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
        Path("/tmp"),
        range(1 << 40),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_small_otherwise(value):
    """It is packed where it is, as one pickle."""
    assert not serialize.is_large(value)
    if not isinstance(value, Holder):
        assert type(serialize.dumps(value)) is bytes


def test_a_look_at_a_value_is_bounded():
    """However large a value is, no more than a thousand of its objects are looked at."""
    looked = 0

    class Counting(dict):
        def keys(self):
            nonlocal looked
            looked += len(self)
            return super().keys()

    value = [Counting({n: n for n in range(300)}) for _ in range(900)]
    assert serialize.is_large(value)
    assert looked <= 1000


# the loop beside it

MB = 1 << 20
HEAVY = {
    "tensor": lambda: torch.zeros(256 * MB, dtype=torch.uint8),
    "strided tensor": lambda: torch.zeros(256 * MB // 4).view(1 << 13, 1 << 13).T,
    "array": lambda: np.zeros(256 * MB, dtype=np.uint8),
    "strided array": lambda: np.zeros((1 << 12, 1 << 13))[:, ::2],
    "bytes": lambda: bytes(256 * MB),
    "bytearray": lambda: bytearray(256 * MB),
    "many tensors": lambda: [torch.zeros(1) for _ in range(30_000)],
    "many numbers": lambda: list(range(2_000_000)),
    "many objects": lambda: [Record(n) for n in range(100_000)],
}


@pytest.mark.parametrize("name", HEAVY)
async def test_the_loop_goes_on_beside_a_thread_that_packs_or_unpacks(name):
    """256 MB, or a hundred thousand objects: no turn of the loop has to wait for long."""
    value = HEAVY[name]()
    gc.collect()
    gc.disable()  # a collection belongs to neither
    try:
        payload, lag = await beside(serialize.dumps, value)
        assert lag < 0.02, "packing"
        frame = memoryview(mmap.mmap(-1, nbytes_of(payload)))
        at = 0
        for part in payload if isinstance(payload, tuple) else (payload,):
            frame[at : at + len(part)] = part
            at += len(part)
        del payload, part
        copy, lag = await beside(serialize.loads, frame)
        assert lag < 0.02, "unpacking"
        assert type(copy) is type(value)
        assert len(copy) == len(value)
    finally:
        gc.enable()


async def beside(work, argument):
    """Do ``work`` in a thread; return its result and the longest time that the loop was held up.

    What the machine took the processor away for, from either thread, is not counted.
    """
    loop, threads, worst = asyncio.get_running_loop(), [threading.get_native_id()], 0.0

    def do():
        threads.append(threading.get_native_id())
        return work(argument)

    def waited():
        stats = [Path(f"/proc/self/task/{thread}/schedstat").read_text() for thread in threads]
        return sum(int(stat.split()[1]) for stat in stats) / 1e9

    with ThreadPoolExecutor(1) as pool:
        working = loop.run_in_executor(pool, do)
        while len(threads) == 1:
            await turn()
        while not working.done():
            before, began = waited(), time.perf_counter()
            await turn()
            taken = time.perf_counter() - began
            worst = max(worst, taken - (waited() - before))
        return await working, worst

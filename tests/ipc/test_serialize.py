"""serialize: values as frames, tensors as plain bytes, and errors that name the value."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch

from ipc_helpers import open_fds
from keisei.exceptions import SerializationError
from keisei.ipc import serialize
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


@pytest.mark.parametrize("direction", ["dumps", "loads"])
def test_an_interrupt_stays_one(direction):
    """KeyboardInterrupt is the user's and passes through."""
    if direction == "dumps":
        with pytest.raises(KeyboardInterrupt):
            serialize.dumps(Raising(KeyboardInterrupt()))
    else:
        frame = pickle.dumps(RaisingAtLoad(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            serialize.loads(frame)


@pytest.mark.parametrize(
    "data",
    [b"", b"nonsense", serialize.dumps({"a": 1})[:-3], b"cno_such_module\nthing\n."],
)
def test_bytes_that_are_no_frame_are_an_error(data):
    """Nonsense, a cut frame, and a class that is not here are refused as SerializationError."""
    with pytest.raises(SerializationError, match=r"^value cannot be unpickled \("):
        serialize.loads(data)


# sizes


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (torch.zeros(10, 10), 400),
        (torch.zeros(0), 0),
        (torch.zeros(3, dtype=torch.bfloat16), 6),
        (b"12345", 5),
        (bytearray(7), 7),
        (memoryview(bytes(16)).cast("d"), 16),
        ("four", 4),
        (12, 64),
        (None, 64),
        ([], 0),
        ([b"12", b"345"], 2 * 8 + 5),
        ((torch.zeros(4), 1), 2 * 8 + 16 + 64),
        ({b"123"}, 8 + 3),
        ({"key": torch.zeros(25), "other": b"1"}, 101),
        ({"a": {"b": {"c": torch.zeros(1000)}}}, 4000),
        ({"a": {"b": {"c": {"d": torch.zeros(1000)}}}}, 4000),
        ({"a": {"b": {"c": {"d": {"e": torch.zeros(1000)}}}}}, 64),
    ],
)
def test_the_size_of_a_value_is_estimated(value, nbytes):
    """Buffers count their bytes, containers their items four levels deep, anything else 64."""
    assert serialize.estimated_size(value) == nbytes


def test_the_estimate_is_near_the_truth():
    """Where bytes dominate, the estimate is within 5 % of the frame's length."""
    value = {"states": [torch.zeros(100, 100) for _ in range(5)], "name": "x" * 1000}
    assert abs(serialize.estimated_size(value) / len(serialize.dumps(value)) - 1) < 0.05

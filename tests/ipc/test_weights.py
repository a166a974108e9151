"""Weights: published once, read whole by anybody, whatever happens to whom at which moment."""

from __future__ import annotations

import gc
import os
import re
import socket
import threading

import pytest
import torch

import ipc_helpers
from ipc_helpers import bounded, end_of, open_fds, pair_of_fds, process
from keisei.exceptions import WeightsError
from keisei.ipc import serialize, weights
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.layout import describe
from keisei.ipc.memory import PAGE
from keisei.ipc.weights import WeightsPublisher, WeightsReader
from torch_helpers import DTYPES, Copies


def filled(value: float) -> dict[str, torch.Tensor]:
    """Return weights of several sizes, every element ``value``."""
    return {
        "weight": torch.full((64, 33), float(value)),
        "bias": torch.full((33,), float(value), dtype=torch.float64),
        "scale": torch.full((), float(value)),
        "empty": torch.zeros(0),
    }


def value_of(tensors: dict[str, torch.Tensor]) -> float:
    """Return the one value that all elements have."""
    full = [tensor for tensor in tensors.values() if tensor.numel()]
    values = {v.item() for tensor in full for v in (tensor.min(), tensor.max())}
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    return values.pop()


class Pair:
    """A publisher and a reader on the same memory."""

    def __init__(self, first: dict[str, torch.Tensor]) -> None:
        self.publisher = WeightsPublisher(describe(first))
        self.reader = WeightsReader(os.dup(self.publisher.fd), self.publisher.layout)


@pytest.fixture
def pair():
    made = []

    def make(first=None):
        made.append(Pair(filled(0) if first is None else first))
        return made[-1].publisher, made[-1].reader

    yield make
    for one in made:
        one.publisher.close()
    made.clear()


# whole and in order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_every_dtype_arrive_bit_for_bit(pair, dtype):
    """Names, dtypes, shapes and every bit of what was published are what is read."""
    first = {}
    for shape in [(), (1,), (5, 3), (2, 3, 4), (0, 2)]:
        raw = torch.arange(torch.Size(shape).numel() * dtype.itemsize).to(torch.uint8)
        raw = raw % 2 if dtype is torch.bool else raw
        first[f"tensor {shape}"] = raw.view(dtype).view(shape)
    publisher, reader = pair(first)
    assert publisher.publish(first) == 1
    read, version = reader.read()
    assert version == 1
    assert list(read) == list(first)
    for copies in (read, publisher.newest()):
        for name, tensor in first.items():
            assert (copies[name].dtype, copies[name].shape) == (dtype, tensor.shape)
            assert torch.equal(
                copies[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            )


def test_versions_count_up(pair):
    """The versions are 1, 2, 3 …, and a reader always gets the newest with its number."""
    publisher, reader = pair()
    assert (publisher.version, reader.latest) == (0, 0)
    for number in range(1, 8):
        assert publisher.publish(filled(number)) == number
        assert (publisher.version, reader.latest) == (number, number)
        read, version = reader.read()
        assert (value_of(read), version) == (number, number)
        assert value_of(publisher.newest()) == number


def test_before_the_first_version_there_is_nothing_to_read(pair):
    """Reading before anything was published is an error, not zeros."""
    _, reader = pair()
    with pytest.raises(WeightsError, match=r"^no weights were published yet$"):
        reader.read()


def test_what_is_read_is_the_readers_own(pair):
    """A copy that was read, and one of the newest, are not touched by later versions."""
    publisher, reader = pair()
    publisher.publish(filled(1))
    read, newest = reader.read()[0], publisher.newest()
    for number in range(2, 5):
        publisher.publish(filled(number))
    assert (value_of(read), value_of(newest)) == (1, 1)


def test_weights_are_read_into_a_module(pair):
    """read_into fills parameters and buffers in place, as the module's own."""
    source = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    target = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    publisher, reader = pair(source.state_dict())
    publisher.publish(source.state_dict())
    places = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    assert reader.read_into(target.state_dict()) == 1
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])
        assert tensor.data_ptr() == places[name]
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_tensors_of_any_make_are_published(pair):
    """Strided and conjugate tensors, and those with a graph, are published as values."""
    wide = torch.arange(12.0).view(3, 4)
    made = {
        "transposed": wide.T,
        "graph": wide.clone().requires_grad_() * 2,
        "conjugate": torch.complex(wide, wide).conj(),
    }
    publisher, reader = pair(made)
    publisher.publish(made)
    read, _ = reader.read()
    assert all(torch.equal(read[name], tensor.detach()) for name, tensor in made.items())


def test_a_publish_copies_each_tensor_once(pair):
    """One copy_ per tensor, however many read; a check of the version copies nothing."""
    publisher, reader = pair()
    readers = [WeightsReader(os.dup(publisher.fd), publisher.layout) for _ in range(3)]
    first = filled(1)
    with Copies() as copies:
        publisher.publish(first)
    assert [name for name, _ in copies.seen] == ["copy_.default"] * len(first)
    with Copies() as copies:
        assert [one.latest for one in (reader, *readers)] == [1] * 4
    assert copies.seen == []
    targets = filled(0)
    with Copies() as copies:
        reader.read_into(targets)
    assert [name for name, _ in copies.seen] == ["copy_.default"] * len(targets)


# going back


def test_going_back_is_a_new_version(pair):
    """Revert publishes what lay before the newest, under the next number, without a copy."""
    publisher, reader = pair()
    publisher.publish(filled(10))
    publisher.publish(filled(20))
    with Copies() as copies:
        assert publisher.revert() == 3
    assert copies.seen == []
    read, version = reader.read()
    assert (value_of(read), version, publisher.version) == (10, 3, 3)
    assert publisher.publish(filled(40)) == 4
    assert value_of(reader.read()[0]) == 40
    assert publisher.revert() == 5
    assert (value_of(reader.read()[0]), value_of(publisher.newest())) == (10, 10)


def test_without_a_version_before_there_is_no_way_back(pair):
    """Revert is refused before the second version, and the newest stays what it is."""
    publisher, reader = pair()
    match = r"^there are no weights before the newest ones to go back to$"
    with pytest.raises(WeightsError, match=match):
        publisher.revert()
    publisher.publish(filled(1))
    with pytest.raises(WeightsError, match=match):
        publisher.revert()
    assert (value_of(reader.read()[0]), reader.latest) == (1, 1)


class Failing(dict):
    """Weights of which a tensor cannot be had."""

    def __getitem__(self, name):
        if name == "bias":
            raise RuntimeError("the device is gone")
        return super().__getitem__(name)


def test_a_publish_that_fails_publishes_nothing(pair):
    """The newest version stays readable, nobody can go back to the torn one, and the next works."""
    publisher, reader = pair()
    publisher.publish(filled(1))
    publisher.publish(filled(2))
    with pytest.raises(RuntimeError, match="the device is gone"):
        publisher.publish(Failing(filled(3)))
    read, version = reader.read()
    assert (value_of(read), version, publisher.version) == (2, 2, 2)
    with pytest.raises(WeightsError):
        publisher.revert()
    assert publisher.publish(filled(4)) == 3
    assert value_of(reader.read()[0]) == 4
    assert publisher.revert() == 4
    assert value_of(reader.read()[0]) == 2


# readers beside a publisher that never rests


def read_often(reader: WeightsReader, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read ``times`` times, and on until a read had to be repeated; check each version."""
    fences = 0
    fence = weights._fence

    def counting() -> None:
        nonlocal fences
        fences += threading.current_thread() is threading.main_thread()
        fence()

    monkeypatch.setattr(weights, "_fence", counting)
    newest = 0
    targets = {name: torch.zeros_like(view) for name, view in reader._arena.views[0].items()}
    reads = 0
    while reads < times or fences == 2 * reads:
        version = reader.read_into(targets)
        reads += 1
        assert value_of(targets) == version
        assert version >= newest
        newest = version
    monkeypatch.undo()


def test_a_reader_beside_a_busy_thread_never_sees_a_mixture(pair, monkeypatch):
    """Thousands of reads while another thread publishes are each one version, never backwards."""
    publisher, reader = pair()
    publisher.publish(filled(1))
    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            publisher.publish(filled(publisher.version + 1))

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        read_often(reader, 3000, monkeypatch)
    finally:
        stop.set()
        thread.join(timeout=30)
    assert publisher.version > 10


@bounded(100)
async def test_a_reader_beside_a_busy_process_never_sees_a_mixture(monkeypatch):
    """Thousands of reads while another process publishes are each one version, never backwards."""
    inward, outward = pair_of_fds()
    frames = FrameReader(socket.socket(fileno=inward))
    with process(ipc_helpers.publish_for_ever, outward):
        payload, fds = await frames.get()
        reader = WeightsReader(fds.claim(), serialize.loads(payload))
        await frames.get()  # the first version is there
        first = reader.latest
        read_often(reader, 2000, monkeypatch)
        assert reader.latest > first + 10
    frames.close()


# deaths


@bounded(100)
async def test_a_publisher_killed_in_a_write_leaves_the_version_before():
    """After SIGKILL between two tensors of version 3 everybody still reads version 2, whole."""
    inward, outward = pair_of_fds()
    frames = FrameReader(socket.socket(fileno=inward))
    with process(ipc_helpers.die_publishing, outward) as child:
        payload, fds = await frames.get()
        reader = WeightsReader(fds.claim(), serialize.loads(payload))
        assert await end_of(child) == -9
    torn = reader._arena.views[3 % weights.BUFFERS]
    assert (torn["first"][0].item(), torn["second"][0].item()) == (3, 1)  # it was in the middle
    for _ in range(3):
        read, version = reader.read()
        assert (value_of(read), version) == (2, 2)
    frames.close()


@bounded(100)
async def test_a_reader_killed_in_a_read_is_no_ones_concern(pair):
    """After a reader's SIGKILL between two tensors the publisher goes on, and so do others."""
    publisher, reader = pair({"first": torch.zeros(1000), "second": torch.zeros(1000)})
    publisher.publish({"first": torch.ones(1000), "second": torch.ones(1000)})
    with process(ipc_helpers.die_reading, os.dup(publisher.fd)) as child:
        assert await end_of(child) == -9
    for number in range(2, 6):
        publisher.publish(dict.fromkeys(("first", "second"), torch.full((1000,), float(number))))
        read, version = reader.read()
        assert (value_of(read), version) == (number, number)


def test_weights_outlive_their_publisher(pair):
    """After the publisher has closed, readers go on reading; no descriptor stays open."""
    before = open_fds()
    first = filled(0)
    publisher = WeightsPublisher(describe(first))
    reader = WeightsReader(os.dup(publisher.fd), publisher.layout)
    publisher.publish(filled(5))
    publisher.close()
    publisher.close()
    assert publisher.fd == -1
    del publisher
    gc.collect()
    assert value_of(reader.read()[0]) == 5
    del reader
    gc.collect()
    assert open_fds() == before


def test_the_memory_is_two_buffers_and_a_page(pair):
    """Its size follows from the weights, whatever the number of workers."""
    publisher, _ = pair({"a": torch.zeros(PAGE), "b": torch.zeros(1)})
    assert os.fstat(publisher.fd).st_size == PAGE + 2 * (4 * PAGE + PAGE)


# weights that do not fit


def test_every_way_in_which_weights_do_not_fit_is_named(pair):
    """Missing, unexpected, reshaped and retyped keys are all in one error."""
    publisher, _ = pair()
    wrong = {
        "weight": torch.zeros(33, 64),
        "scale": torch.zeros((), dtype=torch.float16),
        "empty": torch.zeros(0),
        "new": torch.zeros(1),
    }
    message = (
        "these weights do not fit: missing keys: bias; unexpected keys: new; "
        "weight: shape [33, 64] instead of [64, 33]; scale: dtype float16 instead of float32"
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        publisher.check(wrong)


def test_the_order_of_the_keys_is_free(pair):
    """The same weights in another order fit and arrive under their names."""
    publisher, reader = pair({"a": torch.zeros(2), "b": torch.zeros(2)})
    swapped = {"b": torch.full((2,), 2.0), "a": torch.full((2,), 1.0)}
    publisher.check(swapped)
    publisher.publish(swapped)
    read, _ = reader.read()
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"a": [1, 1], "b": [2, 2]}


def test_values_are_the_trainers_business(pair):
    """NaN and infinity pass the check and arrive."""
    publisher, reader = pair({"a": torch.zeros(3)})
    odd = {"a": torch.tensor([float("nan"), float("inf"), -0.0])}
    publisher.check(odd)
    publisher.publish(odd)
    read, _ = reader.read()
    assert torch.equal(read["a"].view(torch.int32), odd["a"].view(torch.int32))

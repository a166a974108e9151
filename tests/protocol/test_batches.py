"""BatchParser: what a worker claims of an experience is checked before anything changes."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc_helpers import open_fds
from keisei.ipc import kernel, memory, serialize
from keisei.ipc.descriptors import NO_DESCRIPTORS, Descriptors
from keisei.ipc.layout import Layout, describe
from keisei.ipc.memory import PAGE
from keisei.ipc.ring import BUSY, RingWriter
from keisei.protocol import messages
from keisei.protocol.batches import BatchParser
from keisei.protocol.errors import ProtocolError

NEWEST = 5


class Worker:
    """What a worker does to have an experience delivered, and a parser to hear of it."""

    def __init__(self) -> None:
        self.ring = RingWriter(4)
        self.parser = BatchParser(3, 1)
        self.sequence = 0
        self.told = None

    def frame(self, number=0, info=None, **lies):
        """Write an experience; return the frame about it and the descriptors that come along."""
        ref, fds = self.ring.write({"x": torch.full((8,), number), "y": torch.ones(2, 3)})
        truth = messages.ExperienceFrame(
            sequence=self.sequence,
            version=2,
            segment=ref.segment,
            segment_nbytes=ref.segment_nbytes if fds else 0,
            cell=ref.cell,
            stride=ref.stride,
            layout=None if ref.layout is self.told else ref.layout,
            num_steps=8,
            info=None if info is None else serialize.dumps(info),
            seed=11,
        )
        frame = truth._replace(**lies)
        return frame, Descriptors(os.dup(fd) for fd in fds) if fds else NO_DESCRIPTORS

    def parse(self, frame, fds=NO_DESCRIPTORS, *, outstanding=1, newest=NEWEST):
        payload = frame if isinstance(frame, bytes) else joined(messages.pack(frame))
        batch = self.parser.parse(
            memoryview(bytearray(payload)), fds, outstanding=outstanding, newest_version=newest
        )
        self.ring.told()
        self.sequence += 1
        self.told = self.ring._layout
        return batch

    def deliver(self, number=0, info=None):
        return self.parse(*self.frame(number, info))

    def states(self):
        segments = self.ring._segments
        return [sum(state == BUSY for state in one.map[: one.cells]) for one in segments]

    def close(self):
        self.ring.close()
        self.parser.close()


def joined(payload):
    return b"".join(payload) if isinstance(payload, tuple) else payload


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def value_of(batch):
    return batch.views.on(batch.memory)["x"].unique().tolist()


def test_what_is_right_is_delivered(worker):
    """Its facts are the frame's, its tensors lie in the cell, and the count goes up."""
    for number in range(20):
        batch = worker.deliver(number, {"number": number} if number % 2 else None)
        assert batch[:2] == (3, 1)
        assert (batch.sequence, batch.version, batch.num_steps, batch.seed) == (number, 2, 8, 11)
        assert batch.info == ({"number": number} if number % 2 else {})
        assert value_of(batch) == [number]
        assert worker.parser.received == number + 1
    assert len(worker.parser._ring._segments) == 1


def test_the_cell_is_free_when_the_batch_is_gone(worker):
    """It is held by the batch and by each of its tensors, and by nothing else."""
    batch = worker.deliver(7)
    tensors = batch.views.on(batch.memory)
    assert worker.states() == [1]
    del batch
    assert worker.states() == [1]
    assert tensors["x"].sum() == 56
    del tensors
    assert worker.states() == [0]


LIES = {
    "the next but one": {"sequence": 2},
    "the one before": {"sequence": 0},
    "a version of the future": {"version": NEWEST + 1},
    "a segment that was never shared": {"segment": 77},
    "a cell beyond the segment": {"cell": 60},
    "a cell beyond any segment": {"cell": PAGE - 1},
    "cells of no size": {"stride": 0},
    "another stride": {"stride": 64},
    "an enormous stride": {"stride": (1 << 63) - 1},
    "tensors beyond the cell": {"layout": describe({"x": torch.zeros(1 << 20)})},
    "no tensors": {"layout": Layout.of([])},
    "settings that it was not told": {"settings_version": 1},
    "a segment without its descriptor": {"segment_nbytes": 2 * PAGE},
    "an info that is no pickle": {"info": b"nonsense"},
    "an info that is no dict": {"info": serialize.dumps([1])},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_is_refused_and_changes_nothing(worker, lie):
    """The truth is accepted afterwards as if nothing had been said before."""
    worker.deliver(1)
    frame, fds = worker.frame(2)
    before = open_fds()
    with pytest.raises(ProtocolError):
        worker.parse(frame._replace(**lie), fds)
    assert (worker.parser.received, open_fds()) == (1, before)
    assert value_of(worker.parse(frame, fds)) == [2]


@pytest.mark.parametrize(
    "lie",
    [
        {"segment_nbytes": PAGE},
        {"segment_nbytes": 1 << 40},
        {"segment_nbytes": 0},
        {"stride": 0},
        {"stride": 100},
        {"stride": (1 << 63) - 64},
        {"cell": 40},
        {"layout": None},
        {"info": b"nonsense"},
        {"sequence": 1},
    ],
    ids=repr,
)
def test_a_lie_about_a_new_segment_is_refused_and_changes_nothing(worker, lie):
    """Nothing stays mapped of it, its descriptor is closed, and the truth is accepted."""
    frame, fds = worker.frame(2)
    before = open_fds()
    with pytest.raises(ProtocolError):
        worker.parse(frame._replace(**lie), fds)
    gc.collect()
    assert (worker.parser.received, worker.parser._ring._segments) == (0, {})
    assert open_fds() == before - 1
    again = Descriptors([os.dup(worker.ring._segments[0].fd)])
    assert value_of(worker.parse(frame, again)) == [2]


def test_an_experience_without_a_credit_is_refused(worker):
    """A worker cannot send more than it may."""
    frame, fds = worker.frame()
    with pytest.raises(ProtocolError, match=r"^experience 0 came without a credit$"):
        worker.parse(frame, fds, outstanding=0)
    assert worker.parser.received == 0


def test_a_cell_in_use_is_not_delivered_again(worker):
    """As long as a tensor of a batch lives, whatever the worker has written into the states."""
    batch = worker.deliver(1)
    tensor = batch.views.on(batch.memory)["x"][2:]
    worker.ring._segments[0].map[0] = 0
    frame, fds = worker.frame(2)
    assert frame.cell == 0
    del batch
    with pytest.raises(ProtocolError, match="cell 0 of segment 0 is in use"):
        worker.parse(frame, fds)
    del tensor
    assert value_of(worker.parse(frame, fds)) == [2]


def test_a_cell_may_be_sent_again_as_soon_as_it_is_free(worker):
    """Also where the last tensor goes in another thread, however often."""
    for number in range(300):
        held = [worker.deliver(number)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join(timeout=30)
    assert len(worker.ring._segments) == 1
    assert worker.states() == [0]


def test_a_segment_is_not_shared_twice(worker):
    """The number of a segment that is known does not come with other memory."""
    worker.deliver(1)
    frame, _ = worker.frame(2)
    fd, shared = memory.create(frame.stride + PAGE)
    lie = frame._replace(segment_nbytes=len(shared))
    with pytest.raises(ProtocolError, match="segment 0 was shared before"):
        worker.parse(lie, Descriptors([fd]))
    assert value_of(worker.parse(frame)) == [2]


def unsealed(size):
    fd = os.memfd_create("keisei-unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def unsealable(size):
    fd = os.memfd_create("keisei-unsealable", 0)
    os.ftruncate(fd, size)
    return fd


def a_file(size):
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, size)
    return fd


def a_pipe(_):
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@pytest.mark.skipif(not kernel.can_seal(), reason="needs seals")
@pytest.mark.parametrize("make", [unsealed, unsealable, a_file, a_pipe, lambda _: os.dup(0)])
def test_a_descriptor_that_is_not_sealed_memory_is_refused(worker, make):
    """Memory that its sender can still shrink is never mapped, nor is anything else."""
    frame, fds = worker.frame()
    fds.close()
    before = open_fds()
    with pytest.raises(ProtocolError):
        worker.parse(frame, Descriptors([make(frame.segment_nbytes)]))
    assert open_fds() == before
    assert worker.parser.received == 0


class Raising:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return raise_it, (self.error,)


def raise_it(error):
    raise error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), RecursionError(), MemoryError(), ValueError()]
)
def test_an_info_that_raises_is_its_senders_error(worker, error):
    """Whatever is raised while it is unpickled, KeyboardInterrupt and SystemExit included."""
    frame, fds = worker.frame(info=None)
    lie = frame._replace(info=pickle.dumps({"x": Raising(error)}))
    with pytest.raises(ProtocolError, match=type(error).__name__):
        worker.parse(lie, fds)
    assert worker.parser.received == 0


class Interrupting:
    def __reduce__(self):
        return signal.raise_signal, (signal.SIGINT,)


def test_a_ctrl_c_is_the_users(worker):
    """A signal that comes while an info is unpickled is no error of its sender."""
    frame, fds = worker.frame()
    lie = frame._replace(info=pickle.dumps({"x": Interrupting()}))
    with pytest.raises(KeyboardInterrupt):
        worker.parse(lie, fds)
    assert worker.parser.received == 0


@pytest.mark.parametrize(
    ("info", "names", "is_heavy"),
    [
        (None, 1, False),
        ({"small": 1}, 5, False),
        ({"large": bytes(1 << 17)}, 1, True),
        (None, 10_000, True),
    ],
)
def test_frames_that_are_worth_a_thread_are_told(info, names, is_heavy):
    """Many names and much in info are; an ordinary frame is not."""
    frame = messages.ExperienceFrame(
        0,
        0,
        0,
        0,
        0,
        64,
        Layout.of((str(n), torch.int8, (1,)) for n in range(names)),
        1,
        None if info is None else serialize.dumps(info),
        0,
    )
    payload = memoryview(joined(messages.pack(frame)))
    assert BatchParser(0, 0).is_heavy(payload) is is_heavy


def test_known_layouts_are_not_made_again(worker):
    """Shapes that come in turn have their views made once, and not all are kept for ever."""
    seen = set()
    for number in range(100):
        length = number % 4
        ref, fds = worker.ring.write({"x": torch.zeros(50 + length)})
        frame = messages.ExperienceFrame(
            number, 0, ref.segment, ref.segment_nbytes if fds else 0, ref.cell, ref.stride,
            ref.layout, 1, None, 0,
        )  # fmt: skip
        batch = worker.parse(frame, Descriptors(map(os.dup, fds)))
        seen.add(id(batch.views))
        assert batch.views.on(batch.memory)["x"].shape == (50 + length,)
    assert len(seen) == 4
    for number in range(100, 200):
        ref, fds = worker.ring.write({"x": torch.zeros(number - 90)})
        frame = messages.ExperienceFrame(
            number, 0, ref.segment, ref.segment_nbytes if fds else 0, ref.cell, ref.stride,
            ref.layout, 1, None, 0,
        )  # fmt: skip
        worker.parse(frame, Descriptors(map(os.dup, fds)))
    assert len(worker.parser._known) < 20


@settings(max_examples=300)
@given(st.data())
def test_any_lie_in_any_field_is_refused_or_harmless(data):
    """Whatever is accepted lies inside memory that was shared; what is refused changes nothing."""
    with closing(Worker()) as worker:
        if data.draw(st.booleans()):
            worker.deliver(0)
        frame, fds = worker.frame(1, {"some": "info"} if data.draw(st.booleans()) else None)
        name = data.draw(st.sampled_from(messages.ExperienceFrame._fields))
        if name == "layout":
            shape = data.draw(st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple))
            value = data.draw(st.none() | st.just(Layout.of([("x", torch.float32, shape)])))
        elif name == "info":
            value = data.draw(st.none() | st.binary(max_size=50))
        elif name == "named":
            pairs = st.tuples(st.integers(0, 3), st.integers(0, (1 << 63) - 1))
            value = data.draw(st.none() | st.lists(pairs, max_size=3).map(tuple))
        else:
            bits = {"cell": 16, "segment": 32}.get(name, 63)
            value = data.draw(st.integers(0, 100) | st.integers(0, (1 << bits) - 1))
        check_claim(worker, frame._replace(**{name: value}), fds)


@settings(max_examples=500)
@given(st.booleans(), st.integers(0, 1 << 20), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_harmless(has_segment, position, change):
    """Nothing but a protocol error is raised, and no descriptor stays open."""
    with closing(Worker()) as worker:
        if has_segment:
            worker.deliver(0)
        frame, fds = worker.frame(1, {"some": "info"})
        raw = bytearray(joined(messages.pack(frame)))
        raw[position % len(raw)] ^= change
        check_claim(worker, bytes(raw), fds)


def check_claim(worker, frame, fds):
    """Have a frame parsed, and look whether its tensors lie in memory or nothing has changed."""
    received, segments = worker.parser.received, dict(worker.parser._ring._segments)
    try:
        batch = worker.parse(frame, fds)
    except ProtocolError:
        assert worker.parser.received == received
        assert worker.parser._ring._segments == segments
        return
    finally:
        assert len(fds) == 0
    assert worker.parser.received == received + 1
    for tensor in batch.views.on(batch.memory).values():
        tensor.reshape(-1).view(torch.uint8).sum()


def test_closing_unmaps_what_no_batch_holds(worker):
    """What was delivered keeps its own segment and no other, without the garbage collector."""
    gc.disable()
    try:
        batch = worker.deliver(5)
        worker.ring.close()
        assert mappings() == 1
        worker.parser.close()
        assert mappings() == 1
        assert value_of(batch) == [5]
        del batch
        assert mappings() == 0
    finally:
        gc.enable()


def mappings():
    maps = Path("/proc/self/maps").read_text()
    return sum("keisei-experience" in line for line in maps.splitlines())


def test_many_tensors_are_made_in_the_thread_that_parses(worker):
    """Also by a frame without names, which is small; few are made by whoever takes them."""
    assert worker.deliver().tensors is None
    many = Worker()
    with closing(many):
        for number in range(3):
            data = {f"w{key}": torch.full((2,), number) for key in range(1001)}
            ref, fds = many.ring.write(data)
            frame = messages.ExperienceFrame(
                sequence=number,
                version=2,
                segment=ref.segment,
                segment_nbytes=ref.segment_nbytes if fds else 0,
                cell=ref.cell,
                stride=ref.stride,
                layout=None if number else ref.layout,
                num_steps=8,
                info=None,
                seed=11,
            )
            payload = memoryview(joined(messages.pack(frame)))
            assert many.parser.is_heavy(payload)
            batch = many.parse(frame, Descriptors(map(os.dup, fds)))
            assert batch.opened() is batch.tensors
            assert {name: tensor.tolist() for name, tensor in batch.opened().items()} == {
                name: [number, number] for name in data
            }
            del batch
            assert many.states() == [0]


def test_a_process_without_descriptors_blames_no_worker(worker, monkeypatch):
    """What keeps this process from mapping memory is no ProtocolError; the frame's are closed."""
    frame, fds = worker.frame()
    before = open_fds()

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(memory, "_mapped", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        worker.parse(frame, fds)
    assert open_fds() == before - 1
    assert worker.parser.received == 0

"""The ring: experiences copied once into shared memory, read in place, and cells used again."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import socket
import threading
import tracemalloc

import numpy as np
import pytest
import torch

import ipc_helpers
from ipc_helpers import bounded, end_of, open_fds, pair_of_fds, process
from keisei.exceptions import QueueBroken
from keisei.ipc import serialize
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.memory import PAGE
from keisei.ipc.ring import BUSY, FREE, RingReader, RingWriter
from torch_helpers import DTYPES, Copies


class Ring:
    """Both sides in one process; what goes over the queue goes through ``carry``."""

    def __init__(self, cells: int = 4) -> None:
        self.writer = RingWriter(cells)
        self.reader = RingReader()

    def carry(self, data):
        """Write ``data``; return its cell and what the application sees there."""
        ref, fds = self.writer.write(data)
        views = self.open(ref, *fds)
        if fds:
            self.writer.told()
        return ref, views

    def open(self, ref, fd=None):
        return ref.layout.views(taken(self.reader, ref, None if fd is None else os.dup(fd)))

    def states(self):
        """Return how many cells are busy in each of the writer's segments."""
        segments = self.writer._segments
        return [sum(state == BUSY for state in one.map[: one.cells]) for one in segments]

    def numbers(self):
        return [segment.number for segment in self.writer._segments]

    def close(self):
        self.writer.close()
        self.reader.close()


@pytest.fixture
def make_ring():
    made = []

    def make(*args):
        made.append(Ring(*args))
        return made[-1]

    yield make
    for ring in made:
        ring.close()
    made.clear()


def taken(reader, ref, fd=None):
    """Return the buffer of a cell, as the parser of frames takes it."""
    return reader.take(ref, reader.find(ref, fd))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def span(shared):
    """Return the addresses of a mapping."""
    first = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    return range(first, first + len(shared))


# what arrives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(make_ring, dtype):
    """Tensors of one kind and several shapes, 0-dimensional and empty ones too, are the same."""
    ring = make_ring()
    data = {}
    for number, shape in enumerate([(), (1,), (3, 5), (2, 3, 4), (0,), (4, 0)]):
        raw = torch.arange(torch.Size(shape).numel() * dtype.itemsize).to(torch.uint8) + number
        if dtype is torch.bool:
            raw = raw % 2
        data[f"field {number}"] = raw.view(dtype).view(shape)
    _, views = ring.carry(data)
    assert list(views) == list(data)
    for name, view in views.items():
        assert (view.dtype, view.shape) == (dtype, data[name].shape)
        assert bits(view) == bits(data[name])


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(24.0).reshape(4, 6).T,
        lambda: np.arange(24.0).reshape(4, 6)[::2, ::-1],
        lambda: np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
        lambda: np.broadcast_to(np.arange(3), (4, 3)),
        lambda: np.arange(10, dtype=">i4"),
        lambda: np.linspace(0, 1, 7, dtype=">f8"),
        lambda: np.array(3.5),
        lambda: np.zeros((0, 3), dtype=np.float16),
        lambda: np.array([[True, False], [False, True]]),
        lambda: np.arange(5, dtype=np.uint16),
        lambda: np.arange(4) + 1j,
        lambda: np.frombuffer(b"read only", dtype=np.uint8),
    ],
)
def test_arrays_of_any_make_arrive(make_ring, make):
    """Strided, Fortran, broadcast, byte-swapped, read-only, 0-dimensional and empty arrays do."""
    array = make()
    _, views = make_ring().carry({"array": array})
    assert (
        views["array"].dtype is torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).dtype
    )
    assert views["array"].shape == array.shape
    assert views["array"].tolist() == array.tolist()
    assert views["array"].is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[::2, 1::2],
        lambda t: t[0].expand(3, 6),
        lambda t: torch.complex(t, t + 1).conj(),
        lambda t: torch.complex(t, t + 1).conj().imag,
        torch._neg_view,
        lambda t: t.clone().requires_grad_(),
        lambda t: t.clone().requires_grad_() * 2,
        torch.nn.Parameter,
    ],
)
def test_tensor_views_of_any_make_arrive(make_ring, view):
    """Strided, expanded, conjugate and negated views, and tensors with a graph, are values."""
    tensor = view(torch.arange(24.0).view(4, 6))
    _, views = make_ring().carry({"tensor": tensor})
    assert torch.equal(views["tensor"], tensor.detach())
    assert views["tensor"].is_contiguous()
    assert not views["tensor"].requires_grad


def test_tensors_and_arrays_may_alternate(make_ring):
    """One key may be a tensor now and an array next time; each write has its own values."""
    ring = make_ring()
    for number in range(6):
        value = [torch.full((5,), number), np.full(5, number)][number % 2]
        _, views = ring.carry({"value": value})
        assert views["value"].tolist() == [number] * 5
        del views
    assert ring.numbers() == [0]


def test_what_arrives_can_be_written_to(make_ring):
    """The tensors are the receiver's: changing them is seen nowhere else."""
    ring = make_ring()
    own = torch.arange(4)
    _, first = ring.carry({"a": own})
    _, second = ring.carry({"a": own})
    first["a"] += 10
    assert (own.tolist(), second["a"].tolist()) == ([0, 1, 2, 3],) * 2


# one copy


def test_the_application_reads_where_the_worker_wrote(make_ring):
    """Every tensor that arrives lies inside the mapped segment; nothing was copied."""
    ring = make_ring()
    ref, views = ring.carry({"a": torch.arange(1000), "b": np.arange(50.0), "c": torch.ones(())})
    mapped = span(ring.reader._segments[ref.segment].map)
    for view in views.values():
        assert view.data_ptr() in mapped
        assert view.data_ptr() + view.nbytes - 1 in mapped
        assert view.data_ptr() % 64 == 0


def test_a_write_copies_each_tensor_once(make_ring):
    """The only operation on elements is one copy_ from the worker's tensor into the segment."""
    ring = make_ring()
    data = {"a": torch.arange(1000), "b": torch.ones(3, 4).T}
    ring.carry(data)
    with Copies() as copies:
        ref, _ = ring.writer.write(data)
    mapped = span(ring.writer._segments[0].map)
    touching = [(name, at) for name, at in copies.seen if not name.startswith("detach")]
    assert [name for name, _ in touching] == ["copy_.default"] * 2
    assert all(at in mapped for _, at in touching)
    with Copies() as copies:
        ring.open(ref)
    assert not [name for name, _ in copies.seen if name.startswith(("copy", "clone", "to"))]


def test_a_write_of_an_array_needs_no_memory_beside(make_ring):
    """NumPy arrays, strided ones too, are copied straight into the segment."""
    ring = make_ring()
    array = np.zeros((1000, 1000))[:, ::2]
    ring.carry({"a": array})
    tracemalloc.start()
    try:
        ref, _ = ring.writer.write({"a": array})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    ring.open(ref)
    assert peak < 100_000


# cells


def test_a_cell_is_free_when_its_last_tensor_is_gone(make_ring):
    """Views of views keep the cell; when the last one goes it is free at once."""
    ring = make_ring()
    _, views = ring.carry({"a": torch.arange(100).view(10, 10), "b": torch.zeros(3)})
    assert ring.states() == [1]
    row = views["a"][2:].t()[1]
    del views
    gc.collect()
    assert ring.states() == [1]
    last = row.view(-1)[1:].unsqueeze(0).detach()
    del row
    assert ring.states() == [1]
    assert last[0, 0] == 31
    del last
    assert ring.states() == [0]


def test_other_libraries_views_keep_the_cell(make_ring):
    """A NumPy array or a memoryview made of a tensor counts as a view of it."""
    ring = make_ring()
    _, views = ring.carry({"a": torch.arange(4)})
    array = views["a"].numpy()
    del views
    window = memoryview(array)[1:]
    del array
    assert ring.states() == [1]
    assert window.tolist() == [1, 2, 3]
    window.release()
    del window
    assert ring.states() == [0]


def test_a_copy_does_not_keep_the_cell(make_ring):
    """Clones and results of arithmetic leave the cell to the worker."""
    ring = make_ring()
    _, views = ring.carry({"a": torch.arange(4)})
    results = [views["a"].clone(), views["a"] + 1]
    del views
    assert ring.states() == [0]
    assert results[1].tolist() == [1, 2, 3, 4]


def test_a_graph_keeps_the_cell(make_ring):
    """What autograd has saved for a backward pass is held until the pass is done."""
    ring = make_ring()
    weight = torch.ones(4, requires_grad=True)
    _, views = ring.carry({"a": torch.arange(4.0)})
    loss = (views["a"] * weight).sum()
    del views
    assert ring.states() == [1]
    loss.backward()
    assert weight.grad.tolist() == [0, 1, 2, 3]
    assert ring.states() == [0]


def test_a_cell_may_be_released_in_another_thread(make_ring):
    """Whichever thread drops the last tensor frees the cell."""
    ring = make_ring()
    held = [ring.carry({"a": torch.full((3,), n)})[1] for n in range(4)]
    assert ring.states() == [4]
    threads = [threading.Thread(target=held.pop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert ring.states() == [0]


def test_a_released_cell_is_used_again_and_no_other(make_ring):
    """Held cells keep their values, whatever is written while they are held."""
    ring = make_ring(3)
    held = [ring.carry({"a": torch.full((1000,), n)}) for n in range(3)]
    ref, released = held.pop(1)
    del released
    next_ref, views = ring.carry({"a": torch.full((1000,), 9)})
    assert next_ref == ref
    assert views["a"].unique().tolist() == [9]
    assert [views["a"].unique().tolist() for _, views in held] == [[0], [2]]


def test_an_experience_that_nobody_opens_can_be_dropped(make_ring):
    """Wrapping a cell and letting go of it at once gives it back."""
    ring = make_ring()
    ring.carry({"a": torch.zeros(2)})
    assert ring.states() == [0]
    ref, _ = ring.writer.write({"a": torch.zeros(2)})
    assert ring.states() == [1]
    taken(ring.reader, ref)
    assert ring.states() == [0]


def test_an_experience_without_elements_needs_no_cell(make_ring):
    """Tensors without elements hold nothing, so the cell is free as soon as they are read."""
    ring = make_ring()
    _, views = ring.carry({"none": torch.zeros(0, 3)})
    assert views["none"].shape == (0, 3)
    assert ring.states() == [0]


# segments


def test_the_first_experience_decides_the_size(make_ring):
    """Nothing is made before the first write, then one segment with the cells asked for."""
    ring = make_ring(5)
    assert ring.writer.nbytes == 0
    ref, _ = ring.carry({"a": torch.zeros(1000, dtype=torch.uint8)})
    assert ref.stride == 1024
    assert ring.writer.nbytes == -(-(PAGE + 5 * 1024) // PAGE) * PAGE
    large = make_ring(2)
    ref, _ = large.carry({"a": torch.zeros(PAGE + 1, dtype=torch.uint8)})
    assert ref.stride == 2 * PAGE


def test_memory_grows_when_nothing_is_released(make_ring):
    """A writer that finds every cell held makes a segment, each time as large as all before."""
    ring = make_ring(2)
    held = [ring.carry({"a": torch.full((100,), n)}) for n in range(9)]
    assert [len(one.map[: one.cells]) for one in ring.writer._segments] == [2, 2, 4, 8]
    assert [ref.segment for ref, _ in held] == [0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert [views["a"].unique().tolist() for _, views in held] == [[n] for n in range(9)]


@pytest.mark.parametrize("num_held", [0, 1, 3, 7])
def test_memory_does_not_grow_in_the_steady_state(make_ring, num_held):
    """While k experiences are held at any time, a thousand more need no further memory."""
    ring = make_ring(4)
    held = []

    def rounds(count):
        for number in range(count):
            _, views = ring.carry({"a": torch.full((50,), number)})
            held.append((number, views))
            while len(held) > num_held:
                oldest, views = held.pop(0)
                assert views["a"].unique().tolist() == [oldest]

    rounds(20)
    segments, nbytes, fds = ring.numbers(), ring.writer.nbytes, open_fds()
    rounds(1000)
    assert (ring.numbers(), ring.writer.nbytes, open_fds()) == (segments, nbytes, fds)


def test_a_larger_experience_makes_a_larger_segment(make_ring):
    """It comes with headroom, so that a little more of growth needs no other one."""
    ring = make_ring(2)
    small, views = ring.carry({"a": torch.zeros(1000, dtype=torch.uint8)})
    large, more = ring.carry({"a": torch.ones(8000, dtype=torch.uint8)})
    assert (small.segment, large.segment) == (0, 1)
    assert large.stride == 3 * PAGE  # 8000 and a quarter, in pages
    larger, _ = ring.carry({"a": torch.ones(9900, dtype=torch.uint8)})
    assert larger.segment == 1
    assert views["a"].unique().tolist() == [0]
    assert more["a"].unique().tolist() == [1]


def test_segments_that_are_too_small_are_dropped_when_they_are_free(make_ring):
    """Neither side keeps a segment whose cells became too small, once nobody holds one."""
    ring = make_ring(2)
    _, small = ring.carry({"a": torch.zeros(100)})
    _, large = ring.carry({"a": torch.zeros(100_000)})
    assert ring.numbers() == [0, 1]
    assert sorted(ring.reader._segments) == [0, 1]
    del small, large
    ring.carry({"a": torch.zeros(100_000)})
    assert ring.numbers() == [1]
    assert sorted(ring.reader._segments) == [1]
    ref, _ = ring.carry({"a": torch.zeros(100)})
    assert ref.segment == 1


def test_growing_experiences_do_not_make_a_segment_each(make_ring):
    """A hundred experiences, each a little larger, get along with a few segments."""
    ring = make_ring(2)
    for number in range(100):
        _, views = ring.carry({"a": torch.zeros(1000 + 40 * number)})
        del views
    assert ring.writer._next_number < 10
    assert len(ring.writer._segments) == len(ring.reader._segments) == 1


def test_shapes_may_vary_from_call_to_call(make_ring):
    """Episodes of any length, with keys that come and go, arrive right in the same memory."""
    ring = make_ring(4)
    lengths = [7, 30, 1, 30, 0, 12, 30, 29] * 5
    held = []
    for number, length in enumerate(lengths):
        data = {"steps": torch.full((length, 3), number), "done": torch.ones(length).bool()}
        if length % 2:
            data["extra"] = np.full(length, number / 2)
        held.append((number, length, ring.carry(data)[1]))
        if len(held) > 2:
            one, steps, views = held.pop(0)
            assert list(views) == ["steps", "done", "extra"][: 2 + steps % 2]
            assert views["steps"].shape == (steps, 3)
            assert torch.equal(views["steps"], torch.full((steps, 3), one))
            assert bool(views["done"].all())
            assert steps % 2 == 0 or views["extra"].tolist() == [one / 2] * steps
    assert len(ring.numbers()) == 1
    assert ring.writer._next_number == 2


def test_more_cells_than_a_page_has_bytes(make_ring):
    """However many cells are asked for, a segment has as many as its states' page can tell."""
    ring, count = make_ring(10 * PAGE), 2 * (PAGE - 1) + 3
    held = [ring.carry({"a": torch.full((1,), n, dtype=torch.int32)})[1] for n in range(count)]
    assert ring.states() == [PAGE - 1, PAGE - 1, 3]
    assert {segment.cells for segment in ring.writer._segments} == {PAGE - 1}
    assert [views["a"].item() for views in held] == list(range(count))
    held.clear()
    assert ring.states() == [0, 0, 0]


# descriptors


def test_a_ring_holds_as_many_descriptors_as_segments(make_ring):
    """A thousand experiences need the descriptors of one; closing both sides needs none."""
    before = open_fds()
    ring = make_ring(4)
    for _ in range(1000):
        ring.carry({"a": torch.zeros(100)})
    assert open_fds() <= before + 2
    ring.close()
    gc.collect()
    assert open_fds() == before


def test_a_new_segment_is_handed_over_until_it_was_told(make_ring):
    """Every cell of a segment brings its descriptor until ``told``, and none afterwards."""
    ring = make_ring()
    first, (fd,) = ring.writer.write({"a": torch.zeros(3)})
    second, (again,) = ring.writer.write({"a": torch.ones(3)})
    assert (fd, first.segment) == (again, second.segment)
    views = ring.open(first, fd)
    ring.writer.told()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    _, none = ring.writer.write({"a": torch.zeros(3)})
    assert none == []
    assert ring.states() == [3]
    assert ring.open(second)["a"].tolist() == [1, 1, 1]
    assert ring.states() == [2]
    del views
    assert ring.states() == [1]


def test_a_new_segment_that_was_never_told_is_closed():
    """Closing the writer closes a descriptor that nobody was told of."""
    before = open_fds()
    writer = RingWriter(2)
    _, (fd,) = writer.write({"a": torch.zeros(3)})
    writer.close()
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert writer.nbytes == 0
    del writer
    gc.collect()
    assert open_fds() == before


def test_what_was_delivered_outlives_both_sides(make_ring):
    """After close of writer and reader a tensor is as good as before."""
    ring = make_ring()
    _, views = ring.carry({"a": torch.arange(1000)})
    ring.close()
    gc.collect()
    assert views["a"].sum() == 499_500
    views["a"] += 1
    assert views["a"][0] == 1


# another process


@bounded(100)
async def test_what_a_killed_worker_wrote_stays_readable():
    """After the worker's SIGKILL every experience whose frame was sent is there, whole."""
    before = open_fds()
    inward, outward = pair_of_fds()
    frames, ring = FrameReader(socket.socket(fileno=inward)), RingReader()
    with process(ipc_helpers.write_experiences_and_die, outward, numbers=(5,)) as child:
        assert await end_of(child) == -9
        batches = []
        for _ in range(5):
            payload, fds = await frames.get()
            ref = serialize.loads(payload)
            batches.append(ref.layout.views(taken(ring, ref, fds.claim() if fds else None)))
        with pytest.raises(QueueBroken):
            await frames.get()
    frames.close()
    ring.close()
    assert [batch["steps"].unique().tolist() for batch in batches] == [[n] for n in range(5)]
    assert all(batch["steps"].shape == (1000, 9) for batch in batches)
    assert torch.equal(batches[4]["more"], torch.arange(4, 504).to(torch.bfloat16))
    batches[0]["steps"] += 1
    del batches
    gc.collect()
    assert open_fds() == before


# what cannot be shared


class Own:
    pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [torch.zeros(1)],
            "an experience must be a mapping of names to tensors or arrays, not list",
        ),
        (None, "an experience must be a mapping of names to tensors or arrays, not NoneType"),
        ({}, "an experience must hold at least one tensor; this mapping is empty"),
        ({3: torch.zeros(1)}, "experience keys must be strings, not 3 (int)"),
        (
            {"fine": torch.zeros(1), "reward": 1.5},
            "experience['reward'] is float; give a torch tensor or a NumPy array "
            "(small values of other kinds travel in Experience.info)",
        ),
        (
            {"x": np.float32(1)},
            "experience['x'] is numpy.float32; give a torch tensor or a NumPy array "
            "(small values of other kinds travel in Experience.info)",
        ),
        (
            {"x": Own()},
            f"experience['x'] is {__name__}.Own; give a torch tensor or a NumPy array "
            "(small values of other kinds travel in Experience.info)",
        ),
        (
            {"x": torch.eye(3).to_sparse()},
            "experience['x'] is a torch.sparse_coo tensor; make it dense",
        ),
        (
            {"x": torch.zeros(3, device="meta")},
            "experience['x'] is on the meta device and has no values",
        ),
        (
            {"x": np.array([Own()])},
            "experience['x'] is an array of dtype object, which torch has not; convert it first",
        ),
        (
            {"x": np.array(["a", "bcd"])},
            "experience['x'] is an array of dtype <U3, which torch has not; convert it first",
        ),
        (
            {"x": np.zeros(2, dtype="datetime64[s]")},
            "experience['x'] is an array of dtype datetime64[s], which torch has not; "
            "convert it first",
        ),
        (
            {"x": np.zeros(2, dtype=[("a", "f4"), ("b", "i2")])},
            "experience['x'] is an array of dtype [('a', '<f4'), ('b', '<i2')], which torch has "
            "not; convert it first",
        ),
        (
            {"x": np.zeros(2, dtype=np.longdouble)},
            "experience['x'] is an array of dtype float128, which torch has not; convert it first",
        ),
        (
            {"x": torch.empty(2, dtype=torch.uint1)},
            "experience['x'] is a torch.uint1 tensor, which torch cannot copy",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_shared_is_named(make_ring, data, message):
    """The error names the key, the type and the way out, and the ring serves the next one."""
    ring = make_ring()
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ring.writer.write(data)
    assert sum(ring.states()) == 0
    _, views = ring.carry({"x": torch.ones(2)})
    assert views["x"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    ],
)
def test_tensors_of_special_kinds_are_named(make_ring, make, kind):
    """Quantized and nested tensors are refused by name."""
    with pytest.raises(TypeError, match=rf"^experience\['x'\] is a {kind} tensor; make it dense$"):
        make_ring().writer.write({"x": make()})


def test_a_copy_that_fails_leaves_the_cell_free(make_ring):
    """An error in the middle of a write, of whatever kind, takes no cell."""
    ring = make_ring()
    ring.carry({"a": torch.zeros(3), "b": torch.zeros(3)})

    class Torn(torch.Tensor):
        def detach(self):
            raise RuntimeError("the device is gone")

    torn = torch.ones(3, requires_grad=True).as_subclass(Torn)
    with pytest.raises(RuntimeError, match="the device is gone"):
        ring.writer.write({"a": torch.ones(3), "b": torn})
    assert ring.states() == [0]
    assert FREE == 0


def test_memory_that_cannot_be_had_is_an_error(make_ring, monkeypatch):
    """Where there is no memory for another segment, OSError is raised and the ring goes on."""
    ring = make_ring(1)
    _, held = ring.carry({"a": torch.zeros(3)})

    def refuse(size, name):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("keisei.ipc.memory.create", refuse)
        with pytest.raises(OSError, match="No space left on device"):
            ring.writer.write({"a": torch.ones(3)})
    assert ring.states() == [1]
    del held
    _, views = ring.carry({"a": torch.ones(3)})
    assert views["a"].tolist() == [1, 1, 1]

"""Layout: where tensors lie, as views without a copy, and how two layouts differ."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keisei.ipc.layout import ALIGNMENT, Field, Layout, describe, dtype_name

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128]


def test_fields_lie_one_behind_the_other():
    """Offsets are multiples of 64 and the length covers the last field."""
    layout = Layout.of(
        [("a", torch.uint8, (3,)), ("b", torch.float32, (4, 5)), ("c", torch.int64, ())]
    )
    assert layout.fields == (
        Field("a", "uint8", (3,), 0, 3),
        Field("b", "float32", (4, 5), 64, 80),
        Field("c", "int64", (), 192, 8),
    )
    assert layout.nbytes == 256


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8
    )
)
def test_fields_never_overlap(described):
    """Whatever the tensors, each has aligned bytes of its own inside the layout."""
    layout = Layout.of((str(n), dtype, tuple(s)) for n, (dtype, s) in enumerate(described))
    end = 0
    for field, (dtype, shape) in zip(layout.fields, described, strict=True):
        assert field.offset % ALIGNMENT == 0
        assert field.offset >= end
        assert field.nbytes == torch.Size(shape).numel() * dtype.itemsize
        end = field.offset + field.nbytes
    assert layout.nbytes >= max(end, ALIGNMENT)
    buffer = bytearray(layout.nbytes + 64)
    for number, view in enumerate(layout.views(buffer, 64).values()):
        view.view(-1).view(torch.uint8).fill_(number + 1)
    for number, field in enumerate(layout.fields):
        place = buffer[64 + field.offset : 64 + field.offset + field.nbytes]
        assert place == bytes([number + 1]) * field.nbytes
    assert sum(map(bool, buffer)) == sum(field.nbytes for field in layout.fields)


def test_views_alias_the_buffer():
    """What is written through a view is in the buffer, and the other way round."""
    layout = Layout.of([("a", torch.int32, (2, 2)), ("b", torch.uint8, (3,))])
    buffer = bytearray(1000)
    views = layout.views(buffer, base=128)
    views["a"].copy_(torch.tensor([[1, 2], [3, 4]]))
    buffer[128 + 64 : 128 + 67] = b"xyz"
    assert memoryview(buffer)[128:144].cast("i").tolist() == [1, 2, 3, 4]
    assert bytes(views["b"].tolist()) == b"xyz"
    assert views["a"].is_contiguous()


def test_views_keep_the_buffer_alive():
    """The buffer goes when the last view on it goes."""

    class Buffer(mmap.mmap):
        pass

    buffer = Buffer(-1, 4096)
    gone = weakref.ref(buffer)
    views = Layout.of([("a", torch.float32, (4,)), ("b", torch.float32, (4,))]).views(buffer)
    row = views["b"][1:]
    del buffer, views
    gc.collect()
    assert gone() is not None
    del row
    gc.collect()
    assert gone() is None


def test_an_empty_tensor_aliases_nothing():
    """A tensor without elements has its dtype and shape, and no bytes."""
    layout = Layout.of([("none", torch.float64, (3, 0)), ("one", torch.float64, ())])
    views = layout.views(bytearray(layout.nbytes))
    assert (views["none"].shape, views["none"].dtype) == ((3, 0), torch.float64)
    assert (layout.fields[0].nbytes, layout.fields[1].offset, layout.nbytes) == (0, 0, 64)
    assert Layout.of([]).nbytes == 64


def test_a_mapping_is_described_in_its_order():
    """The layout of a mapping has its names, dtypes and shapes."""
    layout = describe({"z": torch.zeros(2, 3), "a": torch.ones(4, dtype=torch.bool)})
    assert [(f.name, f.dtype, f.shape) for f in layout.fields] == [
        ("z", "float32", (2, 3)),
        ("a", "bool", (4,)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_has_a_name(dtype):
    """The name is the one under which torch has the dtype."""
    assert getattr(torch, dtype_name(dtype)) is dtype


def test_every_difference_is_named():
    """Missing, unexpected, reshaped and retyped keys are one line each, in their order."""
    mine = describe(
        {
            "same": torch.zeros(2),
            "gone": torch.zeros(1),
            "lost": torch.zeros(1),
            "shape": torch.zeros(2, 3),
            "dtype": torch.zeros(4),
            "both": torch.zeros(5),
        }
    )
    theirs = describe(
        {
            "same": torch.ones(2),
            "shape": torch.zeros(3, 2),
            "dtype": torch.zeros(4, dtype=torch.float16),
            "both": torch.zeros((), dtype=torch.int64),
            "new": torch.zeros(1),
        }
    )
    assert mine.differences(theirs) == [
        "missing keys: gone, lost",
        "unexpected keys: new",
        "shape: shape [3, 2] instead of [2, 3]",
        "dtype: dtype float16 instead of float32",
        "both: shape [] instead of [5]",
        "both: dtype int64 instead of float32",
    ]


def test_another_order_is_no_difference():
    """The same tensors in another order fit."""
    one = {"a": torch.zeros(2), "b": torch.zeros(3)}
    other = dict(reversed(one.items()))
    assert describe(one) != describe(other)
    assert describe(one).differences(describe(other)) == []

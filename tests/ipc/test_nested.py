"""Nested experiences: dotted names, exactly, and a clear error where there are none."""

from __future__ import annotations

import os
import re
from collections import OrderedDict, UserDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keisei.ipc import nested
from keisei.ipc.ring import RingReader, RingWriter
from torch_helpers import Copies

X, Y, Z = torch.arange(6.0).view(2, 3), torch.arange(2), np.arange(2, dtype=np.int16)


class Writer(RingWriter):
    """A ring, and what the application sees there."""

    def __init__(self) -> None:
        super().__init__(4)
        self.reader = RingReader()

    def written(self, data):
        """Return copies of what arrives, by name."""
        ref, fds = self.write(data)
        segment = self.reader.find(ref, os.dup(fds[0]) if fds else None)
        self.told()
        views = ref.layout.views(self.reader.take(ref, segment))
        return {name: tensor.clone() for name, tensor in views.items()}


@pytest.fixture
def writer():
    writer = Writer()
    yield writer
    writer.close()
    writer.reader.close()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"a": X, "b": Y}, ["a", "b"]),
        ({"a": X, "next": {"a": Y}}, ["a", "next.a"]),
        ({"next": {"a": {"b": {"c": X}}}, "a": Y}, ["next.a.b.c", "a"]),
        ({"a": {"x.y": X}, "a.b": Y}, ["a.x.y", "a.b"]),
        ({"a": X, "a.b": Y}, ["a", "a.b"]),
        (OrderedDict(b=X, a=OrderedDict(z=Y, y=Z)), ["b", "a.z", "a.y"]),
        (MappingProxyType({"a": UserDict({"b": Z})}), ["a.b"]),
    ],
)
def test_nested_mappings_have_dotted_names(writer, data, names):
    """Entries come in the order in which they stand, whatever kind of mapping they are in."""
    flat = nested.flatten(data)
    assert list(flat) == names
    seen = writer.written(data)
    assert list(seen) == names
    for name in names:
        assert np.array_equal(seen[name].numpy(), np.asarray(flat[name]))
        assert seen[name].dtype == torch.as_tensor(flat[name]).dtype


class Loop(UserDict):
    """A mapping that contains itself."""

    def __init__(self) -> None:
        super().__init__()
        self.data["a"] = self


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"a": {"b": X}, "a.b": Y},
            "two entries of the experience have the name 'a.b': a nested entry is named by its "
            "keys joined by dots; rename one of them",
        ),
        (
            {"a": {"b.c": X, "b": {"c": Y}}},
            "two entries of the experience have the name 'a.b.c': a nested entry is named by its "
            "keys joined by dots; rename one of them",
        ),
        (
            {"a": X, "next": {}},
            "experience['next'] is an empty mapping, of which nothing would arrive; leave it out",
        ),
        (
            {"next": {"a": {"b": {}}}},
            "experience['next.a.b'] is an empty mapping, of which nothing would arrive; leave it "
            "out",
        ),
        (
            {"a": {3: X}},
            "experience keys must be strings, not 3 (int)",
        ),
        (
            {3: {"a": X}},
            "experience keys must be strings, not 3 (int)",
        ),
        ({3: X}, "experience keys must be strings, not 3 (int)"),
        (
            {("next", "obs"): X},
            "experience keys must be strings, not ('next', 'obs') (tuple): write 'next.obs', "
            "or nest mappings",
        ),
        (
            {"a": {("b", "c"): X}},
            "experience keys must be strings, not ('b', 'c') (tuple): write 'b.c', or "
            "nest mappings",
        ),
        ({"a": {"": X}}, "experience['a'] has an empty key, which no dotted name can hold"),
        ({"": {"a": X}}, "the experience has an empty key, which no dotted name can hold"),
        (
            {"a": {"b": 3.5}},
            "experience['a.b'] is float; give a torch tensor or a NumPy array (small values of "
            "other kinds travel in Experience.info)",
        ),
        (
            {"a": {"b": [X]}},
            "experience['a.b'] is list; give a torch tensor or a NumPy array (small values of "
            "other kinds travel in Experience.info)",
        ),
        (
            {"a": {"b": X.to_sparse()}},
            "experience['a.b'] is a torch.sparse_coo tensor; make it dense",
        ),
        (
            Loop(),
            "experience['a'] contains itself, or nests more than 64 mappings",
        ),
        ({}, "an experience must hold at least one tensor; this mapping is empty"),
        (
            [X],
            "an experience must be a mapping of names to tensors or arrays, not list",
        ),
    ],
)
def test_what_has_no_name_is_refused(writer, data, message):
    """The error names the key and the way out, and the next experience is served."""
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        writer.write(data)
    assert writer.written({"a": {"b": Y}})["a.b"].tolist() == [0, 1]


def trees():
    names = st.text("ab", min_size=1, max_size=2)
    leaf = st.integers(0, 9).map(torch.tensor)
    inner = lambda child: st.dictionaries(names, child, min_size=1, max_size=3)  # noqa: E731
    return inner(st.recursive(leaf, inner, max_leaves=8))


def rebuilt(flat):
    """Nest a flat mapping again."""
    tree = {}
    for name, value in flat.items():
        *branch, leaf = name.split(".")
        node = tree
        for part in branch:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


@given(trees())
def test_names_lead_back_to_the_nesting(tree):
    """Without dots in its keys, any nesting can be told from the names, and values are the same."""
    assert rebuilt(nested.flatten(tree)) == tree


def test_a_plain_experience_is_not_flattened(writer, monkeypatch):
    """A dict of tensors and arrays takes the way that it took before anything could be nested."""

    def refuse(data):
        raise AssertionError("flattened")

    monkeypatch.setattr(nested, "flatten", refuse)
    for _ in range(3):
        writer.write({"a": X, "b.c": Z})
    with pytest.raises(AssertionError, match="flattened"):
        writer.write({"a": X, "b": {"c": Z}})


def test_a_nested_experience_is_copied_once(writer):
    """Each tensor is copied once, into the cell, and the layout is made once for all."""
    data = {"a": X, "next": {"a": Y}}
    layouts = [writer.write(data)[0].layout]
    copies = Copies()
    with copies:
        layouts += [writer.write(data)[0].layout for _ in range(3)]
    assert len({id(layout) for layout in layouts}) == 1
    assert [name for name, _ in copies.seen if "copy" in name] == ["copy_.default"] * 6


class TestTensorDicts:
    """TensorDicts, tensorclasses and their stacks."""

    @pytest.fixture(autouse=True)
    def td(self):
        self.td = pytest.importorskip("tensordict")

    def test_a_tensordict_is_a_nested_mapping(self, writer):
        """It arrives as the same entries in plain dicts do."""
        data = {"obs": X, "next": {"obs": X + 1, "reward": torch.zeros(2, 1)}}
        seen = writer.written(self.td.TensorDict(data, batch_size=[2]))
        assert list(seen) == ["obs", "next.obs", "next.reward"]
        assert torch.equal(seen["next.obs"], X + 1)

    def test_a_tensordict_may_be_part_of_a_dict(self, writer):
        """Kinds of mappings may be mixed."""
        inner = self.td.TensorDict({"a": X}, batch_size=[])
        assert list(writer.written({"b": Y, "c": {"d": inner}})) == ["b", "c.d.a"]

    def test_a_tensorclass_is_a_nested_mapping(self, writer):
        """Its fields are names, at the top and within a mapping."""
        kind = self.td.tensorclass(type("Kind", (), {"__annotations__": {"a": torch.Tensor}}))
        one = kind(a=X, batch_size=[2])
        assert torch.equal(writer.written(one)["a"], X)
        assert torch.equal(writer.written({"k": one})["k.a"], X)

    def test_a_lazy_stack_arrives_as_stacked(self, writer):
        """What TensorDict would stack when it is asked is stacked, nested ones too."""
        each = [
            self.td.TensorDict({"a": X + i, "n": {"b": Y + i}}, batch_size=[2]) for i in range(3)
        ]
        seen = writer.written(self.td.lazy_stack(each))
        assert torch.equal(seen["a"], torch.stack([X, X + 1, X + 2]))
        assert torch.equal(seen["n.b"], torch.stack([Y, Y + 1, Y + 2]))

    def test_a_stack_of_different_keys_is_refused(self, writer):
        """TensorDict would leave out what not all have, without a word."""
        each = [
            self.td.TensorDict({"a": Y, "n": {"b": Y}}, batch_size=[2]),
            self.td.TensorDict({"a": Y, "n": {"b": Y, "c": Y}}, batch_size=[2]),
        ]
        message = (
            "experience['n'] stacks TensorDicts of which only some have c: give all of them the "
            "same keys"
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            writer.write(self.td.lazy_stack(each))

    def test_a_stack_of_different_shapes_is_refused(self, writer):
        """It is no dense tensor."""
        each = [self.td.TensorDict({"a": torch.ones(n)}, batch_size=[]) for n in (2, 3)]
        message = (
            "experience['a'] stacks tensors of different shapes; pad them, or join them and tell "
            "their lengths"
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            writer.write(self.td.lazy_stack(each))

    @pytest.mark.parametrize("value", ["a text", {"a": 1}])
    def test_non_tensor_data_is_refused(self, writer, value):
        """It would have to be pickled, which is what ``info`` is for."""
        data = self.td.TensorDict({"a": Y}, batch_size=[2])
        data.set_non_tensor("note", value)
        message = (
            "experience['note'] is non-tensor data of a TensorDict; small values of other kinds "
            "travel in Experience.info"
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            writer.write(data)

    @pytest.mark.parametrize(
        ("batch_size", "steps"), [([], None), ([4], 4), ([4, 6], 24), ([0], 0)]
    )
    def test_the_batch_size_counts_the_steps(self, batch_size, steps):
        """All of its dimensions together; without one, nothing is said."""
        data = self.td.TensorDict({"a": torch.zeros(*batch_size, 7)}, batch_size=batch_size)
        assert nested.steps_of(data) == steps
        assert nested.steps_of({"a": X}) is None

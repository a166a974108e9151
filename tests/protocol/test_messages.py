"""Messages: small frames that arrive as what they were, and nothing else is taken for one."""

from __future__ import annotations

import os
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipc_helpers import open_fds
from keisei.ipc import wire
from keisei.ipc.descriptors import Descriptors
from keisei.ipc.layout import DTYPES, Layout
from keisei.protocol import messages
from keisei.protocol.errors import ProtocolError

ALL = messages.CONTROL | messages.MODEL | messages.REPLY | messages.EXPERIENCE
FRAME = messages.ExperienceFrame(
    sequence=1 << 40,
    version=7,
    segment=3,
    segment_nbytes=0,
    cell=2,
    stride=4096,
    layout=None,
    num_steps=128,
    info=None,
    seed=(1 << 63) - 1,
)
LAYOUT = Layout.of([("w", torch.float32, (2, 3)), ("", torch.bool, ()), ("none", torch.int8, (0,))])
SAMPLES = [
    messages.Hello(b"factory", 1, 2, 3, 4, "cpu", 5, 6, 7, True, None, 8, True, False),
    messages.Command(1, "echo", b"data"),
    messages.Pause(2),
    messages.Configure(3, (("level", 5), ("", 0)), b"value"),
    messages.Resume(),
    messages.Stop(),
    messages.Arena(1, 2, True, "name", LAYOUT),
    messages.Announcement(2, 3, acknowledge=True),
    messages.Dropped(4, 5),
    messages.Introduced(6),
    messages.Ready(4, takes_weights=False),
    messages.Reply(5, b"value"),
    messages.ReplyError(6, "message", "traceback \ud800 \N{MUSICAL SYMBOL G CLEF}"),
    messages.Configured(6),
    messages.Refused(6, "message", "traceback"),
    messages.Applied(3, 7),
    messages.Failed("collect", "message", "traceback", during_start=False),
    messages.Goodbye("it is old"),
    FRAME,
    FRAME._replace(named=()),
    FRAME._replace(named=((1, 2), (1 << 40, 3))),
    FRAME._replace(layout=LAYOUT, info=b"pickled", segment_nbytes=1 << 20),
    FRAME._replace(layout=Layout.of([])),
    FRAME._replace(settings_version=12, layout=LAYOUT),
]


def whole(payload: wire.Payload) -> bytes:
    return b"".join(payload) if isinstance(payload, tuple) else bytes(payload)


# what is said arrives

INTS = st.integers(0, (1 << 63) - 1)
PAYLOADS = st.binary(max_size=100) | st.sampled_from([bytes(4096), bytes(70_001)])
TEXTS = st.text(st.characters(), max_size=20)
LAYOUTS = st.dictionaries(
    TEXTS,
    st.tuples(
        st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__),
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
    ),
    max_size=5,
).map(lambda named: Layout.of((name, *form) for name, form in named.items()))
MESSAGES = st.one_of(
    st.builds(
        messages.Hello,
        PAYLOADS,
        *[INTS] * 4,
        TEXTS,
        *[INTS] * 3,
        st.booleans(),
        st.none() | INTS,
        st.none() | INTS,
        st.booleans(),
        st.booleans(),
    ),
    st.builds(messages.Command, INTS, TEXTS, PAYLOADS),
    st.builds(messages.Pause, INTS),
    st.builds(messages.Configure, INTS, st.lists(st.tuples(TEXTS, INTS)).map(tuple), PAYLOADS),
    st.builds(messages.Configured, INTS),
    st.builds(messages.Refused, INTS, TEXTS, TEXTS),
    st.builds(messages.Arena, INTS, INTS, st.booleans(), TEXTS, LAYOUTS),
    st.builds(messages.Dropped, INTS, INTS),
    st.builds(messages.Introduced, INTS),
    st.builds(messages.Announcement, INTS, INTS, st.booleans()),
    st.builds(messages.Applied, INTS, INTS),
    st.builds(messages.Ready, INTS, st.booleans()),
    st.builds(messages.Reply, INTS, PAYLOADS),
    st.builds(messages.ReplyError, INTS, TEXTS, TEXTS),
    st.builds(messages.Failed, TEXTS, TEXTS, TEXTS, st.booleans()),
    st.builds(messages.Goodbye, TEXTS),
    st.builds(
        messages.ExperienceFrame,
        INTS,
        INTS,
        st.integers(0, (1 << 32) - 1),
        INTS,
        st.integers(0, (1 << 16) - 1),
        INTS,
        st.none() | LAYOUTS,
        INTS,
        st.none() | PAYLOADS,
        INTS,
        st.none() | st.lists(st.tuples(INTS, INTS), max_size=3).map(tuple),
        INTS,
    ),
)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was(message):
    """Its kind and its fields are the same, from any kind of buffer."""
    frame = whole(messages.pack(message))
    for data in (frame, bytearray(frame), memoryview(frame)):
        copy = messages.unpack(data, ALL)
        assert (type(copy), copy) == (type(message), message)


@given(MESSAGES)
def test_any_message_arrives_as_it_was(message):
    """Whatever the numbers, texts, layouts and payloads are."""
    copy = messages.unpack(whole(messages.pack(message)), ALL)
    assert (type(copy), copy) == (type(message), message)


def test_the_frame_of_an_experience_is_small():
    """What is the same in each names no class and repeats no layout."""
    assert len(messages.pack(FRAME)) < 64


@pytest.mark.parametrize(
    "make",
    [
        lambda payload: messages.Command(1, "a name of some length", payload),
        lambda payload: messages.Reply(1, payload),
        lambda payload: FRAME._replace(info=payload, layout=LAYOUT),
        lambda payload: SAMPLES[0]._replace(factory=payload),
    ],
)
def test_a_large_payload_is_neither_joined_nor_copied(make):
    """Its parts are parts of the frame as they are, and begin where buffers may be looked at."""
    parts = (bytes(4096), memoryview(bytearray(64)), bytes(100))
    head, *rest = messages.pack(make(parts))
    assert [part is sent for part, sent in zip(parts, rest, strict=True)] == [True] * 3
    assert len(head) % wire.ALIGNMENT == 0
    assert len(head) < 512
    frame = bytearray(head + b"".join(parts))
    copy = messages.unpack(frame, ALL)
    payload = next(field for field in copy if isinstance(field, memoryview))
    assert payload.obj is frame
    assert payload == b"".join(parts)


@pytest.mark.parametrize(
    "message",
    [
        FRAME._replace(sequence=-1),
        FRAME._replace(num_steps=1 << 63),
        FRAME._replace(cell=1 << 16),
        FRAME._replace(segment=1 << 32),
        FRAME._replace(layout=Layout.of([("x" * (1 << 16), torch.int8, ())])),
        messages.Applied(0, -1),
        messages.Pause(1 << 63),
        messages.Arena(0, 0, False, "", Layout.of([("x", torch.int8, (1,) * 300)])),
        FRAME._replace(named=((1, -1),)),
        FRAME._replace(named=((1, 1 << 63),)),
    ],
)
def test_what_does_not_fit_is_refused_by_its_sender(message):
    """Numbers and names beyond the form are an error where they are packed, not at the reader."""
    with pytest.raises(ValueError, match=r"^an? "):
        messages.pack(message)


# nothing else does


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data):
    """Nothing else is raised, and what is accepted is one of the messages, with values in range."""
    try:
        message = messages.unpack(data, ALL)
    except ProtocolError:
        return
    assert type(message) in ALL
    assert whole(messages.pack(message)) is not None


@given(st.integers(0, 13), st.binary(max_size=300))
def test_any_bytes_behind_a_kind_are_a_message_or_a_protocol_error(kind, data):
    """Also where the first byte names a kind that there is."""
    test_any_bytes_are_a_message_or_a_protocol_error.hypothesis.inner_test(bytes([kind]) + data)


@given(MESSAGES, st.data())
def test_a_frame_with_one_byte_changed_is_refused_or_harmless(message, data):
    """Whichever byte changes: the result is a message in range, or a protocol error."""
    frame = bytearray(whole(messages.pack(message)))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        copy = messages.unpack(frame, ALL)
    except ProtocolError:
        return
    assert type(copy) in ALL
    for field in copy:
        assert not isinstance(field, int) or 0 <= field < 1 << 63
        if isinstance(field, Layout):
            check_layout(field)


def check_layout(layout: Layout) -> None:
    """Every tensor lies inside, behind the one before, with the bytes that its shape needs."""
    end = 0
    assert len({field.name for field in layout.fields}) == len(layout.fields)
    for field in layout.fields:
        size = DTYPES[field.dtype].itemsize
        for dim in field.shape:
            assert dim >= 0
            size *= dim
        assert field.nbytes == size
        assert field.offset >= end
        assert field.offset % 64 == 0
        end = field.offset + size
    assert end <= layout.nbytes < 1 << 63


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_frame_that_is_cut_or_too_long_is_refused(message):
    """Wherever it is cut, and whatever follows on it."""
    frame = whole(messages.pack(message))
    for end in range(len(frame)):
        with pytest.raises(ProtocolError, match=r"^a frame of \d+ bytes is malformed: "):
            messages.unpack(frame[:end], ALL)
    with pytest.raises(ProtocolError, match=r"bytes follow on its fields"):
        messages.unpack(frame + b"\0", ALL)


@pytest.mark.parametrize(
    "data",
    [b"", b"nonsense", b"\xff", pickle.dumps(42), pickle.dumps((13, 1, 2)), bytes(1 << 17)],
    ids=lambda data: repr(data[:10]),
)
def test_anything_else_is_refused(data):
    """Pickles too: nothing of a frame is ever unpickled here."""
    with pytest.raises(ProtocolError):
        messages.unpack(data, ALL)


def test_a_pickle_in_a_frame_is_not_run():
    """A payload is handed on as bytes, whatever it would do."""
    payload = pickle.dumps(Bomb())
    assert messages.unpack(messages.pack(messages.Reply(1, payload)), ALL).payload == payload


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("queue", ["CONTROL", "MODEL", "REPLY", "EXPERIENCE"])
def test_a_queue_takes_its_own_kinds_only(message, queue):
    """A message in a queue of another direction or purpose is refused."""
    allowed = getattr(messages, queue)
    frame = whole(messages.pack(message))
    if type(message) in allowed:
        assert messages.unpack(frame, allowed) == message
    else:
        with pytest.raises(ProtocolError, match=r"^a \w+ has no business in this queue$"):
            messages.unpack(frame, allowed)


def layout_frame(*fields: tuple[bytes, bytes, tuple[int, ...]]) -> bytes:
    """Return the frame of an ``Arena`` whose layout says anything."""
    body = b"".join(
        struct.pack("<HBB", len(name), len(dtype), len(shape))
        + name
        + dtype
        + struct.pack(f"<{len(shape)}q", *shape)
        for name, dtype, shape in fields
    )
    head = messages.pack(messages.Arena(1, 2, True, "name", Layout((), 0)))
    return head[: -len(struct.pack("<I", 0))] + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "fields",
    [
        [(b"a", b"float32", (-1,))],
        [(b"a", b"float32", (1 << 62, 1 << 62))],
        [(b"a", b"float32", (1 << 62, 0, 1 << 62))],
        [(b"a", b"int8", ((1 << 63) - 1,)), (b"b", b"int8", ((1 << 63) - 1,))],
        [(b"a", b"quint8", (3,))],
        [(b"a", b"float33", (3,))],
        [(b"a", b"Tensor", (3,))],
        [(b"a", b"", (3,))],
        [(b"a", b"int8", (3,)), (b"a", b"int8", (3,))],
        [(b"\xff", b"int8", (3,))],
        [(b"a", b"int8", (1,) * 65)],
    ],
    ids=repr,
)
def test_a_layout_that_cannot_be_is_refused(fields):
    """Negative, overflowing and too many dimensions, unknown dtypes, names that are there twice."""
    with pytest.raises(ProtocolError):
        messages.unpack(layout_frame(*fields), messages.MODEL)


def test_the_layouts_above_differ_from_a_right_one_in_that():
    """The frame that they are made of is accepted where nothing is wrong with it."""
    arena = messages.unpack(layout_frame((b"a", b"int8", (3,))), messages.MODEL)
    assert arena.layout == Layout.of([("a", torch.int8, (3,))])


# descriptors


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (messages.Arena(1, 2, True, "name", LAYOUT), 1),
        (messages.Introduced(1), 1),
        (messages.Dropped(1, 1), 0),
        (messages.Announcement(0, 1, acknowledge=False), 0),
        (messages.Reply(1, b""), 0),
        (FRAME, 0),
        (FRAME._replace(segment_nbytes=8192), 1),
    ],
)
@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_a_message_comes_with_its_descriptors_and_no_others(message, number, given):
    """One comes with new memory, none with anything else; a frame that is refused closes them."""
    before = open_fds()
    fds = Descriptors(os.dup(0) for _ in range(given))
    frame = messages.pack(message)
    if given == number:
        assert messages.unpack(frame, ALL, fds) == message
        assert len(fds) == number
    else:
        with pytest.raises(ProtocolError, match=rf"{given} descriptors came with it instead of"):
            messages.unpack(frame, ALL, fds)
        assert open_fds() == before
    fds.close()
    assert open_fds() == before


@pytest.mark.parametrize("data", [b"", b"nonsense", whole(messages.pack(messages.Stop()))])
def test_a_refused_frame_closes_its_descriptors(data):
    """Whatever it is refused for."""
    before = open_fds()
    fds = Descriptors([os.dup(0), os.dup(0)])
    with pytest.raises(ProtocolError):
        messages.unpack(data, messages.REPLY, fds)
    assert open_fds() == before

"""Messages: small frames that arrive as what they were, and nothing else is taken for one."""

from __future__ import annotations

import pickle

import pytest

from keisei.exceptions import SerializationError
from keisei.ipc.layout import Field, Layout
from keisei.protocol import messages

FRAME = messages.ExperienceFrame(
    sequence=1 << 40,
    version=7,
    segment=3,
    slot=2,
    stride=4096,
    layout=None,
    new_segment=False,
    num_steps=128,
    info=None,
    seed=(1 << 63) - 1,
)


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(b"factory", 1, 2, 3, 4, "cpu", 5, 6, 7, True, None, 8),
        messages.Command(1, "echo", b"data"),
        messages.Pause(2),
        messages.Resume(),
        messages.Stop(),
        messages.Arena(Layout((Field("w", "float32", (2, 3), 0, 24),), 64)),
        messages.Announcement(3, acknowledge=True),
        messages.Ready(4, True),
        messages.Reply(5, b"value"),
        messages.ReplyError(6, "message", "traceback"),
        messages.Applied(7),
        messages.Failed("collect", "message", "traceback", during_start=False),
        messages.Goodbye("it is old"),
        FRAME,
        FRAME._replace(layout=Layout((), 64), info=b"pickled", new_segment=True),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_arrives_as_it_was(message):
    """Its kind and its fields are the same, from any kind of buffer."""
    frame = messages.pack(message)
    for data in (frame, bytearray(frame), memoryview(frame)):
        copy = messages.unpack(data)
        assert (type(copy), copy) == (type(message), message)


def test_the_frame_of_an_experience_is_small():
    """What is the same in each names no class and repeats no layout."""
    assert len(messages.pack(FRAME)) < 64


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        pickle.dumps(42),
        pickle.dumps(()),
        pickle.dumps((1000,)),
        pickle.dumps(("Stop",)),
        pickle.dumps((1, 2)),
        pickle.dumps((None,)),
        pickle.dumps({0: 1}),
    ],
    ids=repr,
)
def test_anything_else_is_refused(data):
    """With an error of the library, whatever it is."""
    with pytest.raises(SerializationError, match=r"^a frame "):
        messages.unpack(data)

"""What the frames between the application and a worker say; one class for each."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

from keisei.exceptions import SerializationError
from keisei.ipc import serialize
from keisei.ipc.layout import Layout

# application -> worker, control queue


class Hello(NamedTuple):
    """The first frame: everything that a worker needs to begin. ``factory`` is pickled."""

    factory: bytes
    worker_id: int
    incarnation: int
    num_workers: int
    seed: int
    device: str
    weights_version: int
    threads: int
    slots: int
    paused: bool
    max_experiences: int | None
    max_rss: int | None


class Command(NamedTuple):
    """Call ``on_command`` (or ``reset``); ``payload`` is pickled data."""

    sequence: int
    name: str
    payload: bytes


class Pause(NamedTuple):
    """Begin no experience from now on; answered when the worker stands still."""

    sequence: int


class Resume(NamedTuple):
    """Collect again, as far as credits go."""


class Stop(NamedTuple):
    """Tear down, say goodbye and exit."""


# application -> worker, model queue


class Arena(NamedTuple):
    """The weights' shared memory; comes with its descriptor."""

    layout: Layout


class Announcement(NamedTuple):
    """A version was published; acknowledge with ``Applied`` if ``acknowledge``."""

    version: int
    acknowledge: bool


# worker -> application, reply queue


class Ready(NamedTuple):
    """``setup`` is done and the newest weights are applied.

    ``takes_weights`` tells whether the worker has a model or its own ``load_weights``.
    """

    version: int
    takes_weights: bool


class Reply(NamedTuple):
    """The answer to a ``Command`` or ``Pause``; ``payload`` is pickled."""

    sequence: int
    payload: bytes


class ReplyError(NamedTuple):
    """A command raised, or its reply could not be pickled."""

    sequence: int
    message: str
    traceback: str


class Applied(NamedTuple):
    """This version, and every older one, is applied or skipped."""

    version: int


class Failed(NamedTuple):
    """A hook raised; the process ends after this frame. Its texts are those of ``failures``."""

    phase: str
    message: str
    traceback: str
    during_start: bool


class Goodbye(NamedTuple):
    """The process ends in an orderly way; ``recycle`` says why it wants a successor, or ""."""

    recycle: str


# worker -> application, experience queue


class ExperienceFrame(NamedTuple):
    """One experience lies in shared memory, in a slot of ``stride`` bytes.

    A new segment comes with its descriptor. ``layout`` is ``None`` where it is that of the frame
    before: it would be most of the frame. ``info`` is pickled, ``None`` if empty.
    """

    sequence: int
    version: int
    segment: int
    slot: int
    stride: int
    layout: Layout | None
    new_segment: bool
    num_steps: int
    info: bytes | None
    seed: int


_KINDS: tuple[type[Any], ...] = (
    Hello,
    Command,
    Pause,
    Resume,
    Stop,
    Arena,
    Announcement,
    Ready,
    Reply,
    ReplyError,
    Applied,
    Failed,
    Goodbye,
    ExperienceFrame,
)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


def pack(message: Any) -> bytes:
    """Return the frame of a message: its kind's number and its fields, pickled.

    Far cheaper than the message itself, whose class would be named and looked up each time. Its
    fields hold plain values only, or bytes that ``serialize.dumps`` has made.
    """
    return pickle.dumps((_NUMBERS[type(message)], *message), pickle.HIGHEST_PROTOCOL)


def unpack(frame: bytes | bytearray | memoryview) -> Any:
    """Return the message in a frame.

    Raises:
        SerializationError: It is none.
    """
    fields = serialize.loads(frame, "a frame")
    try:
        return _KINDS[fields[0]]._make(fields[1:])
    except (TypeError, IndexError, KeyError) as error:
        raise SerializationError(f"a frame holds no message ({error})") from error

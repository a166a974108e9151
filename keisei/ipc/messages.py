"""What the frames between the application and a worker say; one class for each."""

from __future__ import annotations

from typing import Any, NamedTuple

from keisei.ipc.layout import Layout
from keisei.ipc.ring import Place

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
    """``setup`` is done and the newest weights are applied."""

    version: int


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
    """A hook raised; the process ends after this frame."""

    phase: str
    message: str
    traceback: str
    during_start: bool


class Goodbye(NamedTuple):
    """The process ends in an orderly way; ``recycle`` says why it wants a successor, or ""."""

    recycle: str


# worker -> application, experience queue


class ExperienceFrame(NamedTuple):
    """One experience lies in shared memory; a new segment comes with its descriptor."""

    sequence: int
    version: int
    place: Place
    new_segment: bool
    num_steps: int
    info: dict[str, Any]
    seed: int

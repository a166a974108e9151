"""What the frames between the application and a worker say; one class for each.

A frame is the number of its kind and the fields in fixed binary forms. Nothing in it is pickled but
the values of users: a factory, the data and the reply of a command, ``Experience.info``. Those are
payloads, the last thing in their frames, and are not looked at here.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from keisei.ipc.descriptors import NO_DESCRIPTORS, Descriptors
from keisei.ipc.layout import Layout
from keisei.ipc.sizes import LARGE
from keisei.ipc.wire import Payload
from keisei.protocol import codec, experience_frame
from keisei.protocol.codec import BOOL, ENTRIES, INT, LAYOUT, OPTIONAL_INT, TEXT, Bytes, Coder
from keisei.protocol.errors import ProtocolError

# application -> worker, control queue


class Hello(NamedTuple):
    """The first frame: everything that a worker needs to begin. ``factory`` is pickled.

    ``cells`` is how many experiences may be on their way at a time. ``has_weights`` tells that the
    worker is to wait for ``Introduced``; with ``has_settings`` a ``Configure`` with all settings of
    the slot comes next.
    """

    factory: Payload
    worker_id: int
    incarnation: int
    num_workers: int
    seed: int
    device: str
    weights_version: int
    threads: int
    cells: int
    paused: bool
    max_experiences: int | None
    max_rss: int | None
    has_weights: bool = False
    has_settings: bool = False


class Command(NamedTuple):
    """Call ``on_command`` (or ``reset``); ``payload`` is pickled data."""

    sequence: int
    name: str
    payload: Payload


class Pause(NamedTuple):
    """Begin no experience from now on; answered when the worker stands still."""

    sequence: int


class Configure(NamedTuple):
    """Settings that are new or have changed; answered between two experiences.

    ``payload`` has their values, pickled, as ``protocol.settings`` packs them; ``entries`` has the
    name and the bytes of each.
    """

    version: int
    entries: tuple[tuple[str, int], ...]
    payload: Payload


class Resume(NamedTuple):
    """Collect again, as far as credits go."""


class Stop(NamedTuple):
    """Tear down, say goodbye and exit."""


# application -> worker, model queue


class Arena(NamedTuple):
    """Where weights lie: new shared memory, of a new name or in the place of its former one.

    Comes with the memory's descriptor. ``number`` stands for the name in all other frames; 0 is
    "main". ``edition`` counts the changes of the names, this one included.
    """

    number: int
    edition: int
    is_final: bool
    name: str
    layout: Layout


class Dropped(NamedTuple):
    """There are no weights of this name any more."""

    number: int
    edition: int


class Introduced(NamedTuple):
    """The worker was sent all names that there are; comes with the descriptor of the board."""

    edition: int


class Announcement(NamedTuple):
    """A version was published; acknowledge with ``Applied`` if ``acknowledge``."""

    number: int
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
    payload: Payload


class ReplyError(NamedTuple):
    """A command raised, or its reply could not be pickled."""

    sequence: int
    message: str
    traceback: str


class Configured(NamedTuple):
    """The worker has the settings of this version."""

    version: int


class Refused(NamedTuple):
    """``configure`` raised at the settings of this version; the worker has the former ones."""

    version: int
    message: str
    traceback: str


class Applied(NamedTuple):
    """This version of a name, and every older one, is applied or skipped."""

    number: int
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

ExperienceFrame = experience_frame.ExperienceFrame


Message = (
    Hello
    | Command
    | Pause
    | Configure
    | Resume
    | Stop
    | Arena
    | Dropped
    | Introduced
    | Announcement
    | Ready
    | Reply
    | ReplyError
    | Configured
    | Refused
    | Applied
    | Failed
    | Goodbye
    | ExperienceFrame
)

CONTROL: frozenset[type[Any]] = frozenset({Hello, Command, Pause, Configure, Resume, Stop})
MODEL: frozenset[type[Any]] = frozenset({Arena, Dropped, Introduced, Announcement})
REPLY: frozenset[type[Any]] = frozenset(
    {Ready, Reply, ReplyError, Configured, Refused, Applied, Failed, Goodbye}
)
EXPERIENCE: frozenset[type[Any]] = frozenset({ExperienceFrame})
"""The kinds that each queue carries; any other in it is its sender's error."""


class _Form:
    """How the messages of one kind lie in a frame.

    Its number and the integers that it begins with, the other fields in order, then the payload.
    """

    def __init__(
        self,
        kind: type[Any],
        num_ints: int,
        coders: tuple[Coder[Any], ...] = (),
        payload: int | None = None,
    ) -> None:
        """Describe a kind; ``payload`` is the place of that field among the fields."""
        self.kind = kind
        self.head = struct.Struct(f"<B{num_ints}q")
        self.num_ints = num_ints
        self.coders = coders
        self.payload = payload


_FORMS = (
    _Form(
        Hello,
        4,
        (TEXT, INT, INT, INT, BOOL, OPTIONAL_INT, OPTIONAL_INT, BOOL, BOOL),
        payload=0,
    ),
    _Form(Command, 1, (TEXT,), payload=2),
    _Form(Pause, 1),
    _Form(Configure, 1, (ENTRIES,), payload=2),
    _Form(Resume, 0),
    _Form(Stop, 0),
    _Form(Arena, 2, (BOOL, TEXT, LAYOUT)),
    _Form(Dropped, 2),
    _Form(Introduced, 1),
    _Form(Announcement, 2, (BOOL,)),
    _Form(Ready, 1, (BOOL,)),
    _Form(Reply, 1, payload=1),
    _Form(ReplyError, 1, (TEXT, TEXT)),
    _Form(Configured, 1),
    _Form(Refused, 1, (TEXT, TEXT)),
    _Form(Applied, 2),
    _Form(Failed, 0, (TEXT, TEXT, TEXT, BOOL)),
    _Form(Goodbye, 0, (TEXT,)),
)
_NUMBERS = {form.kind: number for number, form in enumerate(_FORMS)}
_EXPERIENCE_NUMBER = len(_FORMS)
_WITH_DESCRIPTORS = frozenset({Arena, Introduced})


def pack(message: Message) -> Payload:
    """Return the frame of a message: bytes, or parts that are not copied where it is large.

    Raises:
        ValueError: A field does not fit; no worker and no application says such a thing.
    """
    try:
        if type(message) is ExperienceFrame:
            return experience_frame.pack_experience(message, _EXPERIENCE_NUMBER)
        number = _NUMBERS[type(message)]
        form = _FORMS[number]
        fields: list[Any] = list(message)
        payload: Any = None if form.payload is None else fields.pop(form.payload)
        ints = fields[: form.num_ints]
        if ints and min(ints) < 0:
            raise ValueError("a number is negative")  # noqa: TRY301 - told with the others
        out = bytearray(form.head.pack(number, *ints))
        for coder, value in zip(form.coders, fields[form.num_ints :], strict=True):
            coder.write(out, value)
        return bytes(out) if form.payload is None else codec.write_payload(out, payload)
    except (struct.error, ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"a {type(message).__name__} does not fit a frame: {error}") from error


def unpack(frame: Bytes, allowed: frozenset[type[Any]], fds: Descriptors | None = None) -> Any:
    """Return the message in a frame.

    Args:
        frame: Anything at all. A payload in the message is a view of it.
        allowed: The kinds that may come; one of the sets above.
        fds: What came with the frame; closed if it is refused.

    Raises:
        ProtocolError: It is no such message: of another kind, cut, too long, with numbers out of
            range, or with other descriptors than its kind has.
    """
    is_right = False
    try:
        number = frame[0]
        if number == _EXPERIENCE_NUMBER:
            kind: type[Any] = ExperienceFrame
        else:
            kind = _FORMS[number].kind
        if kind not in allowed:
            raise ProtocolError(f"a {kind.__name__} has no business in this queue")
        read = experience_frame.read_experience if kind is ExperienceFrame else _read
        message, end, num_fds = read(frame)
        if end != len(frame):
            raise ValueError(f"{len(frame) - end} bytes follow on its fields")
        if fds is not None and num_fds != (0 if fds is NO_DESCRIPTORS else len(fds)):
            raise ValueError(f"{len(fds)} descriptors came with it instead of {num_fds}")
        is_right = True
    except codec.MALFORMED as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is malformed: {error}") from error
    finally:
        if fds is not None and not is_right:
            fds.close()
    return message


def is_heavy(message: Message) -> bool:
    """Return whether to unpickle a message's payload is worth a thread."""
    return isinstance(message, (Command, Reply)) and len(message.payload) > LARGE


def _read(frame: Bytes) -> tuple[Any, int, int]:
    """Return the message in a frame, where it ends, and how many descriptors it comes with."""
    form = _FORMS[frame[0]]
    _, *fields = form.head.unpack_from(frame)
    if fields and min(fields) < 0:
        raise ValueError("a number is out of range")
    at = form.head.size
    for coder in form.coders:
        value, at = coder.read(frame, at)
        fields.append(value)
    if form.payload is not None:
        value, at = codec.read_payload(frame, at)
        fields.insert(form.payload, value)
    return form.kind._make(fields), at, int(form.kind in _WITH_DESCRIPTORS)

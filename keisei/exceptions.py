"""Every error that the library raises, as one tree.

::

    KeiseiError
    ├── ConfigurationError (ValueError)    a configuration that cannot work; lists every problem
    ├── SerializationError (TypeError)     a factory, command or reply that cannot travel
    ├── ManagerStateError (RuntimeError)   used before start, after stop, or from another loop
    ├── CollectTimeout (TimeoutError)      not enough experience in time; nothing was lost
    ├── LearnerTimeout (TimeoutError)      the learner did not return when the run should end
    ├── PoolExhausted                      restart intensity exceeded, or too few slots are left
    ├── WeightsError (ValueError)          weights that do not fit the ones before them
    │   └── PoisonedWeights                a version that killed its workers, now withdrawn
    ├── WorkerError                        something happened in, or to, one worker
    │   ├── WorkerStartError               it never became ready
    │   ├── WorkerLost                     its process ended while something was expected of it
    │   ├── CommandError                   it answered a command with an error
    │   └── CommandTimeout (TimeoutError)  it did not answer a command in time
    └── QueueError
        ├── QueueTimeout (TimeoutError)    the deadline passed; the queue stays usable
        ├── QueueWouldBlock                a ``_nowait`` call could not act at once
        ├── QueueClosed                    this side was closed by its owner
        ├── QueueBroken                    the peer died in the middle of a frame
        └── QueueEnded                     the peer's end is closed and everything was read

Errors carry their facts as attributes and survive a pickle round trip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keisei.naming import public

if TYPE_CHECKING:
    from keisei.events import Incident


_STDERR_LINES = 20


@public
class KeiseiError(Exception):
    """Base of every error raised by the library."""


@public
class ConfigurationError(KeiseiError, ValueError):
    """A configuration that cannot work.

    Attributes:
        problems: One line for each problem: the key, the value and the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n  - ".join([f"{head}:", *self.problems]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@public
class SerializationError(KeiseiError, TypeError):
    """A value cannot be sent to, or received from, another process."""


@public
class ManagerStateError(KeiseiError, RuntimeError):
    """A manager was used in a state, or from an event loop, in which it cannot serve."""


@public
class CollectTimeout(KeiseiError, TimeoutError):
    """Too little experience arrived in time; what did arrive stays queued for the next call."""


@public
class LearnerTimeout(KeiseiError, TimeoutError):
    """The learner did not return in time when ``run()`` should end, and was abandoned.

    Attributes:
        stack: Where the learner's thread, or its coroutine, stood then, as text.
    """

    def __init__(self, message: str, stack: str = "") -> None:
        self.message = message
        self.stack = stack
        super().__init__(message)

    def __str__(self) -> str:
        if self.stack:
            return f"{self.message}\n\nWhere it stands:\n{self.stack.rstrip()}"
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.stack)


@public
class PoolExhausted(KeiseiError):
    """Workers failed more often than the restart policy allows.

    Attributes:
        incidents: The failures that used the budget up, oldest first.
    """

    def __init__(self, message: str, incidents: Sequence[Incident] = ()) -> None:
        self.message = message
        self.incidents = tuple(incidents)
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  - {incident.summary}" for incident in self.incidents[-5:]]
        if self.incidents and self.incidents[-1].traceback:
            lines += ["", "The last failure in full:", self.incidents[-1].traceback.rstrip()]
        if self.incidents and self.incidents[-1].stderr:
            last = self.incidents[-1].stderr.splitlines()[-_STDERR_LINES:]
            lines += ["", "The last lines of its standard error:", *last]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.incidents)


@public
class WeightsError(KeiseiError, ValueError):
    """Weights whose names, shapes or types differ from the first ones that were pushed."""


@public
class PoisonedWeights(WeightsError):
    """A weights version killed the workers that applied it and was withdrawn.

    Attributes:
        version: The version that was withdrawn.
        replacement: The version that holds the previous weights again.
    """

    def __init__(self, message: str, version: int = 0, replacement: int = 0) -> None:
        self.message = message
        self.version = version
        self.replacement = replacement
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.version, self.replacement)


@public
class WorkerError(KeiseiError):
    """Something happened in, or to, one worker.

    Attributes:
        message: What happened, in one line.
        worker_id: The slot, 0 … n-1.
        incarnation: Which process of that slot.
        exitcode: The exit code, minus the signal's number after a signal, or ``None``.
        remote_traceback: The traceback of the worker's process, or else the last lines of its
            standard error, as text, or ``None``.
        replies: For commands: the answers of the workers that did answer.
        errors: For commands: the errors of all that did not, by worker id.
    """

    def __init__(
        self,
        message: str,
        worker_id: int = -1,
        incarnation: int = -1,
        exitcode: int | None = None,
        remote_traceback: str | None = None,
    ) -> None:
        self.message = message
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.exitcode = exitcode
        self.remote_traceback = remote_traceback
        self.replies: Mapping[int, Any] = {}
        self.errors: Mapping[int, WorkerError] = {}
        super().__init__(message)

    def __str__(self) -> str:
        if self.remote_traceback:
            return f"{self.message}\n\nIn the worker:\n{self.remote_traceback.rstrip()}"
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (
            self.message,
            self.worker_id,
            self.incarnation,
            self.exitcode,
            self.remote_traceback,
        )
        return type(self), facts, {"replies": self.replies, "errors": self.errors}


@public
class WorkerStartError(WorkerError):
    """A worker never became ready: its factory, its imports or ``setup`` failed, or it hung."""


@public
class WorkerLost(WorkerError):
    """A worker's process ended while something was expected of it."""


@public
class CommandError(WorkerError):
    """A worker answered a command with an error."""


@public
class CommandTimeout(WorkerError, TimeoutError):
    """A worker did not answer a command in time; its late answer will be dropped."""


@public
class QueueError(KeiseiError):
    """Base of the errors of the queues between processes."""


@public
class QueueTimeout(QueueError, TimeoutError):
    """The deadline passed; nothing was taken or added, and the queue stays usable."""


@public
class QueueWouldBlock(QueueError):
    """The queue is empty (``get_nowait``) or full (``put_nowait``)."""


@public
class QueueClosed(QueueError):
    """This side of the queue was closed by its owner."""


@public
class QueueBroken(QueueError):
    """The peer died in the middle of a frame; the partial frame was discarded."""


@public
class QueueEnded(QueueError):
    """The peer closed its end; every frame that it sent was read."""

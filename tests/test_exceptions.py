"""The tree of errors: as printed, as caught, and as it travels between processes."""

from __future__ import annotations

import asyncio
import builtins
import pickle
import re

import pytest

from keisei import exceptions
from keisei.events import ExitCause, Incident, Remedy
from keisei.exceptions import (
    CommandTimeout,
    ConfigurationError,
    KeiseiError,
    LearnerTimeout,
    PoisonedWeights,
    PoolExhausted,
    WorkerError,
)

INCIDENT = Incident(
    worker_id=1,
    incarnation=2,
    cause=ExitCause.SIGNAL,
    exitcode=-9,
    phase="collect",
    traceback="Traceback …\nValueError: 1\n",
    remedy=Remedy.ESCALATED,
)
CLASSES = [
    value
    for value in vars(exceptions).values()
    if isinstance(value, type) and issubclass(value, KeiseiError)
]
FACTS = {
    "message": "it went",
    "worker_id": 3,
    "incarnation": 1,
    "exitcode": -11,
    "remote_traceback": "Traceback …",
}


def an_instance_of(kind: type[KeiseiError]) -> KeiseiError:
    if issubclass(kind, WorkerError):
        return kind(**FACTS)
    if kind is ConfigurationError:
        return ConfigurationError(["a = 1: unknown key", "b = 2: must be 3"])
    if kind is PoolExhausted:
        return PoolExhausted("too many", [INCIDENT])
    if kind is LearnerTimeout:
        return LearnerTimeout("learn() did not return", "in learn\n")
    if kind is PoisonedWeights:
        return PoisonedWeights("version 7 kills", version=7, replacement=8)
    return kind("what happened")


def printed_tree() -> dict[str, tuple[str, ...]]:
    """Read {class: (parent, built-in parents …)} from the drawing in the module's docstring."""
    tree: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in (exceptions.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+)(?: \((\w+)\))?(?:  |$)", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents = [path[depth - 1]] if depth else ["Exception"]
            tree[match[2]] = (*parents, *([match[3]] if match[3] else []))
    return tree


def test_the_printed_tree_is_the_real_one():
    """Every class, its place and its built-in parent are drawn in the module's docstring."""
    real = {kind.__name__: tuple(base.__name__ for base in kind.__bases__) for kind in CLASSES}
    assert printed_tree() == real
    assert len(real) == 20


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_its_facts(kind):
    """Type, text and every attribute come back from a pickle."""
    error = an_instance_of(kind)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_the_answers_beside_a_failed_command_survive_pickling():
    """What the other workers replied travels with the error."""
    error = CommandTimeout("worker 1 did not answer", worker_id=1)
    error.replies = {0: "pong"}
    error.errors = {1: CommandTimeout("worker 1 did not answer", worker_id=1)}
    back = pickle.loads(pickle.dumps(error))
    assert back.replies == {0: "pong"}
    assert back.errors[1].worker_id == 1


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_is_also_of_the_built_in_kind_that_is_drawn(kind):
    """An application that knows only Python's own errors can catch ours by them."""
    builtin = [name for name in printed_tree()[kind.__name__] if hasattr(builtins, name)]
    for name in builtin:
        assert issubclass(kind, getattr(builtins, name))


def test_every_deadline_is_a_timeout_error():
    """What asyncio's own deadlines raise catches ours too."""
    deadlines = {kind.__name__ for kind in CLASSES if issubclass(kind, asyncio.TimeoutError)}
    assert deadlines == {"CollectTimeout", "CommandTimeout", "LearnerTimeout", "QueueTimeout"}


def test_a_configuration_error_lists_its_problems():
    """The text counts the problems and gives each a line."""
    assert str(ConfigurationError(["a", "b"])) == "2 problems in the configuration:\n  - a\n  - b"
    assert str(ConfigurationError(["a"])) == "1 problem in the configuration:\n  - a"


def test_a_worker_error_shows_the_remote_traceback():
    """The traceback of the worker's process follows the one-line message."""
    error = WorkerError("worker 3 failed", 3, 0, 1, "Traceback …\nValueError: 1\n")
    assert str(error) == "worker 3 failed\n\nIn the worker:\nTraceback …\nValueError: 1"
    assert str(WorkerError("worker 3 failed", 3)) == "worker 3 failed"


def test_an_exhausted_pool_shows_its_last_failures():
    """The newest five incidents are summed up, and the last traceback is shown in full."""
    error = PoolExhausted("6 failures in 60 s", [INCIDENT] * 6)
    summary = (
        "  - worker 1 (incarnation 2) ended by signal during collect (SIGKILL); pool stopped\n"
    )
    assert str(error) == (
        "6 failures in 60 s\n"
        + summary * 5
        + "\nThe last failure in full:\nTraceback …\nValueError: 1"
    )
    assert error.incidents == (INCIDENT,) * 6

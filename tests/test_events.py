"""What the pool tells the world: exact words, frozen values."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import signal

import pytest

from keisei import events
from keisei.events import Event, ExitCause, Incident, Remedy, UpdateCompleted, signal_name

VALUES = [
    value
    for value in vars(events).values()
    if inspect.isclass(value) and dataclasses.is_dataclass(value)
]


@pytest.mark.parametrize(
    ("incident", "summary"),
    [
        (
            Incident(0, 0, ExitCause.SIGNAL, exitcode=-9, phase="collect"),
            "worker 0 (incarnation 0) ended by signal during collect (SIGKILL); restarted",
        ),
        (
            Incident(
                3,
                2,
                ExitCause.USER_ERROR,
                detail="ValueError: no such level",
                exitcode=1,
                phase="start",
                remedy=Remedy.ESCALATED,
            ),
            "worker 3 (incarnation 2) ended by user error during start (exit code 1): "
            "ValueError: no such level; pool stopped",
        ),
        (
            Incident(1, 5, ExitCause.LOST, remedy=Remedy.GAVE_UP),
            "worker 1 (incarnation 5) ended by lost (exit code unknown); slot given up",
        ),
        (
            Incident(1, 0, ExitCause.EXIT, exitcode=0, phase="idle", remedy=Remedy.NONE),
            "worker 1 (incarnation 0) ended by exit during idle (exit code 0); "
            "nothing: the pool was stopping",
        ),
    ],
)
def test_the_summary_of_an_incident(incident, summary):
    """One line tells who, why, when, how, what is known and what was done."""
    assert incident.summary == summary


@pytest.mark.parametrize(
    ("exitcode", "name"),
    [
        (-signal.SIGKILL, "SIGKILL"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-63, "signal 63"),
        (0, None),
        (1, None),
        (137, None),
        (None, None),
    ],
)
def test_the_name_of_the_signal_behind_an_exit_code(exitcode, name):
    """Negative exit codes have a signal's name, or its number; others have none."""
    assert signal_name(exitcode) == name
    assert Incident(0, 0, ExitCause.SIGNAL, exitcode=exitcode).signal_name == name


def test_only_these_ends_are_no_failures():
    """Orderly, requested and recycled ends do not count against the restart intensity."""
    harmless = {cause for cause in ExitCause if not cause.is_failure}
    assert harmless == {ExitCause.GOODBYE, ExitCause.REQUESTED, ExitCause.RECYCLED}


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_value_is_frozen_and_slotted(kind):
    """No event can be changed, nor be given attributes that it does not declare."""
    value = kind(**dict.fromkeys((field.name for field in dataclasses.fields(kind)), 0))
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 1)
    assert not hasattr(value, "__dict__")


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_value_survives_pickling(kind):
    """An event that went through a pickle equals the first."""
    value = kind(**dict.fromkeys((field.name for field in dataclasses.fields(kind)), 0))
    assert pickle.loads(pickle.dumps(value)) == value


def test_every_value_but_the_incident_is_an_event():
    """What observers are given has one base."""
    assert [kind for kind in VALUES if not issubclass(kind, Event)] == [Incident]
    assert len(VALUES) == 20


def test_an_update_has_its_own_empty_metrics():
    """Two updates without metrics do not share one dictionary."""
    first, second = (
        UpdateCompleted(1, 10, 5.0, 2, 2, 0, 0.0),
        UpdateCompleted(2, 20, 5.0, 3, 2, 0, 0.0),
    )
    assert first.metrics == {}
    assert first.metrics is not second.metrics

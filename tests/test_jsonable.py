"""Events and their fields as JSON: exact values for every kind that a field may hold."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keisei.events import ExitCause, Incident, PoolStarted, Remedy, UpdateCompleted, WorkerIncident
from keisei.jsonable import jsonable
from observers.samples import EVERY_EVENT, INCIDENT, Unfriendly, odd_events


class Colour(enum.Enum):
    RED = (1, math.nan)


class Text(str):
    __slots__ = ()

    def __str__(self):
        raise RuntimeError("no")


class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no")


CYCLE: list[object] = []
CYCLE.append(CYCLE)

PLAIN = [
    (None, None),
    (True, True),
    (7, 7),
    (10**400, 10**400),
    (0.5, 0.5),
    (math.nan, None),
    (math.inf, None),
    (-math.inf, None),
    (np.float32(0.5), 0.5),
    (np.float64("nan"), None),
    (np.int64(-3), -3),
    ("text", "text"),
    ("\udcff", "\\udcff"),
    (Text("own"), "own"),
    (ExitCause.USER_ERROR, "user error"),
    (Colour.RED, [1, None]),
    (ValueError("no"), "ValueError: no"),
    (KeyError(), "KeyError"),
    (Broken(), "<Broken>"),
    (b"\xff", "\\xff"),
    ((1, (2.5, math.nan)), [1, [2.5, None]]),
    ({3}, [3]),
    ({1: {"a": math.inf}, ExitCause.HANG: 1}, {"1": {"a": None}, "hang": 1}),
    (range(2), [0, 1]),
    (object, "<class 'object'>"),
    (np.bool_(True), True),
    (np.array(2.5), 2.5),
    (types.SimpleNamespace(a=1), "namespace(a=1)"),
]


@pytest.mark.parametrize(("value", "expected"), PLAIN, ids=lambda value: type(value).__name__)
def test_every_kind_of_value_is_json(value, expected):
    """Numbers, text, containers, enumerations, exceptions and strangers have one form each."""
    found = jsonable(value)
    assert found == expected
    assert type(found) is type(expected)
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


def test_a_value_that_cannot_be_shown_is_named():
    """Where every conversion fails the class's name is left."""
    assert jsonable(Unfriendly()).startswith("<Unfriendly")
    assert jsonable({Unfriendly: 1, "a": Unfriendly()})["a"].startswith("<Unfriendly")


def test_a_container_in_itself_ends():
    """What nests without end is followed for eight levels."""
    assert json.dumps(jsonable(CYCLE)).count("[") < 20


@given(
    st.recursive(
        st.none() | st.floats() | st.text() | st.binary() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    )
)
def test_whatever_it_is_given_json_takes_it(value):
    """No value makes ``json`` refuse, and its text is UTF-8."""
    json.dumps(jsonable(value), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: type(event).__name__)
def test_every_event_tells_its_type_its_time_and_its_fields(event):
    """Each declared field is a key; the type and the wall clock stand beside them."""
    found = event.to_dict()
    names = {field.name for field in dataclasses.fields(event)}
    assert set(found) == {"type", *names}
    assert found["type"] == type(event).__name__
    assert abs(found["time"] - time.time()) < 86_400
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_odd_fields_are_json_too():
    """No content of a field, and all of them at once, makes an event unwritable."""
    for event in odd_events():
        json.dumps(event.to_dict(), allow_nan=False, ensure_ascii=False).encode()


def test_the_time_is_the_wall_clock_and_does_not_count(monkeypatch):
    """Two equal events made at different times are equal; each keeps its own time."""
    before = time.time()
    first, second = PoolStarted(2), PoolStarted(2, time=1.0)
    assert before <= first.time <= time.time()
    assert second.time == 1.0
    assert first == second
    assert hash(first) == hash(second)


def test_an_incident_tells_what_it_computes_too():
    """The summary and the signal's name are in the dictionary, also inside an event."""
    incident = Incident(0, 1, ExitCause.SIGNAL, exitcode=-9, phase="collect", time=5.0)
    found = incident.to_dict()
    assert found["signal_name"] == "SIGKILL"
    assert found["summary"] == incident.summary
    assert (found["cause"], found["remedy"], found["time"]) == ("signal", Remedy.RESTARTED.value, 5)
    assert WorkerIncident(incident).to_dict()["incident"] == found
    assert WorkerIncident(INCIDENT).to_dict()["incident"]["signal_name"] is None


def test_the_means_of_episodes():
    """Returns and lengths have means, and none where no episode ended."""
    fields = (1, 10, 5.0, 2, 2, 0, 0.0)
    update = UpdateCompleted(*fields, episode_returns=(1.0, 2.0), episode_lengths=(3, 6))
    assert (update.mean_return, update.mean_length) == (1.5, 4.5)
    assert UpdateCompleted(*fields).mean_return is None
    assert UpdateCompleted(*fields).mean_length is None
    assert update.to_dict()["episode_returns"] == [1.0, 2.0]

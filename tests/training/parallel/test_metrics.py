"""Metrics of a learner: numbers of any kind reach observers as floats, nothing else does."""

from __future__ import annotations

import asyncio
import collections
import decimal
import enum
import fractions
import logging
import math
import threading
import types
from unittest import mock

import numpy as np
import pytest
import torch

import pool_workers
from keisei import ParallelManager
from keisei.events import UpdateCompleted
from keisei.observers.log import LogObserver
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.metrics import MetricNumbers


class Level(enum.IntEnum):
    HIGH = 3


class Floatish:
    """Something with a value, such as a running mean."""

    def __float__(self):
        return 2.5


class FloatSubclass(float):
    pass


class Lying:
    """Says that it is a float, and is none."""

    __class__ = float  # type: ignore[assignment]


class Failing:
    """Raises whenever it is looked at."""

    def __init__(self, error):
        self.error = error

    def __float__(self):
        raise self.error

    def __getattr__(self, name):
        raise self.error


class ReturnsText:
    def __float__(self):
        return "1.0"


class OddArray:
    """Looks like an array, and its item is no number."""

    shape = ()

    def item(self):
        return "1.0"


NUMBERS = [
    (1.5, 1.5),
    (3, 3.0),
    (True, 1.0),
    (math.inf, math.inf),
    (Level.HIGH, 3.0),
    (FloatSubclass(0.5), 0.5),
    (fractions.Fraction(1, 4), 0.25),
    (decimal.Decimal("0.5"), 0.5),
    (Floatish(), 2.5),
    (np.float32(0.5), 0.5),
    (np.float16(0.5), 0.5),
    (np.longdouble(0.5), 0.5),
    (np.int64(-7), -7.0),
    (np.uint8(7), 7.0),
    (np.bool_(True), 1.0),
    (np.array(2.0), 2.0),
    (np.array([[2.0]]), 2.0),
    (torch.tensor(2.0), 2.0),
    (torch.tensor([[2.0]], dtype=torch.bfloat16), 2.0),
    (torch.tensor(2.0, requires_grad=True), 2.0),
    (torch.tensor(True), 1.0),
    (torch.tensor(7, dtype=torch.int8), 7.0),
    (torch.nn.Parameter(torch.ones(1)), 1.0),
]

NO_NUMBERS = [
    None,
    "1.5",
    b"1.5",
    bytearray(b"1"),
    memoryview(b"1"),
    np.str_("1.5"),
    np.datetime64("2024-01-01"),
    np.array("1.5"),
    np.array(None),
    [1.0],
    (1.0,),
    {"a": 1.0},
    {1.0},
    1j,
    np.complex64(1),
    torch.tensor(1j),
    torch.zeros(2),
    torch.zeros(0),
    torch.zeros(1, device="meta"),
    np.zeros(2),
    np.array([]),
    10**400,
    decimal.Decimal("sNaN"),
    Lying(),
    ReturnsText(),
    OddArray(),
    object(),
    float,
    lambda: 1.0,
    Failing(ValueError("no")),
    Failing(KeyboardInterrupt()),
    Failing(SystemExit()),
    Failing(StopIteration()),
    Failing(asyncio.CancelledError()),
]


@pytest.mark.parametrize(("value", "number"), NUMBERS, ids=lambda value: type(value).__name__)
def test_numbers_of_any_kind_become_floats(caplog, value, number):
    """Numbers, and tensors and arrays with one element, are Python's floats."""
    (found,) = MetricNumbers().of({"a": value}).values()
    assert (type(found), found) == (float, number)
    assert caplog.records == []


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), torch.tensor(math.nan)])
def test_nan_stays_nan(value):
    """A loss that went wrong is seen."""
    assert math.isnan(MetricNumbers().of({"a": value})["a"])


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_left_out_and_told_once(caplog, value):
    """The other metrics are there; one warning names the metric and its type."""
    numbers = MetricNumbers()
    for update in range(3):
        assert numbers.of({"a": 1, "odd": value, "b": update}) == {"a": 1.0, "b": float(update)}
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "keisei.learner",
            "WARNING",
            f"the metric 'odd' is no number but a {type(value).__qualname__}; "
            "it is left out of events; told once",
        )
    ]


def test_names_that_are_no_strings_become_strings():
    """Whatever names a metric, observers are given text."""

    class Nameless:
        def __str__(self):
            raise ValueError("no")

    class Name(str):
        __slots__ = ()

        def __str__(self):
            return "another"

    class Colour(enum.StrEnum):
        RED = "red"

    metrics = {1: 1, ("a", 2): 2, None: 3, Nameless(): 4, Name("name"): 5, Colour.RED: 6}
    numbers = MetricNumbers().of(metrics)
    assert numbers == {
        "1": 1,
        "('a', 2)": 2,
        "None": 3,
        f"<{Nameless.__qualname__}>": 4,
        "another": 5,
        "red": 6,
    }
    assert {type(name) for name in numbers} == {str}


class BrokenMapping(collections.UserDict):
    def __iter__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("mapping", "numbers"),
    [
        (types.MappingProxyType({"a": 1}), {"a": 1.0}),
        (collections.OrderedDict(a=1), {"a": 1.0}),
        (collections.defaultdict(float, a=1), {"a": 1.0}),
        (BrokenMapping(a=1), {}),
        ({}, {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mappings_of_any_kind_are_read(mapping, numbers):
    """A mapping that cannot be read has no numbers, and stays the report's."""
    copy, found = MetricNumbers().copy_and_numbers_of(mapping)
    assert found == numbers
    assert (copy is mapping) if isinstance(mapping, BrokenMapping) else (copy == dict(mapping))


def test_only_so_many_names_are_warned_of(caplog):
    """A learner that makes up a new name in each update does not fill the log."""
    numbers = MetricNumbers()
    for update in range(1000):
        numbers.of({f"odd {update}": None})
    assert len(caplog.records) == 100


def test_only_values_that_cannot_block_are_read_on_the_loop():
    """A tensor may have to wait for its device, an object runs code of its own."""
    assert MetricNumbers.are_plain({"a": 1, "b": 2.0, "c": True})
    for metrics in ({"a": torch.ones(1)}, {"a": Floatish()}, {1: 1.0}, {"a": FloatSubclass(1)}):
        assert not MetricNumbers.are_plain(metrics)


class Returning:
    """A learner that returns the next of its metrics with each update."""

    def __init__(self, *metrics):
        self.metrics = list(metrics)

    def learn(self, batches):
        return self.metrics.pop(0)

    def state_dict(self):
        return {"w": torch.zeros(1)}


class ReturningAsync(Returning):
    async def learn(self, batches):
        return super().learn(batches)


class Watching:
    def __init__(self):
        self.metrics = []

    def on_event(self, event):
        if isinstance(event, UpdateCompleted):
            self.metrics.append(event.metrics)


@pytest.mark.parametrize("learner", [Returning, ReturningAsync])
async def test_observers_outlive_any_metric(make_manager, caplog, learner):
    """Events hold the numbers alone; the report has the last metrics as they were returned."""
    odd = {"mean_return": None, "loss": torch.tensor(0.5, requires_grad=True), 3: "x"}
    learner = learner({"mean_return": 1.0}, odd, None, odd)
    watching = Watching()
    observers = [LogObserver(), watching]
    manager = make_manager(
        pool_workers.Counting,
        learner=learner,
        observers=observers,
        backend="inline",
        mode="sync",
        num_workers=1,
    )
    async with fail_after(30):
        with caplog.at_level(logging.DEBUG, logger="keisei"):
            report = await manager.run(max_steps=4)
    assert watching.metrics == [{"mean_return": 1.0}, *[{"loss": 0.5}] * 3]
    assert report.metrics == odd
    assert report.metrics is not odd
    told = [record for record in caplog.records if record.name == "keisei.learner"]
    assert sorted(record.getMessage().split("'")[1] for record in told) == ["3", "mean_return"]
    assert "removed" not in caplog.text
    assert "update 4: 4 steps" in caplog.text


@pytest.mark.parametrize("learner", [Returning, ReturningAsync])
async def test_metrics_that_take_their_time_are_read_in_the_learners_thread(make_manager, learner):
    """A tensor on a device has its value when the device is done: the loop does not wait."""
    threads = []

    class Slow:
        def __float__(self):
            threads.append(threading.current_thread().name)
            return 1.0

    watching = Watching()
    manager = make_manager(
        pool_workers.Counting,
        learner=learner({"slow": Slow()}),
        observers=[watching],
        backend="inline",
        num_workers=1,
    )
    async with fail_after(30):
        await manager.run(max_steps=1)
    assert watching.metrics == [{"slow": 1.0}]
    assert threads == ["keisei-learner"]


def test_a_mock_is_what_it_says_it_is():
    """An object that converts to a float is a number, whatever else it has."""
    value = mock.MagicMock()
    value.__float__.return_value = 7.0
    assert MetricNumbers().of({"a": value}) == {"a": 7.0}


EPISODES = [
    ([{"episode_returns": [1.5, 2], "episode_lengths": [3, 4]}], ((1.5, 2.0), (3, 4))),
    ([{}, {"episode_returns": (1.0,)}], ((1.0,), ())),
    ([{"episode_returns": np.array([1.0, 2.0])}], ((1.0, 2.0), ())),
    ([{"episode_lengths": torch.tensor([5])}], ((), (5,))),
]
NO_EPISODES = [None, "text", 3, {"a": 1}, object(), Failing(ValueError("no"))]


@pytest.mark.parametrize(("infos", "expected"), EPISODES)
def test_episodes_of_batches_are_gathered(caplog, infos, expected):
    """Returns and lengths of all batches follow one another, whatever sequence they come in."""
    assert MetricNumbers().episodes_of(infos) == expected
    assert caplog.records == []


@pytest.mark.parametrize("value", NO_EPISODES, ids=lambda value: type(value).__name__)
def test_what_is_no_sequence_of_numbers_is_left_out_and_told_once(caplog, value):
    """Workers may put anything under that name; the training goes on."""
    numbers = MetricNumbers()
    for _ in range(3):
        assert numbers.episodes_of([{"episode_returns": value}]) == ((), ())
    assert len(caplog.records) == 1
    assert "info['episode_returns']" in caplog.text


def test_a_length_that_is_no_number_is_left_out():
    """NaN has no integer; a missing value in a sequence is passed over."""
    infos = [{"episode_returns": [1.0, None], "episode_lengths": [math.nan, 2]}]
    assert MetricNumbers().episodes_of(infos) == ((1.0,), (2,))


class Idle:
    """A learner that learns nothing and returns nothing."""

    def learn(self, batches):
        return None

    def state_dict(self):
        return torch.nn.Linear(1, 1).state_dict()


async def test_episodes_are_in_updates_without_code_of_the_learners():
    """What workers report in info stands in UpdateCompleted, whatever the learner returns."""
    seen = []

    class Keep:
        def on_event(self, event):
            seen.append(event)

    manager = ParallelManager(
        pool_workers.Episodic,
        learner=Idle(),
        observers=[Keep()],
        config={"backend": "inline", "num_workers": 1},
    )
    async with fail_after(20):
        await manager.run(max_steps=1, steps_per_update=1)
    updates = [event for event in seen if isinstance(event, UpdateCompleted)]
    assert (updates[0].episode_returns, updates[0].episode_lengths) == ((1.0, 3.0), (2, 4))
    assert (updates[0].mean_return, updates[0].mean_length) == (2.0, 3.0)
    times = [event.time for event in seen]
    assert times == sorted(times)

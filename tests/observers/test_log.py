"""LogObserver: exact records for every event."""

from __future__ import annotations

import logging

import pytest

from keisei import events
from keisei.events import Event, PoolStarted, WorkerIncident, WorkerSuspected
from keisei.observers.log import LogObserver, describe
from observers.samples import EVERY_EVENT, SUMMARY, Unfriendly, odd_events, update

EXPECTED = [
    ("DEBUG", "worker 1 (incarnation 0) started as process 4711"),
    ("INFO", "worker 1 (incarnation 0) is ready"),
    ("INFO", "the pool started with 2 workers"),
    ("DEBUG", "weights version 3: 1024 bytes"),
    (
        "DEBUG",
        "update 1: 12288 steps, 2346 steps/s, weights version 2, staleness 0.50, mean_return 21.5",
    ),
    (
        "WARNING",
        "worker 1 (incarnation 0) made no progress in collect for 2.5 s\n"
        "  stacks:\n    Thread 1\n      at f",
    ),
    (
        "WARNING",
        f"{SUMMARY}\n"
        "  traceback:\n    Traceback (most recent call last):\n      …\n    ValueError: no\n"
        "  stderr:\n    bad things\n    happen",
    ),
    ("ERROR", f"worker 1 is given up: {SUMMARY}"),
    ("CRITICAL", f"the pool is stopping: {SUMMARY}"),
    ("INFO", "the pool is paused"),
    ("INFO", "the pool goes on"),
    ("INFO", "the pool has 1 worker now"),
    ("INFO", "settings version 4 of workers 0, 2: level, map"),
    (
        "WARNING",
        "worker 2 (incarnation 1): it refused: ValueError: no\n  traceback:\n    Trace\n      …",
    ),
    ("INFO", "worker 1 (incarnation 0) ended: requested"),
    ("INFO", "evaluation 2 of update 8, 1.5 s, win_rate 0.75"),
    ("WARNING", "evaluation 3 of update 12 has failed: ValueError: no"),
    ("INFO", "the pool stopped after 0 incidents"),
]


def test_every_event_is_written_with_its_level(caplog):
    """Each event makes one record with these words, and carries the event itself."""
    observer = LogObserver()
    with caplog.at_level(logging.DEBUG, logger="keisei"):
        for event in EVERY_EVENT:
            observer.on_event(event)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == EXPECTED
    assert tuple(vars(record)["event"] for record in caplog.records) == EVERY_EVENT


def test_no_kind_of_event_was_forgotten():
    """The samples hold every event that there is."""
    every = {kind for kind in vars(events).values() if isinstance(kind, type)}
    known = {type(event) for event in EVERY_EVENT}
    assert known == {kind for kind in every if issubclass(kind, Event) and kind is not Event}


def test_an_event_of_the_future_is_still_written():
    """An event that this module does not know is shown as it is."""

    class Novel(Event):
        def __repr__(self) -> str:
            return "Novel()"

    assert describe(Novel()) == (logging.DEBUG, "Novel()")


def test_a_logger_of_the_applications_own_is_used(caplog):
    """Records go to the logger that was given."""
    logger = logging.getLogger("application.pool")
    with caplog.at_level(logging.INFO, logger="application.pool"):
        LogObserver(logger).on_event(PoolStarted(1))
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("application.pool", "the pool started with 1 worker")
    ]


@pytest.mark.parametrize(
    "event", [event for event in EVERY_EVENT if isinstance(event, WorkerIncident)]
)
def test_a_level_that_is_off_writes_nothing(caplog, event):
    """The logger's level is respected."""
    with caplog.at_level(logging.ERROR, logger="keisei"):
        LogObserver().on_event(event)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            "T",
            "worker 1 (incarnation 2) is stopped by a signal (state T), in idle for 0.5 s; "
            "SIGCONT lets it go on",
        ),
        ("D", "worker 1 (incarnation 2) made no progress in idle for 0.5 s (state D)"),
        ("", "worker 1 (incarnation 2) made no progress in idle for 0.5 s"),
    ],
)
def test_a_stopped_worker_is_told_plainly(state, text):
    """A suspicion names the process state, and what a stopped process needs to go on."""
    event = WorkerSuspected(1, 2, "idle", 0.5, state=state)
    assert describe(event) == (logging.WARNING, text)


def test_no_content_of_an_event_makes_the_log_fail(caplog):
    """Fields of any kind make one record each, which can be encoded."""
    events = list(odd_events())
    with caplog.at_level(logging.DEBUG, logger="keisei"):
        for event in events:
            LogObserver().on_event(event)
    assert len(caplog.records) == len(events)
    for record in caplog.records:
        assert record.getMessage().encode()


def test_metrics_that_are_no_numbers_are_shown_as_they_are():
    """Each metric is formatted by itself: one of a wrong kind spoils none of the others."""
    event = update(1, 2, loss=0.5, mean_return=None, name="x", odd=Unfriendly())  # type: ignore[arg-type]
    _, text = describe(event)
    assert ", loss 0.5, mean_return None, name 'x', odd <Unfriendly instance at 0x" in text

"""ObserverSet: order, failures, and events that observers cause themselves."""

from __future__ import annotations

import asyncio
import logging

import pytest

from keisei.events import Event, PoolPaused, PoolResumed, PoolStarted
from keisei.observers import ObserverSet


class Recorder:
    def __init__(self, log: list[tuple[str, Event]], name: str) -> None:
        self.log = log
        self.name = name

    def on_event(self, event: Event) -> None:
        self.log.append((self.name, event))


class Private(BaseException):
    """An error of the application's own that "except Exception" does not see."""


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __repr__(self) -> str:
        return "Failing()"

    def on_event(self, event: Event) -> None:
        self.calls += 1
        raise self.error


def test_every_observer_sees_every_event_in_order():
    """Events reach the observers one by one, first added first."""
    log: list[tuple[str, Event]] = []
    observers = ObserverSet([Recorder(log, "a"), Recorder(log, "b")])
    observers.on_event(PoolStarted(2))
    observers.on_event(PoolPaused())
    assert log == [
        ("a", PoolStarted(2)),
        ("b", PoolStarted(2)),
        ("a", PoolPaused()),
        ("b", PoolPaused()),
    ]


def test_an_observer_that_raises_is_removed_and_logged(caplog):
    """The others go on; the log has one record with the observer, the event and the traceback."""
    log: list[tuple[str, Event]] = []
    failing = Failing(ValueError("no"))
    observers = ObserverSet([failing, Recorder(log, "b")])
    with caplog.at_level(logging.ERROR, logger="keisei.observers"):
        observers.on_event(PoolStarted(2))
        observers.on_event(PoolPaused())
    assert failing.calls == 1
    assert log == [("b", PoolStarted(2)), ("b", PoolPaused())]
    assert len(observers) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "observer Failing() failed at PoolStarted and was removed"
    ]
    assert caplog.records[0].exc_info[1] is failing.error


@pytest.mark.parametrize(
    "error", [SystemExit(0), GeneratorExit(), asyncio.CancelledError(), StopIteration(), Private()]
)
def test_no_kind_of_error_passes_an_observer(caplog, error):
    """Errors that would end the application or cancel the pool remove the observer as any other."""
    log: list[tuple[str, Event]] = []
    observers = ObserverSet([Failing(error), Recorder(log, "b")])
    with caplog.at_level(logging.ERROR, logger="keisei.observers"):
        observers.on_event(PoolStarted(2))
    assert log == [("b", PoolStarted(2))]
    assert len(observers) == 1
    assert caplog.records[0].exc_info[1] is error


def test_a_log_that_fails_does_not_keep_a_failed_observer():
    """A log handler that raises while the failure is logged reaches nobody else."""

    class FailingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    log: list[tuple[str, Event]] = []
    observers = ObserverSet([Failing(ValueError("no")), Recorder(log, "b")])
    logger, handler = logging.getLogger("keisei.observers"), FailingHandler()
    logger.addHandler(handler)
    try:
        observers.on_event(PoolStarted(2))
    finally:
        logger.removeHandler(handler)
    assert log == [("b", PoolStarted(2))]
    assert len(observers) == 1


def test_an_interrupt_in_a_running_loop_is_raised_by_the_loop():
    """Ctrl-C inside an observer lets the event be told to all, and then ends the loop."""
    log: list[tuple[str, Event]] = []
    failing = Failing(KeyboardInterrupt())
    observers = ObserverSet([failing, Recorder(log, "b")])
    went_on = []

    async def tell() -> None:
        observers.on_event(PoolStarted(2))
        went_on.append(True)
        await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    task = loop.create_task(tell())
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        assert (log, went_on, len(observers)) == ([("b", PoolStarted(2))], [True], 2)
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
    finally:
        loop.close()


def test_an_interrupt_is_not_an_observers_failure():
    """KeyboardInterrupt passes through, and the set stays usable with everyone in it."""
    failing = Failing(KeyboardInterrupt())
    log: list[tuple[str, Event]] = []
    observers = ObserverSet([failing, Recorder(log, "b")])
    with pytest.raises(KeyboardInterrupt):
        observers.on_event(PoolStarted(2))
    assert next(iter(observers)) is failing
    failing.error = ValueError("no")
    observers.on_event(PoolPaused())
    assert log == [("b", PoolPaused())]


def test_an_event_that_an_observer_causes_comes_after_the_one_at_hand():
    """Every observer sees cause before effect."""
    log: list[tuple[str, Event]] = []

    class Resumer:
        def on_event(self, event: Event) -> None:
            if event == PoolPaused():
                observers.on_event(PoolResumed())

    observers = ObserverSet([Resumer(), Recorder(log, "b")])
    observers.on_event(PoolPaused())
    assert log == [("b", PoolPaused()), ("b", PoolResumed())]


def test_an_observer_can_be_removed():
    """Whoever was removed sees nothing more; removing a stranger is no error."""
    log: list[tuple[str, Event]] = []
    first, second = Recorder(log, "a"), Recorder(log, "b")
    observers = ObserverSet([first, second])
    observers.remove(first)
    observers.remove(first)
    observers.on_event(PoolPaused())
    assert log == [("b", PoolPaused())]


class WithCoroutine:
    async def on_event(self, event: Event) -> None: ...


@pytest.mark.parametrize(
    ("observer", "problem"),
    [
        (object(), "needs a method on_event"),
        (Recorder, "needs a method on_event"),
        (WithCoroutine(), "must be a plain function, not a coroutine"),
    ],
)
def test_what_cannot_observe_is_refused(observer, problem):
    """A value without on_event, a class, and a coroutine are refused when added."""
    with pytest.raises(TypeError, match=problem):
        ObserverSet([observer])

"""What the page tells of a pool: its state, its numbers and curves, and its incidents as text."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest

import pool_workers
from keisei.events import (
    ExitCause,
    Incident,
    PoolEscalated,
    PoolPaused,
    UpdateCompleted,
    WeightsPushed,
)
from keisei.observers.page import pool_page
from keisei.observers.page.view import SHOWN_INCIDENTS, View, return_of, row_of
from keisei.testing.scenarios import fail_after
from page_fakes import STATS, FakeManager, worker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def state_of(view: View) -> dict[str, Any]:
    return asyncio.run(view.state())


def advance(manager: FakeManager, clock: Clock, seconds: float, **more: int) -> None:
    """Let time go by, with so many more steps and the like."""
    clock.now += seconds
    numbers = {name: getattr(manager.numbers, name) + value for name, value in more.items()}
    seconds += manager.numbers.seconds
    manager.numbers = replace(manager.numbers, seconds=seconds, **numbers)


def update(**more):
    values = {"num_steps": 0, "steps_per_second": 0.0, "weights_version": 1, "num_workers": 2}
    return UpdateCompleted(update=1, num_restarts=0, staleness=0.5, **{**values, **more})


async def test_it_follows_a_real_manager_through_its_life(make_manager):
    """Not started, running, paused, running, stopped; it can be asked at any time."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    view = View(manager)
    manager.add_observer(view)
    told = [await view.state()]
    async with fail_after(30), manager:
        await manager.push_weights(pool_workers_weights())
        told.append(await view.state())
        await manager.pause()
        told.append(await view.state())
        await manager.resume()
        told.append(await view.state())
    told.append(await view.state())
    states = [state["state"] for state in told]
    assert states == ["not started", "running", "paused", "running", "stopped"]
    assert (told[0]["numbers"], told[0]["workers"]) == (None, [])
    assert (told[1]["numbers"]["ready"], told[1]["numbers"]["version"]) == (2, 1)
    assert [row[:2] for row in told[1]["workers"]] == [[0, "running"], [1, "running"]]
    assert told[-1]["numbers"]["workers"] == 2
    json.dumps(told, allow_nan=False)


def pool_workers_weights():
    import torch

    return {"w": torch.zeros(1)}


async def test_a_manager_that_was_stopped_before_its_start_is_told_as_stopped(make_manager):
    """There are no numbers, and no error."""
    manager = make_manager(pool_workers.Counting, backend="inline")
    await manager.stop()
    state = await View(manager).state()
    assert (state["state"], state["numbers"], state["workers"]) == ("stopped", None, [])


def test_a_pool_that_has_failed_says_why():
    """The escalation's incident is shown until the end."""
    manager = FakeManager()
    view = View(manager)
    incident = Incident(1, 0, ExitCause.SIGNAL, exitcode=-9)
    view.on_event(PoolEscalated(incident))
    assert (state_of(view)["state"], state_of(view)["failure"]) == ("failed", incident.summary)
    manager.state = "stopped"
    assert (state_of(view)["state"], state_of(view)["failure"]) == ("stopped", incident.summary)


def test_rates_are_those_since_the_look_before(clock):
    """Steps and batches per second come from the pool's counters."""
    manager = FakeManager()
    view = View(manager, clock)
    assert state_of(view)["rates"] == {"steps/s": None, "batches/s": None}
    advance(manager, clock, 2.0, num_steps=100, num_batches=4)
    assert state_of(view)["rates"] == {"steps/s": 50.0, "batches/s": 2.0}


def test_without_an_open_page_samples_come_with_events_once_a_second(clock):
    """A thousand events in a second cost one look, and the curves of late openers begin there."""
    manager = FakeManager()
    view = View(manager, clock)
    for _ in range(3):
        for _ in range(1000):
            view.on_event(WeightsPushed(1, 1))
        advance(manager, clock, 1.0, num_steps=10)
    assert manager.looks == 3
    points = view.curves()["points"]
    assert [(one["t"], one["v"]["queued"]) for one in points] == [(1.0, 0.0), (2.0, 0.0)]
    assert points[1]["v"]["steps/s"] == 10.0


def test_curves_have_returns_and_the_learners_numbers(clock):
    """The mean return of an update's episodes, its staleness, and each metric by its name."""
    manager = FakeManager()
    view = View(manager, clock)
    for value in (1.0, 3.0):
        view.on_event(
            update(episode_returns=(value,), metrics={"loss": value, "bad": float("nan")})
        )
    advance(manager, clock, 1.0)
    view.on_event(PoolPaused())
    (point,) = view.curves()["points"]
    expected = {"return": 2.0, "staleness": 0.5, "learner: loss": 2.0}
    assert {name: point["v"].get(name) for name in expected} == expected
    assert "learner: bad" not in point["v"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"episode_returns": (1.0, 2.0), "metrics": {"mean_return": 9.0}}, 1.5),
        ({"metrics": {"loss": 1.0, "eval_return": 3.0, "mean_return": 9.0}}, 9.0),
        ({"metrics": {"loss": 1.0, "Return of training": 3.0}}, 3.0),
        ({"metrics": {"loss": 1.0}}, None),
        ({}, None),
    ],
)
def test_the_return_is_that_of_the_episodes_or_of_the_learner(more, expected):
    """What the pool has counted goes before what a learner calls a return."""
    assert return_of(update(**more)) == expected


def test_a_row_tells_of_a_slot():
    """Phase, time without progress, age, lag and restarts are those of its present process."""
    row = row_of(
        worker(1, incarnation=2, weights_version=3, seconds_since_progress=1.26, age=61.4), 5
    )
    assert row == [1, "running", "collect", 1.3, 61, 2, 2, 0, 0, 1001, "cpu"]


def test_a_slot_without_a_process_has_neither_age_nor_lag():
    """What nobody does has no time."""
    row = row_of(worker(0, incarnation=-1, pid=None, state="waiting", phase=""), 5)
    assert row == [0, "waiting", "", None, None, None, 0, 0, 0, None, "cpu"]


def test_only_the_newest_incidents_are_told_and_their_texts_are_short():
    """They are numbered from the first, the newest comes first, and the end of a text stays."""
    long = "first line\n" + "x" * 100_000 + "\nlast line"
    incidents = tuple(
        Incident(0, number, ExitCause.USER_ERROR, traceback=long, stderr=long)
        for number in range(100)
    )
    told = View(FakeManager(incidents=incidents)).incidents()
    assert [one["number"] for one in told] == list(range(100, 100 - SHOWN_INCIDENTS, -1))
    assert [one["incarnation"] for one in told] == list(range(99, 99 - SHOWN_INCIDENTS, -1))
    for key in ("traceback", "stderr"):
        assert told[0][key].endswith("\nlast line")
        assert len(told[0][key]) < 6100
    assert len(json.dumps(told)) < 500_000


def test_what_commands_a_terminal_is_taken_out():
    """Colours, movements and control characters of a worker's output are no part of the text."""
    stderr = "\x1b[31mred\x1b[0m \x1b[2K\x07bell\x00 tab\tline\n"
    incident = Incident(0, 0, ExitCause.USER_ERROR, stderr=stderr, traceback=None)
    (told,) = View(FakeManager(incidents=(incident,))).incidents()
    assert (told["stderr"], told["traceback"]) == ("red bell tab\tline\n", "")


async def test_a_look_at_eight_workers_is_cheap():
    """It takes less than the half millisecond by which an open page may hold the loop up."""
    page = pool_page(FakeManager(workers=tuple(map(worker, range(8))), numbers=STATS))
    costs = []
    for _ in range(50):
        begun = time.thread_time()
        await page._make_frame()
        costs.append(time.thread_time() - begun)
    assert min(costs) < 0.0005

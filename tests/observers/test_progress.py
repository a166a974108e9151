"""RichProgress: what is shown on a terminal and elsewhere, from events alone."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading

import pytest

from observers.samples import EVERY_EVENT, INCIDENT, SUMMARY, odd_events, update

pytest.importorskip("rich", reason="needs the extra 'progress'")

from rich.console import Console

from keisei.events import (
    ExitCause,
    PoolPaused,
    PoolScaled,
    PoolStarted,
    PoolStopped,
    WorkerExited,
    WorkerIncident,
    WorkerReady,
)
from keisei.observers import ObserverSet
from keisei.observers.progress import RichProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def on_a_terminal(screen: io.StringIO) -> Console:
    return Console(
        file=screen, force_terminal=True, width=160, color_system=None, legacy_windows=False
    )


def in_a_file(screen: io.StringIO) -> Console:
    return Console(file=screen, force_terminal=False, width=40)


def plain(screen: io.StringIO) -> list[str]:
    """Return the lines that were written, without control sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "")
    return text.rstrip("\n").splitlines()


def test_a_file_gets_plain_lines_from_time_to_time(screen, clock):
    """A file gets a line once per interval; incidents and the end appear at once."""
    progress = RichProgress(console=in_a_file(screen), clock=clock, line_interval=10.0)
    progress.on_event(WorkerReady(0, 0, 1))
    progress.on_event(WorkerReady(1, 0, 2))
    progress.on_event(PoolStarted(2))
    clock.now += 9.9
    progress.on_event(update(1, 1000, mean_return=10.0))
    assert screen.getvalue() == ""
    clock.now += 0.1
    progress.on_event(update(2, 2000, mean_return=20.0))
    progress.on_event(WorkerIncident(INCIDENT))
    clock.now += 55.0
    progress.on_event(PoolStopped(1))
    assert screen.getvalue().splitlines() == [
        "2,000 steps · 2,346 steps/s · return 20.0 · weights 3 · workers 2/2 · restarts 1 · 0:10",
        SUMMARY,
        "2,000 steps · 2,346 steps/s · return 20.0 · weights 3 · workers 1/2 · restarts 2 · 1:05",
    ]


def test_a_terminal_is_drawn_in_place_with_incidents_above(screen, clock):
    """The display shows every figure; an incident is written before the display's next drawing."""
    progress = RichProgress(console=on_a_terminal(screen), clock=clock)
    progress.on_event(PoolStarted(2))
    progress.on_event(WorkerReady(0, 0, 1))
    clock.now += 1.0
    progress.on_event(update(1, 1000, mean_return=10.0))
    last = [  # the drawing before ends where the cursor goes up again
        "workers 0/21,000 steps · 2,346 steps/s · 0:01 · weights 2 · restarts 1",
        "return 10.0 ▁ 10.0 to 10.0",
    ]
    assert plain(screen)[-3:] == [*last, "workers 1/2  0 ready"]
    progress.on_event(WorkerIncident(INCIDENT))
    text = screen.getvalue()
    assert text.count(SUMMARY) == 1
    assert text.rindex("restarts 2") > text.index(SUMMARY)
    progress.on_event(PoolStopped(1))


def test_the_drawing_is_limited_in_rate(screen, clock):
    """A thousand updates in no time are drawn once; the next interval draws again."""
    progress = RichProgress(console=on_a_terminal(screen), clock=clock, refresh_interval=0.1)
    progress.on_event(WorkerReady(0, 0, 1))
    before = screen.getvalue()
    for number in range(1000):
        progress.on_event(update(number, number))
    assert screen.getvalue() == before
    clock.now += 0.2
    progress.on_event(update(1000, 1000))
    assert screen.getvalue() != before
    progress.close()


def test_the_terminal_is_given_back_at_the_end(screen, clock):
    """The cursor is hidden while the pool lives and shown after it stopped; no thread is needed."""
    threads = threading.active_count()
    stdout = sys.stdout
    progress = RichProgress(console=on_a_terminal(screen), clock=clock)
    progress.on_event(PoolStarted(2))
    assert "\x1b[?25l" in screen.getvalue()
    assert "\x1b[?25h" not in screen.getvalue()
    assert threading.active_count() == threads
    progress.on_event(PoolStopped(0))
    assert "\x1b[?25h" in screen.getvalue()
    assert sys.stdout is stdout


def test_the_terminal_is_given_back_when_the_application_fails(screen, clock):
    """Leaving the with block by an exception shows the cursor again; closing twice is harmless."""
    stdout = sys.stdout
    progress = RichProgress(console=on_a_terminal(screen), clock=clock)

    def application() -> None:
        with progress:
            progress.on_event(PoolStarted(2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        application()
    assert screen.getvalue().endswith("\x1b[?25h")
    assert sys.stdout is stdout
    progress.close()


class BreakingScreen(io.StringIO):
    """A terminal that refuses one write, once ``broken`` is set."""

    broken = False

    def write(self, text: str) -> int:
        if self.broken:
            self.broken = False
            raise OSError("the terminal is gone")
        return super().write(text)


def test_the_terminal_is_given_back_when_the_display_fails(clock):
    """A display that cannot be drawn ends itself, is removed, and leaves the terminal as it was."""
    screen = BreakingScreen()
    progress = RichProgress(console=on_a_terminal(screen), clock=clock)
    observers = ObserverSet([progress])
    observers.on_event(PoolStarted(2))
    clock.now += 1.0
    screen.broken = True
    observers.on_event(update(1, 1))
    assert len(observers) == 0
    assert screen.getvalue().endswith("\x1b[?25h")


def test_a_second_run_begins_anew(screen, clock):
    """After the pool stopped, the counts of the next run start at nothing."""
    progress = RichProgress(console=in_a_file(screen), clock=clock)
    progress.on_event(update(1, 1000, mean_return=10.0))
    progress.on_event(PoolStopped(0))
    clock.now += 7.0
    progress.on_event(PoolStarted(1))
    progress.on_event(PoolStopped(0))
    assert screen.getvalue().splitlines()[-1] == (
        "0 steps · – steps/s · return – · weights 0 · workers 0/1 · restarts 0 · 0:00"
    )


def test_workers_come_and_go(screen, clock):
    """The count of workers follows ready, exited and scaled; a pause is told."""
    progress = RichProgress(console=in_a_file(screen), clock=clock, line_interval=0.0)
    for worker_id in range(3):
        progress.on_event(WorkerReady(worker_id, 0, None))
    progress.on_event(PoolStarted(3))
    progress.on_event(WorkerExited(2, 0, ExitCause.REQUESTED))
    progress.on_event(PoolScaled(2))
    progress.on_event(PoolPaused())
    tails = [line.partition("workers ")[2] for line in screen.getvalue().splitlines()]
    assert tails == [
        "1/1 · restarts 0 · 0:00",
        "2/2 · restarts 0 · 0:00",
        "3/3 · restarts 0 · 0:00",
        "3/3 · restarts 0 · 0:00",
        "2/3 · restarts 0 · 0:00",
        "2/2 · restarts 0 · 0:00",
        "2/2 · restarts 0 · 0:00 · paused",
    ]


def test_a_known_goal_shows_a_bar(screen, clock):
    """With total_steps a bar that is full in proportion, and the time left, stand on top."""
    progress = RichProgress(console=on_a_terminal(screen), clock=clock, total_steps=2000)
    progress.on_event(PoolStarted(1))
    clock.now += 61.0
    progress.on_event(update(1, 500))
    progress.on_event(PoolStopped(0))
    bar, figures, _, _ = plain(screen)[-4:]
    # The line before it ends where the cursor goes up again.
    assert bar == "workers 0/1" + "━" * 36 + "─" * 109 + "  25% 3:03 left"
    assert figures.startswith("500 of 2,000 steps · ")


@pytest.mark.parametrize("console", [on_a_terminal, in_a_file])
def test_every_event_is_taken(console, screen, clock):
    """No kind of event makes the display fail."""
    progress = RichProgress(console=console(screen), clock=clock, line_interval=0.0)
    for event in EVERY_EVENT:
        progress.on_event(event)
    assert "12,288 steps" in screen.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_content_of_an_event_makes_the_display_fail(is_terminal, encoding, clock):
    """Fields of any kind leave the figures as they were, on a screen of any encoding."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=is_terminal, width=160, legacy_windows=False)
    progress = RichProgress(
        console=console, clock=clock, line_interval=0, refresh_interval=0, total_steps=100
    )
    observers = ObserverSet([progress])
    for event in odd_events():
        observers.on_event(event)
    assert list(observers) == [progress]
    progress.on_event(update(7, 1234, mean_return=1.0))
    progress.close()
    file.flush()
    goal = b" of 100" if is_terminal else b""
    assert b"1,234" + goal + b" steps" in file.buffer.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), ("1.5", "–"), (float("nan"), "nan"), (2, "2.0"), ([3.0], "–")],
)
def test_a_return_that_is_no_number_is_a_dash(screen, clock, value, shown):
    """Only numbers are shown as the return, NaN among them."""
    progress = RichProgress(console=in_a_file(screen), clock=clock, line_interval=0.0)
    progress.on_event(update(1, 10, mean_return=value))
    assert f"· return {shown} ·" in screen.getvalue()


def test_without_rich_the_error_says_what_to_install():
    """Importing the display without the extra is an ImportError with the command to run."""
    program = (
        "import sys\n"
        "sys.modules['rich'] = sys.modules['rich.console'] = None\n"
        "import keisei.observers.progress\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        'ImportError: keisei.observers.progress needs rich: pip install "keisei[progress]"'
    )

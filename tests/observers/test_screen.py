"""What a person sees: the screen of a terminal emulator, at several widths, and never the bytes."""

from __future__ import annotations

import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

pyte = pytest.importorskip("pyte", reason="the tests' group installs it")
pytest.importorskip("rich", reason="needs the extra 'progress'")

# ruff: noqa: E402 - the extra may be missing
from rich.console import Console

from keisei.events import (
    ExitCause,
    Incident,
    PoolPaused,
    PoolScaled,
    PoolStarted,
    PoolStopped,
    Remedy,
    UpdateCompleted,
    WorkerExited,
    WorkerGivenUp,
    WorkerIncident,
    WorkerReady,
    WorkerStarted,
    WorkerSuspected,
)
from keisei.observers.panel import ASCII, UNICODE, Curve, Panel, clock
from keisei.observers.progress import RichProgress

WIDTHS = (60, 80, 200)
ROOT = Path(__file__).parent.parent.parent
KILLED = Incident(1, 0, ExitCause.SIGNAL, exitcode=-9, phase="collect")


class Terminal:
    """A screen that shows what is written to it, and a console that writes to it."""

    def __init__(self, columns, encoding="utf-8", lines=24):
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.Stream(self.screen)
        self.encoding = encoding
        self.console = Console(
            file=self, force_terminal=True, width=columns, height=lines, legacy_windows=False
        )

    def write(self, text):
        text.encode(self.encoding)
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def flush(self): ...

    @property
    def shown(self):
        return [line.rstrip() for line in self.screen.display if line.strip()]


def step(number, num_steps, value, **fields):
    fields = {"metrics": {"mean_return": value}} | fields
    return UpdateCompleted(number, num_steps, 2345.6, number + 1, 2, 0, 0.5, **fields)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def story():
    """A display on a terminal of a given width, and the clock that moves it."""

    def begin(columns, **options):
        terminal, time = Terminal(columns), Clock()
        progress = RichProgress(
            console=terminal.console, clock=time, refresh_interval=0.0, **options
        )
        return terminal, time, progress

    return begin


START = (WorkerStarted(0, 0, 1), WorkerStarted(1, 0, 2), WorkerReady(0, 0, 1), WorkerReady(1, 0, 2))


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_training_as_it_is_seen(story, columns):
    """Bar, figures, curve and workers are all on the screen, each on one line that fits."""
    terminal, time, progress = story(columns, total_steps=4000)
    for event in (*START, PoolStarted(2)):
        progress.on_event(event)
    for number in range(1, 11):
        time.now += 1.0
        progress.on_event(step(number, 100 * number, 10.0 * number))
    bar, figures, curve, workers = terminal.shown
    assert bar.endswith("  25% 0:30 left")
    assert len(bar) == columns
    assert bar.count("━") == round(0.25 * (columns - len("  25% 0:30 left")))
    assert figures.startswith("1,000 of 4,000 steps · 2,346 steps/s · 0:10")
    assert curve == "return 100.0 ▁▂▃▃▄▅▆▆▇█ 10.0 to 100.0"
    assert workers == "workers 2/2  0 ready · 1 ready"
    assert ("weights 11 · restarts 0" in figures) is (columns > 60)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_killed_worker_is_seen_dying_and_coming_back(story, columns):
    """Each change of its state is on the screen at once, and the incident stays above."""
    terminal, _, progress = story(columns, total_steps=4000)
    for event in (*START, PoolStarted(2)):
        progress.on_event(event)
    seen = []
    for event in (
        WorkerSuspected(1, 0, "collect", 2.6),
        WorkerIncident(KILLED),
        WorkerStarted(1, 1, 3),
        WorkerReady(1, 1, 3),
    ):
        progress.on_event(event)
        seen.append(terminal.shown[-1])
    assert seen == [
        "workers 2/2  0 ready · 1 stuck (collect 3 s)",
        "workers 1/2  0 ready · 1 died (SIGKILL)",
        "workers 1/2  0 ready · 1 starting",
        "workers 2/2  0 ready · 1 ready again (1)",
    ]
    above = " ".join("".join(line.ljust(columns) for line in terminal.shown[:-4]).split())
    assert "ended by signal during collect (SIGKILL); restarted" in above
    assert len([line for line in terminal.shown if "━" in line or "─" in line]) == 1


@pytest.mark.parametrize("columns", [*WIDTHS, 20, 8, 1])
@pytest.mark.parametrize("number", [2, 16, 1000])
def test_no_line_is_wider_than_the_screen(story, columns, number):
    """However many workers and however narrow: four lines, none of them cut by a wrap."""
    terminal, time, progress = story(columns, total_steps=10**9)
    for worker_id in range(number):
        progress.on_event(WorkerReady(worker_id, 0, None))
    progress.on_event(PoolStarted(number))
    progress.on_event(WorkerIncident(Incident(0, 0, ExitCause.HANG)))
    for place in range(40):
        time.now += 1
        progress.on_event(step(place, 1000 * place, float(place % 7)))
    lines = progress._panel.lines(columns, 40.0)
    assert len(lines) == 4
    assert max(map(len, lines)) <= columns
    if columns >= 20:
        assert terminal.shown[-4:] == [line.rstrip() for line in lines]
        assert terminal.shown[-1].startswith(f"workers {number - 1}/{number}")


def test_many_workers_are_marks_with_the_odd_ones_named(story):
    """Where words do not fit, each worker is one character, and those in trouble are named."""
    terminal, _, progress = story(80)
    for worker_id in range(16):
        progress.on_event(WorkerReady(worker_id, 0, None))
    progress.on_event(PoolStarted(16))
    progress.on_event(WorkerIncident(Incident(3, 0, ExitCause.SIGNAL, exitcode=-11)))
    assert terminal.shown[-1] == "workers 15/16  ●●●✗●●●●●●●●●●●● 3 died (SIGSEGV)"


def test_a_pause_a_change_of_size_and_a_slot_that_is_given_up(story):
    """Each is on the screen: the word, the smaller pool, and why a slot is empty."""
    terminal, _, progress = story(80)
    for event in (*START, PoolStarted(2)):
        progress.on_event(event)
    lost = Incident(1, 3, ExitCause.USER_ERROR, remedy=Remedy.GAVE_UP)
    progress.on_event(WorkerIncident(lost))
    progress.on_event(WorkerGivenUp(1, lost))
    assert terminal.shown[-1] == "workers 1/2  0 ready · 1 given up"
    progress.on_event(PoolPaused())
    assert terminal.shown[-3].startswith("paused · 0 steps")
    progress.on_event(WorkerExited(1, 3, ExitCause.REQUESTED))
    progress.on_event(PoolScaled(1))
    assert terminal.shown[-1] == "workers 1/1  0 ready"


def test_returns_of_episodes_are_shown_where_the_learner_tells_none(story):
    """The mean return of the episodes takes the place of a metric that is missing."""
    terminal, _, progress = story(80)
    progress.on_event(step(1, 10, 0.0, metrics={}, episode_returns=(4.0, 6.0)))
    assert terminal.shown[1] == "return 5.0 ▁ 5.0 to 5.0"
    progress.on_event(step(2, 20, 0.0, metrics={}))
    assert terminal.shown[1] == "return 5.0 ▁ 5.0 to 5.0"


def test_the_last_figures_stay_and_the_cursor_is_below_them(story):
    """After the end the panel is on the screen once, and what follows is written under it."""
    terminal, time, progress = story(80, total_steps=100)
    progress.on_event(PoolStarted(1))
    time.now += 2
    progress.on_event(step(1, 100, 1.0))
    progress.on_event(PoolStopped(0))
    terminal.console.print("done")
    assert terminal.shown[0].endswith(" 100% 0:00 left")
    assert [line for line in terminal.shown if "━" in line] == terminal.shown[:1]
    assert terminal.shown[-1] == "done"
    assert terminal.screen.cursor.hidden is False


def test_a_terminal_without_those_characters_gets_others():
    """An ASCII screen shows the same panel in ASCII, with nothing replaced by "?"."""
    terminal = Terminal(80, encoding="ascii")
    progress = RichProgress(
        console=terminal.console, clock=Clock(), refresh_interval=0.0, total_steps=40
    )
    for event in (*START, PoolStarted(2), step(1, 10, 1.0), step(2, 20, 2.0)):
        progress.on_event(event)
    bar, figures, curve, workers = terminal.shown
    assert bar.startswith("####") and " 50%" in bar  # noqa: PT018 - one line
    assert figures.startswith("20 of 40 steps | 2,346 steps/s")
    assert curve == "return 2.0 _# 1.0 to 2.0"
    assert workers == "workers 2/2  0 ready | 1 ready"
    assert ASCII.fits("ascii")
    assert not UNICODE.fits("ascii")
    assert not UNICODE.fits("no such encoding")


def in_a_pty(columns, program, *arguments, **environment):
    """Run a program in a real terminal; return the screens as they followed, and the last one."""
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        env.pop(name, None)
    env |= environment
    done = subprocess.Popen(
        [sys.executable, *program, *arguments], stdin=child, stdout=child, stderr=child, env=env
    )
    os.close(child)
    screen = pyte.Screen(columns, 30)
    stream = pyte.ByteStream(screen)
    raw, seen = b"", []
    while True:
        try:
            data = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        raw += data
        for part in data.split(b"\n"):
            stream.feed(part)
            stream.feed(b"\n")
            seen.append([line.rstrip() for line in screen.display])
    os.close(parent)
    assert done.wait(60) == 0, raw.decode(errors="replace")
    return raw, seen, screen


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_demo_in_a_real_terminal(columns):
    """Its own program on a pseudo-terminal: every part of the panel is seen, the kill as well."""
    pytest.importorskip("gymnasium", reason="needs the extra 'gymnasium'")
    raw, seen, _ = in_a_pty(columns, ["examples/train_cartpole.py"], "--smoke")
    lines = {line for shown in seen for line in shown}
    assert any(" left" in line and "%" in line for line in lines)
    assert any("steps/s" in line for line in lines)
    assert any(line.startswith("return ") for line in lines)
    assert any(line.startswith("workers 2/2") for line in lines)
    assert b"\x1b[?25h" in raw


@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["colours", "no colours", "dumb"],
)
def test_colours_and_dumb_terminals(environment, is_coloured):
    """NO_COLOR takes the colours; a dumb terminal gets plain lines without any control sequence."""
    program = (
        "from keisei.events import *\n"
        "from keisei.observers.progress import RichProgress\n"
        "with RichProgress(total_steps=10) as shown:\n"
        "    shown.on_event(PoolStarted(1))\n"
        "    shown.on_event(WorkerIncident(Incident(0, 0, ExitCause.HANG)))\n"
        "    shown.on_event(PoolStopped(1))\n"
    )
    raw, _, screen = in_a_pty(80, ["-c", program], **environment)
    assert (b"\x1b[33m" in raw) is is_coloured
    if environment.get("TERM") == "dumb":
        assert b"\x1b" not in raw
        assert "workers 0/1" in "\n".join(screen.display)
    else:
        assert b"\x1b[?25l" in raw


def test_a_log_file_gets_plain_lines(tmp_path):
    """Without a terminal there is no control sequence, whatever TERM says."""
    program = (
        "from keisei.events import *\n"
        "from keisei.observers.progress import RichProgress\n"
        "shown = RichProgress(total_steps=10)\n"
        "shown.on_event(PoolStarted(1)); shown.on_event(PoolStopped(1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TERM": "xterm-256color"},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert b"\x1b" not in done.stdout
    assert done.stdout.decode() == (
        "0 steps · – steps/s · return – · weights 0 · workers 0/1 · restarts 0 · 0:00\n"
    )


def test_a_curve_keeps_its_shape_however_long_it_is():
    """A million points are drawn as a thousand are: the whole run, the oldest at the left."""
    curve = Curve()
    for number in range(1_000_000):
        curve.add(float(number))
    assert curve.drawn(8, "▁▂▃▄▅▆▇█") == "▁▂▃▄▅▆▇█"
    assert curve.drawn(0, "ab") == ""
    low, high = curve.bounds
    assert low < 2000
    assert high > 998_000


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([1.0], "a"),
        ([1.0, 1.0], "aa"),
        ([0.0, 1.0, 2.0], "abc"),
        ([float("nan"), 1.0, float("inf")], "a"),
        ([2.0, 0.0], "ca"),
    ],
)
def test_curves(values, drawn):
    """The least value has the lowest mark, the greatest the highest; infinity has none."""
    curve = Curve()
    for value in values:
        curve.add(value)
    assert curve.drawn(10, "abc") == drawn


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3599.9, "59:59"), (7265, "2:01:05")]
)
def test_times(seconds, text):
    """Minutes and seconds, and hours where there are some."""
    assert clock(seconds) == text


def test_no_time_left_is_known_before_the_first_step():
    """Without steps there is no estimate, and beyond the goal none is left."""
    panel = Panel(total_steps=100)
    assert panel.lines(30, 5.0)[0].endswith("   0%")
    panel.note(step(1, 300, 1.0))
    assert panel.lines(30, 5.0)[0].endswith(" 100% 0:00 left")

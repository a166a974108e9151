"""Observers that write in a thread: the loop never waits, errors are told once, nothing stays."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from keisei.events import PoolPaused, PoolResumed, PoolStarted, PoolStopped
from keisei.observers import ObserverSet
from keisei.observers.background import BackgroundObserver
from observers.samples import EVERY_EVENT


class Kept(BackgroundObserver):
    """Keeps what it is given; fails at the events that it is told to, and waits at a gate."""

    def __init__(self, *, fail_at=(), gate=None, **options):
        super().__init__(**options)
        self.calls = []
        self.fail_at = fail_at
        self.gate = gate
        self.entered = threading.Event()

    target = "the sink"

    def open(self):
        self.calls.append("open")

    def write(self, event):
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        if isinstance(event, self.fail_at):
            raise OSError(28, "No space left on device")
        self.calls.append(event)

    def close(self):
        self.calls.append("close")


def threads():
    return [one for one in threading.enumerate() if one.name.startswith("keisei-")]


def test_everything_is_written_in_order_by_the_end_of_the_run():
    """After PoolStopped the file is complete and closed, and the thread is gone."""
    kept = Kept()
    for event in EVERY_EVENT:
        kept.on_event(event)
    assert kept.calls == ["open", *EVERY_EVENT, "close"]
    assert threads() == []


def test_a_second_run_opens_again():
    """The next run's events follow, in a thread of their own."""
    kept = Kept()
    for _ in range(2):
        kept.on_event(PoolStarted(1))
        kept.on_event(PoolStopped(0))
    assert kept.calls == ["open", PoolStarted(1), PoolStopped(0), "close"] * 2


def test_the_block_ends_what_no_event_ends():
    """Leaving the with block writes out and closes, also when it raises."""
    kept = Kept()

    def application():
        with kept:
            kept.on_event(PoolStarted(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        application()
    assert kept.calls == ["open", PoolStarted(1), "close"]
    assert kept.finish() is True


def test_only_what_is_wanted_is_handed_over():
    """An observer that wants pauses alone begins no thread for anything else."""
    kept = Kept()
    kept.wanted = (PoolPaused,)
    for event in EVERY_EVENT[:4]:
        kept.on_event(event)
    assert threads() == []
    kept.on_event(PoolPaused())
    kept.finish()
    assert kept.calls == ["open", PoolPaused(), "close"]


def test_a_disk_that_hangs_holds_nobody_up():
    """A thousand events, and the end of the pool, pass while the first is being written."""
    gate = threading.Event()
    kept = Kept(gate=gate, max_pending=10)
    kept.on_event(PoolStarted(1))
    assert kept.entered.wait(10)
    began = time.perf_counter()
    for _ in range(1000):
        kept.on_event(PoolPaused())
    passed = time.perf_counter() - began
    began = time.perf_counter()
    kept.on_event(PoolStopped(0))
    at_stop = time.perf_counter() - began
    gate.set()
    assert kept.finish() is True
    assert passed < 0.5
    assert at_stop < 0.5
    assert kept.num_dropped == 991
    assert len(kept.calls) == 1 + 11 + 1
    assert kept.calls[-2:] == [PoolStopped(0), "close"]


def test_too_slow_is_told_once(caplog):
    """However many events are dropped, one warning says so."""
    gate = threading.Event()
    kept = Kept(gate=gate, max_pending=1)
    kept.on_event(PoolStarted(1))
    assert kept.entered.wait(10)
    for _ in range(5):
        kept.on_event(PoolPaused())
    gate.set()
    kept.finish()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the sink is too slow" in caplog.text


def test_errors_are_told_once_and_the_next_event_is_tried(caplog):
    """What cannot be written is lost and counted; what can be is written; both are told."""
    caplog.set_level(logging.INFO)
    kept = Kept(fail_at=PoolPaused)
    observers = ObserverSet([kept])
    for event in (PoolPaused(), PoolPaused(), PoolResumed(), PoolPaused(), PoolResumed()):
        observers.on_event(event)
    kept.finish()
    assert kept.calls == ["open", PoolResumed(), PoolResumed(), "close"]
    assert kept.num_failed == 3
    assert list(observers) == [kept]
    warnings = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert warnings == [
        "the sink cannot be written: OSError: [Errno 28] No space left on device; the training "
        "goes on, and this is told once"
    ]


def test_an_observer_that_nobody_finishes_is_written_out_at_the_interpreters_end(tmp_path):
    """Without PoolStopped, what was handed over is in the file when the program has ended."""
    program = (
        "import sys; from keisei.observers.jsonl import JsonLinesObserver\n"
        "from keisei.events import PoolPaused\n"
        "sink = JsonLinesObserver(sys.argv[1])\n"
        "for _ in range(500): sink.on_event(PoolPaused())\n"
    )
    path = tmp_path / "events.jsonl"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    assert len(path.read_text().splitlines()) == 500


def test_a_forked_copy_writes_nothing_of_its_parents(tmp_path):
    """A child that goes on with a copy of the observer has a thread and a file of its own."""
    kept = Kept()
    kept.on_event(PoolStarted(1))
    pid = os.fork()
    if pid == 0:
        kept.on_event(PoolPaused())
        os._exit(0 if kept.finish(10) and kept.calls.count("close") == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    kept.finish()
    assert kept.calls == ["open", PoolStarted(1), "close"]


@pytest.mark.parametrize(
    ("module", "root", "extra"),
    [
        ("tensorboard", "tensorboard", "tensorboard"),
        ("prometheus", "prometheus_client", "prometheus"),
        ("opentelemetry", "opentelemetry", "opentelemetry"),
        ("wandb", "wandb", "wandb"),
        ("mlflow", "mlflow", "mlflow"),
        ("structlog", "structlog", "structlog"),
        ("progress", "rich", "progress"),
    ],
)
def test_a_missing_extra_names_the_command_that_helps(module, root, extra):
    """The error comes at the import or at the making of the observer, never in its thread."""
    program = (
        f"import sys, importlib; sys.modules[{root!r}] = None\n"
        f"found = importlib.import_module('keisei.observers.{module}')\n"
        "getattr(found, found.__all__[0])(*['x'] * (found.__name__.endswith('board')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: keisei.observers.{module} needs ")
    assert last.endswith(f'pip install "keisei[{extra}]"')


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_heavy_packages_are_not_imported_by_making_an_observer(name, tmp_path):
    """The import happens in the thread, where the loop does not wait for it."""
    pytest.importorskip(name, reason=f"needs the extra '{name}'")
    program = (
        "import sys, importlib\n"
        f"found = importlib.import_module('keisei.observers.{name}')\n"
        f"made = getattr(found, found.__all__[0])(*[{str(tmp_path)!r}] * ({name!r} == "
        "'tensorboard'))\n"
        f"assert {name!r} not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

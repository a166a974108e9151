"""The end of a worker's process: exit handlers run once, in their process, within a limit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

import keisei
from child_workers import LeavesUnwillingly, Leaving
from keisei.events import ExitCause, WorkerExited, WorkerIncident
from keisei.testing.scenarios import fail_after, next_event

ROOT = Path(keisei.__file__).parent.parent
LIMIT = 60
START_METHODS = pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
EVERYTHING = sorted(["teardown", "threading", "multiprocessing", "atexit", "finalize", "loop 1"])


def written(path: Path, incarnation: int = 0) -> list[str]:
    """Return the words that exit handlers have written, in the order of the alphabet."""
    return sorted(Path(f"{path}.{incarnation}").read_text().split("\n")[:-1])


def exists(path: str) -> bool:
    return Path(path).exists()


@START_METHODS
async def test_exit_handlers_run_at_an_orderly_end(make_manager, tmp_path, start_method):
    """All of them, once: of atexit, weakref, threading, multiprocessing and temporary folders."""
    path = tmp_path / "words"
    manager = make_manager(partial(Leaving, str(path)), num_workers=1, start_method=start_method)
    async with fail_after(LIMIT), manager:
        folder = (await manager.send_command("folder"))[0]
        assert exists(folder)
        assert not exists(f"{path}.0")
    assert written(path) == EVERYTHING
    assert not exists(folder)
    assert manager.incidents == ()


async def test_they_run_where_a_worker_is_recycled_or_scaled_away(make_manager, tmp_path):
    """Whatever makes a process end in good order."""
    path = tmp_path / "words"
    worker = partial(Leaving, str(path))
    manager = make_manager(worker, num_workers=1, max_experiences_per_worker=2)
    async with fail_after(LIMIT), manager:
        events = manager.events()
        async for batch in manager.experiences():
            if batch.incarnation == 1:
                break
        exited = await next_event(events, WorkerExited)
        assert exited.cause is ExitCause.RECYCLED
        assert written(path) == EVERYTHING
    other = tmp_path / "others"
    manager = make_manager(partial(Leaving, str(other)))
    async with fail_after(LIMIT), manager:
        await manager.scale(1)
        assert written(other) == EVERYTHING
    assert written(other) == sorted(EVERYTHING * 2)


@START_METHODS
async def test_they_run_after_an_error_too(make_manager, tmp_path, start_method):
    """As in any program that ends by an exception; its threads are not waited for."""
    path = tmp_path / "words"
    worker = partial(Leaving, str(path), fails=True)
    manager = make_manager(worker, num_workers=1, start_method=start_method)
    async with fail_after(LIMIT), manager:
        events = manager.events()
        collecting = asyncio.create_task(manager.collect(min_steps=3))
        incident = (await next_event(events, WorkerIncident)).incident
        assert incident.cause is ExitCause.USER_ERROR
        assert incident.exitcode == 1
        assert written(path) == ["atexit", "finalize", "loop 1", "multiprocessing"]
        await collecting


async def test_a_handler_that_never_returns_ends_after_an_error(make_manager, tmp_path):
    """The slot is filled again; the handler's stack is told on standard error."""
    path = tmp_path / "words"
    worker = partial(LeavesUnwillingly, str(path), fails=True)
    manager = make_manager(worker, num_workers=1)
    async with fail_after(LIMIT), manager:
        events = manager.events()
        collecting = asyncio.create_task(manager.collect(min_steps=3))
        incident = (await next_event(events, WorkerIncident)).incident
        assert (incident.cause, incident.exitcode) == (ExitCause.USER_ERROR, 1)
        assert "ValueError: on purpose" in incident.detail
        assert "Timeout (0:00:02)!" in incident.stderr
        assert "in wait" in incident.stderr
        await collecting


async def test_a_handler_that_never_returns_does_not_hold_a_stop_up(make_manager, tmp_path):
    """The pool's own limit for a stop holds; the other handlers have run."""
    path = tmp_path / "words"
    worker = partial(LeavesUnwillingly, str(path))
    manager = make_manager(worker, num_workers=1, shutdown_timeout=1.0)
    async with fail_after(LIMIT), manager:
        await manager.collect()
    assert written(path) == EVERYTHING
    assert manager.incidents == ()


FORKED = """
    import atexit, os, sys, tempfile, weakref
    sys.path.insert(0, {root!r})
    from keisei.child import ending, process

    def say(word):
        os.write(1, word.encode() + b"\\n")

    class Thing:
        pass

    kept = Thing()
    weakref.finalize(kept, say, "a finalizer of the parent")
    atexit.register(say, "a handler of the parent")
    if os.fork() == 0:
        ending.forget_exit_handlers()
        {registers}
        ending.leave({code})
    os.wait()
    atexit.unregister(say)
    weakref.finalize._registry.clear()
"""


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize(
    ("registers", "words"),
    [
        ("pass", []),
        ("atexit.register(say, 'its own')", ["its own"]),
        ("own = Thing(); weakref.finalize(own, say, 'its own')", ["its own"]),
        (
            "import logging.handlers; handler = logging.handlers.MemoryHandler(9);"
            "handler.setTarget(logging.StreamHandler(sys.stdout));"
            "logging.getLogger().addHandler(handler); logging.warning('logged')",
            ["logged"],
        ),
    ],
)
def test_what_was_registered_before_a_fork_stays_with_the_parent(registers, words, code):
    """Only handlers of the forked process itself run at its end, finalizers of objects too."""
    program = FORKED.format(root=str(ROOT), registers=registers, code=code)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    assert result.stdout.splitlines() == words


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_exit_code_stays_what_it_was(code):
    """Whatever handlers raise, SystemExit included."""
    program = f"""
        import atexit, sys
        sys.path.insert(0, {str(ROOT)!r})
        from keisei.child import ending
        atexit.register(sys.exit, 5)
        atexit.register(lambda: 1 / 0)
        ending.leave({code})
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert result.returncode == code
    assert "ZeroDivisionError" in result.stderr

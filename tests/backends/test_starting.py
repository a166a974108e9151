"""The application's side of a start: what is sent to the child, the one server, the limits."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
import types
from pathlib import Path

import pytest

from backend_workers import Obedient
from keisei.backends import local, preparation
from keisei.backends.forkserver import ForkServer
from keisei.backends.forkserver import server as the_server
from keisei.backends.local import LocalBackend
from keisei.backends.process import WorkerProcess
from keisei.exceptions import ManagerStateError
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.communication import WorkerCommunicator
from keisei.training.parallel.factory import pickle_factory

LIMIT = 60


def backend(start_method: str = "forkserver", starts: int = 1) -> LocalBackend:
    return LocalBackend(
        pickle_factory(Obedient),
        start_method=start_method,
        preload=None,
        max_concurrent_starts=starts,
    )


# what the child is prepared with


def test_the_preparation_settles_nothing(monkeypatch):
    """The application's default start method is asked for, not chosen; the child gets it if set."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    assert "start_method" not in preparation.preparation("x", with_main=False)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert preparation.preparation("x", with_main=False)["start_method"] == "spawn"


def test_what_is_relative_in_the_path_is_found_elsewhere(monkeypatch, tmp_path):
    """The folder that "" stands for is where the application was started, or where it is now."""
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", "/start")
    monkeypatch.setattr(sys, "path", ["", "/somewhere", "lib"])
    assert preparation.import_path() == ["/start", "", "/somewhere", "/start/lib", "lib"]
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", str(Path.cwd()))
    here = str(Path.cwd())
    assert preparation.import_path() == [here, "/somewhere", f"{here}/lib"]
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", None)
    assert preparation.import_path() == ["", "/somewhere", "lib"]


def test_what_python_passes_over_in_the_path_is_left_out(monkeypatch):
    """Only strings are paths to Python; one of a class of its own is told as the plain string."""

    class Text(str):
        def __str__(self) -> str:
            raise AssertionError("the text of a path is asked of its class")

        __repr__ = __str__

    odd = [Path("/x"), b"/y", None, 3, Text("/z"), "/'\"\n\udc80"]
    monkeypatch.setattr(sys, "path", odd)
    found = preparation.import_path()
    assert found == ["/z", "/'\"\n\udc80"]
    assert type(found[0]) is str


def test_a_process_is_prepared_with_its_name_and_arguments(monkeypatch):
    """What multiprocessing itself would tell is told, but for what is taken over otherwise."""
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", "/start")
    found = preparation.preparation("x", with_main=False)
    assert (found["name"], found["orig_dir"], found["sys_argv"]) == ("x", "/start", sys.argv)
    assert not {"dir", "sys_path"} & found.keys()


@pytest.mark.parametrize(
    ("spec", "file", "expected"),
    [
        ("package.tool", None, {"init_main_from_name": "package.tool"}),
        ("package.__main__", "run.py", {}),
        ("__main__", "run.py", {}),
        (None, "tools/run.py", {"init_main_from_path": "tools/run.py"}),
        (None, "tools/../run.py", {"init_main_from_path": "run.py"}),
        (None, "<stdin>", {}),
        (None, "tools", {}),
        (None, None, {}),
    ],
)
def test_the_main_script_is_found_where_there_is_one(monkeypatch, tmp_path, spec, file, expected):
    """By its module's name, or its path from where the application was started, or not at all."""
    (tmp_path / "tools").mkdir()
    for script in ("run.py", "tools/run.py"):
        (tmp_path / script).touch()
    main = types.ModuleType("__main__")
    main.__spec__ = types.SimpleNamespace(name=spec) if spec else None
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", str(tmp_path))
    if "init_main_from_path" in expected:
        expected = {key: str(tmp_path / path) for key, path in expected.items()}
    found = preparation.preparation("x", with_main=True)
    assert {key: found[key] for key in found if key.startswith("init_main")} == expected
    without = preparation.preparation("x", with_main=False)
    assert not any(key.startswith("init_main") for key in without)


# the one server


def test_only_the_server_that_failed_is_ended():
    """A start that fails with its old server leaves alone the new one that others use by now."""
    old, new = socket.socketpair()
    with old, new:
        server = ForkServer()
        server._socket, server.pid = new, os.getpid()
        server._end(old)
        assert server.pid == os.getpid()
        server._socket = None


def test_a_server_that_was_never_started_is_released():
    """Keepers that start nothing leave nothing to end, in whatever order they come."""
    server = ForkServer()
    server.acquire()
    server.acquire()
    server.release()
    server.abort()
    server.release()
    assert server.pid is None


async def test_a_backend_that_was_not_opened_keeps_nothing():
    """Closing it releases no server that it did not keep, and closing twice releases once."""
    before = the_server._users
    never = backend()
    await never.aclose()
    assert the_server._users == before
    opened = backend()
    await opened.open()
    assert the_server._users == before + 1
    await opened.aclose()
    await opened.aclose()
    assert the_server._users == before


async def test_spawning_needs_no_server(monkeypatch):
    """The server is neither kept nor aborted for workers that it does not start."""
    monkeypatch.setattr(the_server, "abort", lambda: pytest.fail("aborted"))
    before = the_server._users
    spawning = backend("spawn")
    await spawning.open()
    spawning.abort_starts()
    assert the_server._users == before
    await spawning.aclose()


async def test_a_main_script_that_is_being_imported_starts_no_pool(monkeypatch):
    """The second start is refused with the remedy, before there is a process."""
    monkeypatch.setattr(
        multiprocessing.process.current_process(), "_inheriting", True, raising=False
    )
    with pytest.raises(ManagerStateError, match=r"under 'if __name__ == .__main__.:'$"):
        await backend().open()


# limits


async def test_starts_wait_for_one_another(monkeypatch):
    """No more are under way than allowed, and one that fails makes room."""
    begun: list[str] = []
    gate, two = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def start(process: WorkerProcess) -> None:
        begun.append(process.name)
        if len(begun) == 2:
            loop.call_soon_threadsafe(two.set)
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        raise OSError(f"{process.name} fails")

    monkeypatch.setattr(WorkerProcess, "start", start)
    async with fail_after(LIMIT):
        made = backend(starts=2)
        communicator = WorkerCommunicator(3)
        tasks = [
            asyncio.create_task(made.start(communicator.endpoints(key), f"worker {key}"))
            for key in range(3)
        ]
        await two.wait()
        done, _ = await asyncio.wait(tasks, timeout=0.05)
        assert done == set()
        assert sorted(begun) == ["worker 0", "worker 1"]
        gate.set()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(error) for error in errors] == [f"worker {key} fails" for key in range(3)]
        await communicator.cleanup()
        await asyncio.to_thread(made._stderr.join, LIMIT)


async def test_a_start_that_waits_is_cancelled(monkeypatch):
    """It was not begun, so there is nothing to undo, and its queues are closed."""
    monkeypatch.setattr(local._Start, "run", lambda start: pytest.fail("started"))
    async with fail_after(LIMIT):
        made = backend(starts=1)
        communicator = WorkerCommunicator(1)
        async with made._starts:
            starting = asyncio.create_task(made.start(communicator.endpoints(0), "test"))
            await asyncio.wait([starting], timeout=0)
            starting.cancel()
            await asyncio.wait([starting])
        assert starting.cancelled()
        reader = communicator.lines[0].reply
        reader.drain()
        assert reader.ended is not None
        await communicator.cleanup()

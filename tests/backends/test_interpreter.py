"""What workers are started with is a Python interpreter, or the pool is not started at all."""

from __future__ import annotations

import os
import sys
from multiprocessing import spawn
from pathlib import Path

import pytest

from backend_workers import Obedient
from keisei.backends import interpreter
from keisei.backends.forkserver import server
from keisei.exceptions import ManagerStateError
from keisei.training.parallel.parallel_manager import ParallelManager

REMEDY = r"multiprocessing.set_executable\(path\).*backend='inline'"


async def refusal(method: str) -> str:
    """Start a pool that is to be refused, and return the error's text; nothing was started."""
    before = server.pid, server._users
    manager = ParallelManager(Obedient, config={"num_workers": 1, "start_method": method})
    with pytest.raises(ManagerStateError, match=REMEDY) as caught:
        await manager.start()
    assert (server.pid, server._users) == before
    return str(caught.value)


def pretend(monkeypatch: pytest.MonkeyPatch, executable: str | None) -> None:
    """Have ``sys.executable`` be something else, before multiprocessing looks."""
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(spawn, "_python_exe", executable and os.fsencode(executable))


async def test_a_frozen_application_does_not_start_itself(monkeypatch, start_method):
    """It would run its own program once more for every worker, and each of those again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    told = await refusal(start_method)
    assert told.startswith(f"this application is frozen: {sys.executable!r}")


async def test_a_frozen_application_may_name_an_interpreter(make_manager, monkeypatch, tmp_path):
    """What multiprocessing was told is taken."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(spawn, "_python_exe", os.fsencode(sys.executable))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "application"))
    async with make_manager(Obedient, num_workers=1, start_method="spawn") as manager:
        assert (await manager.send_command("call", (os.getppid,)))[0] == os.getpid()


def this_program(path: Path) -> Path:
    """Make another name of what this process runs."""
    path.symlink_to(Path("/proc/self/exe").readlink())
    return path


@pytest.mark.parametrize("executable", ["", None, "/no/such/python"])
async def test_an_interpreter_that_is_not_there_is_told(monkeypatch, executable, start_method):
    """Embedded interpreters often have none."""
    pretend(monkeypatch, executable)
    told = await refusal(start_method)
    assert f"{executable or ''!r} (sys.executable" in told


@pytest.mark.parametrize(
    ("arguments", "name"), [([], "python3"), (["host", "--serve"], "host")], ids=["none", "its own"]
)
async def test_a_program_that_embeds_python_is_not_started(
    monkeypatch, tmp_path, arguments, name, start_method
):
    """It is this very program, and its arguments or its name are no interpreter's."""
    program = this_program(tmp_path / name)
    pretend(monkeypatch, str(program))
    monkeypatch.setattr(sys, "orig_argv", arguments)
    told = await refusal(start_method)
    assert told.startswith(f"{str(program)!r} embeds Python")


@pytest.mark.parametrize("name", ["python3.11", "pypy", "graalpy", ".python-wrapped"])
def test_interpreters_are_known(monkeypatch, tmp_path, name):
    """By their names, and by the arguments that they were started with."""
    program = this_program(tmp_path / name)
    pretend(monkeypatch, str(program))
    interpreter.require_interpreter()

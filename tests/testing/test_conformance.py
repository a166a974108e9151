"""The conformance checks: another sound backend passes, and each fault fails the right one."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forking_backend import ForkedProcess, ForkingBackend
from keisei.backends.inline import InlineBackend
from keisei.protocol.endpoints import WorkerEndpoints
from keisei.testing import conformance
from keisei.testing.conformance import (
    BACKEND_CHECKS,
    PROCESS_CHECKS,
    baseline,
    check_abort_of_a_start_that_hangs,
    check_backend,
    every_backend,
    processes,
    stage,
)
from keisei.testing.failpoints import Gate

ALL = (*BACKEND_CHECKS, *PROCESS_CHECKS)
CHECKS = {check.__name__: check for check in ALL}
SHORT = 1.5
"""The limit of a check that is to exceed it."""


@pytest.mark.parametrize("check", ALL)
async def test_another_sound_backend_conforms(check):
    """The checks hold what a backend must do, and not how ours do it."""
    await check(ForkingBackend)


# faults of handles


class NeverExited(ForkedProcess):
    @property
    def has_exited(self) -> bool:
        return False

    @has_exited.setter
    def has_exited(self, value: bool) -> None:
        pass

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            super().send(number)


class TellsZero(ForkedProcess):
    async def wait(self) -> int | None:
        await super().wait()
        return 0


class TellsTooEarly(ForkedProcess):
    async def wait(self) -> int | None:
        return 0


class ForgetsItsEnd(ForkedProcess):
    told = False

    async def wait(self) -> int | None:
        code = await super().wait()
        if self.told:
            await asyncio.Event().wait()
        self.told = True
        return code


class Unshielded(ForkedProcess):
    async def wait(self) -> int | None:
        return await self.exit


class RaisesAfterTheEnd(ForkedProcess):
    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)


class CannotTerminate(ForkedProcess):
    def terminate(self) -> None:
        pass


class TerminatesByKill(ForkedProcess):
    def terminate(self) -> None:
        self.kill()


class KillsByTerm(ForkedProcess):
    def kill(self) -> None:
        self.send(signal.SIGTERM)


class KillsOneOnly(ForkedProcess):
    def kill(self) -> None:
        self.send(signal.SIGKILL)


class CutsCodes(ForkedProcess):
    async def wait(self) -> int | None:
        code = await super().wait()
        return code & 127 if code is not None and code > 0 else code


class TellsAnotherPid(ForkedProcess):
    def __init__(self, pid: int, crash_fd: int) -> None:
        super().__init__(pid, crash_fd)
        self.pid = os.getppid()


class Stateless(ForkedProcess):
    def state(self) -> str:
        return ""


class KeepsStacks(ForkedProcess):
    def dump_stacks(self, *, all_threads: bool = False) -> None:
        pass


class ForgetsReports(ForkedProcess):
    def crash_report(self) -> str:
        return "" if self.has_exited else super().crash_report()


class KeepsADescriptor(ForkedProcess):
    def close(self) -> None:
        os.close(self.crash_fd)


class KeepsAZombie(ForkedProcess):
    def reap(self) -> None:
        ended = os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status
        self.exit.set_result(code if ended.si_code == os.CLD_EXITED else -code)


# faults of backends


class KeepsQueues(ForkingBackend):
    """Holds the worker's end of one queue."""

    name = "reply"

    def fork(self, endpoints: WorkerEndpoints, crash_fd: int) -> ForkedProcess:
        left_open.append(os.dup(getattr(endpoints, self.name)._sock.fileno()))
        return super().fork(endpoints, crash_fd)


class KeepsTheControlQueue(KeepsQueues):
    name = "control"


class StartsOnce(ForkingBackend):
    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        if not self.started:
            return await super().start(endpoints, name)
        endpoints.close()
        return self.started[0]


class CannotRestart(ForkingBackend):
    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        if self.started:
            endpoints.close()
            raise OSError("only once")
        return await super().start(endpoints, name)


class FailsWithLeftovers(ForkingBackend):
    def failed(self, crash_fd: int) -> None:
        if crash_fd >= 0:
            left_open.append(crash_fd)


class FailsOtherwise(ForkingBackend):
    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        try:
            return await super().start(endpoints, name)
        except OSError as error:
            raise RuntimeError("no room") from error


class StartsOnRegardless(ForkingBackend):
    def cancelled(self, process: ForkedProcess) -> None:
        pass


class AbortsForGood(ForkingBackend):
    aborted = False

    def abort_starts(self) -> None:
        self.aborted = True

    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        if self.aborted:
            endpoints.close()
            raise OSError("aborted")
        return await super().start(endpoints, name)


class AbortsWithAnotherError(ForkingBackend):
    def abort_starts(self) -> None:
        self.fork = self.refuse  # type: ignore[method-assign]

    def refuse(self, endpoints: WorkerEndpoints, crash_fd: int) -> ForkedProcess:
        os.close(crash_fd)
        raise LookupError("aborted")


class Faultless(ForkingBackend):
    """Its workers write nothing about a crash."""

    def heed_signals(self, crash_fd: int) -> None:
        super().heed_signals(crash_fd)
        faulthandler.disable()


class LeavesAThread(ForkingBackend):
    async def aclose(self) -> None:
        threading.Thread(target=let_go.wait, name="left").start()


class LeavesATask(ForkingBackend):
    async def aclose(self) -> None:
        tasks.append(asyncio.ensure_future(asyncio.Event().wait()))


class LeavesAProcess(ForkingBackend):
    async def aclose(self) -> None:
        leave_a_process()


def leave_a_process() -> None:
    program = "import sys; sys.stdin.read()"
    command = [sys.executable, "-S", "-c", program]
    children.append(subprocess.Popen(command, stdin=subprocess.PIPE))


left_open: list[int] = []
tasks: list[asyncio.Future[Any]] = []
children: list[subprocess.Popen[bytes]] = []
let_go = threading.Event()
made: list[ForkingBackend] = []


def making(fault: type[Any]) -> Callable[[], ForkingBackend]:
    """Return a maker of backends that have the fault, and are remembered."""

    def make() -> ForkingBackend:
        broken: ForkingBackend = (
            fault() if issubclass(fault, ForkingBackend) else ForkingBackend(fault)
        )
        made.append(broken)
        return broken

    return make


@pytest.fixture(autouse=True)
def _clean_up(
    request: pytest.FixtureRequest, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """End what broken backends have left, before anybody looks for it; wait short for them."""
    if "sound" not in request.function.__name__:
        monkeypatch.setattr(baseline, "_PATIENCE", 0.3)
        monkeypatch.setattr(stage, "_PATIENCE_WITH_THE_BROKEN", 0.3)
    yield
    for process in [one for backend in made for one in backend.started]:
        with contextlib.suppress(OSError):
            os.killpg(process.number, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.number, 0)
        for fd in (process.end, process.crash_fd):
            if "memfd:keisei-crash" in named(fd) or "pidfd" in named(fd):
                os.close(fd)
    for fd in left_open:
        os.close(fd)
    let_go.set()
    for thread in threading.enumerate():
        if thread.name == "left":
            thread.join()
    let_go.clear()
    for child in children:
        child.communicate()
    for task in tasks:
        if not task.get_loop().is_closed():
            task.cancel()
    for things in (made, left_open, tasks, children):
        things.clear()  # type: ignore[attr-defined]


def named(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        (NeverExited, "check_orderly_end", "has_exited is false"),
        (ForgetsItsEnd, "check_orderly_end", "waits when called again"),
        (TellsTooEarly, "check_orderly_end", "wait.. tells 0, and the worker was not to end"),
        (KeepsQueues, "check_orderly_end", "its reply queue has not: somebody else"),
        (KeepsTheControlQueue, "check_orderly_end", "its control queue takes frames"),
        (KeepsADescriptor, "check_orderly_end", "has left:\n.* 1 × descriptors: anon_inode"),
        (LeavesAThread, "check_orderly_end", "1 × threads: left"),
        (LeavesATask, "check_orderly_end", "1 × tasks: Event.wait"),
        (LeavesAProcess, "check_orderly_end", "1 × children: .*sys.stdin.read"),
        (KeepsAZombie, "check_orderly_end", "1 × children: a zombie"),
        (Unshielded, "check_many_may_wait", "was cancelled, and others with it"),
        (TellsZero, "check_kill", r"after kill\(\) is 0; it must be -9"),
        (RaisesAfterTheEnd, "check_kill", r"kill\(\) raises after the end"),
        (KillsByTerm, "check_kill_at_once", "the exit code after kill.. is -15"),
        (CannotTerminate, "check_terminate", "was not done within"),
        (StartsOnce, "check_two_starts_at_once", "two workers have the pids"),
        (FailsWithLeftovers, "check_start_that_fails", "has left:\n.* /memfd:keisei-crash"),
        (StartsOnRegardless, "check_start_that_is_cancelled", "was not done within"),
        (AbortsWithAnotherError, "check_abort_of_starts", "raises no OSError"),
        (TellsZero, "check_pool", r"after one kill is \[\(0, 0, 0\)\]"),
        (TellsAnotherPid, "check_pid", "the pid that the worker has"),
        (CutsCodes, "check_exit_codes", r"os._exit\(255\) is 127; it must be 255"),
        (TerminatesByKill, "check_signals", "after terminate.. is -9; it must be -15"),
        (Stateless, "check_process_that_is_stopped", "is ''; it must be 'T'"),
        (KillsByTerm, "check_process_that_is_stopped", "was not done within"),
        (KillsOneOnly, "check_process_group", "was not done within"),
        (KeepsStacks, "check_stacks", r"after dump_stacks\(\) the report shows no 'stand_here'"),
        (ForgetsReports, "check_stacks", "and the worker's end the report shows no"),
        (Faultless, "check_native_crash", "the report shows no 'crash_here'"),
    ],
)
async def test_a_fault_fails_the_check_that_is_for_it(fault, check, message):
    """The error tells what is wrong, and a note which check it was."""
    chosen = CHECKS[check]
    with pytest.raises(AssertionError, match=message) as caught:
        await chosen(making(fault), limit=SHORT if "was not done" in message else 60.0)
    (note,) = [one for one in caught.value.__notes__ if one.startswith(check)]
    assert note == f"{check}: {chosen.__doc__}"


@pytest.mark.parametrize(
    ("fault", "check", "error"),
    [
        (CannotRestart, "check_restart", "only once"),
        (AbortsForGood, "check_abort_of_starts", "aborted"),
        (FailsOtherwise, "check_start_that_fails", "no room"),
    ],
)
async def test_an_error_that_a_backend_must_not_raise_passes_through(fault, check, error):
    """It comes as it is, with the note."""
    with pytest.raises((OSError, RuntimeError), match=error) as caught:
        await CHECKS[check](making(fault))
    assert caught.value.__notes__[-1].startswith(check)


# starts that hang


class Hanging(ForkingBackend):
    """Stands at a gate before it forks."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        self.standing: asyncio.Future[Any] | None = None

    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        self.standing = asyncio.ensure_future(self.gate.wait())
        try:
            await asyncio.wait([self.standing])
        finally:
            self.standing.cancel()
            endpoints.close()
        raise OSError("aborted")

    def abort_starts(self) -> None:
        assert self.standing is not None
        self.standing.cancel()


class HangsOn(Hanging):
    def abort_starts(self) -> None:
        pass


class GoesOn(Hanging):
    async def start(self, endpoints: WorkerEndpoints, name: str) -> ForkedProcess:
        try:
            return await super().start(endpoints, name)
        except OSError:
            raise LookupError("gone on") from None


async def test_a_start_that_hangs_can_be_aborted():
    """A backend whose ``abort_starts`` ends it passes."""
    await check_abort_of_a_start_that_hangs(Hanging)


@pytest.mark.parametrize(
    ("fault", "message", "limit"),
    [(HangsOn, "was not done within", 0.5), (GoesOn, "raises no OSError", 30.0)],
)
async def test_a_start_that_hangs_on_fails_the_check(fault, message, limit):
    """It must end, and as a start that failed."""
    with pytest.raises(AssertionError, match=message):
        await check_abort_of_a_start_that_hangs(fault, limit=limit)


# all of them


async def test_all_checks_in_one(monkeypatch):
    """Those that need processes, or a start that hangs, are run where these are given."""
    seen: list[str] = []

    def spied(name: str) -> Any:
        async def check(make: Any, *, limit: float) -> None:
            assert limit == 7
            seen.append(name)

        return check

    monkeypatch.setattr(conformance, "BACKEND_CHECKS", (spied("every"),))
    monkeypatch.setattr(conformance, "PROCESS_CHECKS", (spied("process"),))
    monkeypatch.setattr(conformance, "check_abort_of_a_start_that_hangs", spied("hanging"))
    await check_backend(InlineBackend, own_process=False, limit=7)
    assert seen == ["every"]
    await check_backend(ForkingBackend, make_hanging=Hanging, limit=7)
    assert seen == ["every", "every", "process", "hanging"]


def test_every_check_is_in_a_list_and_says_what_it_holds():
    """What is named as a check is run by ``check_backend``, and described in a sentence."""
    modules = (every_backend, processes)
    named = {name for module in modules for name in vars(module) if name.startswith("check_")}
    assert named - CHECKS.keys() == {"check_abort_of_a_start_that_hangs"}
    assert all((check.__doc__ or "").endswith(".") for check in ALL)

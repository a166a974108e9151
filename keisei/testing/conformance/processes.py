"""What holds for backends whose workers are processes of this machine."""

from __future__ import annotations

import asyncio
import os
import signal

from keisei.backends.base import Backend
from keisei.testing import puppet
from keisei.testing.conformance.baseline import wait_gone, wait_stopped
from keisei.testing.conformance.checking import checked, require, require_equal
from keisei.testing.conformance.stage import Actor, Stage, hold_no_effect
from keisei.testing.failpoints import Gate


@checked
async def check_pid(backend: Backend) -> None:
    """``pid`` is that of a living process, which is the one that answers."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        pid = actor.handle.pid
        if pid is None or pid == os.getpid():
            raise AssertionError(f"pid is {pid}: the worker has no process of its own")
        os.kill(pid, 0)
        require_equal(await actor.call(os.getpid), pid, "the pid that the worker has")


@checked
async def check_exit_codes(backend: Backend) -> None:
    """The exit code is told as it is, and 0 without a goodbye is no orderly end."""
    async with Stage(backend) as stage:
        for code in (0, 3, 255):
            actor = await stage.start()
            actor.tell(os._exit, code)
            words = await actor.ended(code, f"os._exit({code})")
            require(not words.said_goodbye, "a worker that just exits has said goodbye")


@checked
async def check_signals(backend: Backend) -> None:
    """``terminate`` sends SIGTERM, and a signal from anywhere is told as minus its number."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        await actor.call(os.getpid)
        actor.handle.terminate()
        await actor.ended(-signal.SIGTERM, "terminate()")
        actor = await stage.start()
        actor.tell(signal.raise_signal, signal.SIGKILL)
        await actor.ended(-signal.SIGKILL, "a SIGKILL of somebody else")
        await hold_no_effect(actor, -signal.SIGKILL)


@checked
async def check_process_that_is_stopped(backend: Backend) -> None:
    """A process under SIGSTOP is in state "T" and can be killed."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        pid = await actor.call(os.getpid)
        require(actor.handle.state() != "T", 'the state of a process that runs is "T"')
        os.kill(pid, signal.SIGSTOP)
        if await wait_stopped(pid):
            require_equal(actor.handle.state(), "T", "the state of a process that is stopped")
        actor.handle.kill()
        await actor.ended(-signal.SIGKILL, "kill() of a process that was stopped")


@checked
async def check_process_group(backend: Backend) -> None:
    """The end is told though a child of the worker lives, and ``kill`` then ends that too."""
    async with Stage(backend) as stage:
        with Gate() as gate:
            actor = await stage.start()
            pid = await actor.call(puppet.leave_a_child, gate)
            child = await gate.visitor()
            actor.tell(os._exit, 3)
            require_equal(await actor.handle.wait(), 3, "the exit code, while a child lives")
            actor.handle.kill()
            await child.gone()
            await wait_gone(pid)  # only then is all closed that it held
            await actor.ended(3, "os._exit(3)")


@checked
async def check_stacks(backend: Backend) -> None:
    """``dump_stacks`` has ``crash_report`` show where a worker stands, until it is closed."""
    async with Stage(backend) as stage:
        with Gate() as gate:
            actor = await stage.start()
            require_equal(actor.handle.crash_report(), "", "the report of a sound worker")
            standing = asyncio.ensure_future(actor.call(puppet.stand_here, gate))
            await gate.visitor()
            actor.handle.dump_stacks()
            gate.open()
            # It was to write before it went on.
            require_equal(await standing, "stood there", "the answer after a dump of stacks")
            _hold_shows(actor, "stand_here", "dump_stacks()")
            actor.stop()
            await actor.ended(0, "a dump of stacks and an orderly end")
            _hold_shows(actor, "stand_here", "dump_stacks() and the worker's end")


@checked
async def check_native_crash(backend: Backend) -> None:
    """A segmentation fault is told as signal 11, and ``crash_report`` shows the stack."""
    async with Stage(backend) as stage:
        actor = await stage.start()
        actor.tell(puppet.crash_here)
        await actor.ended(-signal.SIGSEGV, "a segmentation fault")
        _hold_shows(actor, "crash_here", "a segmentation fault")


def _hold_shows(actor: Actor, function: str, after: str) -> None:
    report = actor.handle.crash_report()
    require(function in report, f"after {after} the report shows no {function!r}: {report!r}")


CHECKS = (
    check_pid,
    check_exit_codes,
    check_signals,
    check_process_that_is_stopped,
    check_process_group,
    check_stacks,
    check_native_crash,
)

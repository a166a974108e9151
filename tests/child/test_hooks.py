"""Whatever a hook raises, plain or coroutine, is its error with a traceback, and never a hang."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from functools import partial

import pytest
import torch

from child_stage import on_stage
from child_workers import CancelsItself, RaisesIn, RaisesThroughTheLoop
from keisei.child.hooks import HookFailed, Hooks, failing_as
from keisei.child.isolation import OwnProcess
from keisei.events import ExitCause, WorkerIncident
from keisei.exceptions import CommandError, PoolExhausted, WorkerStartError
from keisei.ipc.status import Phase, StatusLine
from keisei.protocol import messages
from keisei.testing.scenarios import fail_after, next_event

LIMIT = 60
ERRORS = [
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    SystemExit,
    KeyboardInterrupt,
    asyncio.CancelledError,
]
KINDS = [
    pytest.mark.parametrize("error", ERRORS),
    pytest.mark.parametrize("is_coroutine", [False, True], ids=["plain", "coroutine"]),
    pytest.mark.parametrize("backend", ["local", "inline"]),
]


def of_every_kind(test):
    for mark in KINDS:
        test = mark(test)
    return test


def name_of(error, is_coroutine):
    """Return what is told: Python itself turns StopIteration of a coroutine into RuntimeError."""
    return "RuntimeError" if is_coroutine and error is StopIteration else error.__name__


@of_every_kind
async def test_in_setup_it_is_a_failed_start(make_manager, error, is_coroutine, backend):
    """The caller of ``start`` is told, with the line that raised."""
    worker = partial(RaisesIn, "setup", error, is_coroutine)
    async with fail_after(LIMIT):
        with pytest.raises(WorkerStartError, match=name_of(error, is_coroutine)) as raised:
            await make_manager(worker, backend=backend).start()
        assert 'raise error("on purpose")' in raised.value.remote_traceback


@of_every_kind
@pytest.mark.parametrize("hook", ["collect", "load_weights"])
async def test_in_the_main_loop_it_is_a_user_error(
    make_manager, error, is_coroutine, backend, hook
):
    """The process ends, and the incident has the phase and the line that raised."""
    worker = partial(RaisesIn, hook, error, is_coroutine)
    manager = make_manager(worker, num_workers=1, backend=backend, restart={"max_restarts": 0})
    async with fail_after(LIMIT), manager:
        events = manager.events()
        with contextlib.suppress(PoolExhausted, WorkerStartError):
            if hook == "load_weights":
                await manager.push_weights({"w": torch.zeros(1)})
            await manager.collect(min_steps=1000)
        incident = (await next_event(events, WorkerIncident)).incident
    assert (incident.cause, incident.phase) == (ExitCause.USER_ERROR, hook)
    assert name_of(error, is_coroutine) in incident.detail
    assert 'raise error("on purpose")' in incident.traceback


@of_every_kind
@pytest.mark.parametrize("hook", ["on_command", "reset"])
async def test_in_a_command_it_is_answered(make_manager, error, is_coroutine, backend, hook):
    """The caller is told, and the worker lives on."""
    worker = partial(RaisesIn, hook, error, is_coroutine)
    async with fail_after(LIMIT), make_manager(worker, num_workers=1, backend=backend) as manager:
        for _ in range(2):
            with pytest.raises(CommandError, match=name_of(error, is_coroutine)) as raised:
                await (manager.reset() if hook == "reset" else manager.send_command("x"))
            assert 'raise error("on purpose")' in raised.value.remote_traceback
        await manager.collect()
        assert manager.incidents == ()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_what_a_task_raises_through_the_event_loop_is_told(make_manager, error):
    """The worker's loop stops at these; the incident has the line that raised all the same."""
    worker = partial(RaisesThroughTheLoop, error)
    manager = make_manager(worker, num_workers=1, restart={"max_restarts": 0})
    async with fail_after(LIMIT), manager:
        events = manager.events()
        with pytest.raises(WorkerStartError):
            await manager.collect()
        incident = (await next_event(events, WorkerIncident)).incident
    assert (incident.cause, incident.phase) == (ExitCause.USER_ERROR, "collect")
    assert 'raise self.error("on purpose")' in incident.traceback


@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_a_coroutine_that_cancels_itself_has_failed(make_manager, backend):
    """A worker is not left waiting for a ``collect`` that its own code has cancelled."""
    manager = make_manager(
        CancelsItself, num_workers=1, backend=backend, restart={"max_restarts": 0}
    )
    async with fail_after(LIMIT), manager:
        events = manager.events()
        with pytest.raises(WorkerStartError):
            await manager.collect()
        incident = (await next_event(events, WorkerIncident)).incident
    assert incident.cause is ExitCause.USER_ERROR
    assert "the worker's own code has cancelled collect()" in incident.detail


class Interrupts:
    """Raises KeyboardInterrupt wherever it is unpickled."""

    def __reduce__(self):
        return _interrupt, ()


def _interrupt():
    raise KeyboardInterrupt("on purpose")


async def test_an_interrupt_that_is_unpickled_is_the_commands_error():
    """What arrives in a command may raise anything; the worker answers and lives on."""
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(RaisesIn, "reset", ValueError, False))
        await stage.said()
        await stage.tell(messages.Command(1, "x", pickle.dumps(Interrupts())))
        answer = await stage.said()
        assert isinstance(answer, messages.ReplyError)
        assert "KeyboardInterrupt: on purpose" in answer.message
        await stage.tell(messages.Command(2, "x", pickle.dumps(None)))
        assert (await stage.said()).sequence == 2


async def failed(hook):
    """Call a hook as a worker in its own process does; return how it failed, and the phase then."""
    status = StatusLine()
    try:
        with pytest.raises(HookFailed) as raised:
            await Hooks(status, OwnProcess()).call(Phase.COLLECT, hook)
        return raised.value, status.phase
    finally:
        status.close()


async def test_a_traceback_begins_in_the_hook():
    """There are no frames of the library above it, whether it is plain or a coroutine."""

    def plain():
        raise ValueError("on purpose")

    async def coroutine():
        raise ValueError("on purpose")

    for hook in (plain, coroutine):
        failure, phase = await failed(hook)
        assert failure.summary == "ValueError: on purpose"
        lines = failure.traceback.splitlines()
        assert f"in {hook.__name__}" in lines[1]
        assert len(lines) == 4
        assert phase is Phase.IDLE


async def test_an_error_of_the_librarys_own_keeps_its_last_line():
    """Where nothing but the library is in a traceback, where it was raised is still told."""
    with pytest.raises(HookFailed) as raised, failing_as(Phase.COLLECT):
        raise StopIteration("on purpose")
    assert "test_hooks.py" in raised.value.traceback
    assert raised.value.phase is Phase.COLLECT

"""No silent success, and no blame for the innocent: errors are told as what they are."""

from __future__ import annotations

import asyncio
import os
import queue
import signal

import pytest
import torch

import pool_workers
from fault_helpers import LIMIT
from keisei.events import ExitCause, Remedy, WorkerReady, WorkerSuspected
from keisei.exceptions import WorkerLost
from keisei.protocol.line import Line
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after, next_event
from keisei.training.parallel.flow import Flow


class Bug(TypeError):
    """An error of the application's side."""


async def test_an_error_in_taking_a_batch_is_the_applications(make_manager, monkeypatch):
    """It is raised where batches are waited for; no worker is blamed, condemned or replaced."""
    arrived, count = Flow.arrived, 0

    def failing(flow, batch):
        nonlocal count
        count += 1
        if count == 3:
            raise Bug("not the worker's")
        arrived(flow, batch)

    monkeypatch.setattr(Flow, "arrived", failing)
    async with fail_after(LIMIT):
        manager = make_manager(pool_workers.Counting, num_workers=1)
        with pytest.raises(Bug, match="not the worker's"):
            async with manager:
                await manager.collect(min_steps=1000)
        assert manager.incidents == ()
        assert manager.workers[0].state == "stopped"


async def test_an_error_of_the_applications_is_raised_at_once(make_manager, monkeypatch):
    """Whoever waits for batches has it while the workers are still busy."""

    def failing(flow, batch):
        raise Bug("not the worker's")

    monkeypatch.setattr(Flow, "arrived", failing)
    with Gate() as gate:
        worker = armed(pool_workers.Counting, Failpoint("collect", gate.hold, hit=2))
        patient = {"num_workers": 1, "shutdown_timeout": LIMIT / 2}
        async with fail_after(LIMIT), make_manager(worker, **patient) as manager:
            with pytest.raises(Bug):
                await manager.collect(min_steps=1000)
            assert manager.workers[0].pid is not None
            gate.open()


@pytest.mark.parametrize("place", ["last_words", "read_to_the_end"])
async def test_an_error_in_handling_a_death_hides_no_death(make_manager, monkeypatch, place):
    """The process is gone, its incident recorded, who waits for it answered, the pool failed."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, num_workers=2) as manager:
        await manager.pause()

        def failing(line):
            raise Bug(f"in {place}")

        monkeypatch.setattr(Line, place, failing)
        os.kill(manager.workers[0].pid, signal.SIGSTOP)
        asking = asyncio.create_task(manager.send_command("echo", worker_ids=[0]))
        while manager.queue_info().control_queue_sizes[0] == 0:
            await pool_workers.turn()
        os.kill(manager.workers[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match=f"the pool failed to handle its end: Bug: in {place}"):
            await asking
        monkeypatch.undo()
        with pytest.raises(Bug, match=place):
            await manager.collect()
        (incident,) = [one for one in manager.incidents if one.worker_id == 0]
        assert (incident.cause, incident.remedy) == (ExitCause.LOST, Remedy.ESCALATED)
        assert incident.exitcode == -signal.SIGKILL


async def test_a_pause_finds_a_stopped_idle_worker(make_manager):
    """A pause gives it something to do, so that its hang counts; its successor stands still."""
    config = {"num_workers": 1, "mode": "sync", "collect_timeout": 0.5}
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, **config) as manager:
        await manager.collect()
        events = manager.events()
        os.kill(manager.workers[0].pid, signal.SIGSTOP)
        await manager.pause()
        await next_event(events, WorkerReady)
        assert [one.cause for one in manager.incidents] == [ExitCause.HANG]
        assert manager.workers[0].incarnation == 1
        await manager.resume()
        assert [batch.incarnation for batch in await manager.collect()] == [1]


async def test_a_stopped_worker_is_told_soon(make_manager):
    """After seconds, with its state, though its deadline is far away; and only once."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, num_workers=1) as manager:
        events = manager.events()
        await manager.pause()
        os.kill(manager.workers[0].pid, signal.SIGSTOP)
        asking = asyncio.create_task(manager.send_command("echo", 1))
        told = await next_event(events, WorkerSuspected)
        assert (told.worker_id, told.state, told.phase) == (0, "T", "idle")
        assert told.seconds < manager.config.collect_timeout / 4
        os.kill(manager.workers[0].pid, signal.SIGCONT)
        assert await asking == {0: 1}
        assert manager.incidents == ()


async def test_a_sweep_of_kills_does_not_stop_a_large_pool(make_manager):
    """Sixteen workers that are killed together are all replaced."""
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, num_workers=16) as manager:
        events = manager.events()
        for info in manager.workers:
            os.kill(info.pid, signal.SIGKILL)
        for _ in range(16):
            await next_event(events, WorkerReady)
        assert manager.is_healthy
        assert len(manager.incidents) == 16
        assert {info.incarnation for info in manager.workers} == {1}


async def test_a_recycled_worker_that_does_not_leave_is_ended(make_manager):
    """Its goodbye begins the grace; its successor comes, and no failure is counted."""
    config = {"num_workers": 1, "max_experiences_per_worker": 2, "shutdown_timeout": 0.2}
    async with fail_after(LIMIT), make_manager(pool_workers.Lingering, **config) as manager:
        batches = []
        while not any(batch.incarnation == 1 for batch in batches):
            batches += await manager.collect()
        assert manager.incidents == ()
        assert manager.stats().num_restarts == 1


async def test_a_busy_default_executor_holds_nothing_up(make_manager):
    """Start, large weights, large commands and replies need none of the application's threads."""
    waiting = queue.Queue()
    number = min(32, (os.cpu_count() or 1) + 4)
    waits = [asyncio.ensure_future(asyncio.to_thread(waiting.get)) for _ in range(number)]
    try:
        model = torch.nn.Linear(1500, 1500)
        manager = make_manager(pool_workers.Counting, model=model, num_workers=1)
        async with fail_after(LIMIT), manager:
            await manager.push_weights(model, wait=True)
            data = torch.arange(1_000_000)
            replies = await manager.send_command("echo", data)
            assert torch.equal(replies[0], data)
    finally:
        for _ in waits:
            waiting.put(None)
        await asyncio.gather(*waits)

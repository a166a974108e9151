"""Calls in any order, each cancelled anywhere: what the pool owes afterwards is always the same.

Each seed is one interleaving; one that has found a fault stays in ``FOUND``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from functools import partial

import pytest
import torch

import pool_workers
from keisei import ParallelManager
from keisei.exceptions import CollectTimeout, WorkerLost
from training.parallel import chance

WORKERS = pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.AsyncHooks])
MODES = pytest.mark.parametrize("mode", ["async", "sync"])
SEEDS = range(12)
FOUND: tuple[int, ...] = ()
WEIGHTS = {"w": torch.zeros(4)}
CALLS = 8
"""Calls that each of three tasks makes."""


class Ledger:
    """Every batch that a call has returned, by the process that collected it."""

    def __init__(self):
        self.sequences = defaultdict(list)

    def book(self, batches):
        last = {}
        for batch in batches:
            key = batch.worker_id, batch.incarnation
            assert batch.sequence > last.get(key, -1), f"{key}: out of order"
            assert batch.data["number"].tolist() == [batch.sequence + 1]
            last[key] = batch.sequence
            self.sequences[key].append(batch.sequence)

    def check(self):
        """Nothing came twice, and nothing is missing before what came."""
        for key, sequences in self.sequences.items():
            assert sorted(sequences) == list(range(len(sequences))), key


async def one_turn():
    turned = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(turned.set_result, None)
    await turned


class Caller:
    """Makes random calls of a manager, one after the other, and cancels some of them anywhere."""

    def __init__(self, manager, draw, ledger):
        self.manager, self.draw, self.ledger = manager, draw, ledger

    async def collect(self):
        steps = self.draw.choice([None, 1, 5, 20])
        self.ledger.book(await self.manager.collect(steps))

    async def collect_in_time(self):
        with contextlib.suppress(CollectTimeout):
            self.ledger.book(await self.manager.collect(50, timeout=self.draw.random() / 100))

    async def iterate(self):
        async for batch in self.manager.experiences():
            self.ledger.book([batch])
            if self.draw.random() < 0.3:
                break

    async def push(self):
        await self.manager.push_weights(WEIGHTS, wait=self.draw.random() < 0.5)

    async def command(self):
        number = self.draw.random()
        for reply in (await self.manager.send_command("echo", number)).values():
            assert reply == number

    async def pause(self):
        await self.manager.pause()

    async def resume(self):
        await self.manager.resume()

    async def scale(self):
        await self.manager.scale(self.draw.randint(1, 3))

    async def call(self, calls):
        """Make one call; return when it is over."""
        call = self.draw.choice(calls)
        task = asyncio.ensure_future(call(self))
        if self.draw.random() < 0.5:
            for _ in range(self.draw.randrange(40)):
                if task.done():
                    break
                await one_turn()
            task.cancel()
        await asyncio.wait([task])
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, WorkerLost):  # a scale took it away
            raise error


ALL = [
    Caller.collect_in_time,
    Caller.push,
    Caller.command,
    Caller.pause,
    Caller.resume,
    Caller.scale,
]
WHILE_IT_RUNS = [
    Caller.collect,
    Caller.collect_in_time,
    Caller.iterate,
    Caller.push,
    Caller.command,
]


async def interleaved(make, calls, draw):
    """Have three callers at a time, and look at what the pool owes when they are done."""
    ledger = Ledger()
    async with make() as manager:
        callers = [Caller(manager, draw, ledger) for _ in range(3)]

        async def make_calls(caller):
            for _ in range(CALLS):
                await caller.call(calls)

        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(make_calls(caller))
        pool = manager._pool
        assert (pool.flow._demand, pool.flow._wanted, pool.flow._rounds_held) == (0, [], 0)
        await manager.scale(2)
        await manager.resume()
        before = manager.weights_version
        assert await manager.push_weights(WEIGHTS, wait=True) == before + 1
        assert manager.stats().num_pushes == before + 1
        assert await manager.send_command("worker_id") == {0: 0, 1: 1}
        ledger.book(await manager.collect(40))
        await manager.pause()
        assert not any(line.has_requests for line in pool.ready.values())
        if manager.config.mode == "async":
            while any(manager.queue_info().experience_queue_sizes):
                ledger.book(await manager.collect())
            made = await manager.send_command("number")
            for worker_id, number in made.items():
                incarnation = manager.workers[worker_id].incarnation
                assert len(ledger.sequences[worker_id, incarnation]) == number
        ledger.check()
    assert manager.incidents == ()


@MODES
@WORKERS
@pytest.mark.parametrize("kind", ["collecting", "all"])
def test_any_calls_in_any_order_leave_a_pool_that_owes_nothing(parallel_config, worker, mode, kind):
    """No batch is lost or doubled, no demand, round or request stays, and every call works on."""
    calls = WHILE_IT_RUNS if kind == "collecting" else ALL
    config = {**parallel_config, "mode": mode, "backend": "inline"}
    make = partial(ParallelManager, worker, config=config)
    for seed in (*FOUND, *SEEDS):
        try:
            chance.run(partial(interleaved, make, calls), seed)
        except BaseException as error:
            error.add_note(f"with seed {seed}")
            raise


def test_a_seed_repeats_its_interleaving(parallel_config):
    """The same calls come in the same order, and end in the same way."""
    config = {**parallel_config, "backend": "inline"}

    async def told(draw):
        async with ParallelManager(pool_workers.Counting, config=config) as manager:
            callers = [Caller(manager, draw, Ledger()) for _ in range(2)]
            for _ in range(CALLS):
                await asyncio.gather(*(caller.call(WHILE_IT_RUNS) for caller in callers))
            stats = manager.stats()
            return stats.num_batches, stats.num_pushes, stats.weights_version

    assert chance.run(told, 3) == chance.run(told, 3)
    assert len({chance.run(told, seed) for seed in range(5)}) > 1


def test_a_wait_for_ever_is_an_error_at_once():
    """The loop of chance tells that nothing is left to happen."""

    async def wait(draw):
        await asyncio.Event().wait()

    with pytest.raises(chance.NothingHappens, match="is left"):
        chance.run(wait, 0)

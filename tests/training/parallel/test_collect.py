"""collect() and experiences(): complete, once, in order, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial

import pytest
import torch

import pool_workers
from keisei.exceptions import CollectTimeout
from keisei.testing.failpoints import Gate
from keisei.testing.scenarios import fail_after

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
WORKERS = pytest.mark.parametrize(
    "worker", [pool_workers.Counting, pool_workers.Coroutine, pool_workers.AsyncHooks]
)


def numbers(batches):
    """Return the numbers that each worker delivered, in the order of delivery."""
    found = defaultdict(list)
    for batch in batches:
        assert batch.data["worker"].unique().tolist() == [batch.worker_id]
        found[batch.worker_id] += batch.data["number"].unique().tolist()
        assert batch.sequence == batch.data["number"][0] - 1
    return found


@BACKENDS
@WORKERS
async def test_batches_arrive_complete_once_and_in_order(make_manager, backend, worker):
    """Each worker's experiences come as 1, 2, 3 … without a gap, whatever its hooks are."""
    async with fail_after(30), make_manager(partial(worker, 3), backend=backend) as manager:
        batches = []
        while sum(batch.num_steps for batch in batches) < 120:
            batches += await manager.collect()
        found = numbers(batches)
        assert all(ones == list(range(1, len(ones) + 1)) for ones in found.values())
        assert manager.stats().num_batches == len(batches)
        assert manager.stats().num_steps == 3 * len(batches)


@BACKENDS
async def test_a_batch_says_where_it_comes_from(make_manager, backend):
    """Provenance, info and data of a batch are those of the experience."""
    config = {"backend": backend, "num_workers": 1}
    async with fail_after(30), make_manager(partial(pool_workers.Counting, 4), **config) as manager:
        (first, *_) = await manager.collect()
        assert first.data.keys() == {"number", "worker"}
        assert first.data["number"].tolist() == [1, 1, 1, 1]
        assert first.data["number"].dtype is torch.int64
        assert (first.worker_id, first.incarnation, first.sequence) == (0, 0, 0)
        assert (first.num_steps, first.weights_version, first.staleness) == (4, 0, 0)
        assert first.info.keys() == {"pid", "version"}
        if backend == "local":
            assert first.info["pid"] == manager.workers[0].pid


async def test_collect_gathers_more_than_the_queues_can_hold(make_manager):
    """min_steps beyond every queue's capacity is met: workers go on as long as somebody waits."""
    config = {"num_workers": 2, "max_queue_size": 2}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        batches = await manager.collect(min_steps=50, timeout=30)
        assert sum(batch.num_steps for batch in batches) == 50
        found = numbers(batches)
        assert all(ones == list(range(1, len(ones) + 1)) for ones in found.values())


async def test_collect_takes_about_as_much_as_was_asked_for(make_manager):
    """The last batch may bring more steps than asked for; no further batch is taken."""
    async with fail_after(30), make_manager(partial(pool_workers.Counting, 5)) as manager:
        batches = await manager.collect(min_steps=12)
        assert [batch.num_steps for batch in batches] == [5, 5, 5]


async def test_workers_run_ahead_only_as_far_as_their_queues(make_manager):
    """Nobody collects: each worker fills its queue and waits."""
    config = {"num_workers": 2, "max_queue_size": 3}
    async with fail_after(30), make_manager(pool_workers.Counting, **config) as manager:
        # A worker answers between two experiences: once more after each that it may collect.
        while await manager.send_command("number") != {0: 3, 1: 3}:
            pass
        await manager.pause()
        assert await manager.send_command("number") == {0: 3, 1: 3}
        assert manager.queue_info().experience_queue_sizes == (3, 3)
        assert manager.stats().num_queued == 6


@BACKENDS
async def test_a_timeout_loses_nothing(make_manager, backend):
    """What had arrived before the deadline comes with the next call."""
    with Gate() as gate:
        factory = partial(pool_workers.Coroutine, gate=gate)
        manager = make_manager(factory, backend=backend)
        async with fail_after(30), manager:
            for _ in range(3):
                (await gate.visitor()).release()
            with pytest.raises(CollectTimeout, match=r"\d of 100 steps arrived in 0.2 s; worker 0"):
                await manager.collect(min_steps=100, timeout=0.2)
            gate.open()
            found = numbers(await manager.collect(min_steps=30))
            assert all(ones == list(range(1, len(ones) + 1)) for ones in found.values())


async def test_a_collect_timeout_is_a_timeout_error(make_manager):
    """Callers that know nothing of the library catch TimeoutError."""
    with Gate() as gate:
        async with (
            fail_after(30),
            make_manager(partial(pool_workers.Counting, gate=gate)) as manager,
        ):
            with pytest.raises(TimeoutError):
                await manager.collect(timeout=0.01)
            gate.open()


@BACKENDS
async def test_experiences_can_be_broken_out_of_and_taken_up_again(make_manager, backend):
    """Leaving the iteration keeps the rest for the next one, or for collect."""
    async with fail_after(30), make_manager(pool_workers.Counting, backend=backend) as manager:
        batches = []
        for wanted in range(10, 50, 10):
            async for batch in manager.experiences():
                batches.append(batch)
                if len(batches) >= wanted:
                    break
            batches += await manager.collect(min_steps=3)
        found = numbers(batches)
        assert len(batches) == 43
        assert all(ones == list(range(1, len(ones) + 1)) for ones in found.values())


async def test_several_readers_share_the_batches(make_manager):
    """Each batch goes to exactly one of several concurrent iterators and collects."""
    async with fail_after(30), make_manager(pool_workers.Counting) as manager:
        batches = []

        async def iterate():
            async for batch in manager.experiences():
                batches.append(batch)
                if len(batches) >= 60:
                    break

        async def collect():
            while len(batches) < 60:
                taken = await manager.collect(min_steps=3)
                assert len(taken) == 3
                batches.extend(taken)

        await asyncio.gather(iterate(), iterate(), collect())
        found = numbers(batches)
        assert all(sorted(ones) == list(range(1, len(ones) + 1)) for ones in found.values())


async def test_experiences_end_after_request_stop(make_manager):
    """A consumer that is waiting ends without an error; so does one that comes later."""
    with Gate() as gate:
        async with (
            fail_after(30),
            make_manager(partial(pool_workers.Counting, gate=gate)) as manager,
        ):
            taken = []

            async def consume():
                taken.extend([batch async for batch in manager.experiences()])

            waiting = asyncio.create_task(consume())
            await gate.visitor()
            manager.request_stop()
            await waiting
            await consume()
            assert taken == []
            assert manager.is_stop_requested
            gate.open()


async def test_a_waiting_collect_ends_at_request_stop(make_manager):
    """A collect that waits returns what is here, which may be nothing, when a stop is requested."""
    with Gate() as gate:
        async with (
            fail_after(30),
            make_manager(partial(pool_workers.Counting, gate=gate)) as manager,
        ):
            waiting = asyncio.create_task(manager.collect())
            await gate.visitor()
            await pool_workers.turn()  # a worker that is there already is met without a wait
            assert not waiting.done()
            manager.request_stop()
            assert await waiting == []
            gate.open()


@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_experiences_without_a_step_are_delivered_too(make_manager, mode):
    """An experience of no rows is a batch like any other."""
    config = {"mode": mode, "num_workers": 1}
    async with fail_after(30), make_manager(partial(pool_workers.Counting, 0), **config) as manager:
        batches = await manager.collect(timeout=10)
        assert len(batches) >= 1
        assert batches[0].num_steps == 0
        assert batches[0].data["number"].shape == (0,)
        async for batch in manager.experiences():
            assert batch.num_steps == 0
            break


async def test_num_steps_is_the_largest_leading_dimension(make_manager):
    """Without num_steps the longest of the tensors counts, and scalars count as one step."""
    value = {"one": torch.zeros(()), "few": torch.zeros(2, 9), "many": torch.zeros(5)}
    worker = partial(pool_workers.Returning, value)
    async with fail_after(30), make_manager(worker, num_workers=1) as manager:
        assert (await manager.collect())[0].num_steps == 5
    worker = partial(pool_workers.Returning, {"one": torch.zeros(())})
    async with fail_after(30), make_manager(worker, num_workers=1) as manager:
        assert (await manager.collect())[0].num_steps == 1


async def test_data_of_every_kind_arrives_bit_for_bit(make_manager):
    """Dtypes, shapes, strides, empty tensors, NumPy arrays and info come as they were made."""
    async with fail_after(30), make_manager(pool_workers.Assorted, num_workers=1) as manager:
        for batch in (await manager.collect(min_steps=6))[:6]:
            expected = pool_workers.assorted(batch.sequence)
            assert batch.data.keys() == expected.keys()
            for name, value in expected.items():
                given = batch.data[name]
                wanted = torch.as_tensor(value)
                assert given.dtype == wanted.dtype, name
                assert given.shape == wanted.shape, name
                assert torch.equal(given, wanted), name
            assert batch.info == {"text": "ü", "nested": {"list": [1, 2.5, None]}}
            assert batch.num_steps == batch.sequence + 1

"""ExperienceBatch: zero-copy memory that is never overwritten while anybody holds it."""

from __future__ import annotations

import asyncio
import gc
import threading
from functools import partial

import pytest
import torch

import pool_workers
from keisei.testing.failpoints import Failpoint, armed, kill
from keisei.testing.scenarios import fail_after

ONE = {"num_workers": 1, "max_queue_size": 2}


def value(tensor):
    """Return the one number that a tensor holds everywhere."""
    (number,) = set(tensor.reshape(-1).tolist())
    return number


async def take(manager, count):
    """Take batches one by one, holding none, and return the last number."""
    async for batch in manager.experiences():
        number = value(batch.data["number"])
        batch.release()
        count -= 1
        if count == 0:
            return number
    raise AssertionError("the pool has ended")


async def test_held_batches_are_never_overwritten(make_manager):
    """While workers deliver hundreds more, every batch that is kept stays as it was."""
    worker = partial(pool_workers.Counting, 500)
    async with fail_after(60), make_manager(worker, **ONE) as manager:
        held = []
        async for batch in manager.experiences():
            number = value(batch.data["number"])
            if number % 10 == 0:
                held.append(batch)
            if number == 200:
                break
        assert [value(batch.data["number"]) for batch in held] == list(range(10, 201, 10))


async def test_a_view_keeps_the_memory(make_manager):
    """A slice of a slice of a tensor is enough, when the batch is released and forgotten."""
    worker = partial(pool_workers.Counting, 64)
    async with fail_after(30), make_manager(worker, **ONE) as manager:
        batch = (await manager.collect())[0]
        view = batch.data["number"].reshape(8, 8)[2:6, 1].view(2, 2)
        batch.release()
        assert batch.data == {}
        del batch
        assert await take(manager, 50) > 10
        assert value(view) == 1


async def test_memory_is_used_again_when_the_last_tensor_is_gone(make_manager):
    """A reader that lets go keeps the worker in its first segment of shared memory."""
    worker = partial(pool_workers.Counting, 1000)
    async with fail_after(30), make_manager(worker, **ONE) as manager:
        await take(manager, 20)
        before = pool_workers.mapped_segments()
        await take(manager, 100)
        assert pool_workers.mapped_segments() == before


async def test_a_clone_outlives_everything(make_manager):
    """A clone has memory of its own and the same provenance."""
    worker = partial(pool_workers.Counting, 8)
    async with fail_after(30), make_manager(worker, **ONE) as manager:
        batch = (await manager.collect())[0]
        clone = batch.clone()
        assert clone.data["number"].data_ptr() != batch.data["number"].data_ptr()
        kept = {name: getattr(batch, name) for name in batch.__slots__ if name != "data"}
        batch.release()
        del batch
        await take(manager, 20)
    assert {name: getattr(clone, name) for name in clone.__slots__ if name != "data"} == kept
    assert value(clone.data["number"]) == 1


async def test_batches_outlive_their_worker_and_their_pool(make_manager):
    """Data that was delivered stays readable after the worker died, and after stop."""
    worker = armed(partial(pool_workers.Counting, 100), Failpoint("committed", kill, hit=3))
    async with fail_after(30), make_manager(worker, **ONE) as manager:
        batches = await manager.collect(min_steps=500)
        assert {batch.incarnation for batch in batches} == {0, 1}
    numbers = [value(batch.data["number"]) for batch in batches]
    assert numbers[:3] == [1, 2, 3]
    assert numbers[3:] == list(range(1, len(numbers) - 2))
    batches[0].data["number"][:] = 77
    assert value(batches[0].data["number"]) == 77


async def test_batches_are_the_receivers_own(make_manager):
    """They may be written to; neither the worker nor another batch sees it."""
    async with fail_after(30), make_manager(partial(pool_workers.Counting, 8), **ONE) as manager:
        first, second = (await manager.collect(min_steps=16))[:2]
        first.data["number"].zero_()
        assert value(second.data["number"]) == 2
        assert await take(manager, 5) == 7


async def test_batches_may_be_dropped_in_any_thread(make_manager):
    """A learner's thread lets go of tensors while the loop takes more of them."""
    worker = partial(pool_workers.Counting, 256)
    async with fail_after(60), make_manager(worker, **ONE) as manager:
        kept = {}
        lock = threading.Lock()

        def work(batch):
            number = value(batch.data["number"])
            with lock:
                kept.pop(number - 3, None)
                kept[number] = batch
                return {n: value(one.data["number"]) for n, one in kept.items()}

        async for batch in manager.experiences():
            seen = await asyncio.to_thread(work, batch)
            assert all(number == found for number, found in seen.items())
            if max(seen) >= 150:
                break


async def test_experiences_may_grow_and_shrink(make_manager):
    """Larger experiences get larger memory; batches of all sizes stay intact side by side."""
    worker = partial(pool_workers.Growing, [10, 100_000, 10, 300_000, 1_000, 0, 50])
    async with fail_after(30), make_manager(worker, **ONE) as manager:
        held = (await manager.collect(min_steps=21))[:21]
        for number, batch in enumerate(held):
            size = worker.args[0][number % 7]
            assert batch.data["x"].shape == (size,)
            assert set(batch.data["x"].unique().tolist()) <= {number}


async def test_a_batch_shows_what_it_is(make_manager):
    """The text form names provenance, shapes and dtypes, not values."""
    async with fail_after(30), make_manager(partial(pool_workers.Counting, 2), **ONE) as manager:
        (batch, *_) = await manager.collect()
        assert repr(batch) == (
            "<ExperienceBatch worker 0.0 #0 v0 (2 steps) "
            "{number: [2] torch.int64, worker: [2] torch.int64}>"
        )


async def test_restarts_leave_no_descriptor_behind(make_manager):
    """After thirty recycled processes the application holds what it held after the first few."""
    manager = make_manager(pool_workers.Counting, num_workers=2, max_experiences_per_worker=2)
    async with fail_after(60), manager:

        async def held_after(incarnation):
            async for batch in manager.experiences():
                if batch.incarnation == incarnation:
                    break
            del batch
            gc.collect()
            return pool_workers.descriptors()

        early = await held_after(4)
        late = await held_after(14)
        assert late <= early + 12  # one process more or less may be alive at that moment


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
async def test_any_size_will_do(make_manager, size):
    """Nothing about sizes is configured: from no byte to many megabytes."""
    worker = partial(pool_workers.Returning, {"x": torch.arange(size)})
    async with fail_after(60), make_manager(worker, **ONE) as manager:
        batch = (await manager.collect())[0]
        assert torch.equal(batch.data["x"], torch.arange(size))

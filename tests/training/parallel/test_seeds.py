"""Seeds: the same seed and sync mode give bit-identical batches, on every backend."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import pool_workers
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.seeds import worker_seed

WORKERS = pytest.mark.parametrize("worker", [pool_workers.Drawing, pool_workers.DrawingCoroutine])


async def rounds(manager, count=3):
    """Return the draws of some rounds, as exact values."""
    async with fail_after(30), manager:
        return [
            {
                (batch.worker_id, name): tensor.tolist()
                for batch in await manager.collect()
                for name, tensor in batch.data.items()
            }
            for _ in range(count)
        ]


@WORKERS
async def test_the_backends_draw_the_same(make_manager, worker):
    """Inline and local give the same bits to users of random, NumPy and torch."""
    inline = await rounds(make_manager(worker, mode="sync", backend="inline"))
    local = await rounds(make_manager(worker, mode="sync"))
    assert inline == local


async def test_the_start_methods_draw_the_same(make_manager):
    """A fresh interpreter draws what a forked process draws."""
    forked = await rounds(make_manager(pool_workers.Drawing, mode="sync"))
    spawned = await rounds(make_manager(pool_workers.Drawing, mode="sync", start_method="spawn"))
    assert forked == spawned


@WORKERS
@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_the_same_seed_draws_the_same_again(make_manager, worker, backend):
    """Two pools with the same seed cannot be told apart, and a third can."""
    config = {"mode": "sync", "backend": backend}
    first = await rounds(make_manager(worker, **config))
    second = await rounds(make_manager(worker, **config))
    other = await rounds(make_manager(worker, **config | {"seed": 8}))
    assert first == second
    assert all(other[0][key] != value for key, value in first[0].items())


async def test_workers_rounds_and_generators_differ(make_manager):
    """No two workers and no two rounds draw the same."""
    drawn = await rounds(make_manager(pool_workers.Drawing, mode="sync", num_workers=3), 4)
    changing = [tuple(value) for one in drawn for key, value in one.items() if key[1] != "first"]
    assert len(set(changing)) == len(changing) == 4 * 3 * 4


async def test_inline_workers_leave_the_applications_generators_alone(make_manager):
    """The application draws as if there were no pool in its process."""

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def seed():
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)

    seed()
    expected = [draw(), draw()]
    threads = torch.get_num_threads()
    seed()
    manager = make_manager(pool_workers.DrawingCoroutine, mode="sync", backend="inline")
    async with fail_after(30), manager:
        await manager.collect()
        drawn = [draw()]
        await manager.collect()
        drawn.append(draw())
    assert drawn == expected
    assert torch.get_num_threads() == threads


async def test_the_seed_is_recorded(make_manager):
    """stats() tells the root of all seeds, and each batch the seed of its process."""
    async with fail_after(30), make_manager(pool_workers.Counting, mode="sync") as manager:
        assert manager.stats().seed == 7
        for batch in await manager.collect():
            assert batch.seed == worker_seed(7, batch.worker_id, 0)


async def test_without_a_seed_one_is_drawn_and_told(make_manager):
    """Two pools without a seed have different ones; with the one told, a run can be repeated."""
    first = make_manager(pool_workers.Drawing, mode="sync", backend="inline", seed=None)
    drawn = await rounds(first)
    seed = first.stats().seed
    again = make_manager(pool_workers.Drawing, mode="sync", backend="inline", seed=seed)
    assert await rounds(again) == drawn
    other = make_manager(pool_workers.Drawing, mode="sync", backend="inline", seed=None)
    assert await rounds(other) != drawn

"""Managers that nobody stops: dropped, or left open by a loop that ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

import pool_workers
from keisei import ParallelManager
from keisei.testing.leaks import check_no_leaks
from keisei.testing.scenarios import fail_after

LIMIT = 60.0


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_dropped_manager_ends_its_workers_and_says_so(make_manager):
    """A ResourceWarning tells what to do; nothing of the pool is left."""
    async with fail_after(LIMIT):
        with check_no_leaks():
            manager = make_manager(pool_workers.Counting)
            await manager.start()
            pids = [info.pid for info in manager.workers]
            with pytest.warns(ResourceWarning, match=r"dropped without stop\(\)"):
                del manager
            while any(map(is_there, pids)):
                await pool_workers.turn()


@pytest.mark.usefixtures("_warm_fork_server")
@pytest.mark.parametrize("how", ["run ends", "closed with its tasks"])
def test_a_loop_that_ends_with_an_open_manager_leaves_nothing(parallel_config, how):
    """Its workers are gone, and everything else is given back, while the manager is still held."""
    kept = []

    async def main() -> None:
        manager = ParallelManager(
            pool_workers.Counting, model=torch.nn.Linear(512, 512), config=parallel_config
        )
        kept.append(manager)
        await manager.start()
        await manager.collect()

    with check_no_leaks():
        if how == "run ends":
            asyncio.run(main())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()
            with pytest.warns(ResourceWarning, match="dropped"):
                kept.clear()

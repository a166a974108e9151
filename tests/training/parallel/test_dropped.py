"""Managers that nobody stops: dropped, or left open by a loop that ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pool_workers
from keisei import ParallelManager
from keisei.testing.leaks import check_no_leaks
from keisei.testing.scenarios import fail_after

LIMIT = 60.0
TESTS = Path(__file__).parent.parent.parent


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
def test_a_loop_that_ends_with_an_open_manager_leaves_nothing(parallel_config):
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
        asyncio.run(main())


CLOSED_WITH_ITS_TASKS = """
import asyncio, gc, logging
import pool_workers
from keisei import ParallelManager
from keisei.testing.leaks import check_no_leaks

async def main():
    manager = ParallelManager(pool_workers.Counting, config={"num_workers": 2})
    await manager.start()
    return manager

if __name__ == "__main__":
    logging.disable()  # asyncio tells of each task that was left pending
    with check_no_leaks():
        loop = asyncio.new_event_loop()
        manager = loop.run_until_complete(main())
        loop.close()
        del manager, loop
        gc.collect()
    print("nothing is left")
"""


def test_a_loop_that_is_closed_with_its_tasks_leaves_nothing(tmp_path):
    """Nothing can be awaited any more: the manager's end is that of its workers."""
    script = tmp_path / "closed.py"
    script.write_text(CLOSED_WITH_ITS_TASKS, encoding="utf-8")
    known = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "default", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(known)},
    )
    assert done.stdout == "nothing is left\n", done.stderr
    assert "ResourceWarning: a ParallelManager was dropped without stop()" in done.stderr

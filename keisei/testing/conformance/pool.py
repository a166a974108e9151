"""A whole pool on a backend, with exact values: the last of the conformance checks."""

from __future__ import annotations

import asyncio
import operator
from typing import Any

import torch

from keisei.backends.base import Backend
from keisei.config import ParallelConfig, RestartPolicy
from keisei.events import Event, WorkerReady
from keisei.testing.conformance.checking import require_equal
from keisei.training.parallel.pool import Pool

_LONG = 600.0


async def run_pool(backend: Backend, factory: bytes) -> None:
    """Run a pool of two puppets in rounds; kill one of them on the way.

    The pool is the one under ``ParallelManager``, which has no way to be given a backend.

    Raises:
        AssertionError: A batch, a reply, an incident or an id is not what it must be.
    """
    readied: asyncio.Queue[WorkerReady] = asyncio.Queue()

    def publish(event: Event) -> None:
        if isinstance(event, WorkerReady):
            readied.put_nowait(event)

    pool = Pool(_config(), factory, 7, publish)
    pool.backend = backend
    try:
        await backend.open()
        await pool.communicator.send_model_weights({"weight": torch.full((2, 3), 0.5)})
        await pool.fill()
        await _hold_commands(pool)
        require_equal(await _round(pool), _expected(1, (0, 1), (0, 1), 0.5), "the first round")
        better = {"weight": torch.full((2, 3), 0.25)}
        await pool.communicator.send_model_weights(better, wait=True)
        pool.flow.pushed()
        require_equal(await _round(pool), _expected(2, (0, 2), (0, 2), 0.25), "the second round")
        while not readied.empty():
            readied.get_nowait()
        _kill(pool, 0)
        ready = await readied.get()
        require_equal((ready.worker_id, ready.incarnation), (0, 1), "who is ready after a kill")
        require_equal(
            [(one.worker_id, one.incarnation, one.exitcode) for one in pool.supervisor.incidents],
            [(0, 0, -9)],
            "the incidents after one kill",
        )
        await _hold_commands(pool)
        require_equal(
            await _round(pool), _expected(2, (1, 1), (0, 3), 0.25), "the round after the restart"
        )
    finally:
        await pool.close()


def _config() -> ParallelConfig:
    return ParallelConfig(
        num_workers=2,
        mode="sync",
        backend="inline",  # replaced by the one that is checked
        start_timeout=_LONG,
        command_timeout=_LONG,
        collect_timeout=_LONG,
        shutdown_timeout=_LONG,
        restart=RestartPolicy(backoff_base=0.0, backoff_cap=0.0),
    )


async def _hold_commands(pool: Pool) -> None:
    replies = await pool.communicator.send_control_command("call", (operator.mul, 6, 7))
    require_equal(replies, {0: 42, 1: 42}, "the replies to a command")


async def _round(pool: Pool) -> list[dict[str, Any]]:
    """Return what one round has brought, as plain values."""
    await pool.flow.wait_for(None, lambda: pool.supervisor.failure is not None)
    pool.raise_failure()
    return [
        {
            "who": (batch.worker_id, batch.incarnation, batch.sequence),
            "version": batch.weights_version,
            "data": {name: tensor.tolist() for name, tensor in batch.data.items()},
        }
        for batch in pool.flow.take()
    ]


def _expected(
    version: int, first: tuple[int, int], second: tuple[int, int], weight: float
) -> list[dict[str, Any]]:
    """Return a round as it must be; of each worker its incarnation and the number of its batch."""
    return [
        {
            "who": (worker_id, incarnation, number - 1),
            "version": version,
            "data": {"counted": [worker_id, number], "weight": [[weight] * 3] * 2},
        }
        for worker_id, (incarnation, number) in enumerate((first, second))
    ]


def _kill(pool: Pool, worker_id: int) -> None:
    running = pool.supervisor.running(worker_id)
    if running is None or running.handle is None:
        raise AssertionError(f"worker {worker_id} does not run")
    running.handle.kill()

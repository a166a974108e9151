"""Keisei: weights on their way to the workers."""

from __future__ import annotations

import asyncio
import functools
import time

import torch

from benchmarks.cases import Staleness, Throughput, TornReads, Weights
from benchmarks.ours.workers import RolloutWorker, TinyWorker
from benchmarks.plan import Metrics
from benchmarks.timing import percentile, repeat
from benchmarks.work import state_of_size
from keisei import ParallelManager


def weights(case: Weights) -> Metrics:
    """Push to workers that wait for the learner: publishing alone, and until all have applied."""
    return asyncio.run(_weights(case))


async def _weights(case: Weights) -> Metrics:
    torch.set_num_threads(1)
    state = state_of_size(case.num_bytes)
    published, applied = [], []
    async with ParallelManager(TinyWorker, config={"num_workers": case.workers}) as manager:
        await manager.push_weights(state, wait=True)
        for _ in repeat(case.seconds / 2, case.at_least):
            began = time.perf_counter()
            await manager.push_weights(state, wait=True)
            applied.append((time.perf_counter() - began) * 1e3)
        for _ in repeat(case.seconds / 2, case.at_least):
            began = time.perf_counter()
            await manager.push_weights(state)
            published.append((time.perf_counter() - began) * 1e3)
            await manager.push_weights(state, wait=True)
    return {"applied_ms": percentile(applied, 50), "publish_ms": percentile(published, 50)}


def torn(case: TornReads) -> Metrics:
    """Push as fast as possible and let the workers check every version."""
    return asyncio.run(_torn(case))


async def _torn(case: TornReads) -> Metrics:
    worker = functools.partial(TinyWorker, check=True)
    pushes = 0
    async with ParallelManager(worker, config={"num_workers": case.workers}) as manager:
        states = [state_of_size(case.num_bytes, fill=float(value)) for value in range(4)]
        drain = asyncio.create_task(_drain(manager))
        try:
            for pushes in repeat(case.seconds, 10):
                await manager.push_weights(states[pushes % len(states)])
            replies = await manager.send_command("torn")
        finally:
            drain.cancel()
    return {
        "torn": float(sum(torn for _, torn in replies.values())),
        "loaded": float(sum(loaded for loaded, _ in replies.values())),
        "pushed": float(pushes + 1),
    }


async def _drain(manager: ParallelManager) -> None:
    async for batch in manager.experiences():
        batch.release()


def staleness(case: Staleness) -> Metrics:
    """Push at fixed intervals and read how old the batches' weights are."""
    return asyncio.run(_staleness(case))


async def _staleness(case: Staleness) -> Metrics:
    state = state_of_size(case.num_bytes)
    worker = functools.partial(RolloutWorker, Throughput(work="cartpole"))
    lags: list[int] = []

    async def push() -> None:
        while True:
            await manager.push_weights(state)
            await asyncio.sleep(case.interval)

    async with ParallelManager(worker, config={"num_workers": case.workers}) as manager:
        await manager.push_weights(state, wait=True)
        pusher = asyncio.create_task(push())
        end = time.perf_counter() + case.seconds
        try:
            async for batch in manager.experiences():
                lags.append(batch.staleness)
                batch.release()
                if time.perf_counter() >= end:
                    break
        finally:
            pusher.cancel()
    return {"mean_versions": sum(lags) / len(lags), "max_versions": float(max(lags))}

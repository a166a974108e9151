"""Keisei: batches on their way to the learner."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import procfs
from benchmarks.cases import Bandwidth, Throughput
from benchmarks.ours.workers import ArrayWorker, RolloutWorker, make_policy
from benchmarks.plan import Metrics
from benchmarks.timing import Meter
from benchmarks.work import POLICY_FIELDS, fields, make_env
from keisei import ParallelManager
from keisei.training.gymnasium import ActorCritic as OwnActorCritic
from keisei.training.gymnasium import GymnasiumWorker

NAMES = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminated",
    "truncated": "truncated",
    "log_prob": "log_probs",
    "value": "values",
}


def throughput(case: Throughput) -> Metrics:
    """Receive the batches of workers that run the shared loop."""
    meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
    worker = functools.partial(RolloutWorker, case)
    return asyncio.run(_stream(worker, meter, workers=case.workers, ahead=case.ahead))


def throughput_gymnasium(case: Throughput) -> Metrics:
    """Receive the batches of ``GymnasiumWorker`` with the shared networks."""
    return _gymnasium(case, make_policy)


def throughput_own_policy(case: Throughput) -> Metrics:
    """Receive the batches of ``GymnasiumWorker`` with keisei's own networks of the same size."""
    return _gymnasium(case, OwnActorCritic)


def _gymnasium(case: Throughput, policy: Callable[[Any, Any], Any]) -> Metrics:
    worker = functools.partial(
        GymnasiumWorker,
        functools.partial(make_env, case.work),
        policy,
        num_envs=case.envs,
        rollout_length=case.batch // case.envs,
    )
    meter = Meter(case.seconds, case.warmup, fields=POLICY_FIELDS)
    return asyncio.run(_stream(worker, meter, NAMES, workers=case.workers, ahead=case.ahead))


def bandwidth(case: Bandwidth) -> Metrics:
    """Receive the same array again and again from one worker."""
    meter = Meter(
        case.seconds,
        case.warmup,
        at_least=case.at_least,
        warmup_batches=case.warmup_batches,
        cpu=lambda: procfs.cpu_seconds(procfs.tree()),
    )
    return asyncio.run(_stream(functools.partial(ArrayWorker, case), meter))


async def _stream(
    worker: Callable[[], Any],
    meter: Meter,
    names: Mapping[str, str] | None = None,
    *,
    workers: int = 1,
    ahead: int = 4,
) -> Metrics:
    """Feed the meter; ``names`` maps the shared fields to keisei's names of them."""
    torch.set_num_threads(1)
    config = {"num_workers": workers, "max_queue_size": ahead}
    async with ParallelManager(worker, config=config) as manager:
        async for batch in manager.experiences():
            data = batch.data
            if names is not None:
                data = {ours: data[theirs] for ours, theirs in names.items()}
            if not meter.add(data, batch.num_steps):
                break
    return meter.metrics()

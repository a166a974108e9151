"""Gymnasium's AsyncVectorEnv: one process per environment, actions from the parent at each step."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv

from benchmarks import procfs
from benchmarks.cases import Recovery, Start, Throughput
from benchmarks.plan import Metrics
from benchmarks.timing import Meter
from benchmarks.work import Arrays, as_tensors, fields, make_env, num_actions


def throughput(case: Throughput) -> Metrics:
    """Step all environments together and gather batches in the parent."""
    env = _make(case)
    try:
        meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
        for arrays in _batches(env, case):
            if not meter.add(as_tensors(arrays), case.batch * env.num_envs):
                break
        return meter.metrics()
    finally:
        env.close(terminate=True)


def _make(case: Throughput) -> AsyncVectorEnv:
    torch.set_num_threads(1)
    makers = [functools.partial(make_env, case.work)] * (case.workers * case.envs)
    return AsyncVectorEnv(makers, shared_memory=True, copy=False)


def _batches(env: AsyncVectorEnv, case: Throughput) -> Iterator[Arrays]:
    """Yield batches of ``case.batch`` transitions of each environment, laid out (time, env)."""
    rng = np.random.default_rng(case.seed)
    shape = (case.batch, env.num_envs)
    obs: Any
    obs, _ = env.reset(seed=case.seed)
    while True:
        arrays: Arrays = {
            "obs": np.empty((*shape, *obs.shape[1:]), obs.dtype),
            "action": rng.integers(num_actions(case.work), size=shape),
            "reward": np.empty(shape, np.float32),
            "terminated": np.empty(shape, np.bool_),
            "truncated": np.empty(shape, np.bool_),
        }
        for step in range(case.batch):
            arrays["obs"][step] = obs
            after: tuple[Any, ...] = env.step(arrays["action"][step])
            obs = after[0]
            arrays["reward"][step] = after[1]
            arrays["terminated"][step] = after[2]
            arrays["truncated"][step] = after[3]
        yield arrays


def recovery(case: Recovery) -> Metrics:
    """Kill one environment's process and report the error that the next steps raise."""
    env = _make(Throughput(work="cartpole", workers=case.workers))
    try:
        env.reset(seed=0)
        actions = np.zeros(env.num_envs, np.int64)
        env.step(actions)
        os.kill(env.processes[0].pid, signal.SIGKILL)
        for _ in range(3):
            env.step_async(actions)
            env.step_wait(timeout=case.patience)
        raise RuntimeError("a killed environment went unnoticed")
    finally:
        for process in env.processes:
            process.kill()


def start(case: Start) -> Metrics:
    """Build the vector and reset it, twice; every process forks from this one, torch included."""
    times = []
    size = 0.0
    for _ in range(2):
        began = time.perf_counter()
        env = _make(Throughput(work="cartpole", workers=case.workers))
        try:
            env.reset(seed=0)
            times.append((time.perf_counter() - began) * 1e3)
            size = procfs.mean_pss_mb(process.pid for process in env.processes)
        finally:
            env.close(terminate=True)
    return {"warm_ms": times[1], "cold_ms": times[0], "pss_mb": size}

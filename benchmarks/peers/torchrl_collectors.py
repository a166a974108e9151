"""TorchRL's MultiSyncCollector and MultiAsyncCollector."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import EnvBase, GymWrapper
from torchrl.modules import ProbabilisticActor

from benchmarks import procfs
from benchmarks.cases import Recovery, Start, Throughput, Weights
from benchmarks.plan import Metrics
from benchmarks.spawning import bounded
from benchmarks.timing import Meter, percentile, repeat
from benchmarks.work import ActorCritic, fields, make_env, state_of_size

if TYPE_CHECKING:
    from tensordict import TensorDictBase

KEYS = {
    "obs": "observation",
    "action": "action",
    "reward": ("next", "reward"),
    "terminated": ("next", "terminated"),
    "truncated": ("next", "truncated"),
    "log_prob": "action_log_prob",
    "value": "state_value",
}


def throughput_sync(case: Throughput) -> Metrics:
    """Collect in rounds: one batch of every worker at a time."""
    return _throughput(case, MultiSyncCollector, case.batch * case.workers)


def throughput_async(case: Throughput) -> Metrics:
    """Collect first come, first served."""
    return _throughput(case, MultiAsyncCollector, case.batch)


def _throughput(case: Throughput, kind: Callable[..., Any], frames: int) -> Metrics:
    policy = _policy() if case.work == "cartpole+mlp" else None
    collector = _collector(kind, case, policy, frames)
    try:
        meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
        names = {name: KEYS[name] for name in fields(case.work)}
        for batch in collector:
            data = {name: batch.get(key) for name, key in names.items()}
            if not meter.add(data, batch.numel()):
                break
        return meter.metrics()
    finally:
        collector.shutdown()


def _collector(kind: Callable[..., Any], case: Throughput, policy: Any, frames: int) -> Any:
    torch.set_num_threads(1)
    maker = functools.partial(make_torchrl_env, case.work, case.envs)
    return kind(
        [maker] * case.workers,
        policy,
        frames_per_batch=frames,
        total_frames=-1,
        num_threads=1,
        num_sub_threads=1,
        compact_obs=True,
    )


def make_torchrl_env(work: Any, envs: int) -> EnvBase:
    """Return the environment of ``work``; several are a SyncVectorEnv, faster than SerialEnv."""
    env: Any = make_env(work)
    if envs > 1:
        makers = [functools.partial(make_env, work)] * envs
        env = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    return GymWrapper(env, categorical_action_encoding=True)


def _policy() -> TensorDictSequential:
    networks = ActorCritic()
    logits = TensorDictModule(networks.actor, in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(
        logits,
        in_keys=["logits"],
        distribution_class=Categorical,
        distribution_kwargs={"validate_args": False},
        return_log_prob=True,
    )
    critic = TensorDictModule(networks.critic, in_keys=["observation"], out_keys=["state_value"])
    return TensorDictSequential(actor, critic)


class HeavyPolicy(nn.Module):
    """Chooses at random and carries parameters of a wanted size, so that they can be sent."""

    def __init__(self, num_bytes: int) -> None:
        """Make the parameters."""
        super().__init__()
        self.layers = nn.ParameterList(
            [nn.Parameter(tensor) for tensor in state_of_size(num_bytes).values()]
        )

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Return random actions."""
        return torch.randint(0, 2, obs.shape[:-1])


def weights(case: Weights) -> Metrics:
    """Send the policy's parameters with ``update_policy_weights_`` between two batches."""
    policy = TensorDictModule(
        HeavyPolicy(case.num_bytes), in_keys=["observation"], out_keys=["action"]
    )
    work = Throughput(work="cartpole", workers=case.workers)
    collector = _collector(MultiSyncCollector, work, policy, 2 * case.workers)
    try:
        batches: Iterator[TensorDictBase] = iter(collector)
        next(batches)
        times = []
        for _ in repeat(case.seconds, case.at_least):
            began = time.perf_counter()
            collector.update_policy_weights_()
            times.append((time.perf_counter() - began) * 1e3)
            next(batches)
    finally:
        collector.shutdown()
    return {"publish_ms": percentile(times, 50)}


def recovery(case: Recovery) -> Metrics:
    """Kill a worker and report the error that the next batches raise."""
    collector = _collector(MultiSyncCollector, Throughput(work="cartpole"), None, 256)
    batches = iter(collector)
    next(batches)
    processes = list(collector.procs)
    os.kill(processes[0].pid, signal.SIGKILL)
    try:
        for _ in range(3):
            bounded(lambda: next(batches), case.patience, "a batch after a worker was killed")
    finally:
        for process in processes:
            with contextlib.suppress(ValueError):  # the collector has closed it
                process.kill()
    raise RuntimeError("a killed worker went unnoticed")


def start(case: Start) -> Metrics:
    """Build a collector and wait for its first batch, twice."""
    times = []
    size = 0.0
    for _ in range(2):
        began = time.perf_counter()
        work = Throughput(work="cartpole", workers=case.workers)
        collector = _collector(MultiSyncCollector, work, None, 2 * case.workers)
        try:
            next(iter(collector))
            times.append((time.perf_counter() - began) * 1e3)
            size = procfs.mean_pss_mb(process.pid for process in collector.procs)
        finally:
            collector.shutdown()
    return {"warm_ms": times[1], "cold_ms": times[0], "pss_mb": size}

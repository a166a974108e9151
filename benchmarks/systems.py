"""Systems that take part in more than one throughput measurement, and the columns they share."""

from __future__ import annotations

from benchmarks.plan import Metric, System
from benchmarks.targets import OURS

TORCHRL_SYNC, TORCHRL_ASYNC = "TorchRL MultiSync", "TorchRL MultiAsync"
TORCHRL = (TORCHRL_SYNC, TORCHRL_ASYNC)
RAY = "Ray actors"
RLLIB = "RLlib env runners"
SLOW_STARTERS = frozenset({*TORCHRL, RAY, RLLIB})
"""They take ten seconds each, however small the measurement is."""
QUEUE, QUEUE_GZIP = "mp.Queue", "mp.Queue + gzip"
AIO = "aiomultiprocess.Pool"
ASYNC_2, ASYNC_8 = "AsyncVectorEnv, 2 envs", "AsyncVectorEnv, 8 envs"
SUBPROC_2, SUBPROC_8 = "SubprocVecEnv, 2 envs", "SubprocVecEnv, 8 envs"
ASYNC, SUBPROC = "AsyncVectorEnv", "SubprocVecEnv"
BARE, BARE_UNRECORDED = "bare loops", "bare loops, nothing kept"
MEMCPY = "memcpy"
PIPE = "blocking pipe"

STEPS = Metric("steps_per_s", "transitions/s", "higher")
GIGABYTES = Metric("gb_per_s", "GB/s", "higher")
LEARNER = Metric("learner_us_per_batch", "µs learner/batch", "lower")


def random_systems() -> tuple[System, ...]:
    """Return the systems of ``pixel`` and ``cartpole``: random actions, one process a worker."""
    gym, sb3 = "peers.gymnasium_async:throughput", "peers.sb3_subproc:throughput"
    return (
        System(BARE, "limit", "limits.bare_loops:throughput"),
        System(OURS, "ours", "ours.data:throughput"),
        System(TORCHRL_SYNC, "peer", "peers.torchrl_collectors:throughput_sync"),
        System(TORCHRL_ASYNC, "peer", "peers.torchrl_collectors:throughput_async"),
        System(ASYNC_2, "peer", gym),
        System(ASYNC_8, "peer", gym, {"envs": 4}),
        System(RAY, "peer", "peers.ray_actors:throughput"),
        System(SUBPROC_8, "peer", sb3, {"envs": 4}),
        System(QUEUE, "peer", "peers.multiprocessing_queue:throughput"),
        System(SUBPROC_2, "peer", sb3),
        System(BARE_UNRECORDED, "limit", "limits.bare_loops:throughput", {"record": False}),
        System(AIO, "peer", "peers.aiomultiprocess_pool:throughput"),
        System(QUEUE_GZIP, "peer", "peers.multiprocessing_queue:throughput_gzip"),
    )

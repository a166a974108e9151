"""Throughput of large observations: 28 kB per transition, an environment that costs nothing."""

from __future__ import annotations

from benchmarks.cases import Throughput
from benchmarks.plan import Measurement
from benchmarks.systems import (
    ASYNC_2,
    ASYNC_8,
    BARE,
    GIGABYTES,
    LEARNER,
    RAY,
    STEPS,
    TORCHRL,
    TORCHRL_SYNC,
    random_systems,
)
from benchmarks.targets import OURS, Target, ahead_of

CASE = "2 workers"
TARGETS = (
    Target("ahead of TorchRL", ahead_of(TORCHRL, "steps_per_s", [CASE]), at_least=25),
    Target(
        "ahead of AsyncVectorEnv",
        ahead_of([ASYNC_2, ASYNC_8], "steps_per_s", [CASE]),
        at_least=8,
    ),
    Target("ahead of Ray actors", ahead_of([RAY], "steps_per_s", [CASE]), at_least=2.5),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    case = Throughput(work="pixel", seconds=0.7, warmup=0.3) if quick else Throughput(work="pixel")
    return Measurement(
        name="pixel",
        title="Experience throughput, 4x84x84 uint8 observations",
        metrics=(STEPS, GIGABYTES, LEARNER),
        cases={CASE: case},
        systems=random_systems(),
        quick_systems=(BARE, OURS, TORCHRL_SYNC, ASYNC_8, RAY),
        targets=TARGETS,
    )

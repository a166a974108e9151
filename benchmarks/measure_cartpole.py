"""Throughput of small observations: CartPole-v1 with random actions chosen in the worker."""

from __future__ import annotations

from benchmarks.cases import Throughput
from benchmarks.plan import OURS, Measurement
from benchmarks.systems import BARE, LEARNER, STEPS, random_systems
from benchmarks.targets import Target, of_limit

CASE = "2 workers"
TARGETS = (Target("of the bare loops", of_limit(BARE, "steps_per_s", [CASE]), at_least=0.9),)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    case = Throughput(work="cartpole")
    if quick:
        case = Throughput(work="cartpole", seconds=0.7, warmup=0.3)
    return Measurement(
        name="cartpole",
        title="Experience throughput, CartPole-v1",
        metrics=(STEPS, LEARNER),
        cases={CASE: case},
        systems=random_systems(),
        quick_systems=(OURS, BARE),
        targets=TARGETS,
    )

"""Throughput of small observations: CartPole-v1 with random actions chosen in the worker."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import Throughput
from benchmarks.plan import Chart, Measurement
from benchmarks.systems import BARE, LEARNER, STEPS, random_systems
from benchmarks.targets import OURS, Target, of_limit

CASE = "2 workers"
LARGE = f"{CASE}, batches of 2048"
TARGETS = (
    Target("of the bare loops", of_limit(BARE, "steps_per_s", [CASE]), at_least=0.9),
    Target(
        "of the bare loops, batches of 2048",
        of_limit(BARE, "steps_per_s", [LARGE]),
        at_least=0.9,
    ),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement: all systems with batches of 128, keisei with other sizes too."""
    case = Throughput(work="cartpole", ahead=16)
    if quick:
        case = replace(case, seconds=0.7, warmup=0.3)
    larger = {f"{CASE}, batches of {n}": replace(case, batch=n) for n in (32, 512, 2048)}
    systems = [
        system if system.name in (OURS, BARE) else replace(system, cases=frozenset([CASE]))
        for system in random_systems()
    ]
    return Measurement(
        name="cartpole",
        title="Experience throughput, CartPole-v1",
        metrics=(STEPS, LEARNER),
        cases={CASE: case} if quick else {CASE: case, **larger},
        systems=tuple(systems),
        charts=(Chart("steps_per_s", lambda case: case.batch, "transitions per batch"),),
        quick_systems=(OURS, BARE),
        targets=TARGETS[:1] if quick else TARGETS,
        isolate_cases=True,
    )

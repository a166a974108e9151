"""Throughput of shogi-sized batches: 46x9x9 float32 planes and a 13,527-wide mask per step."""

from __future__ import annotations

from benchmarks.cases import Throughput
from benchmarks.plan import Measurement, System
from benchmarks.systems import GIGABYTES, LEARNER, MEMCPY, QUEUE, RAY, STEPS
from benchmarks.targets import OURS, Target, of_limit

CASE = "2 workers"
TARGETS = (
    Target(
        "of one memcpy of the same bytes, in as many processes",
        of_limit(MEMCPY, "gb_per_s", [CASE]),
        at_least=0.7,
    ),
)
SYSTEMS = (
    System(MEMCPY, "limit", "limits.memcpy:throughput"),
    System(OURS, "ours", "ours.data:throughput"),
    System(RAY, "peer", "peers.ray_actors:throughput"),
    System(QUEUE, "peer", "peers.multiprocessing_queue:throughput"),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    case = Throughput(work="shogi")
    if quick:
        case = Throughput(work="shogi", seconds=0.7, warmup=0.3)
    return Measurement(
        name="shogi",
        title="Experience throughput, shogi-sized batches",
        metrics=(GIGABYTES, STEPS, LEARNER),
        cases={CASE: case},
        systems=SYSTEMS,
        quick_systems=(MEMCPY, OURS),
        targets=TARGETS,
    )

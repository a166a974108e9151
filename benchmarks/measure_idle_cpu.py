"""Processor time of an idle pool."""

from __future__ import annotations

from benchmarks.cases import Idle
from benchmarks.plan import Measurement, Metric, System
from benchmarks.systems import AIO, RAY
from benchmarks.targets import OURS, Target, value

CASE = "8 workers, paused"
RAY_SETTLE = 15.0
"""Ray goes on starting processes of its own after the actors have answered."""
TARGETS = (Target("% of a core", value("core_percent", [CASE]), below=0.2),)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    systems = (
        System("blocked processes", "limit", "limits.processes:idle"),
        System(OURS, "ours", "ours.life:idle"),
        System(AIO, "peer", "peers.aiomultiprocess_pool:idle"),
        System(RAY, "peer", "peers.ray_actors:idle", {"settle": RAY_SETTLE}),
    )
    return Measurement(
        name="idle_cpu",
        title="Processor time of an idle pool",
        metrics=(Metric("core_percent", "% of a core", "lower"),),
        cases={CASE: Idle(settle=1.0, seconds=3.0) if quick else Idle()},
        systems=systems,
        quick_systems=(OURS,),
        targets=TARGETS,
        timeout=90,
        repetitions=1 if quick else 3,
    )

"""How late the application's event loop is while the pool starts, delivers, pushes and recovers."""

from __future__ import annotations

from benchmarks.cases import Lag
from benchmarks.plan import Measurement, Metric, System
from benchmarks.targets import OURS, Target, value

CASES = ("start", "batches", "weights", "crashes")
TARGETS = (
    Target("p99, ms", value("p99_ms", CASES), below=5),
    Target("max, ms", value("max_ms", CASES), below=50),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement; the limit is an idle loop beside as many busy processes."""
    seconds = 1.0 if quick else 5.0
    return Measurement(
        name="loop_lag",
        title="Lag of the application's event loop",
        metrics=(Metric("p99_ms", "ms p99", "lower"), Metric("max_ms", "ms max", "lower")),
        cases={
            "start": Lag(activity="start", workers=8, seconds=seconds),
            "batches": Lag(activity="batches", seconds=seconds),
            "weights": Lag(activity="weights", seconds=seconds),
            "crashes": Lag(activity="crashes", seconds=seconds),
        },
        systems=(
            System("idle loop", "limit", "limits.processes:lag", cases=frozenset({"batches"})),
            System(OURS, "ours", "ours.life:lag"),
        ),
        targets=TARGETS,
        repetitions=3,
    )

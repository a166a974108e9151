"""The cost of one more worker for the application, as the pool grows from 1 to 64."""

from __future__ import annotations

from benchmarks.cases import Scaling
from benchmarks.plan import Chart, Measurement, Metric, System
from benchmarks.targets import OURS, Target, growth

FLAT = 1.5
"""Fixed costs are shared by more workers as the pool grows; nothing else may grow much."""


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    counts = (1, 8) if quick else (1, 2, 4, 8, 16, 32, 64)
    cases = {
        f"{workers} workers": Scaling(workers=workers, seconds=1.0 if quick else 5.0)
        for workers in counts
    }
    first, last = f"{counts[0]} workers", f"{counts[-1]} workers"
    metrics = (
        Metric("manager_us_per_batch", "µs manager CPU/batch", "lower"),
        Metric("descriptors_per_worker", "descriptors/worker", "lower"),
        Metric("manager_kb_per_worker", "kB manager/worker", "lower"),
        Metric("pss_mb", "MB PSS/worker", "lower"),
    )
    return Measurement(
        name="scaling",
        title="Cost per worker as the pool grows",
        metrics=metrics,
        cases=cases,
        systems=(System(OURS, "ours", "ours.life:scaling"),),
        targets=tuple(
            Target(
                f"{metric.unit}, {last} / {first}",
                growth(metric.key, first, last),
                at_most=FLAT,
            )
            for metric in metrics
        ),
        charts=tuple(Chart(metric.key, lambda case: case.workers, "workers") for metric in metrics),
        timeout=180,
        repetitions=3,
    )

"""Start: until every worker is ready, in a fresh process and once more; memory of each worker."""

from __future__ import annotations

from benchmarks.cases import Start
from benchmarks.plan import Chart, Measurement, Metric, System
from benchmarks.systems import ASYNC, RAY, SUBPROC, TORCHRL_SYNC
from benchmarks.targets import OURS, Target, value

WORKERS = (1, 2, 8, 16)
LARGEST_PEER = 8
FORK = "forkserver with torch"


def _label(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    counts = (8,) if quick else WORKERS
    cases = {_label(workers): Start(workers=workers) for workers in counts}
    few = frozenset(_label(workers) for workers in counts if workers <= LARGEST_PEER)
    systems = (
        System(FORK, "limit", "limits.processes:start_forkserver"),
        System(OURS, "ours", "ours.life:start"),
        System("spawn with torch", "peer", "limits.processes:start_spawn", cases=few),
        System(ASYNC, "peer", "peers.gymnasium_async:start", cases=few),
        System(SUBPROC, "peer", "peers.sb3_subproc:start", cases=few),
        System(TORCHRL_SYNC, "peer", "peers.torchrl_collectors:start", cases=few),
        System(RAY, "peer", "peers.ray_actors:start", cases=few),
    )
    return Measurement(
        name="start",
        title="Start of a pool, and memory per worker",
        metrics=(
            Metric("warm_ms", "ms warm", "lower"),
            Metric("cold_ms", "ms cold", "lower"),
            Metric("pss_mb", "MB PSS/worker", "lower"),
        ),
        cases=cases,
        systems=systems,
        quick_systems=(FORK, OURS),
        targets=(
            Target("8 workers warm, ms", value("warm_ms", ["8 workers"]), below=250),
            Target("PSS of each of 8, MB", value("pss_mb", ["8 workers"]), at_most=30),
        ),
        charts=(
            Chart("warm_ms", lambda case: case.workers, "workers"),
            Chart("cold_ms", lambda case: case.workers, "workers"),
        ),
        timeout=120,
        repetitions=3,
        isolate_cases=True,
    )

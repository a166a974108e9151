"""A worker is killed: time until the application is told, and until the next worker delivers."""

from __future__ import annotations

from benchmarks.cases import Recovery
from benchmarks.plan import Measurement, Metric, System
from benchmarks.systems import AIO, ASYNC, QUEUE, RAY, SUBPROC, TORCHRL_SYNC
from benchmarks.targets import OURS, Target, value

CASE = "SIGKILL of a worker"
LIMIT = "pidfd + forkserver"
TARGETS = (
    Target("noticed p99, ms", value("noticed_p99_ms", [CASE]), below=50),
    Target("first batch p50, ms", value("first_batch_p50_ms", [CASE]), below=60),
)
SYSTEMS = (
    System(LIMIT, "limit", "limits.processes:recovery"),
    System(OURS, "ours", "ours.life:recovery"),
    System(RAY, "peer", "peers.ray_actors:recovery"),
    System(AIO, "peer", "peers.aiomultiprocess_pool:recovery"),
    System(ASYNC, "peer", "peers.gymnasium_async:recovery"),
    System(SUBPROC, "peer", "peers.sb3_subproc:recovery"),
    System(TORCHRL_SYNC, "peer", "peers.torchrl_collectors:recovery"),
    System(QUEUE, "peer", "peers.multiprocessing_queue:recovery"),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement; a peer without recovery shows the error that it raises instead."""
    case = Recovery(kills=10, patience=3.0) if quick else Recovery()
    return Measurement(
        name="recovery",
        title="Recovery after a crash",
        metrics=(
            Metric("first_batch_p50_ms", "ms to first batch p50", "lower"),
            Metric("first_batch_p99_ms", "ms to first batch p99", "lower"),
            Metric("noticed_p50_ms", "ms to noticed p50", "lower"),
            Metric("noticed_p99_ms", "ms to noticed p99", "lower"),
        ),
        cases={CASE: case},
        systems=SYSTEMS,
        quick_systems=(LIMIT, OURS),
        targets=TARGETS,
        timeout=120,
        repetitions=1 if quick else 3,
    )

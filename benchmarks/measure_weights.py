"""Weights: how long publishing takes, and how long until every worker has applied them."""

from __future__ import annotations

from benchmarks.cases import KB, MB, Weights
from benchmarks.plan import Chart, Measurement, Metric, System
from benchmarks.systems import MEMCPY, QUEUE, QUEUE_GZIP, RAY, TORCHRL_SYNC
from benchmarks.targets import OURS, Target, ahead_of, growth, of_limit, value

SIZES = {"17 KB": 17 * KB, "1 MB": MB, "50 MB": 50 * MB, "500 MB": 500 * MB}
WORKERS = (1, 2, 4, 8)
LARGEST_PICKLE = 50 * MB
"""500 MB through pickling queues would take minutes and many GB, and add nothing."""
FLAT = 1.3


def _label(size: str, workers: int) -> str:
    return f"{size} x {workers}"


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    sizes = {label: SIZES[label] for label in ("1 MB", "50 MB")} if quick else SIZES
    counts = (2,) if quick else WORKERS
    seconds, at_least = (0.3, 3) if quick else (2.0, 5)
    cases = {
        _label(size, workers): Weights(
            num_bytes=num_bytes, workers=workers, seconds=seconds, at_least=at_least
        )
        for size, num_bytes in sizes.items()
        for workers in counts
    }
    pickled = frozenset(k for k, case in cases.items() if case.num_bytes <= LARGEST_PICKLE)
    two = frozenset(k for k in pickled if cases[k].workers == 2)
    systems = (
        System(MEMCPY, "limit", "limits.memcpy:weights"),
        System(OURS, "ours", "ours.weights:weights"),
        System(RAY, "peer", "peers.ray_actors:weights"),
        System(QUEUE, "peer", "peers.multiprocessing_queue:weights", cases=pickled),
        System(QUEUE_GZIP, "peer", "peers.multiprocessing_queue:weights_gzip", cases=two),
        System(TORCHRL_SYNC, "peer", "peers.torchrl_collectors:weights", cases=two),
    )
    flat = tuple(
        Target(
            f"publish {size} to {counts[-1]} workers / to 1",
            growth("publish_ms", _label(size, counts[0]), _label(size, counts[-1])),
            at_most=FLAT,
        )
        for size in sizes
        if len(counts) > 1
    )
    return Measurement(
        name="weights",
        title="Weights from the learner to the workers",
        metrics=(
            Metric("applied_ms", "ms until all applied", "lower"),
            Metric("publish_ms", "ms to publish", "lower"),
        ),
        cases=cases,
        systems=systems,
        quick_systems=(MEMCPY, OURS, RAY, QUEUE),
        targets=(
            Target("publish, of one memcpy", of_limit(MEMCPY, "publish_ms", [*cases]), at_most=1.3),
            *flat,
            Target("1 MB x 2 applied, ms", value("applied_ms", ["1 MB x 2"]), at_most=0.5),
            Target(
                "50 MB x 2 applied, ahead of Ray",
                ahead_of([RAY], "applied_ms", ["50 MB x 2"]),
                at_least=1,
            ),
            Target(
                "50 MB x 2 applied, ahead of mp.Queue",
                ahead_of([QUEUE], "applied_ms", ["50 MB x 2"]),
                at_least=10,
            ),
        ),
        charts=(
            Chart("applied_ms", lambda case: case.num_bytes * case.workers, "bytes x workers"),
            Chart("publish_ms", lambda case: case.num_bytes * case.workers, "bytes x workers"),
        ),
        timeout=400,
        repetitions=3,
    )

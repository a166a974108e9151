"""Bytes from one worker to the learner: GB/s and processor time per GB, by the batch's size."""

from __future__ import annotations

from benchmarks.cases import KB, MB, Bandwidth
from benchmarks.plan import Chart, Measurement, Metric, System
from benchmarks.systems import GIGABYTES, LEARNER, MEMCPY, QUEUE, QUEUE_GZIP, RAY
from benchmarks.targets import OURS, Target, of_limit

SIZES = {
    "4 KB": 4 * KB,
    "16 KB": 16 * KB,
    "64 KB": 64 * KB,
    "256 KB": 256 * KB,
    "1 MB": MB,
    "4 MB": 4 * MB,
    "16 MB": 16 * MB,
    "64 MB": 64 * MB,
    "256 MB": 256 * MB,
}
QUICK = ("4 KB", "64 KB", "1 MB", "16 MB")
SLOW = frozenset(label for label, size in SIZES.items() if size <= 16 * MB)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    sizes = {label: SIZES[label] for label in QUICK} if quick else SIZES
    seconds = 0.3 if quick else 2.0
    cases = {
        label: Bandwidth(num_bytes=size, seconds=seconds, warmup=0.1)
        for label, size in sizes.items()
    }
    large = [label for label, size in sizes.items() if size > MB]
    systems = (
        System(MEMCPY, "limit", "limits.memcpy:bandwidth"),
        System(OURS, "ours", "ours.data:bandwidth"),
        System(QUEUE, "peer", "peers.multiprocessing_queue:bandwidth"),
        System(RAY, "peer", "peers.ray_actors:bandwidth"),
        System(QUEUE_GZIP, "peer", "peers.multiprocessing_queue:bandwidth_gzip", cases=SLOW),
    )
    return Measurement(
        name="bandwidth",
        title="Bandwidth from a worker to the learner",
        metrics=(GIGABYTES, Metric("cpu_s_per_gb", "CPU s/GB", "lower"), LEARNER),
        cases=cases,
        systems=systems,
        quick_systems=(MEMCPY, OURS),
        targets=(
            Target("of memcpy above 1 MB", of_limit(MEMCPY, "gb_per_s", large), at_least=0.8),
        ),
        charts=(
            Chart("gb_per_s", lambda case: case.num_bytes, "bytes per batch"),
            Chart("cpu_s_per_gb", lambda case: case.num_bytes, "bytes per batch"),
        ),
        timeout=180,
        repetitions=3,
    )

"""The cost of a batch in the learner's process, at the same pace for every size."""

from __future__ import annotations

from benchmarks.cases import KB, MB, Bandwidth
from benchmarks.plan import Chart, Measurement, System
from benchmarks.systems import LEARNER, QUEUE
from benchmarks.targets import OURS, Target, growth

INTERVAL = 0.02
"""Seconds before each batch: enough for the queue to pickle and send the largest."""
SIZES = {"4 KB": 4 * KB, "64 KB": 64 * KB, "1 MB": MB, "4 MB": 4 * MB, "16 MB": 16 * MB}
SMALLEST, LARGEST = "4 KB", "16 MB"
FLAT = 1.3
"""Room for touching the pages of a large batch; a copy of them would cost 100 times as much."""


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    seconds = 0.6 if quick else 4.0
    sizes = (SMALLEST, LARGEST) if quick else tuple(SIZES)
    cases = {
        size: Bandwidth(num_bytes=SIZES[size], interval=INTERVAL, seconds=seconds) for size in sizes
    }
    return Measurement(
        name="zero_copy",
        title="Cost of a batch to the learner's process, 50 batches a second",
        metrics=(LEARNER,),
        cases=cases,
        systems=(
            System(OURS, "ours", "ours.data:bandwidth"),
            System(QUEUE, "peer", "peers.multiprocessing_queue:bandwidth"),
        ),
        quick_systems=(OURS,),
        targets=(
            Target(
                f"learner's cost of {LARGEST} / of {SMALLEST}",
                growth("learner_us_per_batch", SMALLEST, LARGEST),
                at_most=FLAT,
            ),
        ),
        charts=(Chart("learner_us_per_batch", lambda case: case.num_bytes, "bytes per batch"),),
        timeout=60,
        repetitions=3,
    )

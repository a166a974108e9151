"""Staleness: how many versions old the weights of a batch are when the learner receives it."""

from __future__ import annotations

from benchmarks.cases import Staleness
from benchmarks.plan import Measurement, Metric, System
from benchmarks.systems import QUEUE
from benchmarks.targets import OURS, Target, value

CASE = "10 MB every 0.2 s to 4 workers"
TARGETS = (Target("mean versions behind", value("mean_versions", [CASE]), at_most=1),)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    systems = (
        System(OURS, "ours", "ours.weights:staleness"),
        System(QUEUE, "peer", "peers.multiprocessing_queue:staleness"),
    )
    return Measurement(
        name="staleness",
        title="Staleness of batches while weights are pushed",
        metrics=(
            Metric("mean_versions", "versions, mean", "lower"),
            Metric("max_versions", "versions, max", "lower"),
        ),
        cases={CASE: Staleness(seconds=1.5 if quick else 10.0)},
        systems=systems,
        quick_systems=(OURS,),
        targets=TARGETS,
        repetitions=3,
    )

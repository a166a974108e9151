"""Weights pushed as fast as possible: no worker may ever see parts of two versions."""

from __future__ import annotations

from benchmarks.cases import MB, TornReads
from benchmarks.plan import Measurement, Metric, System
from benchmarks.targets import OURS, Target, value

CASE = "1 MB x 4"
TARGETS = (
    Target("torn versions seen", value("torn", [CASE]), at_most=0),
    Target("versions loaded and checked", value("loaded", [CASE]), at_least=1),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    case = TornReads(num_bytes=MB, workers=4, seconds=1.0 if quick else 10.0)
    return Measurement(
        name="torn_reads",
        title="Torn reads of weights",
        metrics=(
            Metric("torn", "torn", "lower"),
            Metric("loaded", "versions loaded", "higher"),
            Metric("pushed", "versions pushed", "higher"),
        ),
        cases={CASE: case},
        systems=(System(OURS, "ours", "ours.weights:torn"),),
        targets=TARGETS,
        repetitions=1,
    )

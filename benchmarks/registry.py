"""Every measurement, in the order of the report."""

from __future__ import annotations

import importlib

from benchmarks.plan import Measurement

NAMES = (
    "pixel",
    "cartpole",
    "cartpole_mlp",
    "shogi",
    "bandwidth",
    "zero_copy",
    "weights",
    "torn_reads",
    "staleness",
    "round_trip",
    "recovery",
    "start",
    "loop_lag",
    "idle_cpu",
    "scaling",
    "learning",
)
"""``benchmarks/measure_<name>.py`` has a function ``measurement(quick)``."""


def find(name: str, *, quick: bool) -> Measurement:
    """Return one measurement.

    Raises:
        LookupError: If there is no measurement of that name.
    """
    if name not in NAMES:
        raise LookupError(f"no measurement {name!r}; there are: {', '.join(NAMES)}")
    module = importlib.import_module(f"benchmarks.measure_{name}")
    found: Measurement = module.measurement(quick)
    return found

"""A command to one idle worker and its reply: latency, and the rate of many at once."""

from __future__ import annotations

from benchmarks.cases import RoundTrip
from benchmarks.plan import Measurement, Metric, System
from benchmarks.systems import AIO, PIPE, RAY
from benchmarks.targets import OURS, Target, ahead_of, value

CASE = "one worker"
TARGETS = (
    Target("p50, µs", value("p50_us", [CASE]), at_most=150),
    Target("faster than aiomultiprocess.Pool", ahead_of([AIO], "p50_us", [CASE]), at_least=100),
    Target("pipelined, commands/s", value("pipelined_per_s", [CASE]), at_least=15_000),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    case = RoundTrip(calls=500, pipelined=6400) if quick else RoundTrip()
    few = {"calls": 50 if quick else 200, "pipelined": 256 if quick else 1280}
    systems = (
        System(PIPE, "limit", "limits.blocking_pipe:round_trip"),
        System(OURS, "ours", "ours.life:round_trip"),
        System(AIO, "peer", "peers.aiomultiprocess_pool:round_trip", few),
        System(RAY, "peer", "peers.ray_actors:round_trip"),
    )
    return Measurement(
        name="round_trip",
        title="Command round trip",
        metrics=(
            Metric("p50_us", "µs p50", "lower"),
            Metric("p99_us", "µs p99", "lower"),
            Metric("pipelined_per_s", "pipelined/s", "higher"),
        ),
        cases={CASE: case},
        systems=systems,
        quick_systems=(PIPE, OURS, AIO),
        targets=TARGETS,
    )

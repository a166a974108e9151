"""The limit of a command round trip: blocking reads and writes on one pipe, no event loop."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

from benchmarks.cases import RoundTrip
from benchmarks.plan import Metrics
from benchmarks.spawning import processes
from benchmarks.timing import percentile

MESSAGE = b"x" * 64
WARMUP = 50


def round_trip(case: RoundTrip) -> Metrics:
    """Send 64 bytes and read them back."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with processes(_echo, [(theirs,)]):
        times = []
        for _ in range(case.calls + WARMUP):
            began = time.perf_counter()
            ours.send_bytes(MESSAGE)
            ours.recv_bytes()
            times.append((time.perf_counter() - began) * 1e6)
        times = times[WARMUP:]
        began = time.perf_counter()
        for sent in range(case.pipelined + case.window):
            if sent < case.pipelined:
                ours.send_bytes(MESSAGE)
            if sent >= case.window:
                ours.recv_bytes()
        rate = case.pipelined / (time.perf_counter() - began)
    return {
        "p50_us": percentile(times, 50),
        "p99_us": percentile(times, 99),
        "pipelined_per_s": rate,
    }


def _echo(pipe: Connection) -> None:
    while True:
        pipe.send_bytes(pipe.recv_bytes())

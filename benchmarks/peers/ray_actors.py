"""Ray core actors: batches and weights as numpy arrays through the object store."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks import procfs
from benchmarks.cases import (
    MB,
    Bandwidth,
    Case,
    Idle,
    Recovery,
    RoundTrip,
    Start,
    Throughput,
    Weights,
)
from benchmarks.limits.processes import idle_cpu, recovery_metrics
from benchmarks.plan import Metrics, UnavailableError
from benchmarks.timing import Meter, percentile, repeat
from benchmarks.work import Arrays, as_tensors, fields, make_rollout, state_of_size

IN_FLIGHT = 2
LOOPBACK = "127.0.0.1"
STORE = 2048 * MB
RECOVERIES = 10
"""A Ray actor takes more than a second to come back: fewer kills are enough."""


class Actor:
    """An actor that does the work of every measurement."""

    def __init__(self, case: Case, worker_id: int) -> None:
        """Build what the case needs."""
        torch.set_num_threads(1)
        if isinstance(case, Throughput):
            self._rollout = make_rollout(case, worker_id)
        if isinstance(case, Bandwidth):
            rng = np.random.default_rng(0)
            self._array = rng.integers(0, 256, (1, case.num_bytes), dtype=np.uint8)

    def collect(self) -> Arrays:
        """Return one batch; Ray has serialised it before the next call."""
        return self._rollout.collect()

    def array(self) -> Arrays:
        """Return the array of the bandwidth measurement."""
        return {"obs": self._array}

    def load(self, weights: Arrays) -> int:
        """Take weights: arrays in the object store, not copied."""
        return len(weights)

    def echo(self, data: int) -> int:
        """Return ``data``."""
        return data

    def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[None]:
    """Start Ray on this machine alone, reachable only from it.

    Raises:
        UnavailableError: Ray would listen on an address that other machines can reach.
    """
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if address != LOOPBACK:
        raise UnavailableError(f"Ray would listen on {address}, not on the loopback alone")
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=STORE,
        _node_ip_address=LOOPBACK,
        _temp_dir=str(Path(tempfile.gettempdir()) / "ray"),
    )
    try:
        yield
    finally:
        ray.shutdown()


def _actors(case: Case, workers: int) -> list[Any]:
    remote = ray.remote(Actor).options(num_cpus=1, max_restarts=-1, max_task_retries=-1)
    actors: list[Any] = [remote.remote(case, index) for index in range(workers)]
    ray.get([actor.pid.remote() for actor in actors])
    return actors


def throughput(case: Throughput) -> Metrics:
    """Keep some calls per actor in flight; each makes one batch."""
    torch.set_num_threads(1)
    with cluster(case.workers):
        meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
        methods = [actor.collect for actor in _actors(case, case.workers)]
        return _stream(methods, case.batch, meter, in_flight=case.ahead)


def bandwidth(case: Bandwidth) -> Metrics:
    """Keep two calls to one actor in flight; each returns the same array."""
    with cluster(1):
        meter = Meter(
            case.seconds,
            case.warmup,
            at_least=case.at_least,
            warmup_batches=case.warmup_batches,
            cpu=lambda: procfs.cpu_seconds(procfs.tree()),
        )
        methods = [actor.array for actor in _actors(case, 1)]
        return _stream(methods, 1, meter, in_flight=IN_FLIGHT)


def _stream(methods: list[Any], steps: int, meter: Meter, *, in_flight: int) -> Metrics:
    pending = {method.remote(): method for method in methods for _ in range(in_flight)}
    going = True
    while going:
        ready, _ = ray.wait(list(pending), num_returns=1)
        method = pending.pop(ready[0])
        pending[method.remote()] = method
        going = meter.add(as_tensors(ray.get(ready[0])), steps)
    return meter.metrics()


def weights(case: Weights) -> Metrics:
    """Put the state dict into the store once, and hand it to every actor."""
    state = {name: tensor.numpy() for name, tensor in state_of_size(case.num_bytes).items()}
    published, applied = [], []
    with cluster(case.workers):
        actors = _actors(case, case.workers)
        for _ in repeat(case.seconds, case.at_least):
            began = time.perf_counter()
            reference = ray.put(state)
            published.append((time.perf_counter() - began) * 1e3)
            ray.get([actor.load.remote(reference) for actor in actors])
            applied.append((time.perf_counter() - began) * 1e3)
    return {"publish_ms": percentile(published, 50), "applied_ms": percentile(applied, 50)}


def round_trip(case: RoundTrip) -> Metrics:
    """Call an actor's method."""
    with cluster(1):
        (actor,) = _actors(case, 1)
        times = []
        for number in range(case.calls):
            began = time.perf_counter()
            ray.get(actor.echo.remote(number))
            times.append((time.perf_counter() - began) * 1e6)
        began = time.perf_counter()
        for _ in range(0, case.pipelined, case.window):
            ray.get([actor.echo.remote(number) for number in range(case.window)])
        rate = case.pipelined / (time.perf_counter() - began)
    return {
        "p50_us": percentile(times, 50),
        "p99_us": percentile(times, 99),
        "pipelined_per_s": rate,
    }


def recovery(case: Recovery) -> Metrics:
    """Kill an actor's process and wait for the restarted actor's first batch."""
    batch = Throughput(work="cartpole")
    times = []
    with cluster(case.workers):
        actor = _actors(batch, 1)[0]
        for _ in range(min(case.kills, RECOVERIES)):
            pid = ray.get(actor.pid.remote())
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            ray.get(actor.collect.remote())
            while ray.get(actor.pid.remote()) == pid:  # answered before it died
                ray.get(actor.collect.remote())
            times.append((time.perf_counter() - began) * 1e3)
    return recovery_metrics([], times)


def start(case: Start) -> Metrics:
    """Start Ray and actors that import torch; then more actors in the running cluster."""
    began = time.perf_counter()
    with cluster(case.workers):
        actors = _actors(case, case.workers)
        cold = (time.perf_counter() - began) * 1e3
        for actor in actors:
            ray.kill(actor)
        began = time.perf_counter()
        actors = _actors(case, case.workers)
        warm = (time.perf_counter() - began) * 1e3
        size = procfs.mean_pss_mb(ray.get([actor.pid.remote() for actor in actors]))
    return {"warm_ms": warm, "cold_ms": cold, "pss_mb": size}


def idle(case: Idle) -> Metrics:
    """Watch actors, and the processes of Ray itself, that have nothing to do."""
    with cluster(case.workers):
        _actors(case, case.workers)
        return idle_cpu(case)

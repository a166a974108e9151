"""multiprocessing.Queue with pickled arrays, plain or gzipped: the design that keisei replaces."""

from __future__ import annotations

import dataclasses
import gzip
import multiprocessing
import os
import queue
import signal
import time
from typing import Any

import numpy as np
import torch

from benchmarks import procfs
from benchmarks.cases import Bandwidth, Recovery, Staleness, Throughput, Weights
from benchmarks.plan import Metrics
from benchmarks.spawning import bounded, processes
from benchmarks.timing import Meter, percentile, repeat
from benchmarks.work import Arrays, as_tensors, fields, make_rollout, state_of_size

SLOTS = 4
LEVEL = 6
START_SECONDS = 60.0


def throughput(case: Throughput) -> Metrics:
    """Send batches through one queue."""
    return _throughput(case, compress=False)


def throughput_gzip(case: Throughput) -> Metrics:
    """Send batches through one queue, each array compressed."""
    return _throughput(case, compress=True)


def _throughput(case: Throughput, *, compress: bool) -> Metrics:
    torch.set_num_threads(1)
    batches = multiprocessing.get_context("spawn").Queue(case.ahead * case.workers)
    arguments = [(case, index, batches, compress) for index in range(case.workers)]
    with processes(_collect, arguments):
        first = as_tensors(_unpack(batches.get(timeout=START_SECONDS)))
        meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
        meter.add(first, case.batch)
        while meter.add(as_tensors(_unpack(batches.get())), case.batch):
            pass
    return meter.metrics()


def _collect(case: Throughput, worker_id: int, batches: Any, compress: bool) -> None:
    rollout = make_rollout(case, worker_id, fresh=True)
    while True:
        batches.put(_pack(rollout.collect(), compress=compress))


def bandwidth(case: Bandwidth) -> Metrics:
    """Send one array again and again."""
    return _bandwidth(case, compress=False)


def bandwidth_gzip(case: Bandwidth) -> Metrics:
    """Send one array again and again, compressed each time."""
    return _bandwidth(case, compress=True)


def _bandwidth(case: Bandwidth, *, compress: bool) -> Metrics:
    batches = multiprocessing.get_context("spawn").Queue(SLOTS)
    with processes(_repeat_array, [(case, batches, compress)]):
        first = as_tensors(_unpack(batches.get(timeout=START_SECONDS)))
        meter = Meter(
            case.seconds,
            case.warmup,
            at_least=case.at_least,
            warmup_batches=case.warmup_batches,
            cpu=lambda: procfs.cpu_seconds(procfs.tree()),
        )
        meter.add(first, 1)
        while meter.add(as_tensors(_unpack(batches.get())), 1):
            pass
    return meter.metrics()


def _repeat_array(case: Bandwidth, batches: Any, compress: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, (1, case.num_bytes), dtype=np.uint8)
    while True:
        if case.interval:
            time.sleep(case.interval)
        batches.put(_pack({"obs": array}, compress=compress))


def weights(case: Weights) -> Metrics:
    """Pickle a state dict once for each worker."""
    return _weights(case, compress=False)


def weights_gzip(case: Weights) -> Metrics:
    """Compress a state dict once, then pickle it for each worker."""
    return _weights(case, compress=True)


def _weights(case: Weights, *, compress: bool) -> Metrics:
    context = multiprocessing.get_context("spawn")
    queues = _one_way_queues(context, case.workers)
    answers = context.Queue()
    state = {name: tensor.numpy() for name, tensor in state_of_size(case.num_bytes).items()}
    times = []
    with processes(_load, [(each, answers) for each in queues]):
        for _ in queues:
            answers.get(timeout=START_SECONDS)
        for _ in repeat(case.seconds, case.at_least):
            began = time.perf_counter()
            packed = _pack(state, compress=compress)
            for each in queues:
                each.put(packed)
            for _ in queues:
                answers.get()
            times.append((time.perf_counter() - began) * 1e3)
    return {"applied_ms": percentile(times, 50)}


def _one_way_queues(context: Any, count: int) -> list[Any]:
    """Return queues whose unread items do not keep this process from ending."""
    queues = [context.Queue() for _ in range(count)]
    for each in queues:
        each.cancel_join_thread()
    return queues


def _load(incoming: Any, answers: Any) -> None:
    answers.put(True)
    while True:
        as_tensors(_unpack(incoming.get()))
        answers.put(True)


def staleness(case: Staleness) -> Metrics:
    """Push at fixed intervals; workers take the newest state between two batches."""
    context = multiprocessing.get_context("spawn")
    batches = context.Queue(SLOTS * case.workers)
    queues = _one_way_queues(context, case.workers)
    state = {name: tensor.numpy() for name, tensor in state_of_size(case.num_bytes).items()}
    lags: list[int] = []
    version = 0
    with processes(_collect_versions, [(i, each, batches) for i, each in enumerate(queues)]):
        for _ in range(case.workers):
            batches.get(timeout=START_SECONDS)
        began = due = time.perf_counter()
        while (now := time.perf_counter()) < began + case.seconds:
            if now >= due:
                due += case.interval
                version += 1
                for each in queues:
                    each.put((version, state))
            try:
                seen, _ = batches.get(timeout=max(0.0, due - time.perf_counter()))
            except queue.Empty:
                continue
            lags.append(version - seen)
    return {"mean_versions": sum(lags) / len(lags), "max_versions": float(max(lags))}


def _collect_versions(worker_id: int, incoming: Any, batches: Any) -> None:
    rollout = make_rollout(Throughput(work="cartpole"), worker_id, fresh=True)
    version = 0
    while True:
        try:
            while True:
                version, _ = incoming.get_nowait()
        except queue.Empty:
            pass
        batches.put((version, rollout.collect()))


def recovery(case: Recovery) -> Metrics:
    """Kill a worker; this design reports nothing, and its batches just stop."""
    one = dataclasses.replace(Throughput(work="cartpole"), workers=1)
    batches = multiprocessing.get_context("spawn").Queue(SLOTS)
    with processes(_collect, [(one, 0, batches, False)]) as started:
        batches.get(timeout=START_SECONDS)
        assert started[0].pid is not None
        os.kill(started[0].pid, signal.SIGKILL)
        for _ in range(2 * SLOTS):
            bounded(batches.get, case.patience, "get() after the worker was killed")
    raise RuntimeError("a killed worker went on sending")


def _pack(arrays: Arrays, *, compress: bool) -> dict[str, Any]:
    if not compress:
        return dict(arrays)
    return {
        name: (gzip.compress(array.tobytes(), LEVEL), array.dtype.str, array.shape)
        for name, array in arrays.items()
    }


def _unpack(packed: dict[str, Any]) -> Arrays:
    return {
        name: (
            np.frombuffer(gzip.decompress(item[0]), item[1]).reshape(item[2])
            if isinstance(item, tuple)
            else item
        )
        for name, item in packed.items()
    }

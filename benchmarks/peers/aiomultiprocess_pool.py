"""aiomultiprocess.Pool: tasks and pickled results over polled queues."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import torch
from aiomultiprocess import Pool

from benchmarks import procfs
from benchmarks.cases import Idle, Recovery, RoundTrip, Throughput
from benchmarks.plan import Metrics
from benchmarks.timing import Meter, percentile
from benchmarks.work import Arrays, Rollout, as_tensors, fields, make_rollout

IN_FLIGHT = 2
SETTLE = 0.5
"""Seconds that a task has to reach its process."""
_rollout: list[Rollout] = []


def throughput(case: Throughput) -> Metrics:
    """Keep two tasks per process queued; each makes one batch."""
    return asyncio.run(_throughput(case))


async def _throughput(case: Throughput) -> Metrics:
    torch.set_num_threads(1)
    async with Pool(processes=case.workers, childconcurrency=1) as pool:
        meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
        pending = {
            asyncio.ensure_future(pool.apply(_collect, (case,)))
            for _ in range(case.workers * IN_FLIGHT)
        }
        going = True
        while going:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                going = meter.add(as_tensors(task.result()), case.batch) and going
                pending.add(asyncio.ensure_future(pool.apply(_collect, (case,))))
        for task in pending:
            task.cancel()
        pool.terminate()
    return meter.metrics()


async def _collect(case: Throughput) -> Arrays:
    if not _rollout:
        _rollout.append(make_rollout(case, os.getpid() % 1000, fresh=True))
    return _rollout[0].collect()


async def _echo(data: int) -> int:
    return data


async def _pid() -> int:
    return os.getpid()


async def _wait_forever() -> None:
    await asyncio.Event().wait()


def round_trip(case: RoundTrip) -> Metrics:
    """Apply an empty coroutine function."""
    return asyncio.run(_round_trip(case))


async def _round_trip(case: RoundTrip) -> Metrics:
    async with Pool(processes=1) as pool:
        await pool.apply(_echo, (0,))
        times = []
        for number in range(case.calls):
            began = time.perf_counter()
            await pool.apply(_echo, (number,))
            times.append((time.perf_counter() - began) * 1e6)
        began = time.perf_counter()
        for _ in range(0, case.pipelined, case.window):
            await asyncio.gather(*[pool.apply(_echo, (n,)) for n in range(case.window)])
        rate = case.pipelined / (time.perf_counter() - began)
        pool.terminate()
    return {
        "p50_us": percentile(times, 50),
        "p99_us": percentile(times, 99),
        "pipelined_per_s": rate,
    }


def idle(case: Idle) -> Metrics:
    """Watch a pool that has nothing to do."""
    return asyncio.run(_idle(case))


async def _idle(case: Idle) -> Metrics:
    async with Pool(processes=case.workers) as pool:
        await asyncio.gather(*[pool.apply(_pid) for _ in range(case.workers)])
        await asyncio.sleep(case.settle)
        watch = procfs.CpuWatch()
        await asyncio.sleep(case.seconds)
        percent = watch.core_percent()
        pool.terminate()
    return {"core_percent": percent}


def recovery(case: Recovery) -> Metrics:
    """Kill a process that has a task, and wait for that task."""
    return asyncio.run(_recovery(case))


async def _recovery(case: Recovery) -> Metrics:
    async with Pool(processes=1) as pool:
        pid = await pool.apply(_pid)
        task = asyncio.ensure_future(pool.apply(_wait_forever))
        await asyncio.sleep(SETTLE)
        os.kill(pid, signal.SIGKILL)
        try:
            await asyncio.wait_for(task, case.patience)
        except TimeoutError:
            raise TimeoutError(
                f"the task of the killed process: nothing happened within {case.patience:g} s"
            ) from None
        finally:
            pool.terminate()
    raise RuntimeError("the task of a killed process returned")

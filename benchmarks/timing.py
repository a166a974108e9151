"""Small instruments: percentiles, a meter for streams of batches, and a watch on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LAG_INTERVAL = 0.001


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def repeat(seconds: float, at_least: int) -> Iterator[int]:
    """Count until ``seconds`` have passed and ``at_least`` rounds were made."""
    end = time.perf_counter() + seconds
    count = 0
    while count < at_least or time.perf_counter() < end:
        yield count
        count += 1


class Meter:
    """Counts the transitions that reach the learner after a warm-up; reads a byte of each."""

    def __init__(
        self,
        seconds: float,
        warmup: float,
        *,
        fields: Sequence[str] = ("obs",),
        at_least: int = 3,
        warmup_batches: int = 0,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        """Measure for ``seconds`` and ``at_least`` batches; ``cpu`` is read at both ends.

        The warm-up takes ``warmup`` seconds and ``warmup_batches`` batches.
        """
        self._seconds, self._warmup, self._at_least = seconds, warmup, at_least
        self._warmup_batches = warmup_batches
        self._fields, self._cpu = fields, cpu
        self._created = time.perf_counter()
        self._began: float | None = None
        self._ended = self._cpu_began = self._cpu_ended = self._own_began = self._own_ended = 0.0
        self._steps = self._batches = self._bytes = 0
        self.checksum = 0.0

    def add(self, data: Mapping[str, torch.Tensor], steps: int) -> bool:
        """Count one batch; return ``False`` when the measurement is complete."""
        for field in self._fields:
            if field not in data:
                raise ValueError(f"the batch lacks the field {field!r}; it has {sorted(data)}")
        obs = data["obs"]
        if obs.numel() and obs.shape[0] != steps:
            obs = obs.reshape(steps, -1)
        self.checksum += float(obs.reshape(obs.shape[0], -1)[:, 0].sum())
        now = time.perf_counter()
        if self._began is None:
            self._warmup_batches -= 1
            if now - self._created >= self._warmup and self._warmup_batches < 0:
                self._began, self._cpu_began, self._own_began = now, self._cpu(), _own_cpu()
            return True
        self._steps += steps
        self._batches += 1
        self._bytes += sum(tensor.nbytes for tensor in data.values())
        if now - self._began < self._seconds or self._batches < self._at_least:
            return True
        self._ended, self._cpu_ended, self._own_ended = now, self._cpu(), _own_cpu()
        return False

    def metrics(self) -> dict[str, float]:
        """Return rates per second, and the cost per batch of the learner's process."""
        assert self._began is not None, "the stream of batches ended during the warm-up"
        assert self._ended, "the stream of batches ended too early"
        elapsed = self._ended - self._began
        gigabytes = self._bytes / 1e9
        return {
            "steps_per_s": self._steps / elapsed,
            "gb_per_s": gigabytes / elapsed,
            "cpu_s_per_gb": (self._cpu_ended - self._cpu_began) / gigabytes,
            "learner_us_per_batch": (self._own_ended - self._own_began) / self._batches * 1e6,
        }


def _own_cpu() -> float:
    return time.process_time()


@contextlib.asynccontextmanager
async def watch_loop() -> AsyncIterator[list[float]]:
    """Collect how late (seconds) a timer of 1 ms fires on the running loop."""
    lags: list[float] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            lags.append(max(0.0, loop.time() - due))

    task = asyncio.create_task(watch())
    try:
        yield lags
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

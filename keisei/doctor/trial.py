"""A pool of one worker, tried for real: nothing says as surely whether pools work here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

import torch

from keisei.doctor.findings import Finding, Verdict
from keisei.training.parallel.parallel_manager import ParallelManager
from keisei.worker import Worker


class Probe(Worker):
    """Delivers one number."""

    def collect(self) -> dict[str, torch.Tensor]:
        """Return a tensor ``[1]``."""
        return {"x": torch.ones(1)}


async def _try(start_method: str, timeout: float) -> tuple[float, float]:
    """Return the seconds to the first ready worker, and to its first batch."""
    began = time.monotonic()
    config = {"num_workers": 1, "start_method": start_method, "start_timeout": timeout}
    async with asyncio.timeout(timeout + 10), ParallelManager(Probe, config=config) as manager:
        ready = time.monotonic() - began
        batches = await manager.collect(timeout=timeout)
        if batches[0].data["x"].tolist() != [1.0]:
            raise RuntimeError("the batch that arrived is not the one that was sent")
        return ready, time.monotonic() - began


def findings(timeout: float = 60.0) -> Iterator[Finding]:
    """Start a pool with each start method.

    Args:
        timeout: Seconds that each may take.
    """
    for method in ("forkserver", "spawn"):
        try:
            with _quietly():
                ready, first = asyncio.run(_try(method, timeout))
        except Exception as error:  # noqa: BLE001 - the report tells
            text = f"{type(error).__name__}: {error}".strip()
            yield Finding("trial", method, "failed", Verdict.PROBLEM, text)
        else:
            text = f"worker ready in {ready:.2f} s, first batch in {first:.2f} s"
            yield Finding("trial", method, text, Verdict.OK)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the pool's log out of the report."""
    logger = logging.getLogger("keisei")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled

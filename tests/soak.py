"""A pool under the chaos monkey, every batch verified: ``nox -s soak -- --minutes N``.

Two to eight workers are killed, stopped, made to raise and to hang at a high rate while weights
are pushed without a pause. Nothing that was committed may be lost, nothing may come twice or torn,
memory must stay flat, and each fault must have exactly one incident.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from keisei import ExperienceBatch, ParallelManager
from keisei.events import ExitCause
from keisei.testing.chaos import ChaosMonkey
from keisei.testing.failpoints import armed
from keisei.testing.leaks import Resources, left_since
from soak_workers import WEIGHTS, SoakWorker

FAULTS = ("kill", "kill", "terminate", "segfault", "stop", "raise", "exit", "hang", "garbage")
CAUSES = {
    "kill": {ExitCause.SIGNAL},
    "terminate": {ExitCause.SIGNAL},
    "segfault": {ExitCause.SIGNAL},
    "stop": {ExitCause.HANG},
    "hang": {ExitCause.HANG},
    "raise": {ExitCause.USER_ERROR},
    "exit": {ExitCause.EXIT},
    "garbage": {ExitCause.PROTOCOL},
}
"""What each fault must be recorded as."""


@dataclass
class Verdict:
    """What the soak has found; every list must be empty in the end."""

    batches: int = 0
    payload_bytes: int = 0
    pushes: int = 0
    gaps: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    torn_data: list[str] = field(default_factory=list)
    torn_weights: list[str] = field(default_factory=list)
    backwards: list[str] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    incidents: Counter[str] = field(default_factory=Counter)

    @property
    def problems(self) -> list[str]:
        """Everything that must not be."""
        lists = (self.gaps, self.repeated, self.torn_data, self.torn_weights, self.backwards)
        return [line for one in (*lists, self.unaccounted, self.leaks) for line in one]

    @property
    def slope(self) -> float:
        """Growth of the application's resident memory after the first third, bytes a minute."""
        points = self.memory[len(self.memory) // 3 :]
        if len(points) < 3:
            return 0.0
        mean_t = sum(t for t, _ in points) / len(points)
        mean_m = sum(m for _, m in points) / len(points)
        spread = sum((t - mean_t) ** 2 for t, _ in points)
        return 60 * sum((t - mean_t) * (m - mean_m) for t, m in points) / spread


class Verifier:
    """Looks at every batch."""

    def __init__(self) -> None:
        self.verdict = Verdict()
        self._next: dict[tuple[int, int], int] = {}
        self._versions: dict[tuple[int, int], int] = {}

    def look(self, batch: ExperienceBatch) -> None:
        """Check order, data and weights of one batch."""
        verdict, key = self.verdict, (batch.worker_id, batch.incarnation)
        expected = self._next.get(key, 0)
        if batch.sequence != expected or batch.info["count"] != batch.sequence + 1:
            wrong = verdict.repeated if batch.sequence < expected else verdict.gaps
            wrong.append(f"{key}: sequence {batch.sequence} where {expected} was due")
        self._next[key] = batch.sequence + 1
        payload = batch.data["payload"]
        if zlib.crc32(payload.numpy()) != batch.info["checksum"]:
            verdict.torn_data.append(f"{key}: sequence {batch.sequence}")
        low, high = batch.data["weights"].tolist()
        if not low == high == batch.weights_version:
            verdict.torn_weights.append(f"{key}: {low} … {high} as {batch.weights_version}")
        if batch.weights_version < self._versions.get(key, 0):
            verdict.backwards.append(f"{key}: {batch.weights_version}")
        self._versions[key] = batch.weights_version
        verdict.batches += 1
        verdict.payload_bytes += payload.numel()


def resident() -> int:
    """Return this process's resident memory in bytes."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGESIZE")


def weights_of(version: int) -> dict[str, torch.Tensor]:
    """Return weights that are all equal to their version."""
    return {"weight": torch.full((1, WEIGHTS), float(version))}


async def push_for_ever(manager: ParallelManager, verdict: Verdict, looked: asyncio.Event) -> None:
    """Push a version, at any point of the workers' loops, for each batch that is looked at."""
    while True:
        looked.clear()
        await looked.wait()
        verdict.pushes = await manager.push_weights(weights_of(manager.weights_version + 1))


async def soak(seconds: float, *, workers: int, rate: float, seed: int) -> Verdict:
    """Run one pool under faults for so many seconds and return what was found."""
    verifier = Verifier()
    verdict = verifier.verdict
    config = {
        "num_workers": workers,
        "seed": seed,
        "collect_timeout": 1.5,
        "poison_threshold": None,
        "restart": {"max_restarts": 1_000_000, "backoff_base": 0.0, "backoff_cap": 0.0},
    }
    began = time.monotonic()
    model = torch.nn.Linear(WEIGHTS, 1, bias=False)
    model.load_state_dict(weights_of(1))
    async with ParallelManager(armed(SoakWorker), model=model, config=config) as manager:
        looked = asyncio.Event()
        pushing = asyncio.create_task(push_for_ever(manager, verdict, looked))
        async with ChaosMonkey(manager, seed=seed, faults=FAULTS, rate=rate) as monkey:
            async for batch in manager.experiences():
                verifier.look(batch)
                looked.set()
                now = time.monotonic() - began
                if not verdict.memory or now - verdict.memory[-1][0] >= seconds / 60:
                    verdict.memory.append((now, resident()))
                if now >= seconds:
                    break
        pushing.cancel()
        await asyncio.wait([pushing])
        # A worker that was stopped or hangs is found by its deadline; then all are well again.
        await settle(manager, monkey)
    account(verdict, monkey, manager)
    return verdict


async def settle(manager: ParallelManager, monkey: ChaosMonkey) -> None:
    """Take batches until every process that was hit has ended and every slot is ready."""
    hit = {(one.worker_id, one.incarnation) for one in monkey.injections}
    async for _ in manager.experiences():
        alive = {(info.worker_id, info.incarnation) for info in manager.workers}
        if not hit & alive and manager.is_healthy:
            return


def account(verdict: Verdict, monkey: ChaosMonkey, manager: ParallelManager) -> None:
    """Match faults with incidents, one to one."""
    incidents = {(one.worker_id, one.incarnation): one for one in manager.incidents}
    if len(incidents) != len(manager.incidents):
        verdict.unaccounted.append("a process has more than one incident")
    for injection in monkey.injections:
        verdict.faults[injection.fault] += 1
        incident = incidents.pop((injection.worker_id, injection.incarnation), None)
        if incident is None:
            verdict.unaccounted.append(f"no incident for {injection}")
            continue
        verdict.incidents[incident.cause.value] += 1
        if incident.cause not in CAUSES[injection.fault]:
            verdict.unaccounted.append(f"{injection.fault} recorded as: {incident.summary}")
        if incident.experiences_lost > 1:
            verdict.gaps.append(f"more was lost than was unfinished: {incident.summary}")
    verdict.unaccounted += [f"not injected: {incident.summary}" for incident in incidents.values()]


def report(verdict: Verdict, seconds: float) -> str:
    """Say what was found, in lines."""
    return "\n".join(
        [
            f"{seconds:.0f} s, {sum(verdict.faults.values())} faults: {dict(verdict.faults)}",
            f"incidents: {dict(verdict.incidents)}",
            f"{verdict.batches} batches, {verdict.payload_bytes / 1e9:.2f} GB, "
            f"{verdict.pushes} weights versions, all verified",
            f"lost after commit {len(verdict.gaps)}, repeated {len(verdict.repeated)}, "
            f"torn data {len(verdict.torn_data)}, torn weights {len(verdict.torn_weights)}, "
            f"backwards {len(verdict.backwards)}, unaccounted {len(verdict.unaccounted)}, "
            f"leaks {len(verdict.leaks)}",
            f"memory {verdict.memory[-1][1] / 2**20:.0f} MiB, "
            f"slope {verdict.slope / 2**20:+.2f} MiB per minute",
            *verdict.problems[:20],
        ]
    )


def soak_and_check(seconds: float, *, workers: int, rate: float, seed: int) -> Verdict:
    """Soak in an event loop of its own, then look for what was left behind."""
    before = Resources.now()
    verdict = asyncio.run(soak(seconds, workers=workers, rate=rate, seed=seed))
    verdict.leaks += left_since(before)
    return verdict


def main() -> int:
    """Soak pools of 2, 4 and 8 workers in turn; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=4.0, help="faults per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    arguments = parser.parse_args()
    status, figures = 0, []
    for turn, workers in enumerate((2, 4, 8)):
        seconds = 60 * arguments.minutes / 3
        seed = arguments.seed + turn
        print(f"{workers} workers for {seconds:.0f} s, seed {seed}", flush=True)
        began = time.monotonic()
        verdict = soak_and_check(seconds, workers=workers, rate=arguments.rate, seed=seed)
        print(report(verdict, time.monotonic() - began), flush=True)
        figures.append({"workers": workers, "batches": verdict.batches, "slope": verdict.slope})
        status |= bool(verdict.problems)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())

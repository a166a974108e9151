"""Random faults at a given rate: for soaks, demonstrations, and anybody's tests.

::

    worker = armed(MyWorker)  # so that faults inside hooks can be armed while it runs
    async with ParallelManager(worker, config=config) as manager:
        async with ChaosMonkey(manager, seed=7, faults=("kill", "raise"), rate=5.0) as monkey:
            ...  # use the pool
        print(monkey.injections)
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from keisei.exceptions import ManagerStateError, PoolExhausted, WorkerError
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint

if TYPE_CHECKING:
    from keisei.training.parallel.parallel_manager import ParallelManager
    from keisei.training.parallel.stats import WorkerInfo

SIGNALS: Mapping[str, signal.Signals] = {
    "kill": signal.SIGKILL,
    "segfault": signal.SIGSEGV,
    "stop": signal.SIGSTOP,
    "terminate": signal.SIGTERM,
}
"""Faults that need nothing of the worker."""


class ChaosError(RuntimeError):
    """Raised in a worker by the fault "raise"."""


ARMED: Mapping[str, Callable[[], Failpoint]] = {
    "raise": lambda: _at_the_next_collect(_throw),
    "hang": lambda: _at_the_next_collect(failpoints.hang),
    "exit": lambda: _at_the_next_collect(failpoints.exit_now),
    "hold_gil": lambda: _at_the_next_collect(failpoints.hold_gil),
    "garbage": lambda: _at_the_next_collect(failpoints.garbage),
    "torn_frame": lambda: _at_the_next_collect(failpoints.torn_frame),
}
"""Faults that happen at the next ``collect`` of a worker made by ``failpoints.armed``."""


def _throw() -> None:
    raise ChaosError("the chaos monkey was here")


def _at_the_next_collect(fault: Callable[[], object]) -> Failpoint:
    return Failpoint("collect", fault, incarnation=None)


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault that was injected into one process.

    Attributes:
        fault: Its name.
        worker_id: The slot.
        incarnation: The process of the slot.
        monotonic: When, in seconds of ``time.monotonic()``.
    """

    fault: str
    worker_id: int
    incarnation: int
    monotonic: float


class ChaosMonkey:
    """Injects faults into ready workers, at times that look random and follow from the seed.

    Each process is hit once at most, so that every injection can be matched with an incident.

    Attributes:
        injections: What was done, oldest first. A fault that is armed may not happen any more if
            its process ends before its next ``collect``.
    """

    def __init__(
        self,
        manager: ParallelManager,
        *,
        seed: int = 0,
        faults: Sequence[str] = ("kill",),
        rate: float = 1.0,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Prepare; ``async with`` begins and ends the faults.

        Args:
            manager: A pool that is running.
            seed: Of the choice of victims, faults and times.
            faults: Names in ``SIGNALS`` and ``ARMED``, chosen with equal chance.
            rate: Faults per second on average (a Poisson process).
            sleep: Waits for so many seconds; a test may bring its own clock.

        Raises:
            ValueError: A fault is not known, or the rate is not positive.
        """
        unknown = sorted(set(faults) - SIGNALS.keys() - ARMED.keys())
        if unknown:
            known = ", ".join(sorted({*SIGNALS, *ARMED}))
            raise ValueError(f"unknown faults: {', '.join(unknown)}; there are {known}")
        if not rate > 0:
            raise ValueError(f"rate is {rate}; give a positive number of faults per second")
        self.injections: list[Injection] = []
        self._manager = manager
        self._random = random.Random(seed)
        self._faults = tuple(faults)
        self._rate = rate
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._rage(), name="chaos-monkey")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    async def _rage(self) -> None:
        while True:
            await self._sleep(self._random.expovariate(self._rate))
            await self.strike()

    async def strike(self) -> Injection | None:
        """Inject one fault now; return what was done, or ``None`` if there was no victim."""
        hit = {(one.worker_id, one.incarnation) for one in self.injections}
        victims = [
            info
            for info in self._manager.workers
            if info.state == "running" and (info.worker_id, info.incarnation) not in hit
        ]
        fault = self._random.choice(self._faults)
        if not victims:
            return None
        victim = self._random.choice(victims)
        injection = Injection(fault, victim.worker_id, victim.incarnation, time.monotonic())
        self.injections.append(injection)
        if not await self._inject(fault, victim):
            self.injections.remove(injection)
            return None
        return injection

    async def _inject(self, fault: str, victim: WorkerInfo) -> bool:
        if fault in SIGNALS:
            if victim.pid is None:
                return False
            try:
                os.kill(victim.pid, SIGNALS[fault])
            except ProcessLookupError:
                return False
            return True
        try:
            await self._manager.send_command(
                failpoints.ARM, [ARMED[fault]()], worker_ids=[victim.worker_id]
            )
        except (WorkerError, ManagerStateError, PoolExhausted):
            return False
        return True

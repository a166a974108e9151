"""CartPole whose steps and resets crash or stall: the environment of ``train_with_faults.py``.

The worker processes import this module. A crash ends the process for real, in one of three ways
with equal chance: SIGKILL, ``abort()``, or an exit without a goodbye. No crash is an exception:
one that is raised in ``setup`` at the first start is taken for a mistake in the program, and
ends the run.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium

from keisei.training.gymnasium import ActorCritic, GymnasiumWorker
from keisei.worker import WorkerContext

if TYPE_CHECKING:
    from cartpole_ppo import Hyperparameters

EXIT_CODE = 70
"""Of a crash that is an exit."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong in one environment, and how often.

    Attributes:
        crash_in_step: The chance that a step ends the process.
        crash_in_reset: The same of a reset.
        stall_in_step: The chance that a step takes ``stall_seconds`` longer.
        stall_in_reset: The same of a reset.
        stall_seconds: Shortest and longest stall; uniform between them.
        build_seconds: How long every construction takes.
    """

    crash_in_step: float = 0.0
    crash_in_reset: float = 0.0
    stall_in_step: float = 0.0
    stall_in_reset: float = 0.0
    stall_seconds: tuple[float, float] = (2.0, 5.0)
    build_seconds: float = 2.0


HEALTHY = Faults()
CRASHING = Faults(crash_in_step=1e-4, crash_in_reset=1e-3)
STALLING = Faults(stall_in_step=5e-4, stall_in_reset=1e-3)
BOTH = replace(CRASHING, stall_in_step=5e-4, stall_in_reset=1e-3)

SCHEDULE = (CRASHING, CRASHING, STALLING, STALLING)
"""The faults of each slot; no slot is healthy."""
RLLIB_SCHEDULE = (CRASHING, BOTH, STALLING, HEALTHY)
"""The same rates on the slots that have them in RLlib's example."""


class FaultyEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that crashes and stalls by chance, as the generator of ``random`` has it.

    That generator is seeded in each process from the pool's seed, the slot and the incarnation, so
    a process never repeats the end of the one before.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], faults: Faults) -> None:
        super().__init__(env)
        self._faults = faults
        time.sleep(faults.build_seconds)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, if the fault of the moment lets it."""
        self._fail(self._faults.crash_in_step, self._faults.stall_in_step)
        return super().step(action)

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, if the fault of the moment lets it."""
        self._fail(self._faults.crash_in_reset, self._faults.stall_in_reset)
        return super().reset(**arguments)

    def _fail(self, crash: float, stall: float) -> None:
        if random.random() < crash:
            random.choice(CRASHES)()
        if random.random() < stall:
            time.sleep(random.uniform(*self._faults.stall_seconds))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(EXIT_CODE)


CRASHES = (_kill, os.abort, _exit)


class FaultyWorker(GymnasiumWorker):
    """Collects rollouts from environments with the faults that its slot has.

    Args:
        schedule: The faults of each slot.
        parameters: The task, the number of environments and the length of a rollout.
    """

    def __init__(self, schedule: tuple[Faults, ...], parameters: Hyperparameters) -> None:
        super().__init__(
            self._make_env, ActorCritic, parameters.envs_per_worker, parameters.rollout_length
        )
        self._schedule = schedule
        self._env_id = parameters.env_id

    def setup(self, context: WorkerContext) -> None:
        """Find out which slot this is, and build its environments."""
        self._faults = self._schedule[context.worker_id]
        super().setup(context)

    def _make_env(self) -> gymnasium.Env[Any, Any]:
        return FaultyEnv(gymnasium.make(self._env_id), self._faults)


def make_faulty_worker(
    schedule: tuple[Faults, ...], parameters: Hyperparameters
) -> partial[FaultyWorker]:
    """Give what a pool makes its workers from."""
    return partial(FaultyWorker, schedule, parameters)

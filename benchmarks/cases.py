"""The parameters of every measurement, as frozen values that the adapters receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Work = Literal["pixel", "cartpole", "cartpole+mlp", "shogi"]
Activity = Literal["start", "batches", "weights", "crashes"]

KB, MB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """Base of all; ``seed`` is the number of the repetition. Every duration is in seconds."""

    seed: int = 0


@dataclass(frozen=True)
class Throughput(Case):
    """Transitions that reach the learner's process as tensors.

    ``envs`` counts the environments of one worker; a vectorised peer, whose workers are its
    environments, runs ``workers`` x ``envs`` processes. ``ahead`` batches of each worker may wait
    for the learner, in systems whose workers run ahead.
    """

    work: Work = "pixel"
    workers: int = 2
    envs: int = 1
    batch: int = 128
    ahead: int = 4
    seconds: float = 3.0
    warmup: float = 0.5
    record: bool = True


@dataclass(frozen=True)
class Bandwidth(Case):
    """Batches of one array of ``num_bytes``, from one worker to the learner.

    ``warmup_batches`` are enough to have touched every page that will be used again. The worker
    sleeps for ``interval`` before each.
    """

    num_bytes: int = MB
    interval: float = 0.0
    seconds: float = 2.0
    warmup: float = 0.3
    warmup_batches: int = 12
    at_least: int = 6


@dataclass(frozen=True)
class Weights(Case):
    """A state dict of ``num_bytes`` goes to ``workers`` idle workers, again and again."""

    num_bytes: int = MB
    workers: int = 2
    seconds: float = 2.0
    at_least: int = 5


@dataclass(frozen=True)
class TornReads(Case):
    """Pushes as fast as possible, while the workers check that every version is complete."""

    num_bytes: int = MB
    workers: int = 4
    seconds: float = 5.0


@dataclass(frozen=True)
class Staleness(Case):
    """Pushes of ``num_bytes`` every ``interval`` while ``workers`` collect."""

    num_bytes: int = 10_000_000
    workers: int = 4
    interval: float = 0.2
    seconds: float = 10.0


@dataclass(frozen=True)
class RoundTrip(Case):
    """Commands to one idle worker: one after the other, then ``window`` at a time."""

    calls: int = 2000
    pipelined: int = 20_000
    window: int = 64


@dataclass(frozen=True)
class Recovery(Case):
    """A working worker is killed with SIGKILL ``kills`` times."""

    workers: int = 2
    kills: int = 100
    patience: float = 10.0


@dataclass(frozen=True)
class Start(Case):
    """``workers`` workers that import torch are started, cold and then once more."""

    workers: int = 2


@dataclass(frozen=True)
class Idle(Case):
    """``workers`` workers that have nothing to do for ``seconds``, after ``settle``."""

    workers: int = 8
    settle: float = 5.0
    seconds: float = 30.0


@dataclass(frozen=True)
class Lag(Case):
    """The application's event loop is watched while the pool does ``activity``."""

    activity: Activity = "batches"
    workers: int = 2
    seconds: float = 5.0


@dataclass(frozen=True)
class Scaling(Case):
    """``workers`` workers that each make a tiny batch every ``interval``."""

    workers: int = 1
    interval: float = 0.05
    seconds: float = 5.0


@dataclass(frozen=True)
class Learning(Case):
    """CartPole-v1 until the mean return of the last 100 episodes is ``goal``, by PPO.

    Every system has 8 environments and the same PPO parameters: RL-Zoo's, or those of keisei's
    example. Times with different parameters compare the parameters, not the systems.
    """

    parameters: Literal["zoo", "example"] = "zoo"
    goal: float = 475.0
    max_seconds: float = 240.0
    max_steps: int = 500_000

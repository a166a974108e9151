"""What a manager tells about itself, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from keisei.training.parallel import html


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One slot.

    Attributes:
        worker_id: The slot.
        incarnation: The process in it; -1 before the first.
        pid: Its process id, ``None`` without a process of its own.
        state: "waiting", "starting", "running", "backoff", "ending", "stopped" or "given up".
        phase: What its main loop is doing: "start", "idle", "load_weights", "collect" …
        device: Where its model is meant to be.
        weights_version: The version that it has applied; 0 is none.
        experiences: Experiences that this incarnation has committed.
        num_failures: Failures within the restart window.
        age: Seconds since its process became ready; 0 while it is not.
        seconds_since_progress: Since its main loop last moved; 0 without a process.
    """

    worker_id: int
    incarnation: int
    pid: int | None
    state: str
    phase: str
    device: str
    weights_version: int
    experiences: int
    num_failures: int
    age: float
    seconds_since_progress: float

    def _repr_html_(self) -> str:
        return html.of_value(self)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool in numbers, since its start.

    Attributes:
        seconds: Since the start.
        num_workers: Slots that are wanted.
        num_ready: Workers that are ready now.
        num_batches: Batches delivered.
        num_steps: Environment steps delivered.
        num_queued: Batches that wait to be taken.
        num_dropped: Batches discarded by ``overflow`` or ``staleness_policy``.
        num_lost: Experiences that workers had begun when they died.
        num_restarts: Processes started in the place of others.
        num_incidents: Failures.
        weights_version: The newest version; 0 is none.
        num_pushes: Weights pushed.
        bytes_pushed: Their bytes.
        num_not_finite: Pushes that held NaN or infinity (with ``check_finite``).
        seed: The root of all seeds.
        is_paused: Whether the pool is paused.
    """

    seconds: float
    num_workers: int
    num_ready: int
    num_batches: int
    num_steps: int
    num_queued: int
    num_dropped: int
    num_lost: int
    num_restarts: int
    num_incidents: int
    weights_version: int
    num_pushes: int
    bytes_pushed: int
    num_not_finite: int
    seed: int
    is_paused: bool

    def _repr_html_(self) -> str:
        return html.of_value(self)

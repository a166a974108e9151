"""The mappings that validate to configurations, as typed dictionaries for static checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from keisei.config import RestartPolicy

__all__ = ["ParallelConfigDict", "RestartPolicyDict"]


class RestartPolicyDict(TypedDict, total=False):
    """A mapping that validates to a ``RestartPolicy``, for type checkers."""

    max_restarts: int
    restart_window: float
    backoff_base: float
    backoff_cap: float
    reset_after: float
    max_concurrent_starts: int


class ParallelConfigDict(TypedDict, total=False):
    """A mapping that validates to a ``ParallelConfig``, for type checkers."""

    num_workers: int
    mode: Literal["async", "sync"]
    backend: Literal["local", "inline"]
    start_method: Literal["forkserver", "spawn"]
    preload: Sequence[str] | None
    seed: int | None
    max_queue_size: int
    overflow: Literal["block", "drop_oldest"]
    sync_interval: int
    max_staleness: int | None
    staleness_policy: Literal["pace", "drop", "mark"]
    compression_enabled: bool
    check_finite: bool
    worker_device_map: str | Sequence[str]
    max_workers_per_gpu: int
    threads_per_worker: int
    start_timeout: float
    command_timeout: float
    collect_timeout: float
    shutdown_timeout: float
    restart: RestartPolicy | RestartPolicyDict
    min_workers: int
    on_exhausted: Literal["raise", "degrade"]
    max_worker_rss: int | None
    max_experiences_per_worker: int | None
    poison_threshold: int | None

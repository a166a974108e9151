"""ParallelConfig and RestartPolicy: the options of a pool as validated values."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from keisei.config_sources import from_text, plain_values
from keisei.devices import device_problem
from keisei.exceptions import ConfigurationError
from keisei.naming import public

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeSeconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Values(BaseModel, frozen=True, extra="forbid", validate_default=True):
    """Base of the configurations: immutable, without unknown keys, all problems in one error.

    A rule between two fields is a validator of the later field, never of the whole model: pydantic
    skips a model's validators when any field is wrong, and the error would not list the problem.
    """

    def __init__(self, **values: Any) -> None:
        """Validate ``values``.

        Raises:
            ConfigurationError: If any value cannot work; every problem is listed.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            findings = error.errors(include_url=False)
            problems = [line for finding in findings for line in _problems(finding, type(self))]
            raise ConfigurationError(problems) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with the values of ``update``, validated as by the constructor.

        Args:
            update: New values by key; a mapping for ``restart`` replaces all of it.
            deep: Changes nothing: all values are immutable.

        Raises:
            ConfigurationError: If any value cannot work; every problem is listed.
        """
        if not update:
            return super().model_copy(deep=deep)
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**values, **plain_values(update)})


def _problems(finding: Any, model: type[_Values]) -> list[str]:
    """Describe one finding of pydantic in lines of key, value and remedy."""
    key = ".".join(str(part) for part in finding["loc"])
    cause = finding.get("ctx", {}).get("error")
    if isinstance(cause, ConfigurationError):  # the restart policy's own error
        return [f"{key}.{problem}" for problem in cause.problems]
    value = finding["input"]
    message = str(finding["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be", 1)
    if finding["type"] == "extra_forbidden":
        near = _nearest(value=key, known=model.model_fields)
        message = f"unknown key; {near or 'known: ' + ', '.join(sorted(model.model_fields))}"
    elif finding["type"] == "literal_error":
        near = _nearest(value=value, known=get_args(model.model_fields[key].annotation))
        message = f"{message}; {near}" if near else message
    return [f"{key} = {value!r}: {message}"]


def _nearest(*, value: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


@public
class RestartPolicy(_Values, frozen=True):
    """How often, and how soon, the pool restarts a worker that failed.

    Attributes:
        max_restarts: Failures that ``restart_window`` may hold (OTP's restart intensity); with one
            more the pool escalates, as ``on_exhausted`` says. It is meant for up to eight slots;
            a larger pool may fail in proportion to its slots.
        restart_window: Seconds for which a failure counts.
        backoff_base: Seconds. The first restart of a slot is immediate; before the restart that
            follows the n-th failure in a row the pool waits a random time, at most
            ``backoff_base`` · 2^(n-2), for n from 2 on.
        backoff_cap: Seconds; the longest wait.
        reset_after: A worker that was ready for this many seconds has proved its health: the
            slot's failures in a row are counted from zero again.
        max_concurrent_starts: Processes that may be starting at the same time.
    """

    max_restarts: int = Field(default=10, ge=0)
    restart_window: Seconds = 60.0
    backoff_base: NonNegativeSeconds = 0.1
    backoff_cap: NonNegativeSeconds = 10.0
    reset_after: Seconds = 30.0
    max_concurrent_starts: int = Field(default=8, ge=1)

    @field_validator("backoff_cap")
    @classmethod
    def _not_below_base(cls, cap: float, info: ValidationInfo) -> float:
        base = info.data.get("backoff_base", 0.0)
        if cap < base:
            raise ValueError(f"must not be below backoff_base ({base})")
        return cap


@public
class ParallelConfig(_Values, frozen=True):
    """The options of a pool. Every timeout is in seconds.

    Attributes:
        num_workers: Worker processes, one in each slot.
        mode: "async": workers run ahead as far as ``max_queue_size`` lets them. "sync": rounds
            of exactly one experience per worker, all with the newest weights.
        backend: "local" processes, or "inline": the same pool inside the application's own
            process and loop, for debugging.
        start_method: "forkserver", which forks workers from a server process that has imported
            the preloaded modules, or "spawn", in which each worker imports everything itself.
        preload: Modules that the fork server imports once; ``None`` chooses torch, the
            library's own, and the module of the worker. They must start no threads.
        seed: The seed from which every worker's seed is derived; ``None`` draws one, which
            ``stats()`` returns.
        max_queue_size: Experiences of each worker that may wait for the learner. If an experience
            takes about a millisecond, 8 to 16 let the learner read several at once.
        overflow: When a worker's queue is full: "block" lets the worker wait, "drop_oldest"
            discards its oldest experience.
        sync_interval: Learner updates between two weight pushes of ``run()``.
        max_staleness: The largest policy lag that a delivered batch should have, in versions;
            ``None`` sets no limit.
        staleness_policy: How ``max_staleness`` is kept. "pace": workers wait before they run
            further ahead; "drop": older batches are discarded and counted; "mark": it is not kept,
            and ``batch.staleness`` tells the lag.
        compression_enabled: Compress weights where they leave this machine or are saved. Weights
            in shared memory are never compressed.
        check_finite: Count the pushes whose weights hold NaN or infinity, in ``stats()``.
        worker_device_map: The device that each worker is told to use: "auto" (the GPUs in turn,
            ``max_workers_per_gpu`` workers on each, the others on the CPU), one device for all
            workers, or a sequence with one device for each.
        max_workers_per_gpu: See ``worker_device_map``.
        threads_per_worker: ``torch.set_num_threads`` in each worker.
        start_timeout: A worker must be ready this long after its process was started, or after
            its last ``context.progress()`` in ``setup``; else the pool kills it. For the first
            process the imports of the fork server count too.
        command_timeout: How long a caller waits for the replies to a command, for ``pause``, and
            for ``push_weights(wait=True)``, unless the call has a timeout of its own. The worker
            is not killed then.
        collect_timeout: A worker that makes no progress for this long while it has something to
            do has hung, and the pool kills it; ``context.progress()`` is progress. In a command
            and in ``load_weights`` the limit is the longer one of this and ``command_timeout``.
        shutdown_timeout: How long the workers may take to end by themselves when the pool stops;
            SIGTERM follows, and SIGKILL after another quarter of this time. ``run()`` also waits
            this long for an update of the learner when it is cancelled.
        restart: A ``RestartPolicy`` or a mapping.
        min_workers: With ``on_exhausted="degrade"``, the pool ends when fewer slots than this
            are left.
        on_exhausted: When there are more failures than ``restart`` allows: "raise" ends the pool;
            "degrade" counts each slot by itself, gives that slot up, and goes on with the others.
        max_worker_rss: Bytes of its own memory above which a worker is replaced between two
            experiences; ``None`` never. Memory that it shares, such as experiences that the
            application keeps and the code of libraries, does not count.
        max_experiences_per_worker: Experiences after which a worker is replaced; ``None`` never.
        poison_threshold: When this many slots have failed with the same weights version, the
            version before it is published again; ``None`` never does.
    """

    num_workers: int = Field(default=2, ge=1, le=1024)
    mode: Literal["async", "sync"] = "async"
    backend: Literal["local", "inline"] = "local"
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    preload: tuple[str, ...] | None = None
    seed: int | None = Field(default=None, ge=0)
    max_queue_size: int = Field(default=4, ge=1)
    overflow: Literal["block", "drop_oldest"] = "block"
    sync_interval: int = Field(default=1, ge=1)
    max_staleness: int | None = Field(default=None, ge=0)
    staleness_policy: Literal["pace", "drop", "mark"] = "pace"
    compression_enabled: bool = False
    check_finite: bool = False
    worker_device_map: str | tuple[str, ...] = "cpu"
    max_workers_per_gpu: int = Field(default=1, ge=1)
    threads_per_worker: int = Field(default=1, ge=1)
    start_timeout: Seconds = 60.0
    command_timeout: Seconds = 30.0
    collect_timeout: Seconds = 300.0
    shutdown_timeout: Seconds = 5.0
    restart: RestartPolicy = Field(default_factory=RestartPolicy)
    min_workers: int = Field(default=1, ge=1)
    on_exhausted: Literal["raise", "degrade"] = "raise"
    max_worker_rss: int | None = Field(default=None, gt=0)
    max_experiences_per_worker: int | None = Field(default=None, ge=1)
    poison_threshold: int | None = Field(default=3, ge=2)

    @field_validator("max_staleness")
    @classmethod
    def _only_in_async_mode(cls, versions: int | None, info: ValidationInfo) -> int | None:
        if versions is not None and info.data.get("mode") == "sync":
            raise ValueError(
                "has no meaning in sync mode, where every round uses the newest weights"
            )
        return versions

    @field_validator("worker_device_map", mode="before")
    @classmethod
    def _known_devices(cls, devices: object, info: ValidationInfo) -> str | tuple[str, ...]:
        if isinstance(devices, str) or not isinstance(devices, Sequence):
            if problem := device_problem(devices):
                raise ValueError(problem)
            return str(devices)
        for place, device in enumerate(devices):
            if problem := device_problem(device, of_one=True):
                raise ValueError(f"worker {place} has {device!r}, which {problem}")
        num_workers = info.data.get("num_workers", len(devices))
        if len(devices) != num_workers:
            raise ValueError(
                f"names {len(devices)} devices for {num_workers} workers; "
                "give one for each, or a single string for all"
            )
        return tuple(devices)

    @field_validator("restart", mode="before")
    @classmethod
    def _from_any_mapping(cls, restart: object) -> object:
        if isinstance(restart, Mapping):
            return RestartPolicy(**{str(key): value for key, value in restart.items()})
        return restart

    @field_validator("min_workers")
    @classmethod
    def _not_above_num_workers(cls, minimum: int, info: ValidationInfo) -> int:
        num_workers = info.data.get("num_workers", minimum)
        if minimum > num_workers:
            raise ValueError(f"must not exceed num_workers ({num_workers})")
        return minimum

    @classmethod
    def of(cls, config: ParallelConfig | Mapping[str, Any] | None) -> ParallelConfig:
        """Return ``config`` itself, a validated mapping, or the defaults for ``None``.

        Raises:
            ConfigurationError: If any value cannot work; every problem is listed.
        """
        if config is None:
            return cls()
        if isinstance(config, cls):
            return config
        is_dataclass = dataclasses.is_dataclass(config) and not isinstance(config, type)
        if not isinstance(config, Mapping) and not is_dataclass:
            raise ConfigurationError(
                [f"config is a {type(config).__name__}; give a ParallelConfig or a mapping"]
            )
        return cls(**plain_values(config))

    @classmethod
    def from_env(
        cls, prefix: str = "KEISEI_", *, environ: Mapping[str, str] | None = None, **values: Any
    ) -> Self:
        """Return a configuration from environment variables, such as ``KEISEI_NUM_WORKERS=8``.

        Those of the restart policy are ``KEISEI_RESTART__MAX_RESTARTS`` and so on. "none" is
        ``None``; commas stand between the parts of ``preload`` and ``worker_device_map``.
        Variables with the prefix that name no option are passed over, unless they are nearly one.

        Args:
            prefix: Of the variables' names.
            environ: In the place of ``os.environ``.
            values: Options for which there is no variable.

        Raises:
            ConfigurationError: If any value cannot work, or a name is misspelt.
        """
        found: dict[str, Any] = dict(values)
        problems: list[str] = []
        source = os.environ if environ is None else environ
        for name in sorted(source):
            if not name.startswith(prefix):
                continue
            key, _, inner = name.removeprefix(prefix).lower().partition("__")
            model = RestartPolicy if inner else cls
            option = inner or key
            if option not in model.model_fields or (inner and key != "restart"):
                if near := _nearest(value=option, known=model.model_fields):
                    problems.append(f"{name} names no option; {near}")
                continue
            value = from_text(option, source[name])
            if inner:
                found["restart"] = {**_as_mapping(found.get("restart")), inner: value}
            else:
                found[key] = value
        if problems:
            raise ConfigurationError(problems)
        return cls(**found)


def _as_mapping(restart: Any) -> dict[str, Any]:
    if isinstance(restart, RestartPolicy):
        return {name: getattr(restart, name) for name in restart.model_fields_set}
    return dict(restart or {})

"""The plan of a measurement: cases, systems, metrics, targets and chart, as frozen values."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.cases import Case
from benchmarks.targets import Target

Metrics = dict[str, float]
Role = Literal["ours", "peer", "limit"]


class UnavailableError(Exception):
    """A system cannot run here; the table shows the message as the reason."""


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
        name: The row's name.
        role: "ours", "peer", or "limit": the best that the machine can do.
        entry: ``module:function`` in ``benchmarks``; it takes the case and returns metrics.
        options: Fields of the case that this system replaces.
        cases: Labels of the cases it runs; ``None`` is all.
    """

    name: str
    role: Role
    entry: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cases: frozenset[str] | None = None

    def load(self) -> Callable[[Case], Metrics]:
        """Import the adapter; an ``ImportError`` means that the peer is not installed."""
        module, _, function = self.entry.partition(":")
        entry: Callable[[Case], Metrics] = getattr(
            importlib.import_module(f"benchmarks.{module}"), function
        )
        return entry


@dataclass(frozen=True)
class Metric:
    """One column: ``key`` in the adapter's answer, and how to read it."""

    key: str
    unit: str
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Chart:
    """A curve of one metric over the cases, drawn as a PNG."""

    metric: str
    x: Callable[[Any], float]
    x_label: str


@dataclass(frozen=True)
class Measurement:
    """One quantity, measured for several systems.

    Attributes:
        metrics: The first one is the headline: ratios are taken of it.
        cases: Label to case; every system runs them in this order.
        quick_systems: Those that ``--quick`` has time for; ``None`` is all.
        timeout: Seconds that one system may take for one repetition of all cases.
        repetitions: How often the systems are run, one after the other.
        isolate_cases: Give every case a process tree of its own.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    cases: Mapping[str, Case]
    systems: tuple[System, ...]
    targets: tuple[Target, ...] = ()
    charts: tuple[Chart, ...] = ()
    quick_systems: tuple[str, ...] | None = None
    timeout: float = 60.0
    repetitions: int = 5
    isolate_cases: bool = False

    def labels(self, system: System) -> list[str]:
        """Return the cases that ``system`` runs, in order."""
        return [label for label in self.cases if system.cases is None or label in system.cases]

    def system(self, name: str) -> System:
        """Return the system called ``name``."""
        return next(system for system in self.systems if system.name == name)

"""The results: one record per system, case and repetition, and queries on them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.plan import Measurement
from benchmarks.targets import paired_ratio

Status = Literal["ok", "unavailable", "failed", "timeout", "skipped"]


@dataclass(frozen=True)
class Record:
    """The outcome of one case of one system in one repetition."""

    measurement: str
    system: str
    case: str
    repetition: int
    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as a plain mapping."""
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """Median and spread of one figure over the repetitions."""

    median: float
    low: float
    high: float
    count: int


class Results:
    """The records of one measurement."""

    def __init__(self, measurement: Measurement, records: Sequence[Record]) -> None:
        """Keep the records that belong to ``measurement``."""
        self.measurement = measurement
        self.records = [r for r in records if r.measurement == measurement.name]
        self._repetitions = 1 + max((r.repetition for r in self.records), default=-1)

    def series(self, system: str, case: str, metric: str) -> list[float | None]:
        """Return a figure by repetition; ``None`` where it was not measured."""
        values: list[float | None] = [None] * self._repetitions
        for record in self.records:
            if (record.system, record.case) == (system, case) and metric in record.metrics:
                values[record.repetition] = record.metrics[metric]
        return values

    def summary(self, system: str, case: str, metric: str) -> Summary | None:
        """Return median and range, or ``None`` if it was never measured."""
        values = [v for v in self.series(system, case, metric) if v is not None]
        if not values:
            return None
        return Summary(statistics.median(values), min(values), max(values), len(values))

    def median(self, system: str, case: str, metric: str) -> float | None:
        """Return the median alone."""
        summary = self.summary(system, case, metric)
        return summary.median if summary else None

    def reason(self, system: str, case: str) -> str:
        """Return the reason why there is no figure."""
        for record in self.records:
            if (record.system, record.case) == (system, case) and record.status != "ok":
                return f"{record.status}: {record.reason}" if record.reason else record.status
        return "not measured"

    def higher_is_better(self, metric: str) -> bool:
        """Return whether a higher value of ``metric`` is better."""
        found = next(m for m in self.measurement.metrics if m.key == metric)
        return found.better == "higher"

    def best(self, systems: Sequence[str], metric: str, case: str) -> str | None:
        """Return the system with the best median, or ``None`` if none was measured."""
        measured = [(self.median(system, case, metric), system) for system in systems]
        known = [(figure, system) for figure, system in measured if figure is not None]
        if not known:
            return None
        return (max if self.higher_is_better(metric) else min)(known)[1]

    def times_better(
        self, system: str, others: Sequence[str], metric: str, case: str
    ) -> float | None:
        """Return how many times better ``system`` is than the best of ``others``."""
        best = self.best(others, metric, case)
        if best is None:
            return None
        ratio = paired_ratio(self.series(system, case, metric), self.series(best, case, metric))
        if not ratio:
            return None
        return ratio if self.higher_is_better(metric) else 1 / ratio

"""OpenTelemetryMetrics: a pool's figures as instruments; needs the extra ``opentelemetry``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from keisei.observers.missing import missing

try:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
except ImportError as error:
    raise missing("keisei.observers.opentelemetry", "opentelemetry-api", "opentelemetry") from error

from keisei.observers.readings import INSTRUMENTS, Instrument, Kind, PoolReader, WatchedPool

__all__ = ["OpenTelemetryMetrics"]


class OpenTelemetryMetrics:
    """Observable instruments that an application's metric readers ask for the pool's figures.

    Names begin with ``keisei.``: ``keisei.pool.steps``, ``keisei.worker.weights.lag`` …; units are
    UCUM's. Figures of a worker have the attribute ``worker``, incidents ``cause``, the learner's
    metrics ``metric``. Which exporter sends them, and how often, is the provider's business, and
    happens in its thread. It does not keep the manager alive.

    Args:
        manager: A ``ParallelManager``, started or not.
        meter_provider: ``None`` takes the application's global one.
        attributes: Put on every figure.
    """

    def __init__(
        self,
        manager: WatchedPool,
        *,
        meter_provider: MeterProvider | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self._reader = PoolReader(manager)
        self._attributes = dict(attributes or {})
        meter = get_meter("keisei", meter_provider=meter_provider)
        for one in INSTRUMENTS:
            make: Any = meter.create_observable_gauge
            if one.kind is Kind.COUNTER:
                make = meter.create_observable_counter
            make(
                f"keisei.{one.name}",
                callbacks=[self._callback(one)],
                unit=one.unit,
                description=one.description,
            )

    def _callback(self, one: Instrument) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:  # noqa: ARG001
            return [
                Observation(value, {**self._attributes, **labels})
                for value, labels in one.read(self._reader.snapshot())
            ]

        return observe

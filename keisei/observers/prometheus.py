"""PrometheusCollector: a pool's figures for a Prometheus server; needs the extra ``prometheus``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from keisei.observers.missing import missing

try:
    from prometheus_client.core import (
        REGISTRY,
        CollectorRegistry,
        CounterMetricFamily,
        GaugeMetricFamily,
        Metric,
    )
except ImportError as error:
    raise missing("keisei.observers.prometheus", "prometheus_client", "prometheus") from error

from keisei.observers.readings import (
    INSTRUMENTS,
    Instrument,
    Kind,
    PoolReader,
    Snapshot,
    WatchedPool,
)

__all__ = ["PrometheusCollector"]

_UNITS = {"s": "seconds", "By": "bytes", "{step}/s": "steps_per_second"}
"""Base units that the convention puts at the end of a name; counts have none there."""


class PrometheusCollector:
    """Tells ``prometheus_client`` the pool's figures whenever a server asks for them.

    Names begin with ``keisei_`` and follow Prometheus's conventions: counters end in ``_total``,
    times in ``_seconds``, sizes in ``_bytes``; figures of a worker have the label ``worker``,
    incidents the label ``cause``, and the learner's metrics the label ``metric``. Between two
    requests nothing is computed. It registers itself, and does not keep the manager alive.

    Serve them with ``prometheus_client.start_http_server(port)`` or
    ``prometheus_client.make_asgi_app()``.

    Args:
        manager: A ``ParallelManager``, started or not.
        registry: Where it registers; ``None`` registers nowhere.
        labels: Put on every figure, such as ``{"run": "main"}``.
        prefix: The first word of every name; two pools in one registry need different ones.

    Raises:
        ValueError: A label or the prefix is none that Prometheus allows, or the registry has
            figures of that name.
    """

    def __init__(
        self,
        manager: WatchedPool,
        *,
        registry: CollectorRegistry | None = REGISTRY,
        labels: Mapping[str, str] | None = None,
        prefix: str = "keisei",
    ) -> None:
        for name in (prefix, *(labels or {})):
            if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]*", name) or name.startswith("__"):
                raise ValueError(f"{name!r} is no name for Prometheus: letters, digits, _")
        self._reader = PoolReader(manager)
        self._labels = dict(labels or {})
        self._prefix = prefix
        self._registry = registry
        if registry is not None:
            registry.register(self)

    def close(self) -> None:
        """Register no more; may be called again."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.unregister(self)

    def describe(self) -> Iterable[Metric]:
        """Return the names, so that registering asks the pool nothing."""
        return [self._family(one, None) for one in INSTRUMENTS]

    def collect(self) -> Iterable[Metric]:
        """Return the figures of now; called by ``prometheus_client``, in any thread."""
        snapshot = self._reader.snapshot()
        return [self._family(one, snapshot) for one in INSTRUMENTS]

    def _family(self, one: Instrument, snapshot: Snapshot | None) -> Metric:
        words = [self._prefix, *one.name.split(".")]
        unit = _UNITS.get(one.unit, "")
        if unit:
            words.append(unit)
        readings = one.read(snapshot) if snapshot is not None else ()
        own = list(readings[0][1]) if readings else []
        kind = CounterMetricFamily if one.kind is Kind.COUNTER else GaugeMetricFamily
        names = [*self._labels, *own]
        family = kind("_".join(words), one.description, labels=names, unit=unit)
        for value, labels in readings:
            family.add_metric([*self._labels.values(), *(labels[name] for name in own)], value)
        return family

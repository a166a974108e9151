"""Prometheus and OpenTelemetry: real pools, read by their own parsers and readers."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import threading
import urllib.request
import weakref

import pytest

import pool_workers
from keisei.events import PoolStopped, WorkerReady
from keisei.observers.readings import INSTRUMENTS, Kind
from keisei.testing.scenarios import fail_after, next_event
from observers.samples import EVERY_EVENT, update

prometheus_client = pytest.importorskip("prometheus_client", reason="needs the extra 'prometheus'")
sdk = pytest.importorskip("opentelemetry.sdk.metrics", reason="needs the extra 'opentelemetry'")

# ruff: noqa: E402 - the extras may be missing
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from keisei.observers.opentelemetry import OpenTelemetryMetrics
from keisei.observers.prometheus import PrometheusCollector


class Slot:
    """What a manager tells of one worker."""

    def __init__(self, worker_id, state="running", version=3):
        self.worker_id, self.state, self.weights_version = worker_id, state, version
        self.incarnation, self.experiences, self.num_failures, self.age = 2, 40, 1, 12.5


class Stats:
    seconds, num_workers, num_ready, is_paused = 60.5, 2, 1, False
    num_batches, num_steps, num_queued, num_dropped, num_lost = 10, 640, 3, 1, 2
    num_restarts, num_incidents, weights_version, num_pushes = 1, 1, 5, 5
    bytes_pushed, num_not_finite = 2048, 0


class FakeManager:
    """A manager in one state for ever."""

    workers = (Slot(0), Slot(1, "given up", 5))
    is_healthy = False

    def __init__(self, stats=Stats):
        self._stats = stats
        self.observers = []

    def add_observer(self, observer):
        self.observers.append(observer)

    def tell(self, *events):
        for observer in self.observers:
            for event in events:
                observer.on_event(event)

    def stats(self):
        if self._stats is None:
            raise RuntimeError("this manager is not started")
        return self._stats()


def parsed(text):
    """Return each sample by its name and labels, and the families by name."""
    families = {one.name: one for one in text_string_to_metric_families(text)}
    samples = {
        (one.name, *sorted(one.labels.items())): one.value
        for family in families.values()
        for one in family.samples
    }
    return families, samples


def scraped(registry):
    return parsed(prometheus_client.generate_latest(registry).decode())


EXPECTED = {
    ("keisei_pool_healthy",): 0.0,
    ("keisei_pool_uptime_seconds",): 60.5,
    ("keisei_pool_workers",): 2.0,
    ("keisei_pool_workers_ready",): 1.0,
    ("keisei_pool_paused",): 0.0,
    ("keisei_pool_batches_total",): 10.0,
    ("keisei_pool_steps_total",): 640.0,
    ("keisei_pool_batches_queued",): 3.0,
    ("keisei_pool_batches_dropped_total",): 1.0,
    ("keisei_pool_experiences_lost_total",): 2.0,
    ("keisei_pool_restarts_total",): 1.0,
    ("keisei_pool_incidents_total", ("cause", "user error")): 1.0,
    ("keisei_weights_version",): 5.0,
    ("keisei_weights_pushes_total",): 5.0,
    ("keisei_weights_pushed_bytes_total",): 2048.0,
    ("keisei_weights_not_finite_total",): 0.0,
    ("keisei_worker_incarnation", ("worker", "0")): 2.0,
    ("keisei_worker_age_seconds", ("worker", "1")): 12.5,
    ("keisei_worker_experiences_total", ("worker", "0")): 40.0,
    ("keisei_worker_weights_lag", ("worker", "0")): 2.0,
    ("keisei_worker_weights_lag", ("worker", "1")): 0.0,
    ("keisei_worker_failures", ("worker", "1")): 1.0,
    ("keisei_worker_state", ("state", "running"), ("worker", "0")): 1.0,
    ("keisei_worker_state", ("state", "backoff"), ("worker", "0")): 0.0,
    ("keisei_worker_state", ("state", "given_up"), ("worker", "1")): 1.0,
    ("keisei_learner_updates_total",): 1.0,
    ("keisei_learner_rate_steps_per_second",): 2345.6,
    ("keisei_learner_staleness",): 0.5,
    ("keisei_learner_metric", ("metric", "mean_return")): 21.5,
    ("keisei_episodes_total",): 0.0,
}


def test_every_figure_by_name_and_label():
    """The text that Prometheus reads has these values."""
    registry, manager = prometheus_client.CollectorRegistry(), FakeManager()
    PrometheusCollector(manager, registry=registry)
    manager.tell(*EVERY_EVENT)
    _, samples = scraped(registry)
    assert {key: samples.get(key) for key in EXPECTED} == EXPECTED


def test_the_names_follow_the_conventions():
    """Counters end in _total, units are base units at the end, every family has a help text."""
    registry, manager = prometheus_client.CollectorRegistry(), FakeManager()
    PrometheusCollector(manager, registry=registry)
    manager.tell(*EVERY_EVENT)
    families, samples = scraped(registry)
    assert len(families) == len(INSTRUMENTS)
    for family in families.values():
        assert re.fullmatch(r"keisei_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert family.type in {"counter", "gauge"}
        for sample in family.samples:
            assert sample.name.endswith("_total") is (family.type == "counter")
    assert not [name for name, *_ in samples if re.search(r"_(ms|millis|kb|mb|percent)\b", name)]


def test_labels_of_the_application_are_on_every_figure():
    """Each sample carries them beside its own."""
    registry, manager = prometheus_client.CollectorRegistry(), FakeManager()
    PrometheusCollector(manager, registry=registry, labels={"pool": 'a "b"\n\\'}, prefix="my")
    manager.tell(update(1, 10, loss=1.0))
    families, samples = scraped(registry)
    assert all(("pool", 'a "b"\n\\') in key for key in samples)
    assert all(name.startswith("my_") for name in families)


@pytest.mark.parametrize("name", ["my-pool", "", "1st", "__own", "ä"])
def test_a_name_that_prometheus_refuses_is_refused_at_once(name):
    """A label or prefix that no server would take is a ValueError when it is given."""
    registry = prometheus_client.CollectorRegistry()
    with pytest.raises(ValueError, match="is no name for Prometheus"):
        PrometheusCollector(FakeManager(), registry=registry, labels={name: "x"})
    with pytest.raises(ValueError, match="is no name for Prometheus"):
        PrometheusCollector(FakeManager(), registry=registry, prefix=name)


def test_a_pool_that_is_not_started_has_no_figures_yet():
    """A request is answered; all that is known is that the pool is not healthy."""
    registry, manager = prometheus_client.CollectorRegistry(), FakeManager(stats=None)
    PrometheusCollector(manager, registry=registry)
    _, samples = scraped(registry)
    assert samples == {
        ("keisei_pool_healthy",): 0.0,
        ("keisei_learner_updates_total",): 0.0,
        ("keisei_episodes_total",): 0.0,
    }


def test_a_collector_keeps_no_manager_alive_and_can_be_closed():
    """The figures end with the manager; after close the name is free again."""
    registry, manager = prometheus_client.CollectorRegistry(), FakeManager()
    collector = PrometheusCollector(manager, registry=registry)
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    assert ("keisei_pool_workers",) not in scraped(registry)[1]
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusCollector(FakeManager(), registry=registry)
    collector.close()
    collector.close()
    PrometheusCollector(FakeManager(), registry=registry)


async def test_a_server_reads_a_real_pool_whose_worker_is_killed(make_manager):
    """Over HTTP, in the server's own thread, the restart and the incident are counted."""
    registry = prometheus_client.CollectorRegistry()

    def read():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return parsed(answer.read().decode())[1]

    manager = make_manager(pool_workers.Episodic, num_workers=2)
    PrometheusCollector(manager, registry=registry)
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    port = server.server_port
    try:
        async with fail_after(60):
            before = await asyncio.to_thread(read)
            assert before["keisei_pool_healthy",] == 0.0
            async with manager:
                events = manager.events()
                batches = await manager.collect(min_steps=60)
                first = await asyncio.to_thread(read)
                os.kill(manager.workers[1].pid, signal.SIGKILL)
                while (await next_event(events, WorkerReady)).incarnation == 0:
                    continue
                second = await asyncio.to_thread(read)
            await next_event(events, PoolStopped)
            last = await asyncio.to_thread(read)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert first["keisei_pool_steps_total",] >= sum(batch.num_steps for batch in batches)
    assert first["keisei_pool_workers_ready",] == 2.0
    assert first["keisei_pool_healthy",] == 1.0
    assert second["keisei_pool_restarts_total",] == 1.0
    assert second["keisei_pool_incidents_total", ("cause", "signal")] == 1.0
    assert second["keisei_worker_incarnation", ("worker", "1")] == 1.0
    assert last["keisei_pool_steps_total",] >= second["keisei_pool_steps_total",]


def test_reading_beside_a_changing_pool_fails_for_nobody():
    """A manager whose figures change while another thread reads them is read again."""

    class Changing(FakeManager):
        calls = 0

        def stats(self):
            self.calls += 1
            if self.calls % 2:
                raise RuntimeError("dictionary changed size during iteration")
            return super().stats()

    registry, manager = prometheus_client.CollectorRegistry(), Changing()
    PrometheusCollector(manager, registry=registry)
    assert scraped(registry)[1]["keisei_pool_steps_total",] == 640.0


def otel_points(reader):
    data = reader.get_metrics_data()
    return {
        (one.name, one.unit): {
            tuple(sorted(point.attributes.items())): point.value for point in one.data.data_points
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for one in scope.metrics
    }


def test_opentelemetry_reads_every_instrument():
    """Its own reader finds names, units, attributes and values; counters are monotonic sums."""
    reader = InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    manager = FakeManager()
    OpenTelemetryMetrics(manager, meter_provider=provider, attributes={"pool": "a"})
    manager.tell(*EVERY_EVENT, update(2, 20, loss=0.25))
    points = otel_points(reader)
    own = ("pool", "a")
    assert points["keisei.pool.steps", "{step}"] == {(own,): 640.0}
    assert points["keisei.weights.pushed", "By"] == {(own,): 2048.0}
    assert points["keisei.pool.uptime", "s"] == {(own,): 60.5}
    assert points["keisei.worker.weights.lag", "{version}"] == {
        (own, ("worker", "0")): 2.0,
        (own, ("worker", "1")): 0.0,
    }
    assert points["keisei.learner.metric", "1"] == {(("metric", "loss"), own): 0.25}
    assert points["keisei.pool.incidents", "{incident}"] == {(("cause", "user error"), own): 1}
    counters = {one.name for one in INSTRUMENTS if one.kind is Kind.COUNTER}
    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    sums = {one.name for one in data if getattr(one.data, "is_monotonic", False)}
    assert sums <= {f"keisei.{name}" for name in counters}
    assert "keisei.pool.steps" in sums
    provider.shutdown()


def test_opentelemetry_before_the_start_and_after_the_end():
    """Without a pool there is nothing to tell but that it is not healthy; nothing raises."""
    reader = InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    manager = FakeManager(stats=None)
    OpenTelemetryMetrics(manager, meter_provider=provider)
    assert otel_points(reader)["keisei.pool.healthy", "1"] == {(): 0.0}
    del manager
    gc.collect()
    assert otel_points(reader)["keisei.pool.healthy", "1"] == {(): 0.0}
    provider.shutdown()
    assert [one.name for one in threading.enumerate() if "OtelPeriodic" in one.name] == []

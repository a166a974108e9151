"""W&B, MLflow and structlog: the real packages, without a network."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from keisei.events import PoolStopped
from keisei.observers.log import LogObserver
from observers.samples import EVERY_EVENT, INCIDENT, odd_events, update

TESTS = Path(__file__).parent.parent
PATH = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def run(program, folder, **environment):
    """Run a program that talks to a service, in a process and a folder of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "PYTHONPATH": PATH, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done


WANDB = """
    import json, logging, sys, threading, time
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
    from keisei.events import PoolStopped, UpdateCompleted
    from keisei.observers.wandb import WandbObserver

    observer = WandbObserver(project="p", {options})
    longest = 0.0
    for number in range(1, 4):
        fields = (number, 10 * number, 5.0, 2, 2, 0, 0.0, {{"loss": number / 4}}, (1.0,))
        event = UpdateCompleted(*fields)
        began = time.perf_counter()
        observer.on_event(event)
        longest = max(longest, time.perf_counter() - began)
    assert longest < 0.5, longest
    assert observer.finish(100)
    assert observer.num_failed == 0
    import pathlib, wandb
    wandb.teardown()  # its service has written everything then
    from observers.wandb_file import rows
    print(json.dumps(rows(pathlib.Path())))
"""


def wandb_rows(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_wandb_offline(tmp_path):
    """Each update is a row of the run's file on disk, with its own step beside it."""
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    done = run(WANDB.format(options='mode="offline"'), tmp_path, WANDB_SILENT="true")
    rows = wandb_rows(done)
    assert [(row["num_steps"], row["loss"], row["update"]) for row in rows] == [
        (10, 0.25, 1),
        (20, 0.5, 2),
        (30, 0.75, 3),
    ]
    assert rows[0]["episode/return"] == 1.0
    assert rows[0]["pool/num_workers"] == 2.0
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize("key", ["", "0" * 40])
def test_wandb_without_a_network_or_a_key_goes_on_offline_and_says_so(tmp_path, key):
    """The run is kept on disk; one warning tells why, and how it is sent later."""
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        settings = f'settings=__import__("wandb").Settings(init_timeout=3, base_url="{url}")'
        environment = {"WANDB_API_KEY": key} if key else {}
        done = run(WANDB.format(options=settings), tmp_path, WANDB_SILENT="true", **environment)
    assert [row["loss"] for row in wandb_rows(done)] == [0.25, 0.5, 0.75]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "cannot begin online" in warnings[0]
    assert "'wandb sync' sends it" in warnings[0]


def test_mlflow_in_a_folder(tmp_path):
    """Metrics, parameters and the end of the run are in MLflow's own store."""
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    program = """
        import json, math, time
        from keisei.events import UpdateCompleted
        from keisei.observers.mlflow import MLflowObserver

        observer = MLflowObserver(
            experiment="e", run_name="r", tracking_uri="file:./store", params={"lr": 0.1}
        )
        longest = 0.0
        for number, loss in enumerate((0.25, math.nan), start=1):
            fields = (number, 10 * number, 5.0, 2, 2, 0, 0.0, {"loss": loss, "a(b)": 1.0})
            began = time.perf_counter()
            observer.on_event(UpdateCompleted(*fields, time=float(number)))
            longest = max(longest, time.perf_counter() - began)
        assert longest < 0.5, longest
        assert observer.finish(100)
        assert observer.num_failed == 0
        from mlflow import MlflowClient
        client = MlflowClient(tracking_uri="file:./store")
        number = client.get_experiment_by_name("e").experiment_id
        (found,) = client.search_runs([number])
        history = client.get_metric_history(found.info.run_id, "loss")
        print(json.dumps([
            found.info.status, found.info.run_name, found.data.params, found.data.metrics["a_b_"],
            [(one.step, one.timestamp, str(one.value)) for one in history],
        ]))
    """
    done = run(program, tmp_path, MLFLOW_ALLOW_FILE_STORE="true")
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [
        "FINISHED",
        "r",
        {"lr": "0.1"},
        1.0,
        [[10, 1000, "0.25"], [20, 2000, "nan"]],
    ]


def test_mlflow_without_a_server_is_told_once(tmp_path):
    """The training goes on; one warning names the trouble."""
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    program = """
        import logging
        logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        from keisei.events import UpdateCompleted
        from keisei.observers.mlflow import MLflowObserver

        observer = MLflowObserver(tracking_uri="http://127.0.0.1:9")
        for number in range(3):
            observer.on_event(UpdateCompleted(number, number, 5.0, 2, 2, 0, 0.0))
        assert observer.finish(100)
        assert observer.num_failed == 3
    """
    done = run(
        program, tmp_path, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="3"
    )
    mine = [line for line in done.stderr.splitlines() if "WARNING keisei" in line]
    assert len(mine) == 1, done.stderr
    assert "MLflow's run cannot be written" in mine[0]


def test_structlog_has_real_fields():
    """Each event is an entry with its level, its first line and its fields."""
    structlog = pytest.importorskip("structlog", reason="needs the extra 'structlog'")
    from keisei.observers.structlog import StructlogObserver

    captured = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(None, processors=[captured])
    observer = StructlogObserver(logger)
    for event in EVERY_EVENT:
        observer.on_event(event)
    assert [entry["event_type"] for entry in captured.entries] == [
        type(event).__name__ for event in EVERY_EVENT
    ]
    (incident,) = [one for one in captured.entries if one["event_type"] == "WorkerIncident"]
    assert incident["event"] == INCIDENT.summary
    assert incident["log_level"] == "warning"
    assert incident["incident"] == INCIDENT.to_dict()
    (progress,) = [one for one in captured.entries if one["event_type"] == "UpdateCompleted"]
    assert progress["metrics"] == {"mean_return": 21.5}
    for event in odd_events():
        observer.on_event(event)


def test_structlog_renders_json():
    """With structlog's own JSON renderer every entry is a line that JSON reads."""
    structlog = pytest.importorskip("structlog", reason="needs the extra 'structlog'")
    from keisei.observers.structlog import StructlogObserver

    lines = []

    class Sink:
        def msg(self, text):
            lines.append(text)

        debug = info = warning = error = critical = msg

    logger = structlog.wrap_logger(
        Sink(),
        processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.BoundLogger,
    )
    observer = StructlogObserver(logger)
    for event in EVERY_EVENT:
        observer.on_event(event)
    assert [json.loads(line)["event_type"] for line in lines][-1] == "PoolStopped"
    assert len(lines) == len(EVERY_EVENT)


def test_records_of_logging_have_real_fields(caplog):
    """The event's fields are attributes of the record, and none of logging's own is overwritten."""
    caplog.set_level(logging.DEBUG)
    observer = LogObserver()
    for event in (*EVERY_EVENT, update(3, 30, loss=math.nan)):
        observer.on_event(event)
    by_type = {record.event_type: record for record in caplog.records}
    assert by_type["WorkerReady"].worker_id == 1
    assert by_type["WorkerReady"].pid == 4711
    assert by_type["WorkerIncident"].incident == INCIDENT.to_dict()
    assert by_type["UpdateCompleted"].metrics == {"loss": None}
    assert by_type["PoolStopped"].event == PoolStopped(0)
    assert by_type["PoolStopped"].time > 0
    assert by_type["PoolStopped"].name == "keisei"

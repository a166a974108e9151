"""CSV, JSON lines and TensorBoard: exact contents, read by their own readers, on full disks too."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import pytest

import pool_workers
from keisei import ParallelManager
from keisei.events import PoolStopped, UpdateCompleted, WorkerIncident
from keisei.observers.csv import CsvObserver
from keisei.observers.jsonl import JsonLinesObserver
from keisei.observers.tensorboard import TensorBoardObserver
from keisei.testing.scenarios import fail_after
from observers.samples import EVERY_EVENT, INCIDENT, odd_events, update
from training.parallel.test_metrics import Idle

POOL = ["steps_per_second", "weights_version", "num_workers", "num_restarts", "staleness"]
HEADER = ["time", "update", "num_steps", *(f"pool/{name}" for name in POOL)]


def told(observer, *events):
    for event in events:
        observer.on_event(event)
    assert observer.finish()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def scalars_of(folder):
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(module, reason="needs the extra 'tensorboard'")
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return found


def test_every_event_is_a_line_of_json(tmp_path):
    """A line per event, in order, each what to_dict tells."""
    path = tmp_path / "deep" / "events.jsonl"
    told(JsonLinesObserver(path), *EVERY_EVENT)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [event.to_dict() for event in EVERY_EVENT]


def test_chosen_events_alone(tmp_path):
    """The kinds that are asked for are written, and no others."""
    path = tmp_path / "events.jsonl"
    told(JsonLinesObserver(path, events=(WorkerIncident, PoolStopped)), *EVERY_EVENT)
    types = [json.loads(line)["type"] for line in path.read_text().splitlines()]
    assert types == ["WorkerIncident", "PoolStopped"]


def test_a_line_that_was_cut_stays_alone(tmp_path):
    """A second run appends; after a line that a kill has cut, the next begins anew."""
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "Pool')
    told(JsonLinesObserver(path), PoolStopped(0))
    told(JsonLinesObserver(path), PoolStopped(1))
    cut, first, second = path.read_text().splitlines()
    assert cut == '{"type": "Pool'
    assert [json.loads(line)["num_incidents"] for line in (first, second)] == [0, 1]


def test_an_update_is_a_row(tmp_path):
    """Time, counters, the pool's figures, then metrics; NaN is nan, a missing value is empty."""
    path = tmp_path / "run.csv"
    first = update(1, 100, loss=0.5)
    second = UpdateCompleted(
        2, 200, 10.0, 3, 2, 0, 0.0, {"loss": math.nan}, (1.0, 2.0), (3, 5), time=7.0
    )
    told(CsvObserver(path), first, WorkerIncident(INCIDENT), second)
    header, one, two = rows_of(path)
    assert header == [*HEADER, "loss", "episode/count", "episode/return", "episode/length"]
    assert one == [str(first.time), "1", "100", "2345.6", "2.0", "2.0", "1.0", "0.5", "0.5"] + (
        [""] * 3
    )
    assert two == [
        "7.0",
        "2",
        "200",
        "10.0",
        "3.0",
        "2.0",
        "0.0",
        "0.0",
        "nan",
        "2.0",
        "1.5",
        "4.0",
    ]
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_resumed_run_goes_on_in_its_file(tmp_path):
    """Columns of before stay where they are; new ones follow; a missing one is empty."""
    path = tmp_path / "run.csv"
    told(CsvObserver(path), update(1, 100, loss=0.5, old=1.0))
    told(CsvObserver(path), update(2, 200, loss=0.25, new=2.0))
    header, one, two = rows_of(path)
    assert header == [*HEADER, "loss", "old", "new"]
    assert one[-3:] == ["0.5", "1.0", ""]
    assert two[-3:] == ["0.25", "", "2.0"]


def test_a_row_that_was_cut_stays_alone(tmp_path):
    """After a row that a kill has cut, the next begins anew, also when a column is added."""
    path = tmp_path / "run.csv"
    told(CsvObserver(path), update(1, 100, loss=0.5))
    path.write_bytes(path.read_bytes() + b"3.5,2")
    told(CsvObserver(path), update(3, 300, loss=0.25))
    told(CsvObserver(path), update(4, 400, loss=0.125, new=2.0))
    _, one, cut, three, four = rows_of(path)
    assert [row[1] for row in (one, cut, three, four)] == ["1", "2", "3", "4"]
    assert cut[0] == "3.5"
    assert (three[-2:], four[-2:]) == (["0.25", ""], ["0.125", "2.0"])
    assert b"\r" not in path.read_bytes()


def test_a_name_that_no_encoding_has_may_come_later(tmp_path):
    """A column is added for it as if it had been there from the first row."""
    path = tmp_path / "run.csv"
    told(CsvObserver(path), update(1, 100), update(2, 200, **{"\udc80": 1.5}))
    header, _, two = rows_of(path)
    assert (header[-1], two[-1]) == ("\\udc80", "1.5")
    assert sorted(tmp_path.iterdir()) == [path]


def test_names_with_commas_quotes_and_lines(tmp_path):
    """Whatever a metric is called, the reader of CSV gives the name back."""
    names = ["a,b", 'c"d', "e\nf", "update", "ä"]
    path = tmp_path / "run.csv"
    told(CsvObserver(path), update(1, 100, **dict.fromkeys(names, 1.5)))
    header, row = rows_of(path)
    assert header[len(HEADER) :] == ["a,b", 'c"d', "e\nf", "ä"]
    assert row[1] == "1"


@pytest.mark.parametrize("kind", [CsvObserver, JsonLinesObserver, TensorBoardObserver])
def test_no_content_of_an_event_stops_the_writing(kind, tmp_path):
    """Fields of any kind cost at most their own record; the next update is there."""
    if kind is TensorBoardObserver:
        pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    path = tmp_path / "sink"
    told(kind(path), *odd_events(), update(77_777, 1, last=0.125))
    if kind is TensorBoardObserver:
        assert scalars_of(path).Scalars("last")[-1].value == 0.125
    else:
        assert "77777" in path.read_text(encoding="utf-8").splitlines()[-1]


def test_tensorboard_reads_curves_and_incidents(tmp_path):
    """Its own reader finds each figure at its environment step and wall-clock time."""
    first, second = update(1, 100, loss=0.5), update(2, 250, loss=math.nan)
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    told(TensorBoardObserver(tmp_path), first, WorkerIncident(INCIDENT), second)
    found = scalars_of(tmp_path)
    assert found.Tags()["scalars"] == [*(f"pool/{name}" for name in POOL), "loss"]
    points = found.Scalars("loss")
    assert [(one.step, one.wall_time) for one in points] == [(100, first.time), (250, second.time)]
    assert points[0].value == 0.5
    assert math.isnan(points[1].value)
    (text,) = found.Tensors("pool/incidents")
    assert text.tensor_proto.string_val[0].decode() == INCIDENT.summary


FULL = """
import logging, resource, signal, sys
logging.basicConfig(format="%(levelname)s %(message)s")
{make}
sink = Sink(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
from keisei.events import UpdateCompleted
for number in range(100):
    sink.on_event(UpdateCompleted(number, number, 1.0, 1, 1, 0, 0.0, {{"loss": 0.5}}))
print(sink.finish(), sink.num_failed)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
sink.on_event(UpdateCompleted(1000, 1000, 1.0, 1, 1, 0, 0.0, {{"loss": 0.25}}))
sink.finish()
"""
SINKS = {
    "csv": "from keisei.observers.csv import CsvObserver as Sink",
    "jsonl": "from keisei.observers.jsonl import JsonLinesObserver as Sink",
    "tensorboard": "from keisei.observers.tensorboard import TensorBoardObserver as Sink",
}


@pytest.mark.parametrize("kind", SINKS)
def test_a_full_disk_costs_records_and_is_told_once(kind, tmp_path):
    """Whole records are in the file, none is torn, one warning was given, and it goes on later."""
    if kind == "tensorboard":
        pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    path = tmp_path / "sink"
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(make=SINKS[kind]), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    finished, failed = done.stdout.split()
    assert finished == "True"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1, done.stderr
    assert str(path) in warnings[0]
    assert "File too large" in warnings[0]
    written = 100 - int(failed)
    assert 0 < written < 100
    if kind == "csv":
        assert [row[-1] for row in rows_of(path)] == ["loss", *["0.5"] * written, "0.25"]
    elif kind == "jsonl":
        numbers = [json.loads(line)["update"] for line in path.read_text().splitlines()]
        assert numbers == [*range(written), 1000]
    else:
        assert [one.step for one in scalars_of(path).Scalars("loss")] == [*range(written), 1000]


async def test_a_full_disk_under_a_training(tmp_path, caplog):
    """The run ends as it should; one warning for each file tells of the disk."""
    path = tmp_path / "not a folder"
    path.touch()
    sinks = [CsvObserver(path / "a.csv"), JsonLinesObserver("/dev/full")]
    manager = ParallelManager(
        pool_workers.Episodic,
        learner=Idle(),
        observers=sinks,
        config={"backend": "inline", "num_workers": 1},
    )
    async with fail_after(30):
        report = await manager.run(max_steps=60, steps_per_update=6)
    assert report.reason == "max_steps"
    assert all(one.finish() for one in sinks)
    assert sorted(one.message.partition(":")[0] for one in caplog.records) == sorted(
        f"{place} cannot be written" for place in (path / "a.csv", "/dev/full")
    )
    assert len(list(manager._observers)) == 2


async def test_the_files_of_a_run_are_complete_when_it_returns(tmp_path):
    """Every update of a real run is a row, with its episodes, as soon as run() has returned."""
    path = tmp_path / "run.csv"
    manager = ParallelManager(
        pool_workers.Episodic,
        learner=Idle(),
        observers=[CsvObserver(path)],
        config={"backend": "inline", "num_workers": 1},
    )
    async with fail_after(30):
        report = await manager.run(max_steps=60, steps_per_update=6)
    header, *rows = rows_of(path)
    assert len(rows) == report.num_updates
    at = header.index("episode/return")
    assert {row[at] for row in rows} == {"2.0"}

"""Runs measurements: systems interleaved, each in its own process tree, within a time budget."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import sessions
from benchmarks.plan import Measurement, System
from benchmarks.results import Record
from benchmarks.systems import SLOW_STARTERS

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 4.0
"""A system is not started when less than this is left of the budget."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LOG_TAIL = 2000


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        quick: Small sizes.
        repetitions: Replaces each measurement's own number.
        budget: Seconds for everything; cells that do not fit are recorded as skipped.
        verbose: Show what the systems print.
    """

    quick: bool = False
    repetitions: int | None = None
    budget: float | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Cell:
    """One process tree: a system, in one repetition, with the cases it runs there."""

    measurement: Measurement
    system: System
    repetition: int
    labels: tuple[str, ...]


class Runner:
    """Runs cells and keeps their records, also when it is interrupted."""

    def __init__(self, settings: Settings, progress: Callable[[str], None]) -> None:
        """Start the clock of the budget."""
        self.records: list[Record] = []
        self._settings, self._progress = settings, progress
        self._began = time.monotonic()
        self._hopeless: dict[tuple[str, str, str], Record] = {}

    def run(self, measurements: Sequence[Measurement]) -> None:
        """Measure everything."""
        sessions.adopt_orphans()
        cells = [cell for m in measurements for cell in self._cells(m)]
        if self._settings.quick:
            # The slow peers come last: on a busy machine only they are left out.
            cells.sort(key=_cost)
        for number, cell in enumerate(cells, 1):
            name = f"{cell.measurement.name} · {cell.system.name}"
            head = f"[{number:>{len(str(len(cells)))}}/{len(cells)}] {name}"
            began = time.monotonic()
            records = self._run_cell(cell)
            self.records += records
            seconds = time.monotonic() - began
            self._progress(f"{head}: {_digest(cell, records)} ({seconds:.1f} s)")

    def _cells(self, measurement: Measurement) -> Iterator[Cell]:
        """Yield the cells of one measurement; each repetition begins with another system.

        Rows that are compared run close together: if each case has a process tree of its own, all
        systems run one case before the next.
        """
        repetitions = self._settings.repetitions or measurement.repetitions
        groups = [list(measurement.cases)]
        if measurement.isolate_cases:
            groups = [[label] for label in measurement.cases]
        for repetition in range(repetitions):
            shift = repetition % max(1, len(measurement.systems))
            for group in groups:
                for system in measurement.systems[shift:] + measurement.systems[:shift]:
                    labels = [label for label in measurement.labels(system) if label in group]
                    if labels:
                        yield Cell(measurement, system, repetition, tuple(labels))

    def _run_cell(self, cell: Cell) -> list[Record]:
        """Run one process tree and make one record for each case."""
        known = {
            label: record
            for label in cell.labels
            if (record := self._hopeless.get(_key(cell, label))) is not None
        }
        wanted = [label for label in cell.labels if label not in known]
        left = self._left()
        outcomes: dict[str, Record] = {}
        if wanted and left < LEAST_SECONDS:
            outcomes = {
                label: _record(cell, label, "skipped", reason="the time budget was spent")
                for label in wanted
            }
        elif wanted:
            outcomes = self._measure(cell, wanted, min(cell.measurement.timeout, left))
        for label, record in outcomes.items():
            if record.status in ("unavailable", "timeout"):
                self._hopeless[_key(cell, label)] = record
        return list(outcomes.values())

    def _measure(self, cell: Cell, labels: list[str], timeout: float) -> dict[str, Record]:
        folder = Path(tempfile.mkdtemp(prefix="kb-"))
        try:
            results, log = folder / "results.jsonl", folder / "log"
            results.touch()
            code = sessions.run_session(
                self._command(cell, labels, results),
                env=_environment(folder),
                log=log,
                timeout=timeout,
            )
            if self._settings.verbose:
                sys.stderr.write(log.read_text(errors="replace"))
            lines = [json.loads(line) for line in results.read_text().splitlines()]
            tail = log.read_text(errors="replace")[-LOG_TAIL:]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = {
            line["case"]: _record(
                cell, line["case"], line["status"], line.get("metrics"), line.get("reason", "")
            )
            for line in lines
        }
        for label in labels:
            if label not in found:
                found[label] = _unfinished(cell, label, code, timeout, tail)
        return found

    def _command(self, cell: Cell, labels: list[str], results: Path) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.cell"]
        command += [cell.measurement.name, cell.system.name, str(results)]
        command += ["--repetition", str(cell.repetition)]
        command += ["--quick"] * self._settings.quick
        for label in labels:
            command += ["--case", label]
        return command

    def _left(self) -> float:
        if self._settings.budget is None:
            return float("inf")
        return self._settings.budget - (time.monotonic() - self._began)


def _cost(cell: Cell) -> int:
    """Rank the systems of a quick run: limits and ours, peers, peers that start slowly."""
    return 0 if cell.system.role != "peer" else 1 + (cell.system.name in SLOW_STARTERS)


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of a system: one thread, this checkout, its own temporary folder."""
    env = dict(os.environ)
    env |= dict.fromkeys(THREADS, "1")
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Despite its name this works everywhere: no other machine can reach this Ray. Asking for
        # the address 127.0.0.1 has no effect: Ray replaces it and listens on every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    return env


def _key(cell: Cell, label: str) -> tuple[str, str, str]:
    return cell.measurement.name, cell.system.name, label


def _record(
    cell: Cell,
    label: str,
    status: str,
    metrics: dict[str, float] | None = None,
    reason: str = "",
) -> Record:
    return Record(
        measurement=cell.measurement.name,
        system=cell.system.name,
        case=label,
        repetition=cell.repetition,
        status=status,  # type: ignore[arg-type]
        metrics=metrics or {},
        reason=reason,
    )


def _unfinished(cell: Cell, label: str, code: int | None, timeout: float, tail: str) -> Record:
    """Make the record of a case that gave no result."""
    if code is None:
        return _record(cell, label, "timeout", reason=f"not finished after {timeout:.0f} s")
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "no output"
    return _record(cell, label, "failed", reason=f"process ended with {code}: {last}")


def _digest(cell: Cell, records: list[Record]) -> str:
    """Describe a cell in one line: the headline figure of the last case that has one."""
    headline = cell.measurement.metrics[0]
    for record in reversed(records):
        if record.status == "ok" and headline.key in record.metrics:
            return f"{record.case} {record.metrics[headline.key]:,.4g} {headline.unit}"
    if not records:
        return "nothing new to try"
    return f"{records[-1].status}: {records[-1].reason}"

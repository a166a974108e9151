"""The command line: ``python -m benchmarks [--quick] [--only NAME,…] [--list]``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import charts, machine, report
from benchmarks.plan import Measurement
from benchmarks.registry import NAMES, find
from benchmarks.runner import Runner, Settings

QUICK_BUDGET = 165.0
RESULTS = Path(__file__).resolve().parent / "results"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements, write the report, and print its path."""
    options = _parse(arguments)
    names = [name for group in options.only for name in group.split(",") if name] or list(NAMES)
    try:
        measurements = [find(name, quick=options.quick) for name in names]
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    measurements = [_choose(measurement, options) for measurement in measurements]
    if options.list:
        _list(measurements)
        return 0
    budget = options.budget or (QUICK_BUDGET if options.quick else None)
    repetitions = options.repetitions or (1 if options.quick else None)
    runner = Runner(
        Settings(options.quick, repetitions, budget, options.verbose),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    facts = machine.describe() | {"load before": f"{machine.load():.1f}"}
    if options.quick:
        facts["mode"] = "quick: small sizes and one repetition, an indication only"
    code = 0
    try:
        runner.run(measurements)
    except KeyboardInterrupt:
        print("interrupted; writing what was measured", file=sys.stderr)
        code = INTERRUPTED
    path = report.write(options.output, measurements, runner.records, facts)
    try:
        charts.draw(options.output, measurements, runner.records)
    except ImportError as error:
        print(f"no charts: {error}", file=sys.stderr)
    print(path.read_text(encoding="utf-8"))
    print(f"written to {options.output}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, under 3 minutes")
    parser.add_argument("--only", action="append", default=[], metavar="NAME[,NAME]")
    parser.add_argument("--systems", metavar="NAME[;NAME]", help="only these rows, or 'all'")
    parser.add_argument("--list", action="store_true", help="show measurements and systems")
    parser.add_argument("--repetitions", type=int, help="instead of each measurement's own")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="skip what does not fit")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--verbose", action="store_true", help="show what the systems print")
    return parser.parse_args(arguments)


def _choose(measurement: Measurement, options: argparse.Namespace) -> Measurement:
    """Leave out the systems that were not asked for, or that ``--quick`` has no time for."""
    wanted = measurement.quick_systems if options.quick else None
    if options.systems:
        wanted = None if options.systems == "all" else options.systems.split(";")
    if wanted is None:
        return measurement
    systems = tuple(system for system in measurement.systems if system.name in wanted)
    return dataclasses.replace(measurement, systems=systems)


def _list(measurements: Sequence[Measurement]) -> None:
    for measurement in measurements:
        print(f"{measurement.name}: {measurement.title}")
        print(f"    cases: {', '.join(measurement.cases)}")
        print(f"    systems: {'; '.join(system.name for system in measurement.systems)}")


if __name__ == "__main__":
    sys.exit(main())

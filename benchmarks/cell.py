"""The process that measures one system: ``python -m benchmarks.cell``, started by the runner."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.plan import System

REASON_LENGTH = 300


def main() -> int:
    """Run the wanted cases one after the other and append one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement")
    parser.add_argument("system")
    parser.add_argument("results")
    parser.add_argument("--repetition", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", action="append", default=[])
    arguments = parser.parse_args()

    from benchmarks.registry import find

    measurement = find(arguments.measurement, quick=arguments.quick)
    system = measurement.system(arguments.system)
    with Path(arguments.results).open("a", encoding="utf-8") as out:
        for label in measurement.labels(system):
            if arguments.case and label not in arguments.case:
                continue
            case = dataclasses.replace(
                measurement.cases[label], **{**system.options, "seed": arguments.repetition}
            )
            _measure(out, label, functools.partial(_run, system, case))
    return 0


def _run(system: System, case: Case) -> dict[str, float]:
    return system.load()(case)


def _measure(out: TextIO, label: str, run: Callable[[], dict[str, float]]) -> None:
    from benchmarks.plan import UnavailableError

    line: dict[str, object] = {"case": label}
    try:
        line |= {"status": "ok", "metrics": run()}
    except (ImportError, UnavailableError) as error:
        line |= {"status": "unavailable", "reason": _reason(error)}
        traceback.print_exc()
    except Exception as error:  # noqa: BLE001 - any error of a peer is shown in its row
        line |= {"status": "failed", "reason": _reason(error)}
        traceback.print_exc()
    print(json.dumps(line), file=out, flush=True)


def _reason(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= REASON_LENGTH else f"{text[: REASON_LENGTH - 2]} …"


if __name__ == "__main__":
    sys.exit(main())

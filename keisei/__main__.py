"""``python -m keisei``: the version, and the doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import keisei

_PROBLEMS = 1
_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if the doctor found a problem, or 2 for a wrong command line.

    Args:
        arguments: What follows ``python -m keisei``; ``None`` takes the command line's.
    """
    parser = argparse.ArgumentParser(prog="python -m keisei", description=keisei.__doc__)
    parser.add_argument("--version", action="version", version=f"keisei {keisei.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    doctor = commands.add_parser(
        "doctor",
        help="tell what this machine offers to a pool, and what is used in place of what it lacks",
        description="The report is plain text; paste it into a bug report. The exit code is 0 if "
        "pools work here and 1 if not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.add_argument("--no-trial", action="store_true", help="start no pool to see if it works")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor(as_json=options.json, with_trial=not options.no_trial)
    parser.print_help(sys.stderr)
    return _USAGE


def _doctor(*, as_json: bool, with_trial: bool) -> int:
    from keisei.doctor import report

    findings = list(report.examine(with_trial=with_trial))
    text = report.as_json(findings) if as_json else report.as_text(findings)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return _PROBLEMS if report.problems_in(findings) else 0


if __name__ == "__main__":
    sys.exit(main())

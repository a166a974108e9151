"""The doctor's findings as text for a bug report, or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

import keisei
from keisei.doctor import machine, software
from keisei.doctor.findings import Finding, Verdict

_MARKS = {
    Verdict.FACT: "  ",
    Verdict.OK: "ok",
    Verdict.SUBSTITUTE: "~ ",
    Verdict.WARNING: "! ",
    Verdict.PROBLEM: "!!",
}
_WIDTH = 96


def examine(*, with_trial: bool = True) -> Iterator[Finding]:
    """Yield everything that is found, by section.

    Args:
        with_trial: Also start a pool of one worker with each start method, a few seconds.
    """
    found = list(software.findings())
    yield from found
    yield from machine.findings()
    if not with_trial:
        return
    if any(one.verdict is Verdict.PROBLEM for one in found):
        yield Finding("trial", "pool", "not tried", note="something that it needs is missing")
        return
    from keisei.doctor import trial

    yield from trial.findings()


def problems_in(findings: Sequence[Finding]) -> list[Finding]:
    """Return those with which a pool cannot work."""
    return [one for one in findings if one.verdict is Verdict.PROBLEM]


def as_text(findings: Sequence[Finding]) -> str:
    """Return the report as lines of plain ASCII-marked text, no colours, at most 96 wide."""
    lines = [f"keisei doctor ({keisei.__version__})"]
    for section, group in groupby(findings, key=lambda one: one.section):
        lines += ["", section]
        for one in group:
            lines += _lines_of(one)
    return "\n".join([*lines, "", verdict_on(findings)])


def _lines_of(finding: Finding) -> list[str]:
    value = finding.value
    if isinstance(value, bool):
        value = "yes" if value else "no"
    head = f"  {_MARKS[finding.verdict]} {finding.name:<24} "
    text = f"{value}: {finding.note}" if finding.note else f"{value}"
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def verdict_on(findings: Sequence[Finding]) -> str:
    """Return what it all comes to, in one line."""
    problems = problems_in(findings)
    substitutes = sum(one.verdict is Verdict.SUBSTITUTE for one in findings)
    warnings = sum(one.verdict is Verdict.WARNING for one in findings)
    if problems:
        names = ", ".join(one.name for one in problems)
        return f"keisei does not work here: see {names} ({_MARKS[Verdict.PROBLEM]})"
    parts = []
    if substitutes:
        parts.append(f"{substitutes} thing(s) replaced by others (~)")
    if warnings:
        parts.append(f"{warnings} warning(s) (!)")
    return f"keisei works here{': ' if parts else ''}{', '.join(parts)}"


def as_json(findings: Sequence[Finding]) -> str:
    """Return the report as one JSON object: "keisei", "works", "verdict" and "findings"."""
    return json.dumps(
        {
            "keisei": keisei.__version__,
            "works": not problems_in(findings),
            "verdict": verdict_on(findings),
            "findings": [one.to_dict() for one in findings],
        },
        indent=2,
        allow_nan=False,
    )

"""Writes the report: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.plan import Measurement, Metric, System
from benchmarks.results import Record, Results, Summary

NOT_MEASURED = "not measured"


def write(
    folder: Path,
    measurements: Sequence[Measurement],
    records: Sequence[Record],
    facts: Mapping[str, str],
) -> Path:
    """Write ``report.md`` and ``results.json`` into ``folder``; return the former."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": dict(facts),
        "targets": [row for m in measurements for row in _verdicts(m, Results(m, records))],
        "records": [record.as_json() for record in records],
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    report = folder / "report.md"
    report.write_text(markdown(measurements, records, facts) + "\n", encoding="utf-8")
    return report


def markdown(
    measurements: Sequence[Measurement], records: Sequence[Record], facts: Mapping[str, str]
) -> str:
    """Return the whole report."""
    parts = ["# Benchmark report", ", ".join(f"{key} {text}" for key, text in facts.items())]
    parts += ["## Targets", _targets_table(measurements, records)]
    for measurement in measurements:
        results = Results(measurement, records)
        parts += [f"## {measurement.title}", "\n".join(_rows(measurement, results))]
        parts += [
            f"![{chart.metric}]({chart_name(measurement, chart.metric)})"
            for chart in measurement.charts
        ]
    return "\n\n".join(parts)


def chart_name(measurement: Measurement, metric: str) -> str:
    """Return the file name of a chart."""
    return f"{measurement.name}-{metric}.png"


def _targets_table(measurements: Sequence[Measurement], records: Sequence[Record]) -> str:
    lines = ["| measurement | target | required | measured | |", "|---|---|---|---|---|"]
    for measurement in measurements:
        rows = _verdicts(measurement, Results(measurement, records))
        lines += [f"| {' | '.join(row.values())} |" for row in rows]
    return "\n".join(lines)


def _verdicts(measurement: Measurement, results: Results) -> Iterator[dict[str, str]]:
    for target in measurement.targets:
        figure = target.figure(results)
        if figure is None:
            verdict = NOT_MEASURED
        else:
            verdict = "reached" if target.reached(figure) else "**missed**"
        yield {
            "measurement": measurement.name,
            "target": target.text,
            "required": target.required,
            "measured": "–" if figure is None else number(figure),
            "verdict": verdict,
        }


def _rows(measurement: Measurement, results: Results) -> Iterator[str]:
    """Yield the lines of one measurement's table."""
    units = [metric.unit for metric in measurement.metrics]
    header = ["case", "system", *units, "to best peer", "to limit"]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for case in measurement.cases:
        for system in measurement.systems:
            if case not in measurement.labels(system):
                continue
            cells = [_cell(results.summary(system.name, case, m.key)) for m in measurement.metrics]
            if not any(cells):
                cells[0] = results.reason(system.name, case).replace("|", "\\|")
            cells = [cell or "–" for cell in cells]
            ratios = [
                _ratio(measurement, results, system, case, role) for role in ("peer", "limit")
            ]
            name = f"**{system.name}**" if system.role == "ours" else system.name
            if system.role == "limit":
                name = f"*{name}*"
            yield "| " + " | ".join([case, name, *cells, *ratios]) + " |"


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return ""
    if summary.count == 1:
        return number(summary.median)
    return f"{number(summary.median)} [{number(summary.low)} … {number(summary.high)}]"


def _ratio(measurement: Measurement, results: Results, system: System, case: str, role: str) -> str:
    """Return "2.5 x better" than the best other peer, or the first limit, by the headline."""
    metric: Metric = measurement.metrics[0]
    others = [s.name for s in measurement.systems if s.role == role and s.name != system.name]
    if system.role == "limit" or not others:
        return "–"
    if role == "limit":
        others = others[:1]
    ratio = results.times_better(system.name, others, metric.key, case)
    return "–" if ratio is None else f"{number(ratio)} x"


def number(figure: float) -> str:
    """Return three significant digits, and thousands with commas."""
    if figure == 0:
        return "0"
    if abs(figure) >= 1000:
        digits = len(str(int(abs(figure)))) - 3
        return f"{round(figure, -digits):,.0f}"
    return f"{figure:.3g}"

"""Draws the curves of a measurement as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan import Chart, Measurement
from benchmarks.report import chart_name
from benchmarks.results import Record, Results

SIZE = (7.0, 4.5)


def draw(folder: Path, measurements: Sequence[Measurement], records: Sequence[Record]) -> list[str]:
    """Draw every chart that has figures; return the names of the files.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return [
        chart_name(measurement, chart.metric)
        for measurement in measurements
        for chart in measurement.charts
        if _draw(folder, measurement, Results(measurement, records), chart)
    ]


def _draw(folder: Path, measurement: Measurement, results: Results, chart: Chart) -> bool:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    unit = next(m.unit for m in measurement.metrics if m.key == chart.metric)
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    try:
        drawn = False
        for system in measurement.systems:
            points = [
                (chart.x(measurement.cases[label]), found.median, found.low, found.high)
                for label in measurement.labels(system)
                if (found := results.summary(system.name, label, chart.metric)) is not None
            ]
            if not points:
                continue
            xs, medians, lows, highs = zip(*sorted(points), strict=True)
            style = {"ours": "o-", "peer": "s--", "limit": "k:"}[system.role]
            (line,) = axes.plot(xs, medians, style, label=system.name, markersize=4)
            axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.15)
            drawn = True
        if not drawn:
            return False
        axes.set(xscale="log", yscale="log", xlabel=chart.x_label, ylabel=unit)
        axes.set_title(measurement.title)
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(fontsize="small")
        figure.savefig(folder / chart_name(measurement, chart.metric), dpi=120)
        return True
    finally:
        plt.close(figure)

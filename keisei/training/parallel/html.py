"""What a manager and its figures look like in a notebook: small tables, every text escaped."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; every cell is escaped."""
    lines = ["<table><thead><tr>", *(f"<th>{html.escape(one)}</th>" for one in head)]
    lines.append("</tr></thead><tbody>")
    lines += ["".join(["<tr>", *map(_cell, row), "</tr>"]) for row in rows]
    return "".join([*lines, "</tbody></table>"])


def _cell(value: object) -> str:
    return f"<td>{html.escape(text_of(value))}</td>"


def text_of(value: object) -> str:
    """Return a cell's text: thousands apart, times with one digit, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def of_value(value: Any) -> str:
    """Return a frozen value, such as ``PoolStats``, as a table of its fields."""
    fields = dataclasses.fields(value)
    return table(
        ["", type(value).__name__], [(one.name, getattr(value, one.name)) for one in fields]
    )


def of_manager(state: str, stats: Any, workers: Sequence[Any]) -> str:
    """Return a manager as a line and a table with a row for each slot.

    Args:
        state: "running" …
        stats: Its ``PoolStats``, ``None`` before its start.
        workers: Its slots.
    """
    parts = [f"<b>ParallelManager</b>: {html.escape(state)}"]
    if stats is not None:
        parts.append(
            f"{stats.num_ready} of {stats.num_workers} workers, {stats.num_steps:,} steps, "
            f"weights {stats.weights_version}, {stats.num_restarts} restarts"
        )
    head = ("worker", "state", "phase", "process", "incarnation", "weights", "experiences")
    rows = [
        (
            one.worker_id,
            one.state,
            one.phase,
            None if one.pid is None else str(one.pid),
            one.incarnation,
            one.weights_version,
            one.experiences,
        )
        for one in workers
    ]
    return f"<div>{' · '.join(parts)}</div>{table(head, rows) if rows else ''}"

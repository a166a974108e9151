"""The page as HTML, made from the state: all of it can be read without JavaScript.

Everything that comes from a worker, or from whoever named the pool, is escaped at one place.
"""

from __future__ import annotations

import html
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_HEADINGS = (
    ("Worker", "The slot", ""),
    ("State", "Where the slot is in its life", ""),
    ("Phase", "What its main loop is doing", ""),
    ("For", "Time since its main loop last moved", "number small"),
    ("Age", "Time since its process became ready", "number"),
    ("Lag", "Versions that its weights are behind the newest", "number"),
    ("Restarts", "Processes in this slot before the present one", "number"),
    ("Experiences", "Delivered by the present process", "number minor"),
    ("Failures", "Failures within the restart window", "number minor"),
    ("PID", "Its process id", "number minor"),
    ("Device", "Where its model is meant to be", "minor"),
)
_TILES = (
    ("steps/s", "Steps per second"),
    ("steps", "Steps"),
    ("ready", "Workers ready"),
    ("queued", "Batches queued"),
    ("version", "Weights version"),
    ("restarts", "Restarts"),
)


def text(value: object) -> str:
    """Return ``value`` as text that is nothing but text, in HTML and in its attributes."""
    return html.escape(str(value), quote=True)


def head(title: str, version: str) -> str:
    """Return the beginning of the page, up to its body."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<noscript><meta http-equiv="refresh" content="5"></noscript>
<link rel="icon" href="icon.svg?{version}" type="image/svg+xml">
<link rel="stylesheet" href="page.css?{version}">
<script src="page.js?{version}" defer></script>
</head>
"""


def top(title: str, state: dict[str, Any], actions: Collection[str]) -> str:
    """Return the page down to its table of workers."""
    numbers = state["numbers"] or {}
    failure = state["failure"]
    banner = text(failure) if failure else ""
    return f"""<body data-actions="{text(" ".join(actions))}" data-token="{text(state["token"])}">
<a class="skip" href="#workers">Skip to the workers</a>
<header>
<h1>{text(title)}</h1>
<p id="state" class="pill" data-state="{text(state["state"])}" role="status">{text(state["state"])}
</p>
<p id="uptime">{text(duration(numbers.get("seconds")))}</p>
<p id="link" class="quiet"></p>
{_controls(actions, numbers.get("workers"))}
</header>
<p id="failure" class="banner bad"{"" if failure else " hidden"}>{banner}</p>
<p id="notice" class="banner" role="alert" hidden></p>
<main>
<section id="tiles" aria-label="The pool in numbers">
{"".join(_tile(name, label, state) for name, label in _TILES)}</section>
<section id="charts" aria-label="Curves" hidden></section>
<section aria-labelledby="workers">
<div class="bar"><h2 id="workers">Workers</h2><div id="table-tools"></div></div>
<div id="overview" aria-hidden="true" hidden></div>
<div class="scroll" role="region" aria-labelledby="workers" tabindex="0">
<table id="table">
<thead><tr>{_headings(actions)}</tr></thead>
<tbody>
"""


def rows(workers: Iterable[Sequence[Any]], actions: Collection[str]) -> str:
    """Return rows of the table of workers."""
    return "".join(_row(values, actions) for values in workers)


def bottom(state: dict[str, Any], incidents: Sequence[dict[str, Any]]) -> str:
    """Return the page from the end of its table."""
    nothing = "" if state["workers"] else f'<p id="empty">{text(_EMPTY[state["state"]])}</p>\n'
    count = (state["numbers"] or {}).get("incidents", 0)
    shown = f"the newest {len(incidents)} of {count}" if count > len(incidents) else str(count)
    none = '<p class="quiet">None so far.</p>\n'
    return f"""</tbody>
</table>
</div>
{nothing}</section>
<section aria-labelledby="incidents">
<h2 id="incidents">Incidents <span id="count" class="quiet">{text(shown)}</span></h2>
<div id="list">
{"".join(map(_incident, incidents)) or none}</div>
</section>
</main>
<noscript><p class="quiet foot">Without JavaScript the page is loaded anew every five seconds.</p>
</noscript>
</body>
</html>
"""


_EMPTY = {
    "not started": "The pool is not started yet.",
    "starting": "The pool is starting.",
    "running": "The pool has no workers.",
    "paused": "The pool has no workers.",
    "failed": "The pool has failed.",
    "stopping": "The pool is stopping.",
    "stopped": "The pool has stopped.",
}


def _controls(actions: Collection[str], workers: int | None) -> str:
    parts = [
        f'<form method="post" action="actions/{action}"><button>{action.capitalize()}</button>'
        "</form>"
        for action in ("pause", "resume")
        if action in actions
    ]
    if "scale" in actions:
        parts.append(
            '<form method="post" action="actions/scale"><label>Workers <input type="number" '
            f'name="num_workers" min="1" required value="{text(workers or 1)}"></label>'
            "<button>Scale</button></form>"
        )
    return f'<div id="controls">{"".join(parts)}</div>' if parts else ""


def _tile(name: str, label: str, state: dict[str, Any]) -> str:
    numbers = {**(state["numbers"] or {}), **state["rates"]}
    value = numbers.get(name)
    shown = "–" if value is None else f"{value:,.0f}"
    if name == "ready" and value is not None:
        shown = f"{value} of {numbers['workers']}"
    return f'<dl><dt>{text(label)}</dt><dd data-tile="{text(name)}">{text(shown)}</dd></dl>\n'


def _headings(actions: Collection[str]) -> str:
    cells = [
        f'<th scope="col" title="{text(title)}" class="{kind}">{text(label)}</th>'
        for label, title, kind in _HEADINGS
    ]
    if "restart" in actions:
        cells.append('<th scope="col"><span class="hidden">Restart</span></th>')
    return "".join(cells)


def _row(values: Sequence[Any], actions: Collection[str]) -> str:
    worker_id, state = values[0], values[1]
    times = (seconds(values[3]), duration(values[4]))
    shown = [*values[:3], *times, *values[5:7], f"{values[7]:,}", *values[8:]]
    cells = [f'<th scope="row">{text(worker_id)}</th>']
    cells += [
        f'<td class="{kind}">{text("–" if value in (None, "") else value)}</td>'
        for value, (_, _, kind) in zip(shown[1:], _HEADINGS[1:], strict=True)
    ]
    if "restart" in actions:
        cells.append(
            '<td><form method="post" action="actions/restart"><input type="hidden" '
            f'name="worker_id" value="{text(worker_id)}"><button '
            f'aria-label="Restart worker {text(worker_id)}"><span>Restart</span></button></form>'
            "</td>"
        )
    return f'<tr data-state="{text(state)}">{"".join(cells)}</tr>\n'


def _incident(incident: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(incident["time"]))
    blocks = [
        f"<h3>{label}</h3><pre>{text(incident[key])}</pre>"
        for key, label in (("traceback", "Traceback"), ("stderr", "Standard error"))
        if incident[key]
    ]
    body = "".join(blocks) or '<p class="quiet">It left neither a traceback nor output.</p>'
    return (
        f'<details data-number="{text(incident["number"])}"><summary><time>{text(when)}</time> '
        f'<span class="cause">{text(incident["cause"])}</span> {text(incident["summary"])}'
        f"</summary>{body}</details>\n"
    )


def seconds(value: float | None) -> str:
    """Return a short time for people."""
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 10 else duration(value)  # noqa: PLR2004 - two digits


def duration(value: float | None) -> str:
    """Return a time for people, in its two largest units."""
    if value is None:
        return ""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = int(value)
    parts: list[str] = []
    for name, size in units:
        if whole >= size or (name == "s" and not parts):
            parts.append(f"{whole // size} {name}")
            whole %= size
        elif parts:
            break
    return " ".join(parts[:2])

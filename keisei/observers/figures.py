"""The numbers of an update, by name: what every dashboard is given."""

from __future__ import annotations

from keisei.events import UpdateCompleted

PLAIN = (
    "steps_per_second",
    "weights_version",
    "num_workers",
    "num_restarts",
    "staleness",
)
"""Fields of an update that are numbers, beside its counters ``update`` and ``num_steps``."""


def figures_of(update: UpdateCompleted) -> dict[str, float]:
    """Return the numbers of an update but its counters, under the names that dashboards show.

    The pool's own stand under "pool/", those of episodes under "episode/" if any ended, and the
    learner's metrics under their own names.
    """
    found: dict[str, float] = {f"pool/{name}": float(getattr(update, name)) for name in PLAIN}
    if update.episode_returns:
        found["episode/count"] = float(len(update.episode_returns))
    for name, value in (("return", update.mean_return), ("length", update.mean_length)):
        if value is not None:
            found[f"episode/{name}"] = value
    return found | dict(update.metrics)

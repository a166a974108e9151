"""WandbObserver: the figures of each update for Weights & Biases; needs the extra ``wandb``."""

from __future__ import annotations

import logging
from typing import Any

from keisei.events import Event, UpdateCompleted
from keisei.observers.background import BackgroundObserver
from keisei.observers.figures import figures_of
from keisei.observers.missing import require

__all__ = ["WandbObserver"]

logger = logging.getLogger("keisei.observers")

_PATIENCE = 20
"""Seconds in which the service must answer, unless the settings that are given say otherwise."""


class WandbObserver(BackgroundObserver):
    """Logs to a run of W&B, with environment steps as the axis ("num_steps").

    A thread imports ``wandb`` and talks to it; the loop never waits. Where the service cannot be
    reached, or no key is configured, the run is kept on disk (``wandb sync`` sends it later), which
    is told once.

    Args:
        run: A run of the application's own; it is not finished at the end. ``None`` makes one.
        max_pending: See ``BackgroundObserver``.
        options: For ``wandb.init``: ``project``, ``name``, ``config``, ``mode``, ``dir`` …

    Raises:
        ImportError: The extra is missing; names the command that installs it.
    """

    wanted = (UpdateCompleted,)

    def __init__(self, run: Any = None, *, max_pending: int = 10_000, **options: Any) -> None:
        require("wandb", "keisei.observers.wandb", "wandb", "wandb")
        super().__init__(max_pending=max_pending)
        self._given = run
        self._session: Any = None
        self._options = options

    @property
    def target(self) -> str:
        """The service."""
        return "the run of Weights & Biases"

    def open(self) -> None:
        """Begin a run, on disk alone if there is no other way."""
        self._session = self._given if self._given is not None else self._begin()
        self._session.define_metric("num_steps")
        self._session.define_metric("*", step_metric="num_steps")

    def _begin(self) -> Any:
        import wandb

        options = dict(self._options)
        if "settings" not in options:
            options["settings"] = wandb.Settings(init_timeout=_PATIENCE)
        try:
            return wandb.init(**options)
        except Exception as error:  # no network, no key, a proxy: all end the same way
            if options.get("mode") == "offline":
                raise
            text = "%s cannot begin online (%s: %s); it is kept on disk, and 'wandb sync' sends it"
            reason = str(error).partition("\n")[0]
            logger.warning(text, self.target, type(error).__name__, reason)
            return wandb.init(**{**options, "mode": "offline"})

    def write(self, event: Event) -> None:
        """Log one update."""
        assert isinstance(event, UpdateCompleted)  # noqa: S101 - what is wanted
        counters = {"update": event.update, "num_steps": event.num_steps}
        self._session.log({**figures_of(event), **counters})

    def close(self) -> None:
        """Finish the run, unless the application made it."""
        run, self._session = self._session, None
        if self._given is None and run is not None:
            run.finish()

"""The demo under chaos; ``nox -s examples`` runs the examples as programs."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest

pytest.importorskip("gymnasium", reason="needs the extra 'gymnasium'")
pytest.importorskip("rich", reason="needs the extra 'progress'")

from cartpole_ppo import Hyperparameters
from rich.console import Console
from train_cartpole import CHAOS, Settings, show, train

from keisei.events import ExitCause
from keisei.testing.scenarios import fail_after

PARAMETERS = Hyperparameters(rollout_length=32, epochs=1, max_steps=5_000, solved_return=501.0)
CAUSES = {ExitCause.SIGNAL, ExitCause.HANG, ExitCause.USER_ERROR}


@pytest.mark.usefixtures("_warm_fork_server")
async def test_the_demo_trains_through_chaos():
    """Faults hit its workers at random, the rounds go on, and the table tells of both."""
    console = Console(file=io.StringIO())
    async with fail_after(100):
        for seed in itertools.count():
            parameters = replace(PARAMETERS, seed=seed)
            report, learner, director = await train(Settings(parameters, chaos=3.0), console)
            assert report.reason == "max_steps"
            assert report.num_steps == learner.num_steps == 128 * report.num_batches
            if report.incidents:  # chance may leave a run alone
                break
    assert {incident.cause for incident in report.incidents} <= CAUSES
    assert len(report.incidents) <= director.injected.total()
    assert set(director.injected) <= set(CHAOS)
    show(console, report, learner, director.injected)
    assert "fault injected" in console.file.getvalue()

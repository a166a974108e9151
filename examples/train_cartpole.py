"""Solve CartPole with PPO and two supervised worker processes, one of which is killed on the way.

The main job of keisei on real input. Rounds of the sync mode go to a learner until the mean return
of the last 100 episodes is 475 or more. A third of the way there one worker is ended by SIGKILL;
the pool notices, replaces it within the round, and training goes on. With ``--chaos`` random faults
take the place of that one: at a given rate workers are killed, stopped, made to raise or to read
from address 0. At the end a table tells of the run, and the learning curve is drawn. The exit
status is 0 only if CartPole was solved.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cartpole_ppo import Hyperparameters, PPOLearner, make_policy, make_worker
from rich.console import Console
from rich.table import Table

from keisei import ParallelManager, RunReport
from keisei.events import Event, UpdateCompleted
from keisei.observers.progress import RichProgress
from keisei.testing.chaos import ChaosMonkey
from keisei.testing.failpoints import armed

CHAOS = ("kill", "segfault", "stop", "raise")
"""The faults of ``--chaos``."""

CONFIG_FOR_CHAOS: dict[str, Any] = {
    # A step takes less than a millisecond. A worker that is stopped holds its round up until this
    # time is over; the default of five minutes is meant for environments that may be slow.
    "collect_timeout": 2.0,
    # The same of one that does not hear that the run is over.
    "shutdown_timeout": 1.0,
    # As many restarts as there are faults. A process that was healthy for a second owes nothing
    # for the ones before it, so its successor starts at once.
    "restart": {"max_restarts": 1000, "reset_after": 1.0},
}


@dataclass(frozen=True)
class Settings:
    """What a run is told.

    Attributes:
        kill: Whether a worker is killed a third of the way; not beside chaos.
        chaos: Random faults per second.
    """

    parameters: Hyperparameters = field(default_factory=Hyperparameters)
    kill: bool = True
    chaos: float = 0.0
    out: Path = Path(__file__).parent / "out"


class Director:
    """Watches the run: keeps the curve, kills a worker a third of the way, ends it when solved.

    Attributes:
        curve: Environment steps, and the mean return then.
        injected: How often each fault of ``--chaos`` was injected.
    """

    def __init__(self, manager: ParallelManager, learner: PPOLearner, settings: Settings) -> None:
        self.curve: list[tuple[int, float]] = []
        self.injected: Counter[str] = Counter()
        self._manager = manager
        self._learner = learner
        kills = settings.kill and not settings.chaos
        self._kill_at = settings.parameters.solved_return / 3 if kills else None

    def on_event(self, event: Event) -> None:
        """Act on every completed update."""
        if not isinstance(event, UpdateCompleted):
            return
        self.curve.append((event.num_steps, self._learner.mean_return))
        if self._kill_at is not None and self._learner.mean_return >= self._kill_at:
            self._kill_at = None
            victim = self._manager.workers[-1]
            if victim.pid is not None:
                os.kill(victim.pid, signal.SIGKILL)
        if self._learner.solved:
            self._manager.request_stop()


def show(console: Console, report: RunReport, learner: PPOLearner, injected: Counter[str]) -> None:
    """Print the table of the run and every incident."""
    table = Table(title="CartPole-v1, PPO", show_header=False)
    table.add_row("solved", "yes" if learner.solved else "no")
    table.add_row("mean return of the last 100 episodes", f"{learner.mean_return:.1f}")
    table.add_row("environment steps", f"{report.num_steps:,}")
    table.add_row("updates, weights versions", f"{report.num_updates}, {report.weights_version}")
    table.add_row("seconds of training", f"{report.seconds:.1f}")
    table.add_row("steps per second, learning included", f"{report.steps_per_second:,.0f}")
    table.add_row("workers failed, restarted", f"{len(report.incidents)}, {report.num_restarts}")
    for fault, count in injected.most_common():
        table.add_row(f"  fault injected: {fault}", str(count))
    console.print(table)
    for incident in report.incidents:
        console.print(f"incident: {incident.summary}", highlight=False)


def draw(
    curve: Sequence[tuple[float, float]],
    path: Path,
    solved_return: float,
    x_label: str = "environment steps",
) -> None:
    """Draw mean return against steps, or against what else the curve has as its first column."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([x for x, _ in curve], [mean for _, mean in curve])
    axes.axhline(solved_return, linestyle=":", color="gray")
    axes.set(xlabel=x_label, ylabel="mean return of the last 100 episodes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


async def train(settings: Settings, console: Console) -> tuple[RunReport, PPOLearner, Director]:
    """Run the pool until CartPole is solved or the steps are used up."""
    parameters = settings.parameters
    learner = PPOLearner(make_policy(parameters), parameters)
    progress = RichProgress(total_steps=parameters.max_steps, console=console)
    worker = make_worker(parameters)
    config = {"num_workers": parameters.num_workers, "mode": "sync", "seed": parameters.seed}
    if settings.chaos:
        worker, config = armed(worker), config | CONFIG_FOR_CHAOS
    manager = ParallelManager(worker, learner=learner, config=config, observers=[progress])
    director = Director(manager, learner, settings)
    manager.add_observer(director)
    with progress:
        if not settings.chaos:
            report = await manager.run(max_steps=parameters.max_steps)
        else:
            monkey = ChaosMonkey(manager, seed=parameters.seed, faults=CHAOS, rate=settings.chaos)
            async with monkey:
                report = await manager.run(max_steps=parameters.max_steps)
            director.injected.update(injection.fault for injection in monkey.injections)
    return report, learner, director


def main(settings: Settings, *, smoke: bool) -> int:
    """Train, show, draw; return the exit status."""
    console = Console()
    report, learner, director = asyncio.run(train(settings, console))
    show(console, report, learner, director.injected)
    path = settings.out / "train_cartpole.png"
    draw(director.curve, path, settings.parameters.solved_return)
    console.print(f"learning curve: {path}", highlight=False, soft_wrap=True)
    return 0 if learner.solved or smoke else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, solved or not")
    parser.add_argument("--no-kill", action="store_true", help="leave the workers alone")
    parser.add_argument(
        "--chaos",
        type=float,
        nargs="?",
        const=0.5,
        default=0.0,
        metavar="RATE",
        help="random faults instead, RATE per second (default: 0.5)",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = Hyperparameters(seed=arguments.seed)
    if arguments.smoke:
        chosen = replace(chosen, max_steps=3_000, solved_return=30.0)
    try:
        settings = Settings(chosen, kill=not arguments.no_kill, chaos=arguments.chaos)
        status = main(settings, smoke=arguments.smoke)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)

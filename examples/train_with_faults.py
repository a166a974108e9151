"""Train on CartPole while two of four workers crash and the other two stall.

The rates are those of RLlib's example ``crashing_and_stalling_env.py``: four workers with two
environments each. On two of the workers each step ends the process with a chance of 1 in 10,000
and each reset with 1 in 1,000; on the other two a step stalls with 1 in 2,000 and a reset with 1 in
1,000, for two to five seconds. To build one environment takes two seconds, so a restart takes more
than four. In RLlib's example one worker does both and one is healthy (``--rllib``), and a crash is
an exception, not the end of a process.

The aim is a mean return of 450 over the last 100 episodes, sooner than the 101.5 seconds that
RLlib's example names for APPO with whole workers restarted (133.5 for PPO with only the
environments), counted from the start of the pool. That was another machine: the figure is a bar,
and no comparison. The exit status is 0 only if the aim was reached in time.

In async mode nobody waits for a worker that stalls or is being replaced: an update takes what the
others have. Batches are then some versions old, which PPO's ratios, taken from the recorded
``log_probs``, correct for.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cartpole_ppo import Hyperparameters, PPOLearner, make_policy
from faulty_cartpole import RLLIB_SCHEDULE, SCHEDULE, Faults, make_faulty_worker
from rich.console import Console
from rich.table import Table
from train_cartpole import draw

from keisei import ParallelManager, RunReport
from keisei.events import Event, Incident, UpdateCompleted
from keisei.observers.progress import RichProgress

PARAMETERS = Hyperparameters(
    num_workers=len(SCHEDULE),
    envs_per_worker=2,
    rollout_length=128,
    solved_return=450.0,
    max_steps=1_000_000,
)

CONFIG: dict[str, Any] = {
    "mode": "async",
    # A crash costs no more than its restart: hundreds are expected, and a process that has worked
    # for a second owes nothing for the ones before it.
    "restart": {"max_restarts": 1000, "reset_after": 1.0},
    # Crashes come from the environment; weights are never to blame.
    "poison_threshold": None,
    # Longer than any stall.
    "collect_timeout": 30.0,
}


@dataclass(frozen=True)
class Settings:
    """What a run is told.

    Attributes:
        steps_per_update: Environment steps that an update takes at least.
        max_seconds: When the run gives up.
    """

    parameters: Hyperparameters = PARAMETERS
    schedule: tuple[Faults, ...] = SCHEDULE
    steps_per_update: int = 2048
    max_seconds: float = 101.5
    out: Path = Path(__file__).parent / "out"


class Clock:
    """Keeps the curve over time, and ends the run when its aim is reached.

    Attributes:
        curve: Seconds since the start of the pool, and the mean return then.
        staleness: The mean policy lag of each update's batches, in versions.
        reached_after: Seconds to the aim; ``None`` before.
    """

    def __init__(self, manager: ParallelManager, learner: PPOLearner) -> None:
        self.curve: list[tuple[float, float]] = []
        self.staleness: list[float] = []
        self.reached_after: float | None = None
        self._manager = manager
        self._learner = learner
        self._started = time.monotonic()

    def on_event(self, event: Event) -> None:
        """Take note of every completed update."""
        if not isinstance(event, UpdateCompleted):
            return
        seconds = time.monotonic() - self._started
        self.curve.append((seconds, self._learner.mean_return))
        self.staleness.append(event.staleness)
        if self._learner.solved and self.reached_after is None:
            self.reached_after = seconds
            self._manager.request_stop()


def describe(incident: Incident) -> str:
    """Say how a worker ended, without which and when."""
    how = incident.signal_name or f"exit code {incident.exitcode}"
    return f"{incident.cause}, {how}, in {incident.phase}"


def show(console: Console, report: RunReport, learner: PPOLearner, clock: Clock) -> None:
    """Print the table of the run."""
    reached = clock.reached_after
    table = Table(title="CartPole-v1 that crashes and stalls, PPO", show_header=False)
    table.add_row("seconds to the aim", "not reached" if reached is None else f"{reached:.1f}")
    table.add_row("mean return of the last 100 episodes", f"{learner.mean_return:.1f}")
    table.add_row("environment steps", f"{report.num_steps:,}")
    table.add_row("updates, weights versions", f"{report.num_updates}, {report.weights_version}")
    table.add_row("mean policy lag, in versions", f"{fmean(clock.staleness or [0]):.1f}")
    table.add_row("steps per second, faults included", f"{report.steps_per_second:,.0f}")
    table.add_row("incidents, restarts", f"{len(report.incidents)}, {report.num_restarts}")
    for how, count in Counter(map(describe, report.incidents)).most_common():
        table.add_row(f"  {how}", str(count))
    console.print(table)


async def train(settings: Settings, console: Console) -> tuple[RunReport, PPOLearner, Clock]:
    """Run the pool until the aim is reached or the time is over."""
    parameters = settings.parameters
    learner = PPOLearner(make_policy(parameters), parameters)
    progress = RichProgress(console=console)
    manager = ParallelManager(
        make_faulty_worker(settings.schedule, parameters),
        learner=learner,
        config={
            **CONFIG,
            "num_workers": parameters.num_workers,
            "seed": parameters.seed,
        },
        observers=[progress],
    )
    clock = Clock(manager, learner)
    manager.add_observer(clock)
    with progress:
        report = await manager.run(
            max_steps=parameters.max_steps,
            max_seconds=settings.max_seconds,
            steps_per_update=settings.steps_per_update,
        )
    return report, learner, clock


def main(settings: Settings, *, smoke: bool) -> int:
    """Train, show, draw; return the exit status."""
    console = Console()
    report, learner, clock = asyncio.run(train(settings, console))
    show(console, report, learner, clock)
    path = settings.out / "train_with_faults.png"
    aim = settings.parameters.solved_return
    draw(clock.curve, path, aim, x_label="seconds since the start of the pool")
    console.print(f"learning curve: {path}", highlight=False, soft_wrap=True)
    in_time = clock.reached_after is not None and clock.reached_after < settings.max_seconds
    return 0 if in_time or smoke else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, reached or not")
    parser.add_argument("--rllib", action="store_true", help="the slots that RLlib's example has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    schedule = RLLIB_SCHEDULE if arguments.rllib else SCHEDULE
    chosen = Settings(replace(PARAMETERS, seed=arguments.seed), schedule)
    if arguments.smoke:
        times = {"build_seconds": 0.2, "stall_seconds": (0.2, 0.5)}
        brief = tuple(replace(faults, **times) for faults in schedule)
        few = replace(chosen.parameters, max_steps=6_000)
        chosen = replace(chosen, parameters=few, schedule=brief)
    try:
        status = main(chosen, smoke=arguments.smoke)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)

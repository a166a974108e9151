"""Learning: wall time until CartPole-v1 is solved by PPO, one seed per repetition."""

from __future__ import annotations

from benchmarks.cases import Learning
from benchmarks.plan import Measurement, Metric, System
from benchmarks.targets import OURS, Target, ahead_of, faster_across

DUMMY, SUBPROC = "SB3 PPO, DummyVecEnv", "SB3 PPO, SubprocVecEnv"
SB3 = (DUMMY, SUBPROC)
OVERLAPPED = "keisei, collecting while it learns"
ZOO, EXAMPLE = "RL-Zoo's parameters", "the example's parameters"
QUICK_GOAL = 150.0
SYSTEMS = (
    System(OURS, "ours", "ours.learning:learn"),
    System(OVERLAPPED, "ours", "ours.learning:learn_overlapped"),
    System(DUMMY, "peer", "peers.sb3_subproc:learn_dummy"),
    System(SUBPROC, "peer", "peers.sb3_subproc:learn_subproc"),
)
TARGETS = (
    Target(
        "times faster than the better SB3, RL-Zoo's parameters for both",
        ahead_of(SB3, "seconds", [ZOO]),
        at_least=2,
    ),
    Target(
        "times faster than the better SB3, the example's parameters for both",
        ahead_of(SB3, "seconds", [EXAMPLE]),
        at_least=2,
    ),
    Target(
        "keisei with the example's parameters, times faster than SB3 with RL-Zoo's (unlike work)",
        faster_across(SB3, "seconds", EXAMPLE, ZOO),
        at_least=2,
    ),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement; the quick one has an easier goal and RL-Zoo's parameters only.

    The rows of one case have the same parameters. Only the last target compares different
    parameters, and its text says so: it shows how much the example's parameters add.
    """
    goal = QUICK_GOAL if quick else Learning().goal
    cases = {ZOO: Learning(goal=goal), EXAMPLE: Learning(goal=goal, parameters="example")}
    return Measurement(
        name="learning",
        title=f"Learning CartPole-v1 to a mean return of {goal:.0f} over 100 episodes",
        metrics=(
            Metric("seconds", "s", "lower"),
            Metric("steps", "steps", "lower"),
            Metric("steps_per_s", "steps/s", "higher"),
        ),
        cases={ZOO: cases[ZOO]} if quick else cases,
        systems=SYSTEMS,
        quick_systems=(OURS, DUMMY),
        targets=TARGETS[:1] if quick else TARGETS,
        timeout=60 if quick else 300,
        isolate_cases=True,
    )

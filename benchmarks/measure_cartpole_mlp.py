"""Throughput with inference: two workers of 8 CartPoles, actor and critic of 2x64."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import Throughput
from benchmarks.plan import Measurement, System
from benchmarks.systems import (
    BARE,
    LEARNER,
    QUEUE,
    RAY,
    RLLIB,
    STEPS,
    TORCHRL,
    TORCHRL_ASYNC,
    TORCHRL_SYNC,
)
from benchmarks.targets import OURS, Target, ahead_of, of_limit

OWN = "keisei, its own ActorCritic"
SHARED = "keisei, the peers' rollout loop"
CASE = "2 x 8 environments"
LONG = "2 x 8 environments, rollouts of 128 steps"
TARGETS = (
    Target(
        "ahead of the better TorchRL collector",
        ahead_of(TORCHRL, "steps_per_s", [CASE]),
        at_least=4.5,
    ),
    Target("ahead of RLlib env runners", ahead_of([RLLIB], "steps_per_s", [CASE]), at_least=3),
    Target(
        "of bare loops that do the same inference",
        of_limit(BARE, "steps_per_s", [CASE]),
        at_least=0.9,
    ),
    Target(
        "of bare loops that do the same inference, rollouts of 128 steps",
        of_limit(BARE, "steps_per_s", [LONG]),
        at_least=0.9,
    ),
)
SYSTEMS = (
    System(BARE, "limit", "limits.bare_loops:throughput"),
    System(OURS, "ours", "ours.data:throughput_gymnasium"),
    System(OWN, "ours", "ours.data:throughput_own_policy"),
    System(SHARED, "ours", "ours.data:throughput"),
    System(
        TORCHRL_SYNC, "peer", "peers.torchrl_collectors:throughput_sync", cases=frozenset([CASE])
    ),
    System(
        TORCHRL_ASYNC, "peer", "peers.torchrl_collectors:throughput_async", cases=frozenset([CASE])
    ),
    System(RLLIB, "peer", "peers.rllib_runners:throughput", cases=frozenset([CASE])),
    System(RAY, "peer", "peers.ray_actors:throughput", cases=frozenset([CASE])),
    System(QUEUE, "peer", "peers.multiprocessing_queue:throughput"),
)


def measurement(quick: bool) -> Measurement:
    """Return the measurement."""
    case = Throughput(work="cartpole+mlp", envs=8, ahead=16)
    if quick:
        case = replace(case, seconds=1.0, warmup=0.3)
    return Measurement(
        name="cartpole_mlp",
        title="Experience throughput with inference, CartPole-v1",
        metrics=(STEPS, LEARNER),
        cases={CASE: case} if quick else {CASE: case, LONG: replace(case, batch=8 * 128, ahead=4)},
        systems=SYSTEMS,
        quick_systems=(BARE, OURS, TORCHRL_ASYNC, RLLIB),
        targets=TARGETS[:-1] if quick else TARGETS,
        timeout=90,
        isolate_cases=True,
    )

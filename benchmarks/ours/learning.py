"""Keisei: learning CartPole with the PPO of the examples."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import torch

from benchmarks.cases import Learning
from benchmarks.plan import Metrics
from benchmarks.ppo import ENVS, parameters_of
from examples.cartpole_ppo import Hyperparameters, PPOLearner, make_worker
from keisei import ParallelManager
from keisei.training.gymnasium import ActorCritic

WORKERS = 2


class _UntilSolved:
    """The example's learner; it calls ``stop`` when the goal is reached."""

    def __init__(self, learner: PPOLearner, stop: Callable[[], object]) -> None:
        self._learner, self._stop = learner, stop
        self.reached: float | None = None

    def learn(self, batches: Sequence[Any]) -> Any:
        """Update; runs in the learner's thread."""
        metrics = self._learner.learn(batches)
        if self._learner.solved and self.reached is None:
            self.reached = time.perf_counter()
            self._stop()
        return metrics

    def state_dict(self) -> Any:
        """Return the weights to push."""
        return self._learner.state_dict()


def learn(case: Learning) -> Metrics:
    """Train with the example's workers and learner; starting the pool counts."""
    return asyncio.run(_learn(case, {"mode": "sync"}))


def learn_overlapped(case: Learning) -> Metrics:
    """Do the same, but collect one version behind while the learner learns."""
    return asyncio.run(_learn(case, {"mode": "async", "max_staleness": 1}))


async def _learn(case: Learning, mode: Mapping[str, Any]) -> Metrics:
    torch.set_num_threads(1)
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    parameters = Hyperparameters(
        seed=case.seed,
        solved_return=case.goal,
        num_workers=WORKERS,
        envs_per_worker=ENVS // WORKERS,
        **dataclasses.asdict(parameters_of(case)),
    )
    torch.manual_seed(case.seed)
    with gymnasium.make(parameters.env_id) as env:
        policy = ActorCritic(env.observation_space, env.action_space)
    learner = PPOLearner(policy, parameters)
    until = _UntilSolved(learner, lambda: loop.call_soon_threadsafe(manager.request_stop))
    manager = ParallelManager(
        make_worker(parameters),
        model=policy,
        learner=until,
        config={"num_workers": WORKERS, "seed": case.seed, **mode},
    )
    await manager.run(
        max_steps=case.max_steps,
        max_seconds=case.max_seconds,
        steps_per_update=ENVS * parameters.rollout_length,
    )
    if until.reached is None:
        raise RuntimeError(
            f"mean return {learner.mean_return:.0f} after {learner.num_steps:,} steps, "
            f"goal {case.goal:.0f}"
        )
    seconds = until.reached - began
    return {
        "seconds": seconds,
        "steps": float(learner.num_steps),
        "steps_per_s": learner.num_steps / seconds,
    }

"""RLlib's env runners: episodes sampled by remote runners, turned into tensors by the learner."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from benchmarks.cases import Throughput
from benchmarks.peers.ray_actors import cluster
from benchmarks.plan import Metrics
from benchmarks.timing import Meter
from benchmarks.work import HIDDEN, Arrays, as_tensors

FIELDS = ("obs", "action", "reward", "terminated", "truncated", "log_prob")
"""Values are missing: RLlib's new stack computes them in the learner, so its runners do less."""


def throughput(case: Throughput) -> Metrics:
    """Sample with all runners at once, two requests ahead: the fastest of RLlib's own ways."""
    torch.set_num_threads(1)
    with cluster(case.workers):
        group = EnvRunnerGroup(config=_config(case), local_env_runner=False)
        try:
            meter = Meter(case.seconds, case.warmup, fields=FIELDS)
            going = True
            while going:
                ready: list[Any] = group.foreach_env_runner_async_fetch_ready(
                    lambda runner: runner.sample(), tag="sample", timeout_seconds=None
                )
                for episodes in ready:
                    arrays = _concatenate(episodes)
                    going = meter.add(as_tensors(arrays), len(arrays["reward"])) and going
            return meter.metrics()
        finally:
            group.stop()


def _config(case: Throughput) -> PPOConfig:
    model = DefaultModelConfig(
        fcnet_hiddens=[HIDDEN, HIDDEN], fcnet_activation="tanh", vf_share_layers=False
    )
    return (
        PPOConfig()  # type: ignore[no-untyped-call]
        .environment("CartPole-v1")
        .framework("torch")
        .env_runners(
            num_env_runners=case.workers,
            num_envs_per_env_runner=case.envs,
            rollout_fragment_length=case.batch // case.envs,
            batch_mode="truncate_episodes",
        )
        .rl_module(model_config=model)
        .debugging(seed=case.seed)
    )


def _concatenate(episodes: list[Any]) -> Arrays:
    """Join episode fragments into one batch of transitions."""
    fragments = [episode for episode in episodes if len(episode)]
    ends = np.cumsum([len(episode) for episode in fragments]) - 1
    terminated = np.zeros(ends[-1] + 1, np.bool_)
    truncated = np.zeros(ends[-1] + 1, np.bool_)
    terminated[ends] = [episode.is_terminated for episode in fragments]
    truncated[ends] = [episode.is_truncated for episode in fragments]

    def join(parts: list[Any]) -> Any:
        return np.concatenate([np.asarray(part) for part in parts])

    return {
        "obs": join([episode.get_observations(slice(0, len(episode))) for episode in fragments]),
        "action": join([episode.get_actions() for episode in fragments]),
        "reward": join([episode.get_rewards() for episode in fragments]).astype(np.float32),
        "terminated": terminated,
        "truncated": truncated,
        "log_prob": join([episode.get_extra_model_outputs("action_logp") for episode in fragments]),
    }

"""GymnasiumWorker with next_observations: every transition whole, once, in every autoreset mode."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from keisei.training.gymnasium import GymnasiumWorker
from keisei.worker import WorkerContext
from training.environments import CountingDictEnv, CountingEnv, CountingPolicy

CONTEXT = WorkerContext(worker_id=0, incarnation=0, num_workers=1, seed=7)
MODES = list(AutoresetMode)
# (episode, step) before and after each of the first ten steps of CountingEnv, by hand.
BEFORE = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
AFTER = [(episode, step + 1) for episode, step in BEFORE]


def transitions(env, mode, rollout_length, num_rollouts):
    """Return the observations before and after the real steps of environment 1."""
    kwargs = {"autoreset_mode": mode, "next_observations": True}
    worker = GymnasiumWorker(env, CountingPolicy, 2, rollout_length, **kwargs)
    worker.setup(CONTEXT)
    before, after = [], []
    for _ in range(num_rollouts):
        data = worker.collect().data
        mask = data["mask"][:, 1]
        for found, name in ((before, "observations"), (after, "next_observations")):
            if name in data:
                pairs = data[name]
            else:
                leaves = data[f"{name}.episode"].unsqueeze(-1), data[f"{name}.inner.step"]
                pairs = torch.cat([leaf.double() for leaf in leaves], dim=-1)
            found += [tuple(map(int, pair)) for pair in pairs[:, 1][mask]]
    worker.teardown()
    return before, after


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rollout_length", [1, 2, 7, 14])
@pytest.mark.parametrize(
    "env",
    [CountingEnv, CountingDictEnv, functools.partial(CountingEnv, reuses_memory=True)],
    ids=["box", "dict", "reused"],
)
def test_no_transition_is_lost_or_wrong(env, rollout_length, mode):
    """Each step has its true successor: at ends, at the last row, and over many rollouts."""
    before, after = transitions(env, mode, rollout_length, 14 // rollout_length)
    assert before[:10] == BEFORE
    assert after[:10] == AFTER
    if mode is not AutoresetMode.NEXT_STEP:
        assert len(before) == 14


def test_off_means_no_tensor():
    """Without the option nothing is delivered under that name."""
    worker = GymnasiumWorker(CountingEnv, CountingPolicy, 2, 4)
    worker.setup(CONTEXT)
    assert not any(name.startswith("next_obs") for name in worker.collect().data)
    worker.teardown()


def test_a_successor_that_a_reset_replaced_is_asked_for():
    """A SAME_STEP environment that terminates without final_obs cannot give transitions."""

    class Terminating(VectorEnv):
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - as Gymnasium has it
        num_envs = 2
        single_observation_space = spaces.Box(0, 9, (2,), np.float32)
        single_action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros((2, 2), np.float32), {}

        def step(self, actions):
            ended = np.array([False, True])
            return np.zeros((2, 2), np.float32), np.ones(2), ended, ~ended & False, {}

    worker = GymnasiumWorker(Terminating, CountingPolicy, 1, 2, next_observations=True)
    worker.setup(CONTEXT)
    with pytest.raises(ValueError, match=r"environment 1, whose episode ended at step 0 .*final_o"):
        worker.collect()
    worker.teardown()

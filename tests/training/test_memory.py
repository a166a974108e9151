"""A task that needs a memory: the recurrent policy learns it, the memoryless one cannot."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces

from keisei import ExperienceBatch
from keisei.training.actor_critic import ActorCritic
from keisei.training.ppo import PPOLearner, PPOParameters
from keisei.training.recurrent import RecurrentActorCritic

SPACES = (spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2))
STEPS, ENVS = 3, 64
LENGTH = 3
PARAMETERS = PPOParameters(
    epochs=4, minibatch_size=192, learning_rate=0.01, gamma=0.9, entropy_coefficient=0.01
)


def play(policy):
    """Play episodes of three steps: a cue, nothing, and the demand to repeat the cue."""
    is_recurrent = isinstance(policy, RecurrentActorCritic)
    data = {"episode_starts": torch.zeros(STEPS, ENVS, dtype=torch.bool)}
    data["episode_starts"][::LENGTH] = True
    state = policy.initial_state(ENVS) if is_recurrent else None
    if is_recurrent:
        data["states"] = state
    rows = []
    with torch.no_grad():
        for step in range(STEPS):
            place = step % LENGTH
            if place == 0:
                cues = torch.randint(0, 2, (ENVS,))
            shown = 2.0 * cues - 1 if place == 0 else torch.zeros(ENVS)
            asked = torch.full((ENVS,), float(place == LENGTH - 1))
            observations = torch.stack([shown, asked], dim=-1)
            if is_recurrent:
                starts = data["episode_starts"][step]
                actions, log_probs, values, state = policy.act(observations, state, starts)
            else:
                actions, log_probs, values = policy.act(observations)
            rewards = asked * (actions == cues)
            rows.append([observations, actions, log_probs, values, rewards])
    names = ("observations", "actions", "log_probs", "values", "rewards")
    data |= {
        n: torch.stack(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    data["terminated"] = data["episode_starts"].roll(-1, 0)
    data["truncated"] = torch.zeros_like(data["terminated"])
    # Right where episodes go on; after a termination they are not read.
    data["next_values"] = data["values"].roll(-1, 0)
    right = data["rewards"][LENGTH - 1 :: LENGTH].mean().item()
    return ExperienceBatch(data, {"episode_returns": []}, STEPS * ENVS), right


def learn(policy):
    """Learn from 25 rollouts, and return the share of right answers in the last five."""
    learner = PPOLearner(policy, PARAMETERS)
    shares = []
    for _ in range(25):
        batch, right = play(policy)
        if not isinstance(policy, RecurrentActorCritic):
            del batch.data["episode_starts"]
        learner.learn([batch])
        shares.append(right)
    return sum(shares[-5:]) / 5


def test_only_a_memory_learns_what_was_shown_before(request):
    """Both kinds of cells recall the cue two steps later; without a memory it is a coin's toss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small tensors gain nothing from more, and lose much under load
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.manual_seed(0)
    assert learn(ActorCritic(*SPACES, hidden_sizes=(16,))) < 0.65
    for cell in ("lstm", "gru"):
        policy = RecurrentActorCritic(*SPACES, hidden_sizes=(16,), state_size=16, cell=cell)
        assert learn(policy) > 0.95

"""PPO on CartPole: the worker, the policy and the learner of ``train_cartpole.py``.

A module of its own, so that the worker processes import this and not the plots and the progress
display of the program. The learner is the library's; ``keisei.training.ppo.PPO`` puts all this
together in a line, see ``five_lines.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import gymnasium
import torch

from keisei.training import ppo
from keisei.training.gymnasium import ActorCritic, GymnasiumWorker


@dataclass(frozen=True)
class Hyperparameters:
    """What defines a run.

    Rollouts are longer and steps larger than in the RL Zoo's set for this task (32 steps, 20 epochs
    of 256, learning rate 1e-3): as many environment steps then need a fifth of the updates.

    Attributes:
        decay_steps: Environment steps after which learning rate and clip range would be zero; they
            fall linearly to a tenth and stay there.
        max_steps: Environment steps after which the run gives up.
        solved_return: The mean return of the last ``solved_episodes`` episodes that is enough.
    """

    env_id: str = "CartPole-v1"
    seed: int = 0
    num_workers: int = 2
    envs_per_worker: int = 4
    rollout_length: int = 256
    max_steps: int = 150_000
    epochs: int = 8
    minibatch_size: int = 512
    gamma: float = 0.98
    gae_lambda: float = 0.95
    learning_rate: float = 4e-3
    clip_range: float = 0.2
    decay_steps: int = 100_000
    value_coefficient: float = 0.5
    max_grad_norm: float = 0.5
    solved_return: float = 475.0
    solved_episodes: int = 100


def make_worker(parameters: Hyperparameters) -> partial[GymnasiumWorker]:
    """Give what a pool makes its workers from."""
    return partial(
        GymnasiumWorker,
        parameters.env_id,
        ActorCritic,
        num_envs=parameters.envs_per_worker,
        rollout_length=parameters.rollout_length,
    )


def make_policy(parameters: Hyperparameters) -> ActorCritic:
    """Build the learner's policy; its initial weights depend on the seed alone."""
    torch.manual_seed(parameters.seed)
    with gymnasium.make(parameters.env_id) as env:
        return ActorCritic(env.observation_space, env.action_space)


class PPOLearner(ppo.PPOLearner):
    """The library's learner, which also tells whether the task is solved."""

    def __init__(self, policy: ActorCritic, parameters: Hyperparameters) -> None:
        names = ppo.PPOParameters.names()
        known = {name: getattr(parameters, name) for name in names if hasattr(parameters, name)}
        chosen = ppo.PPOParameters(**known, return_window=parameters.solved_episodes)
        super().__init__(policy, chosen)
        self._solved_return = parameters.solved_return

    @property
    def solved(self) -> bool:
        """Whether there are enough recent episodes, with a mean return that is enough."""
        is_full = len(self.recent_returns) == self.recent_returns.maxlen
        return is_full and self.mean_return >= self._solved_return

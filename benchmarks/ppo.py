"""PPO parameters for CartPole-v1, the same for every system that learns."""

from __future__ import annotations

from dataclasses import dataclass, fields

from benchmarks.cases import Learning

ENVS = 8
LEAST_LEFT = 0.1
"""The linear schedules stop at a tenth, so that a slow seed can still learn."""


@dataclass(frozen=True)
class Parameters:
    """RL-Zoo's for this task; named as in ``examples/cartpole_ppo.py``."""

    rollout_length: int = 32
    epochs: int = 20
    minibatch_size: int = 256
    gamma: float = 0.98
    gae_lambda: float = 0.8
    learning_rate: float = 1e-3
    clip_range: float = 0.2
    decay_steps: int = 100_000
    value_coefficient: float = 0.5
    max_grad_norm: float = 0.5


def parameters_of(case: Learning) -> Parameters:
    """Return RL-Zoo's parameters, or the defaults of keisei's example."""
    if case.parameters == "zoo":
        return Parameters()
    from examples.cartpole_ppo import Hyperparameters

    defaults = Hyperparameters()
    return Parameters(**{field.name: getattr(defaults, field.name) for field in fields(Parameters)})

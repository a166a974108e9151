"""Players of tic-tac-toe and the learner of ``train_tictactoe.py``.

A module of its own, so that the worker processes import this and not the program.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from keisei.training.gymnasium import ActorCritic, generalized_advantage_estimate
from keisei.training.pettingzoo import PettingZooWorker, get_policy_data

if TYPE_CHECKING:
    from keisei import ExperienceBatch

ENV = "classic/tictactoe_v3"
PLAYERS = {"player_1": "learner", "player_2": "random"}
"""Who plays with which policy; ``player_1`` begins."""


@dataclass(frozen=True)
class Parameters:
    """What defines a run.

    Attributes:
        max_updates: Updates after which the run gives up.
        solved_return: The mean return of the last ``solved_episodes`` games that is enough; 1 is a
            won game, -1 a lost one.
    """

    seed: int = 0
    num_workers: int = 2
    envs_per_worker: int = 16
    rollout_length: int = 32
    max_updates: int = 60
    epochs: int = 4
    minibatch_size: int = 256
    learning_rate: float = 3e-3
    clip_range: float = 0.2
    entropy_coefficient: float = 0.01
    solved_return: float = 0.9
    solved_episodes: int = 500


class RandomPlayer(nn.Module):
    """Plays any legal move, and learns nothing."""

    def __init__(self, *spaces: Any) -> None:
        super().__init__()

    def act(self, observations: torch.Tensor, *, action_mask: torch.Tensor) -> Any:
        """Sample legal moves."""
        moves = torch.multinomial(action_mask.float(), 1).squeeze(-1)
        return moves, -action_mask.sum(-1).float().log(), self.value(observations)

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """Expect nothing."""
        return torch.zeros(len(observations))


def make_worker(parameters: Parameters) -> partial[PettingZooWorker]:
    """Give what a pool makes its workers from."""
    return partial(
        PettingZooWorker,
        ENV,
        {"learner": ActorCritic, "random": RandomPlayer},
        num_envs=parameters.envs_per_worker,
        rollout_length=parameters.rollout_length,
        policy_mapping=PLAYERS,
    )


class SelfLearner:
    """Proximal policy optimisation for the player that learns.

    Attributes:
        model: All players by name, as the workers have them.
        returns: Of the learner's last games.
    """

    def __init__(self, player: ActorCritic, parameters: Parameters) -> None:
        self.model = nn.ModuleDict({"learner": player, "random": RandomPlayer()})
        self.returns: deque[float] = deque(maxlen=parameters.solved_episodes)
        self._player = player
        self._parameters = parameters
        self._optimizer = torch.optim.Adam(player.parameters(), lr=parameters.learning_rate)

    @property
    def solved(self) -> bool:
        """Whether the last games went well enough."""
        is_full = len(self.returns) == self._parameters.solved_episodes
        return is_full and sum(self.returns) / len(self.returns) >= self._parameters.solved_return

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Give the weights of all players."""
        return self.model.state_dict()

    def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, float]:
        """Update the player with one round."""
        rollouts = []
        for batch in batches:
            games = zip(batch.info["episode_agents"], batch.info["episode_returns"], strict=True)
            self.returns.extend(value for agent, value in games if agent == "player_1")
            data = get_policy_data(batch, "learner")
            advantages, returns = generalized_advantage_estimate(data, gamma=1.0, gae_lambda=0.95)
            data |= {"advantages": advantages, "returns": returns}
            # Rows of a column whose game another player finished are no transitions.
            rollouts.append({name: tensor[data["mask"]] for name, tensor in data.items()})
        rows = {name: torch.cat([data[name] for data in rollouts]) for name in rollouts[0]}
        for _ in range(self._parameters.epochs):
            for chosen in torch.randperm(len(rows["rewards"])).split(
                self._parameters.minibatch_size
            ):
                self._step({name: tensor[chosen] for name, tensor in rows.items()})
        return {"mean_return": sum(self.returns) / max(len(self.returns), 1)}

    def _step(self, rows: dict[str, torch.Tensor]) -> None:
        log_probs, entropies, values = self._player.evaluate(
            rows["observations"], rows["actions"], action_mask=rows["action_masks"]
        )
        advantages = rows["advantages"]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratios = (log_probs - rows["log_probs"]).exp()
        clipped = ratios.clamp(1 - self._parameters.clip_range, 1 + self._parameters.clip_range)
        loss = -torch.minimum(ratios * advantages, clipped * advantages).mean()
        loss = loss + 0.5 * functional.mse_loss(values, rows["returns"])
        loss = loss - self._parameters.entropy_coefficient * entropies.mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

"""Teach one player of a game to beat another: policies by name, legal moves, turns.

``PettingZooWorker`` plays tic-tac-toe. ``player_1`` has the policy that learns, ``player_2`` makes
random moves; each policy has tensors of its own. The run ends when the learner wins nearly every
game. The exit status is 0 only if it does.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace

import torch
from gymnasium.spaces import Box, Discrete
from tictactoe import Parameters, SelfLearner, make_worker

from keisei import ParallelManager
from keisei.training.gymnasium import ActorCritic


async def train(parameters: Parameters) -> SelfLearner:
    """Train until the learner wins, or the updates are used up."""
    torch.manual_seed(parameters.seed)
    player = ActorCritic(Box(0, 1, (3, 3, 2), dtype="int8"), Discrete(9))
    learner = SelfLearner(player, parameters)
    config = {"num_workers": parameters.num_workers, "mode": "sync", "seed": parameters.seed}
    manager = ParallelManager(make_worker(parameters), model=learner.model, config=config)
    async with manager:
        for update in range(1, parameters.max_updates + 1):
            metrics = learner.learn(await manager.collect())
            await manager.push_weights(learner.model)
            print(f"update {update:2d}  mean return {metrics['mean_return']:+.2f}")
            if learner.solved:
                break
    return learner


def main() -> int:
    """Read the command line, train, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parameters = Parameters(seed=arguments.seed)
    if arguments.smoke:
        parameters = replace(parameters, max_updates=2, envs_per_worker=4)
    learner = asyncio.run(train(parameters))
    return 0 if learner.solved or arguments.smoke else 1


if __name__ == "__main__":
    sys.exit(main())

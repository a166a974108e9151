"""The program of the README: two worker processes, a learner, and one await."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

import torch
from quickstart_worker import BanditWorker

from keisei import ExperienceBatch, ParallelManager


class Reinforce:
    """Makes arms that pay more than the average likelier."""

    def __init__(self, model: torch.nn.Linear) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def learn(self, batches: Sequence[ExperienceBatch]) -> dict[str, float]:
        """Take one step of REINFORCE (Williams, 1992) with the mean reward as baseline."""
        arms = torch.cat([batch.data["arms"] for batch in batches])
        rewards = torch.cat([batch.data["rewards"] for batch in batches])
        log_chances = torch.log_softmax(self.model.weight[:, 0], dim=0)[arms]
        loss = -(log_chances * (rewards - rewards.mean())).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"mean_return": rewards.mean().item()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what is pushed to the workers."""
        return self.model.state_dict()


async def main(max_steps: int) -> None:
    """Learn which arm pays best."""
    model = torch.nn.Linear(1, 5, bias=False)
    manager = ParallelManager(BanditWorker, model=model, learner=Reinforce(model))
    report = await manager.run(max_steps=max_steps)
    print(f"mean reward {report.metrics['mean_return']:.2f} of 1.00 after {report.num_steps} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a run of a second")
    asyncio.run(main(max_steps=2_000 if parser.parse_args().smoke else 50_000))

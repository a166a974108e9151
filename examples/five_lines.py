"""Train CartPole with two worker processes, evaluate the policy, save it and play it again."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from keisei.training.ppo import PPO

if __name__ == "__main__":
    steps = 2_048 if "--smoke" in sys.argv else 100_000
    ppo = PPO("CartPole-v1", num_workers=2)
    ppo.learn(steps)
    print(f"mean return of 20 episodes: {ppo.evaluate(episodes=20).mean_return:.1f}")
    path = Path(tempfile.gettempdir()) / "cartpole.pt"
    ppo.save(path)
    PPO.load(path).play(render_mode=None)
    path.unlink()

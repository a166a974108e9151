"""PPO: a Gymnasium environment, a number of workers, and a trained policy a few lines later."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.actor_critic import ActorCritic
from keisei.training.evaluation import EnvSource, Evaluation, evaluate_policy
from keisei.training.gymnasium import GymnasiumWorker
from keisei.training.parallel.parallel_manager import ParallelManager
from keisei.training.parallel.run import RunReport
from keisei.training.playing import make_env
from keisei.training.policy_base import PolicyMaker
from keisei.training.ppo_learner import PPOLearner, PPOParameters

if TYPE_CHECKING:
    from keisei.observers import Observer

__all__ = ["PPO", "PPOLearner", "PPOParameters"]

_FORMAT = 1
_POLICIES: dict[str, PolicyMaker] = {"mlp": ActorCritic}
_PLAIN = (str, int, float, bool, type(None))


class PPO:
    """Trains a policy for a Gymnasium environment on a supervised pool of workers.

    ::

        from keisei.training.ppo import PPO

        if __name__ == "__main__":
            ppo = PPO("CartPole-v1", num_workers=2)
            ppo.learn(100_000)
            print(ppo.evaluate(episodes=20).mean_return)
            ppo.save("cartpole.pt")

    Rounds of the sync mode are learned from by ``PPOLearner``; with a ``seed``, training repeats
    itself. Everything else that the pool can do is open: ``ParallelManager`` with ``worker()`` and
    ``learner`` is what ``run`` runs.

    Args:
        env: An environment id, or a callable that returns an environment and can be imported by
            the workers.
        num_workers: Worker processes.
        policy: ``"mlp"`` (``ActorCritic``), or a callable that makes a policy with ``evaluate``
            from the two spaces. Without a memory: ``GymnasiumWorker`` carries none from step to
            step. ``PPOLearner`` learns from a worker of yours that does.
        policy_kwargs: Further arguments for the policy, such as ``normalize_observations``.
        worker_kwargs: Further arguments for ``GymnasiumWorker``, such as ``num_envs``,
            ``rollout_length`` and ``env_kwargs``. Unless given, 4 environments and 256 steps.
        seed: Of initial weights, minibatches and workers; ``None`` draws one.
        **parameters: Those of ``PPOParameters``. Unless ``decay_steps`` is among them, learning
            rate and clip range fall over the steps of each ``learn``.

    Attributes:
        policy: What is trained.
        learner: What trains it.

    Raises:
        ConfigurationError: An argument that cannot work.
    """

    def __init__(
        self,
        env: EnvSource,
        num_workers: int = 2,
        *,
        policy: str | PolicyMaker = "mlp",
        policy_kwargs: Mapping[str, Any] | None = None,
        worker_kwargs: Mapping[str, Any] | None = None,
        seed: int | None = None,
        **parameters: Any,
    ) -> None:
        unknown = sorted(set(parameters) - set(PPOParameters.names()))
        if unknown:
            known = ", ".join(PPOParameters.names())
            raise ConfigurationError(
                [f"{name}: is no parameter of PPO; there are {known}" for name in unknown]
            )
        if isinstance(policy, str) and policy not in _POLICIES:
            known = ", ".join(map(repr, _POLICIES))
            raise ConfigurationError([f"policy = {policy!r}: must be {known}, or a callable"])
        self._env, self._kind, self._seed = env, policy, seed
        self._num_workers = num_workers
        self._policy_kwargs = dict(policy_kwargs or {})
        self._worker_kwargs = {"num_envs": 4, "rollout_length": 256, **(worker_kwargs or {})}
        self._parameters = PPOParameters(**parameters)
        made = make_env(env, self._env_kwargs())
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch.seed() if seed is None else seed)
                self.policy = self._make_policy()(made.observation_space, made.action_space)
        finally:
            made.close()
        if hasattr(self.policy, "initial_state"):
            raise ConfigurationError(
                [
                    f"policy: {type(self.policy).__name__} has a memory, which GymnasiumWorker "
                    "does not carry; run PPOLearner in a ParallelManager with a worker that does"
                ]
            )
        self.learner = PPOLearner(self.policy, self._parameters)

    def worker(self) -> Callable[[], GymnasiumWorker]:
        """Return what a pool makes its workers from."""
        return partial(GymnasiumWorker, self._env, self._make_policy(), **self._worker_kwargs)

    def learn(
        self, total_steps: int, *, progress: bool = True, observers: Sequence[Observer] = ()
    ) -> RunReport:
        """Train for so many environment steps, and return when every worker is gone.

        May be called again, and goes on then. Blocks, and runs an event loop of its own: from a
        coroutine or a notebook, ``await ppo.run(...)``.

        Args:
            total_steps: Steps of all environments together, from now on.
            progress: Whether a live display is shown, if rich is installed.
            observers: Who else is told of every event.

        Raises:
            RuntimeError: There is a running event loop.
            ConfigurationError: A space is not supported, or the configuration is not possible.
            WorkerStartError: A worker cannot start.
            PoolExhausted: Workers failed too often.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.run(total_steps, progress=progress, observers=observers))
        raise RuntimeError("there is a running event loop: await ppo.run(...) instead")

    async def run(
        self, total_steps: int, *, progress: bool = True, observers: Sequence[Observer] = ()
    ) -> RunReport:
        """Do what ``learn`` does, inside an asyncio application; errors as there.

        When cancelled, the update that is being learned is finished, and every worker is ended.
        """
        learner = self.learner
        if self._parameters.decay_steps is None:
            decay_steps = learner.num_steps + total_steps
            learner.parameters = dataclasses.replace(self._parameters, decay_steps=decay_steps)
        shown = [_display(total_steps)] if progress else []
        manager = ParallelManager(
            self.worker(),
            model=self.policy,
            learner=learner,
            config={"num_workers": self._num_workers, "mode": "sync", "seed": self._seed},
            observers=[*observers, *shown],
        )
        return await manager.run(max_steps=total_steps)

    def evaluate(self, episodes: int = 10, *, seed: int | None = None) -> Evaluation:
        """Play whole episodes with the likeliest actions; see ``evaluate_policy``."""
        return evaluate_policy(
            self.policy, self._env, episodes=episodes, seed=seed, env_kwargs=self._env_kwargs()
        )

    def play(self, episodes: int = 1, *, render_mode: str | None = "human") -> Evaluation:
        """Play whole episodes and show them.

        Args:
            episodes: How many.
            render_mode: As the environment calls it; ``None`` shows nothing.
        """
        env_kwargs = {**self._env_kwargs(), "render_mode": render_mode}
        return evaluate_policy(self.policy, self._env, episodes=episodes, env_kwargs=env_kwargs)

    def save(self, path: str | Path) -> None:
        """Write policy, statistics, optimizer and counts to one file, whole or not at all.

        What is no plain value, such as an environment or a policy that is a callable, is left out:
        ``load`` is given it again.

        Raises:
            ConfigurationError: ``policy_kwargs`` or ``worker_kwargs`` hold what is no plain value.
        """
        arguments = {"policy_kwargs": self._policy_kwargs, "worker_kwargs": self._worker_kwargs}
        problems = [
            f"{name}: holds what is no plain value and cannot be saved"
            for name, value in arguments.items()
            if not _is_plain(value)
        ]
        if problems:
            raise ConfigurationError(problems)
        state = {
            "format": _FORMAT,
            "env": self._env if isinstance(self._env, str) else None,
            "policy": self._kind if isinstance(self._kind, str) else None,
            "num_workers": self._num_workers,
            "seed": self._seed,
            "parameters": dataclasses.asdict(self._parameters),
            "weights": self.policy.state_dict(),
            "training": self.learner.training_state(),
            **arguments,
        }
        path = Path(path)
        partial_path = path.with_name(f"{path.name}.partial")
        torch.save(state, partial_path)
        partial_path.replace(path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        env: EnvSource | None = None,
        policy: PolicyMaker | None = None,
        num_workers: int | None = None,
    ) -> Self:
        """Read what ``save`` wrote: to play, to evaluate, or to train on.

        No code in the file is run: it holds tensors and plain values.

        Args:
            path: The file.
            env: Another environment than the saved one, or the callable that it was.
            policy: The callable that it was.
            num_workers: Another number of workers.

        Raises:
            ConfigurationError: Environment or policy were callables, and were not given again; or
                the file is none that ``save`` wrote.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ConfigurationError([f"{path}: is no file of PPO.save, or of another version"])
        saved_env = env or state["env"]
        saved_policy = policy or state["policy"]
        missing = [
            f"{name}: was a callable when {path} was saved; give it to load()"
            for name, value in (("env", saved_env), ("policy", saved_policy))
            if value is None
        ]
        if missing:
            raise ConfigurationError(missing)
        ppo = cls(
            saved_env,
            num_workers or state["num_workers"],
            policy=saved_policy,
            policy_kwargs=state["policy_kwargs"],
            worker_kwargs=state["worker_kwargs"],
            seed=state["seed"],
            **state["parameters"],
        )
        ppo.policy.load_state_dict(state["weights"])
        ppo.learner.load_training_state(state["training"])
        return ppo

    def _make_policy(self) -> Callable[..., nn.Module]:
        maker = _POLICIES[self._kind] if isinstance(self._kind, str) else self._kind
        return partial(maker, **self._policy_kwargs) if self._policy_kwargs else maker

    def _env_kwargs(self) -> dict[str, Any]:
        env_kwargs = self._worker_kwargs.get("env_kwargs")
        return dict(env_kwargs) if isinstance(env_kwargs, Mapping) else {}


def _display(total_steps: int) -> Observer:
    try:
        from keisei.observers.progress import RichProgress
    except ImportError:
        from keisei.observers.log import LogObserver

        return LogObserver()
    return RichProgress(total_steps=total_steps)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return type(value) in _PLAIN

"""Stable-Baselines3: SubprocVecEnv, and PPO as the reference for learning."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from benchmarks import procfs
from benchmarks.cases import Learning, Recovery, Start, Throughput
from benchmarks.plan import Metrics
from benchmarks.ppo import ENVS, LEAST_LEFT, parameters_of
from benchmarks.spawning import bounded
from benchmarks.timing import Meter
from benchmarks.work import Arrays, as_tensors, fields, make_env, num_actions

EPISODES = 100


def throughput(case: Throughput) -> Metrics:
    """Step all environments together and gather batches in the parent."""
    env = _make(case)
    try:
        meter = Meter(case.seconds, case.warmup, fields=fields(case.work))
        rng = np.random.default_rng(case.seed)
        shape = (case.batch, env.num_envs)
        obs: Any = env.reset()
        going = True
        while going:
            arrays: Arrays = {
                "obs": np.empty((*shape, *obs.shape[1:]), obs.dtype),
                "action": rng.integers(num_actions(case.work), size=shape),
                "reward": np.empty(shape, np.float32),
                "terminated": np.empty(shape, np.bool_),
                "truncated": np.zeros(shape, np.bool_),
            }
            for step in range(case.batch):
                arrays["obs"][step] = obs
                obs, rewards, dones, infos = env.step(arrays["action"][step])
                arrays["reward"][step] = rewards
                arrays["terminated"][step] = dones
                for index, info in enumerate(infos):
                    if dones[index] and info.get("TimeLimit.truncated"):
                        arrays["truncated"][step, index] = True
            going = meter.add(as_tensors(arrays), case.batch * env.num_envs)
        return meter.metrics()
    finally:
        env.close()


def _make(case: Throughput) -> SubprocVecEnv:
    torch.set_num_threads(1)
    return SubprocVecEnv([functools.partial(make_env, case.work)] * (case.workers * case.envs))


def recovery(case: Recovery) -> Metrics:
    """Kill one environment's process and report the error that the next steps raise."""
    env = _make(Throughput(work="cartpole", workers=case.workers))
    try:
        env.reset()
        actions = np.zeros(env.num_envs, np.int64)
        env.step(actions)
        pid = env.processes[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            bounded(lambda: env.step(actions), case.patience, "a step after a worker was killed")
        raise RuntimeError("a killed environment went unnoticed")
    finally:
        for process in env.processes:
            process.kill()


def start(case: Start) -> Metrics:
    """Build the vector and reset it, twice."""
    times = []
    size = 0.0
    for _ in range(2):
        began = time.perf_counter()
        env = _make(Throughput(work="cartpole", workers=case.workers))
        try:
            env.reset()
            times.append((time.perf_counter() - began) * 1e3)
            size = procfs.mean_pss_mb(process.pid for process in env.processes if process.pid)
        finally:
            env.close()
    return {"warm_ms": times[1], "cold_ms": times[0], "pss_mb": size}


def learn_dummy(case: Learning) -> Metrics:
    """Train with all environments in this process."""
    return _learn(case, DummyVecEnv)


def learn_subproc(case: Learning) -> Metrics:
    """Train with one process per environment."""
    return _learn(case, SubprocVecEnv)


def _learn(case: Learning, vec_env_cls: type[DummyVecEnv] | type[SubprocVecEnv]) -> Metrics:
    torch.set_num_threads(1)
    parameters = parameters_of(case)

    def remaining(left: float) -> float:
        """Convert the remaining share of ``max_steps`` into that of the schedule."""
        return max(LEAST_LEFT, 1 - (1 - left) * case.max_steps / parameters.decay_steps)

    began = time.perf_counter()
    env = make_vec_env("CartPole-v1", n_envs=ENVS, seed=case.seed, vec_env_cls=vec_env_cls)
    try:
        goal = _Goal(case, began)
        model = PPO(
            "MlpPolicy",
            env,
            n_steps=parameters.rollout_length,
            batch_size=parameters.minibatch_size,
            gae_lambda=parameters.gae_lambda,
            gamma=parameters.gamma,
            n_epochs=parameters.epochs,
            ent_coef=0.0,
            vf_coef=parameters.value_coefficient,
            max_grad_norm=parameters.max_grad_norm,
            learning_rate=lambda left: parameters.learning_rate * remaining(left),
            clip_range=lambda left: parameters.clip_range * remaining(left),
            seed=case.seed,
            device="cpu",
        )
        model.learn(case.max_steps, callback=goal)
    finally:
        env.close()
    if goal.reached is None:
        raise RuntimeError(
            f"mean return {goal.mean:.0f} after {model.num_timesteps:,} steps, goal {case.goal:.0f}"
        )
    return {
        "seconds": goal.reached,
        "steps": float(model.num_timesteps),
        "steps_per_s": model.num_timesteps / goal.reached,
    }


class _Goal(BaseCallback):
    """Ends the training when the mean return of the last episodes is high enough."""

    def __init__(self, case: Learning, began: float) -> None:
        super().__init__()
        self._case, self._began = case, began
        self._returns: deque[float] = deque(maxlen=EPISODES)
        self.mean = 0.0
        self.reached: float | None = None

    def _on_step(self) -> bool:
        elapsed = time.perf_counter() - self._began
        for info in self.locals["infos"]:
            if "episode" in info:
                self._returns.append(float(info["episode"]["r"]))
                self.mean = sum(self._returns) / len(self._returns)
        if len(self._returns) == EPISODES and self.mean >= self._case.goal:
            self.reached = elapsed
            return False
        return elapsed < self._case.max_seconds

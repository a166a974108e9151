"""Environments of several agents, and plain loops over them, for the tests of PettingZooWorker."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import AECEnv, ParallelEnv
from torch import nn


class DigestPolicy(nn.Module):
    """Decides by the digits of an observation: exactly the same alone and in a batch."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.num_actions = int(action_space.n)

    def digest(self, observations):
        parts = [observations] if isinstance(observations, torch.Tensor) else observations.values()
        digits = [
            (part.double() * 1000).round().long().reshape(len(part), -1).sum(1) for part in parts
        ]
        return sum(digits).abs()

    def act(self, observations, action_mask=None):
        digest = self.digest(observations)
        if action_mask is None:
            actions = digest % self.num_actions
        else:
            order = action_mask.cumsum(1) * action_mask
            wanted = digest % action_mask.sum(1) + 1
            actions = (order == wanted[:, None]).long().argmax(1)
        for part in [observations] if isinstance(observations, torch.Tensor) else []:
            part.fill_(7)  # what a policy does to its observations must not reach the record
        return actions, -(digest % 13).float(), self.value_of(digest)

    def value(self, observations):
        return self.value_of(self.digest(observations))

    def value_of(self, digest):
        return (digest % 97).float() * self.scale


class Row(NamedTuple):
    """One transition of an agent, as a plain loop sees it."""

    observation: Any
    mask: Any
    action: int
    log_prob: float
    value: float
    next_value: float
    reward: float
    terminated: bool
    truncated: bool
    episode: int


class Plain:
    """Plays episodes with a policy in the simplest way, and keeps each agent's transitions."""

    def __init__(self, env, seed, policy, num_episodes):
        self.rows = {agent: [] for agent in env.possible_agents}
        self.ended = []
        self.policy = policy
        self.episode = -1
        play = self.play_turns if isinstance(env, AECEnv) else self.play_together
        for number in range(num_episodes):
            self.episode = number
            play(env, seed if number == 0 else None)
        env.close()

    def look(self, observation):
        mask = None
        if isinstance(observation, dict) and "action_mask" in observation:
            mask = np.asarray(observation["action_mask"]).astype(bool)
            observation = observation["observation"]
        return np.array(observation), mask

    def tensor(self, observation):
        tensor = torch.as_tensor(observation)
        return (tensor.float() if tensor.is_floating_point() else tensor)[None].clone()

    def decide(self, observation):
        observation, mask = self.look(observation)
        masks = {} if mask is None else {"action_mask": torch.from_numpy(mask)[None]}
        with torch.no_grad():
            results = self.policy.act(self.tensor(observation), **masks)
        action, log_prob, value = (result.item() for result in results)
        return observation, mask, action, log_prob, value

    def value(self, observation):
        with torch.no_grad():
            return self.policy.value(self.tensor(self.look(observation)[0])).item()

    def add(self, agent, decision, reward, terminated, truncated, after):
        following = 0.0 if terminated else self.value(after)
        row = Row(
            *decision, following, float(reward), bool(terminated), bool(truncated), self.episode
        )
        self.rows[agent].append(row)

    def play_turns(self, env, seed):
        env.reset(seed=seed)
        pending, returns, lengths = {}, {}, {}
        for agent in env.agent_iter():
            observation, reward, terminated, truncated, _ = env.last()
            returns[agent] = returns.get(agent, 0.0) + reward
            if agent in pending:
                lengths[agent] = lengths.get(agent, 0) + 1
                self.add(agent, pending.pop(agent), reward, terminated, truncated, observation)
            if terminated or truncated:
                self.ended.append((agent, returns[agent], lengths.get(agent, 0)))
                env.step(None)
            else:
                pending[agent] = self.decide(observation)
                env.step(pending[agent][2])

    def play_together(self, env, seed):
        observations, _ = env.reset(seed=seed)
        returns, lengths = {}, {}
        while env.agents:
            decided = {agent: self.decide(observations[agent]) for agent in env.agents}
            actions = {agent: decision[2] for agent, decision in decided.items()}
            observations, rewards, terminations, truncations, _ = env.step(actions)
            for agent, decision in decided.items():
                reward = rewards[agent]
                ends = (terminations[agent], truncations[agent])
                self.add(agent, decision, reward, *ends, observations[agent])
                returns[agent] = returns.get(agent, 0.0) + reward
                lengths[agent] = lengths.get(agent, 0) + 1
                if any(ends):
                    self.ended.append((agent, returns[agent], lengths[agent]))


class Scripted(AECEnv):
    """Two agents with uneven turns and rewards by hand: ``"a"`` acts twice for each of ``"b"``.

    The turns of an episode are a, a, b, a, a, b; after the sixth, b is terminated and a truncated.
    After turn t (1, 2, 3 …) a gets t, and b gets 10 t. What an agent sees is the number of turns.
    """

    metadata: ClassVar = {"name": "scripted"}
    possible_agents: ClassVar = ["a", "b"]
    order = "aabaab"

    def __init__(self, **changes):
        self.changes = changes
        self.closed = False

    def observation_space(self, agent):
        return self.changes.get("observation_space", Box(0, 100, (1,), np.float32))

    def action_space(self, agent):
        return self.changes.get("action_space", {}).get(agent, Discrete(3))

    def reset(self, seed=None, options=None):
        self.seeds = [*getattr(self, "seeds", []), seed]
        self.agents = list(self.changes.get("agents", self.possible_agents))
        self.turns = 0
        for name in ("rewards", "_cumulative_rewards", "terminations", "truncations", "infos"):
            setattr(self, name, {agent: {} if name == "infos" else 0 for agent in self.agents})
        self.agent_selection = self.agents[0] if self.agents else None

    def observe(self, agent):
        see = self.changes.get("see", lambda turns: np.array([turns], np.float32))
        return see(self.turns)

    def step(self, action):
        if self.terminations[self.agent_selection] or self.truncations[self.agent_selection]:
            self._was_dead_step(action)
            return
        self.actions = [*getattr(self, "actions", []), action]
        self._cumulative_rewards[self.agent_selection] = 0
        self.turns += 1
        self.rewards = {"a": self.turns, "b": 10 * self.turns}
        if self.turns == len(self.order):
            if self.changes.get("vanish"):
                self.agents = []
                return
            self.terminations["b"] = True
            self.truncations["a"] = True
            self.agent_selection = "a"
        else:
            self.agent_selection = self.order[self.turns]
        self._accumulate_rewards()

    def close(self):
        self.closed = True


class ComingAndGoing(ParallelEnv):
    """Three agents by hand: who is there differs from step to step.

    ========== =========== ==================================================
    after step there       how the others went
    ========== =========== ==================================================
    reset      x, y
    1          x, z        y left without a word; z came
    2          x, z
    3          z           x is terminated
    4                      z is truncated
    ========== =========== ==================================================

    Everybody who acted gets 1, 2, 4, 8 for the steps; sees the number of steps so far.
    """

    metadata: ClassVar = {"name": "coming_and_going"}
    possible_agents: ClassVar = ["x", "y", "z"]
    there = (["x", "y"], ["x", "z"], ["x", "z"], ["z"], [])

    def __init__(self, forget=""):
        self.forget = forget

    def observation_space(self, agent):
        return Dict({"observation": Box(0, 100, (1,), np.int64), "action_mask": Box(0, 1, (2,))})

    def action_space(self, agent):
        return Discrete(2)

    def sights(self, agents):
        mask = np.array([self.steps % 2 == 0, True], np.int8)
        observation = np.array([self.steps])
        return {agent: {"observation": observation, "action_mask": mask} for agent in agents}

    def reset(self, seed=None, options=None):
        self.steps = 0
        self.agents = list(self.there[0])
        return self.sights(self.agents), {agent: {} for agent in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents)
        before, self.steps = list(actions), self.steps + 1
        self.agents = list(self.there[self.steps])
        several = [agent for agent in self.possible_agents if agent in {*before, *self.agents}]
        rewards = dict.fromkeys(several, 2.0 ** (self.steps - 1))
        terminations = {agent: agent == "x" and self.steps == 3 for agent in several}
        truncations = {agent: agent == "z" and self.steps == 4 for agent in several}
        told = {"observations": self.sights(several), "rewards": rewards}
        if self.forget:
            del told[self.forget]["y"]
        infos = {agent: {} for agent in several}
        return told["observations"], told["rewards"], terminations, truncations, infos

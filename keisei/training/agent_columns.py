"""Which agent of which environment has which column, and how its episodes go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keisei.training.agent_envs import Seen
from keisei.training.agent_groups import AgentGroup
from keisei.training.agent_rows import AgentRows, Decision
from keisei.training.rollouts import Observations
from keisei.training.spaces import np

Value = Callable[[Observations], torch.Tensor]


class AgentColumns:
    """The rollouts of all policies, and one ``EnvRecord`` for each environment.

    Attributes:
        agents: Names of the agents, by their numbers.
        rows: The rollout of each policy.
        records: What each environment tells.
    """

    def __init__(
        self,
        groups: Mapping[str, AgentGroup],
        agents: list[Any],
        num_envs: int,
        num_rows: int,
        *,
        in_turns: bool,
    ) -> None:
        self.agents = agents
        self._groups = groups
        self.rows = {
            name: AgentRows(
                group.leaves,
                group.action_space,
                num_rows,
                [
                    (agents.index(agent), f"agent {agent!r} of environment {index}")
                    for index in range(num_envs)
                    for agent in group.agents
                ],
                group.mask_size,
            )
            for name, group in groups.items()
        }
        self.ended: list[tuple[Any, float, int]] = []
        self.records = [EnvRecord(self, groups, index, in_turns) for index in range(num_envs)]

    @property
    def num_transitions(self) -> int:
        """Complete rows of this rollout."""
        return sum(int(np.count_nonzero(rows.mask)) for rows in self.rows.values())

    def begin(self) -> None:
        """Begin a rollout."""
        for rows in self.rows.values():
            rows.begin()
        for record in self.records:
            record.begin_rollout()

    def forget(self) -> None:
        """Drop what is not complete, since new episodes begin everywhere."""
        for rows in self.rows.values():
            rows.forget()

    def decision_of(self, index: int, seen: Seen) -> tuple[str, Decision]:
        """Return the policy of an agent of an environment, and what it must decide."""
        record = self.records[index]
        name, column = record.place_of(seen.agent)
        mask = self._groups[name].mask_of(seen)
        row = record.row_of(seen.agent)
        return name, Decision(row, column, seen.observation, mask, record.episode)

    def note_following(self, index: int, seen: Sequence[Seen]) -> None:
        """Note what the agents of a parallel environment see at the end of the rollout."""
        for one in seen:
            name, column = self.records[index].place_of(one.agent)
            self.rows[name].add_end(column, one.observation)

    def finish(self, values: Mapping[str, Value]) -> dict[str, torch.Tensor]:
        """Hand the rollout over, under the names of its policies."""
        return {
            f"{policy}.{name}" if policy else name: tensor
            for policy, rows in self.rows.items()
            for name, tensor in rows.finish(values[policy]).items()
        }

    def take_episodes(self) -> dict[str, list[Any]]:
        """Hand over which agents' episodes ended since the last call, oldest first."""
        ended, self.ended = self.ended, []
        return {
            "episode_returns": [total for _, total, _ in ended],
            "episode_lengths": [length for _, _, length in ended],
            "episode_agents": [agent for agent, _, _ in ended],
        }


class EnvRecord:
    """Records what one environment tells about its agents; see ``agent_envs.Record``.

    Attributes:
        episode: The number of the episode, from 0.
    """

    def __init__(
        self,
        columns: AgentColumns,
        groups: Mapping[str, AgentGroup],
        index: int,
        in_turns: bool,
    ) -> None:
        self.episode = -1
        self._columns = columns
        self._index = index
        self._places = {
            agent: (name, index * len(group.agents) + number)
            for name, group in groups.items()
            for number, agent in enumerate(group.agents)
        }
        self._step: int | None = None if in_turns else 0
        self._returns: dict[Any, float] = {}
        self._lengths: dict[Any, int] = {}

    def place_of(self, agent: Any) -> tuple[str, int]:
        """Return an agent's policy and column.

        Raises:
            RuntimeError: It is none of the possible agents.
        """
        try:
            return self._places[agent]
        except KeyError:
            known = ", ".join(map(repr, self._places))
            raise RuntimeError(
                f"agent {agent!r} of environment {self._index} is not among the possible agents: "
                f"{known}"
            ) from None

    def row_of(self, agent: Any) -> int:
        """Return where the agent's next decision is recorded, or the one that is open."""
        if self._step is not None:
            return self._step
        name, column = self.place_of(agent)
        return self._columns.rows[name].counts[column]

    def begin_rollout(self) -> None:
        """Begin a rollout."""
        if self._step is not None:
            self._step = 0

    def begin_episode(self) -> None:
        """Begin an episode: all agents are new.

        Raises:
            RuntimeError: An agent has acted and was not told what came of it.
        """
        open_ones = [
            agent
            for agent, (name, column) in self._places.items()
            if self._columns.rows[name].is_open[column]
        ]
        if open_ones:
            raise RuntimeError(
                f"environment {self._index} ended an episode without a last turn of "
                f"{', '.join(map(repr, open_ones))}, in which the last reward is told"
            )
        self.episode += 1
        self._returns = dict.fromkeys(self._places, 0.0)
        self._lengths = dict.fromkeys(self._places, 0)

    def is_full(self, agent: Any) -> bool:
        """Return whether no more of this agent's decisions fit into the rollout."""
        name, _ = self.place_of(agent)
        return self.row_of(agent) == self._columns.rows[name].num_rows

    def reward(
        self, agent: Any, reward: float, *, terminated: bool, truncated: bool, observation: Any
    ) -> None:
        """Note what followed the agent's last decision, if it took one."""
        name, column = self.place_of(agent)
        rows = self._columns.rows[name]
        self._returns[agent] += reward
        if rows.is_open[column]:
            row = self.row_of(agent)
            rows.complete(row, column, reward, terminated=terminated, truncated=truncated)
            self._lengths[agent] += 1
            if truncated and not terminated:
                rows.add_following(row, column, observation)
        if terminated or truncated:
            self._columns.ended.append((agent, self._returns[agent], self._lengths[agent]))
            self._returns[agent], self._lengths[agent] = 0.0, 0

    def end_step(self) -> None:
        """Note that all agents of a parallel environment have had their rewards."""
        if self._step is not None:
            self._step += 1

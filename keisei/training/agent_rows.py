"""The memory of a rollout of several agents: rows in time, one column for each agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from keisei.training.rollouts import Observations
from keisei.training.spaces import Leaf, Space, np, tensor_dtype

_Array = np.ndarray[Any, Any]


class Decision(NamedTuple):
    """One agent that must act now.

    Attributes:
        row: Where it will be recorded.
        column: The agent's column.
        observation: What it sees, as its environment gave it.
        action_mask: What it may do, ``[n]``; ``None`` where masks are off.
        episode: The number of the episode.
    """

    row: int
    column: int
    observation: Any
    action_mask: Any
    episode: int


class AgentRows:
    """Records the decisions of one policy's agents and what became of them.

    A decision is recorded when it is taken, and complete when its reward is known. Rows hold one
    more decision than a rollout has: the one that is not complete at its end begins the next.

    Attributes:
        num_rows: Transitions of each column in one rollout.
        counts: Complete rows of each column.
        is_open: Whether the row after those holds a decision that is not complete.
        mask: ``[T + 1, C]``, the complete rows.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        action_space: Space[Any],
        num_rows: int,
        columns: Sequence[tuple[int, str]],
        mask_size: int | None,
    ) -> None:
        """Make room for columns, each told by its agent's number and what an error calls it."""
        agents = [agent for agent, _ in columns]
        self._labels = [label for _, label in columns]
        self.num_rows = num_rows
        self.counts = [0] * len(agents)
        self.is_open = [False] * len(agents)
        self._leaves = tuple(leaves)
        rows = (num_rows + 1, len(agents))
        data: dict[str, torch.Tensor] = {}
        for leaf in leaves:
            name = f"observations.{leaf.path}" if leaf.path else "observations"
            shape = leaf.space.shape or ()
            data[name] = torch.zeros((*rows, *shape), dtype=tensor_dtype(leaf.space))
        self._observations: list[_Array] = [tensor.numpy() for tensor in data.values()]
        if mask_size is not None:
            data["action_masks"] = torch.ones((*rows, mask_size), dtype=torch.bool)
        shape = action_space.shape or ()
        data["actions"] = torch.zeros((*rows, *shape), dtype=tensor_dtype(action_space))
        for name in ("log_probs", "values", "next_values", "rewards"):
            data[name] = torch.zeros(rows)
        for name in ("terminated", "truncated", "mask"):
            data[name] = torch.zeros(rows, dtype=torch.bool)
        data["agents"] = torch.tensor(agents).expand(rows).clone()
        data["episodes"] = torch.zeros(rows, dtype=torch.int64)
        self._data = data
        arrays: dict[str, _Array] = {name: tensor.numpy() for name, tensor in data.items()}
        self._masks = arrays.get("action_masks")
        self._decided = [
            *self._observations,
            *([] if self._masks is None else [self._masks]),
            *(arrays[name] for name in ("actions", "log_probs", "values", "episodes")),
        ]
        self._actions, self._log_probs = arrays["actions"], arrays["log_probs"]
        self._values, self._episodes = arrays["values"], arrays["episodes"]
        self._rewards, self.mask = arrays["rewards"], arrays["mask"]
        self._terminated, self._truncated = arrays["terminated"], arrays["truncated"]
        self._unvalued: list[tuple[int, int, list[_Array]]] = []

    def begin(self) -> None:
        """Begin a rollout with the decisions that the last one left open."""
        for column in range(len(self.counts)):
            if self.is_open[column]:
                for array in self._decided:
                    array[0, column] = array[self.num_rows, column]
            self.counts[column] = 0
        self.mask.fill(False)
        for array in (self._rewards, self._terminated, self._truncated):
            array.fill(0)
        self._unvalued.clear()

    def forget(self) -> None:
        """Drop the decisions that are not complete: their episodes were cut off."""
        self.is_open = [False] * len(self.is_open)

    def decide(self, decisions: Sequence[Decision], policy: Callable[..., Any]) -> _Array:
        """Record what the agents see and what the policy does.

        Args:
            decisions: At least one, each of another column.
            policy: Given observations ``[B, ...]`` and the masks ``[B, n]`` or ``None``; returns
                actions, log-probabilities and values.

        Returns:
            The actions ``[B, *shape]``, a copy.
        """
        rows = [one.row for one in decisions]
        columns = [one.column for one in decisions]
        for one in decisions:
            for leaf, array in zip(self._leaves, self._observations, strict=True):
                array[one.row, one.column] = self._fitting(
                    one.column, leaf, one.observation, array.dtype
                )
            if self._masks is not None:
                self._masks[one.row, one.column] = one.action_mask
            self._episodes[one.row, one.column] = one.episode
            self.is_open[one.column] = True
        inputs = [torch.from_numpy(array[rows, columns]) for array in self._observations]
        masks = None if self._masks is None else torch.from_numpy(self._masks[rows, columns])
        actions, log_probs, values = policy(self._as_policy_input(inputs), masks)
        self._actions[rows, columns] = actions.detach().cpu().numpy()
        self._log_probs[rows, columns] = log_probs.detach().cpu().numpy()
        self._values[rows, columns] = values.detach().cpu().numpy()
        chosen: _Array = self._actions[rows, columns]
        return chosen

    def complete(
        self, row: int, column: int, reward: float, *, terminated: bool, truncated: bool
    ) -> None:
        """Tell what became of the decision of a row."""
        self._rewards[row, column] = reward
        self._terminated[row, column] = terminated
        self._truncated[row, column] = truncated
        self.mask[row, column] = True
        self.is_open[column] = False
        self.counts[column] = row + 1

    def add_following(self, row: int, column: int, observation: Any) -> None:
        """Note what followed a row after which the agent does not decide in this rollout."""
        leaves = [
            np.array(self._fitting(column, leaf, observation, array.dtype), array.dtype)
            for leaf, array in zip(self._leaves, self._observations, strict=True)
        ]
        self._unvalued.append((row, column, leaves))

    def add_end(self, column: int, observation: Any) -> None:
        """Note what the agent sees at the end of the rollout, if its last row leads there."""
        row = self.num_rows - 1
        if self.mask[row, column] and not (
            self._terminated[row, column] or self._truncated[row, column]
        ):
            self.add_following(row, column, observation)

    def finish(self, value: Callable[[Observations], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fill ``next_values``, empty what is no transition, and hand the rollout over.

        Args:
            value: Estimates the values ``[B]`` of observations.

        Returns:
            ``[T, C, ...]`` by name: the memory itself, which the next rollout overwrites.
        """
        data = {name: tensor[: self.num_rows] for name, tensor in self._data.items()}
        next_values = data["next_values"]
        next_values.copy_(self._data["values"][1:])
        if self._unvalued:
            rows, columns, observations = zip(*self._unvalued, strict=True)
            stacked = [
                torch.from_numpy(np.stack(column)) for column in zip(*observations, strict=True)
            ]
            values = value(self._as_policy_input(stacked)).detach().to(next_values)
            next_values[list(rows), list(columns)] = values
        next_values.masked_fill_(data["terminated"] | ~data["mask"], 0.0)
        for column, count in enumerate(self.counts):
            if self.is_open[column]:
                for array in self._decided:
                    array[self.num_rows, column] = array[count, column]
        holes = ~self.mask[: self.num_rows]
        if holes.any():
            for array in self._decided:
                array[: self.num_rows][holes] = array is self._masks
        return data

    def _as_policy_input(self, tensors: Sequence[torch.Tensor]) -> Observations:
        if len(self._leaves) == 1 and not self._leaves[0].path:
            return tensors[0]
        return {leaf.path: tensor for leaf, tensor in zip(self._leaves, tensors, strict=True)}

    def _fitting(self, column: int, leaf: Leaf, observation: Any, dtype: Any) -> _Array:
        """Take a leaf out of an observation.

        Raises:
            ValueError: It has another shape or kind than its space says.
        """
        value = np.asarray(leaf.take_from(observation))
        shape = leaf.space.shape or ()
        if value.shape != shape or not np.can_cast(value.dtype, dtype, "same_kind"):
            where = f"observation {leaf.path!r}" if leaf.path else "the observation"
            raise ValueError(
                f"{where} of {self._labels[column]} is {value.dtype} of shape {value.shape}; "
                f"its space is {leaf.space}"
            )
        return value

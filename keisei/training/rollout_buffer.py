"""The memory of one rollout: allocated once, written row by row, delivered without copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keisei.training.rollouts import Observations
from keisei.training.spaces import Leaf, Space, np, tensor_dtype

_Array = np.ndarray[Any, Any]


class RolloutBuffer:
    """Tensors ``[T, N, ...]`` on the CPU, and views of their rows, made once.

    A row costs one plain copy for each tensor: nothing is sliced in the loop, and a row of
    observations is at once what is delivered and what the policy reads. Observations have one row
    more than the rest: row ``T`` follows the rollout, and becomes row 0 of the next one.

    Attributes:
        policy_inputs: Observations ``[N, ...]`` for the policy, by row 0 … ``T``; views.
        actions: Arrays ``[N, ...]`` for the environment, by row; views.
        rewards, terminated, truncated, mask: Arrays ``[T, N]``; views.
    """

    def __init__(
        self, leaves: Sequence[Leaf], action_space: Space[Any], num_steps: int, num_envs: int
    ) -> None:
        def allocate(dtype: torch.dtype, *shape: int, rows: int = num_steps) -> torch.Tensor:
            return torch.zeros(rows, num_envs, *shape, dtype=dtype)

        observations = {
            leaf.path: allocate(
                tensor_dtype(leaf.space), *(leaf.space.shape or ()), rows=num_steps + 1
            )
            for leaf in leaves
        }
        self._data = {
            **{
                f"observations.{path}" if path else "observations": tensor[:-1]
                for path, tensor in observations.items()
            },
            "actions": allocate(tensor_dtype(action_space), *(action_space.shape or ())),
            "log_probs": allocate(torch.float32),
            "values": allocate(torch.float32),
            "next_values": allocate(torch.float32),
            "rewards": allocate(torch.float32),
            "terminated": allocate(torch.bool),
            "truncated": allocate(torch.bool),
            "mask": allocate(torch.bool),
        }
        self._paths = tuple(observations)
        self._leaves = [(leaf, observations[leaf.path].numpy()) for leaf in leaves]
        self._decisions = [self._data[name].unbind() for name in ("actions", "log_probs", "values")]
        self._final_rows: list[int] = []
        self._final_envs: list[int] = []
        self._final_observations: list[list[_Array]] = []
        self.policy_inputs = [
            self._as_policy_input([tensor[row] for tensor in observations.values()])
            for row in range(num_steps + 1)
        ]
        self.actions: list[_Array] = list(self._data["actions"].numpy())
        self.rewards: _Array = self._data["rewards"].numpy()
        self.terminated: _Array = self._data["terminated"].numpy()
        self.truncated: _Array = self._data["truncated"].numpy()
        self.mask: _Array = self._data["mask"].numpy()

    def begin(self) -> None:
        """Begin a rollout at the observations that followed the last one."""
        for _, array in self._leaves:
            array[0] = array[-1]
        self.mask.fill(True)
        self._final_rows, self._final_envs, self._final_observations = [], [], []

    def write_observations(self, row: int, observations: Any) -> None:
        """Copy a batch of observations, as a vector environment returns it, into a row."""
        for leaf, array in self._leaves:
            array[row] = leaf.take_from(observations)

    def write_observation(self, row: int, env: int, observation: Any) -> None:
        """Copy one environment's observation into a row."""
        for leaf, array in self._leaves:
            array[row, env] = leaf.take_from(observation)

    def write_decisions(
        self, row: int, actions: torch.Tensor, log_probs: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy what the policy's ``act`` returned, from any device, into a row."""
        action_rows, log_prob_rows, value_rows = self._decisions
        action_rows[row].copy_(actions)
        log_prob_rows[row].copy_(log_probs)
        value_rows[row].copy_(values)

    def find_misfits(self, decisions: Sequence[torch.Tensor], values: torch.Tensor) -> list[str]:
        """Say what is wrong with the results of a policy's ``act`` and ``value``, in lines."""
        rows = [rows[0] for rows in self._decisions]
        names = ("act() returned actions", "act() returned log_probs", "act() returned values")
        if len(decisions) != len(rows):
            return [f"act() returned {len(decisions)} tensors, not (actions, log_probs, values)"]
        problems = []
        for name, tensor, row in zip(
            (*names, "value() returned values"),
            (*decisions, values),
            (*rows, rows[-1]),
            strict=True,
        ):
            if tensor.shape != row.shape:
                problems.append(f"{name} of shape {tuple(tensor.shape)}, not {tuple(row.shape)}")
            elif not torch.can_cast(tensor.dtype, row.dtype):
                problems.append(f"{name} of {tensor.dtype}, which does not fit {row.dtype}")
        return problems

    def add_final_observation(self, row: int, env: int, observation: Any) -> None:
        """Copy the last observation of an episode that was truncated at ``row``."""
        self._final_rows.append(row)
        self._final_envs.append(env)
        self._final_observations.append(
            [np.array(leaf.take_from(observation), array.dtype) for leaf, array in self._leaves]
        )

    def bootstrap_inputs(self) -> Observations:
        """Gather every observation whose value has not been estimated yet.

        Returns:
            ``[N + K, ...]``: the row that follows the rollout, then the K final observations.
        """
        rows = [torch.from_numpy(array[-1]) for _, array in self._leaves]
        if self._final_observations:
            finals = [np.stack(column) for column in zip(*self._final_observations, strict=True)]
            pairs = zip(rows, finals, strict=True)
            rows = [torch.cat([row, torch.from_numpy(final)]) for row, final in pairs]
        return self._as_policy_input(rows)

    def finish(self, bootstrap_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fill ``next_values`` and hand the rollout over.

        Args:
            bootstrap_values: ``[N + K]``, the values of ``bootstrap_inputs()``, on any device.

        Returns:
            The buffer's own tensors by name; the next rollout overwrites them.
        """
        values, next_values = self._data["values"], self._data["next_values"]
        num_envs = values.shape[1]
        bootstrap_values = bootstrap_values.to(next_values)
        next_values[:-1] = values[1:]
        next_values[-1] = bootstrap_values[:num_envs]
        if self._final_rows:
            next_values[self._final_rows, self._final_envs] = bootstrap_values[num_envs:]
        next_values.masked_fill_(self._data["terminated"], 0.0)
        return dict(self._data)

    def _as_policy_input(self, tensors: Sequence[torch.Tensor]) -> Observations:
        if self._paths == ("",):
            return tensors[0]
        return dict(zip(self._paths, tensors, strict=True))

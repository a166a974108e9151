"""The memory of one rollout: allocated once, written row by row, delivered without copying."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from keisei.training.arrays import LeafFit
from keisei.training.rollouts import Observations
from keisei.training.spaces import Leaf, Space, np, tensor_dtype

_Array = np.ndarray[Any, Any]

_SCORES = ("log_probs", "values", "next_values", "rewards")


class RolloutBuffer:
    """Tensors ``[T, N, ...]`` on the CPU, and views of their rows, made once.

    A row costs one copy for each tensor: nothing is sliced in the loop. Observations have one row
    more than the rest: row ``T`` follows the rollout, and becomes row 0 of the next one.

    Attributes:
        actions: Arrays ``[N, ...]``, by row; views of the record, not to be handed out.
        rewards, terminated, truncated, mask: Arrays ``[T, N]``; views.
        episode_starts: Array ``[T + 1, N]``; true where an observation is the first of an episode.
        scores: The block ``[4, T, N]`` of log-probabilities, values, next values and rewards.
        final_envs: The environments of the final observations of this rollout, oldest first.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        action_space: Space[Any],
        num_steps: int,
        num_envs: int,
        *,
        next_observations: bool = False,
    ) -> None:
        def allocate(dtype: torch.dtype, *shape: int, rows: int = num_steps) -> torch.Tensor:
            return torch.zeros(rows, num_envs, *shape, dtype=dtype)

        observations = {
            leaf.path: allocate(
                tensor_dtype(leaf.space), *(leaf.space.shape or ()), rows=num_steps + 1
            )
            for leaf in leaves
        }
        # One block, so that a single sum finds what is not finite.
        self.scores = torch.zeros(len(_SCORES), num_steps, num_envs)
        self._data = {
            **{_named("observations", path): tensor[:-1] for path, tensor in observations.items()},
            "actions": allocate(tensor_dtype(action_space), *(action_space.shape or ())),
            **dict(zip(_SCORES, self.scores, strict=True)),
            "terminated": allocate(torch.bool),
            "truncated": allocate(torch.bool),
            "mask": allocate(torch.bool),
        }
        self._observations = observations
        self._next = {
            path: torch.zeros_like(tensor[:-1])
            for path, tensor in (observations.items() if next_observations else ())
        }
        self._data |= {_named("next_observations", path): x for path, x in self._next.items()}
        arrays = [observations[leaf.path].numpy() for leaf in leaves]
        self._fits = [LeafFit(leaf, a.dtype) for leaf, a in zip(leaves, arrays, strict=True)]
        self._arrays = arrays
        self._rows = [
            list(zip(self._fits, [array[row] for array in arrays], strict=True))
            for row in range(num_steps + 1)
        ]
        self._is_plain = tuple(observations) == ("",)
        self._paths = tuple(observations)
        self._decisions = [self._data[name].unbind() for name in ("actions", "log_probs", "values")]
        self._final_rows: list[int] = []
        self._final_observations: list[list[_Array]] = []
        self.final_envs: list[int] = []
        self.actions: list[_Array] = list(self._data["actions"].numpy())
        self.rewards: _Array = self._data["rewards"].numpy()
        self.terminated: _Array = self._data["terminated"].numpy()
        self.truncated: _Array = self._data["truncated"].numpy()
        self.mask: _Array = self._data["mask"].numpy()
        self.episode_starts: _Array = np.zeros((num_steps + 1, num_envs), np.bool_)
        self._row = 0

    @property
    def num_steps(self) -> int:
        """Rows of a rollout."""
        return len(self.rewards)

    @property
    def keeps_every_end(self) -> bool:
        """Whether final observations are wanted of terminated episodes too."""
        return bool(self._next)

    def begin(self) -> None:
        """Begin a rollout at the observations that followed the last one."""
        for array in self._arrays:
            array[0] = array[-1]
        self.episode_starts[0] = self.episode_starts[-1]
        self.episode_starts[1:] = False
        self.mask.fill(True)
        self._final_rows, self.final_envs, self._final_observations = [], [], []

    def write_observations(self, row: int, observations: Any) -> None:
        """Copy a batch of observations, as a vector environment returns it, into a row.

        Raises:
            ValueError: It does not fit the space.
        """
        self._row = row
        for fit, array in self._rows[row]:
            fit.copy_batch(array, observations, self._where)

    def write_each(self, row: int, observations: Sequence[Any]) -> None:
        """Copy the observations of all environments, one for each, into a row.

        Raises:
            ValueError: One of them does not fit the space.
        """
        self._row = row
        for fit, array in self._rows[row]:
            fit.copy_each(array, observations, self._where)

    def write_decisions(
        self, row: int, actions: torch.Tensor, log_probs: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Copy what the policy's ``act`` returned, from any device, into a row."""
        action_rows, log_prob_rows, value_rows = self._decisions
        action_rows[row].copy_(actions)
        log_prob_rows[row].copy_(log_probs)
        value_rows[row].copy_(values)

    def policy_input(self, row: int, device: str) -> Observations:
        """Return the observations ``[N, ...]`` of a row, copied: the policy may work in place."""
        tensors = [torch.from_numpy(array.copy()) for _, array in self._rows[row]]
        if device != "cpu":
            tensors = [tensor.to(device) for tensor in tensors]
        return tensors[0] if self._is_plain else dict(zip(self._paths, tensors, strict=True))

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
        """Copy the last observation of an episode that ended at ``row``.

        Raises:
            ValueError: It does not fit the space.
        """
        self._row = row + 1
        self._final_rows.append(row)
        self.final_envs.append(env)
        self._final_observations.append(
            [fit.copy_one(observation, env, self._where) for fit in self._fits]
        )

    def bootstrap_input(self, device: str) -> Observations:
        """Gather every observation whose value has not been estimated yet, as copies.

        Returns:
            ``[N + K, ...]``: the row that follows the rollout, then the K final observations.
        """
        following = self.policy_input(self.num_steps, device)
        if not self._final_observations:
            return following
        tensors = [following] if isinstance(following, torch.Tensor) else following.values()
        joined = [
            torch.cat([tensor, torch.from_numpy(np.stack(finals)).to(tensor)])
            for tensor, finals in zip(tensors, self._final_columns(), strict=True)
        ]
        return joined[0] if self._is_plain else dict(zip(self._paths, joined, strict=True))

    def finish(self, bootstrap_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fill ``next_values`` and ``next_observations``, and hand the rollout over.

        Args:
            bootstrap_values: ``[N + K]``, the values of ``bootstrap_input()``, on any device.

        Returns:
            The buffer's own tensors by name; the next rollout overwrites them.

        Raises:
            ValueError: A number is none, or infinite where no learner can use it.
        """
        values, next_values = self._data["values"], self._data["next_values"]
        num_envs = values.shape[1]
        bootstrap_values = bootstrap_values.to(next_values)
        next_values[:-1] = values[1:]
        next_values[-1] = bootstrap_values[:num_envs]
        if self._final_rows:
            places = (self._final_rows, self.final_envs)
            next_values[places] = bootstrap_values[num_envs:]
        next_values.masked_fill_(self._data["terminated"], 0.0)
        for tensor, following in (
            zip(self._next.values(), self._observations.values(), strict=True) if self._next else ()
        ):
            tensor.copy_(following[1:])
        if self._next and self._final_rows:
            for tensor, finals in zip(self._next.values(), self._final_columns(), strict=True):
                tensor[places] = torch.from_numpy(np.stack(finals))
        return dict(self._data)

    def _final_columns(self) -> Iterator[Sequence[_Array]]:
        return zip(*self._final_observations, strict=True)

    def _where(self, env: int) -> str:
        return f"environment {env} at step {self._row} of the rollout"


def _named(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name

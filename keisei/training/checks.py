"""Find numbers in a rollout that are none: once per rollout, by sums, for next to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from keisei.training.spaces import np

if TYPE_CHECKING:
    import torch

_REMEDIES = {
    "observations": "the environment returned it",
    "actions": "the policy chose it: look at its weights and at the observations",
    "log_probs": "the policy gave it: look at its weights and at the observations",
    "values": "the policy gave it: look at its weights and at the observations",
    "next_values": "the policy gave it: look at its weights and at the observations",
    "rewards": "the environment returned it",
}
_MAY_BE_INFINITE = frozenset({"observations", "log_probs"})
"""Policies may have a use for infinite observations; densities may be infinite or zero."""


def check_numbers(data: Mapping[str, torch.Tensor], scores: torch.Tensor) -> None:
    """Refuse a rollout that holds NaN, or infinity where nothing can be learned from it.

    Steps that ``mask`` excludes may hold anything.

    Args:
        data: The rollout.
        scores: The block in which its log-probabilities, values and rewards lie.

    Raises:
        ValueError: Names the tensor, the environment and the step.
    """
    floats = [
        name
        for name, tensor in data.items()
        if tensor.is_floating_point() and name.partition(".")[0] in ("observations", "actions")
    ]
    suspects = [name for name in floats if not _has_finite_sum(data[name])]
    if not _has_finite_sum(scores):
        suspects += ["rewards", "log_probs", "values", "next_values"]
    for name in suspects:
        _check(name, data[name], data["mask"])


def _has_finite_sum(tensor: torch.Tensor) -> bool:
    return bool(np.isfinite(tensor.numpy().sum()))


def _check(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    kind = name.partition(".")[0]
    bad = tensor.isnan() if kind in _MAY_BE_INFINITE else ~tensor.isfinite()
    bad = bad.unsqueeze(-1).flatten(2).any(2) & mask
    if not bad.any():
        return
    step, env = (int(index) for index in bad.nonzero()[0])
    value = tensor[step, env]
    shown = f"{value.item()}" if value.dim() == 0 else "not finite"
    raise ValueError(
        f"{name} of environment {env} at step {step} of the rollout is {shown}: {_REMEDIES[kind]}"
    )

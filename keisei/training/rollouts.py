"""What a learner does with a rollout before its own update: pick observations, advantages."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Observations = torch.Tensor | Mapping[str, torch.Tensor]
"""A batch of observations: one tensor, or tensors by dotted name for a ``Dict`` space."""


def get_observations(data: Mapping[str, torch.Tensor]) -> Observations:
    """Pick the observations out of a rollout, in the form in which a policy takes them.

    Args:
        data: What ``GymnasiumWorker`` delivers: either ``"observations"``, or one
            ``"observations.<name>"`` for each leaf of a ``Dict`` space.

    Returns:
        The tensors of ``data`` themselves, not copies.

    Raises:
        KeyError: There are no observations in ``data``.
    """
    if "observations" in data:
        return data["observations"]
    leaves = entries_below(data, "observations")
    if not leaves:
        raise KeyError(f"no observations among {', '.join(data) or 'no names at all'}")
    return leaves


def entries_below(data: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Pick the tensors under ``"<name>."``, by what follows it in their names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): one for key, one in data.items() if key.startswith(prefix)}


def generalized_advantage_estimate(
    data: Mapping[str, torch.Tensor], *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate advantages and returns of a rollout, never across the end of an episode.

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (2016), equations 11 and 16. With ``next_values`` as ``GymnasiumWorker`` delivers
    them, a terminated episode is worth nothing after its end, a truncated one the value of its
    last observation, and an unfinished one the value of the observation that follows the rollout.

    An infinite or undefined number stays where it belongs: it reaches neither the episodes before
    and after its own, nor, from a step that ``mask`` excludes, any other step.

    Args:
        data: ``rewards``, ``values``, ``next_values`` as floats and ``terminated``, ``truncated``
            as booleans, all ``[T, ...]`` with time first; ``mask``, of the same shape, if there is
            one. Other names are ignored. At terminated steps ``next_values`` is not read.
        gamma: The discount factor, 0 … 1.
        gae_lambda: The weight of longer returns, 0 (one step) … 1 (Monte Carlo).

    Returns:
        Advantages and returns (``advantages + values``), new tensors shaped like ``rewards``,
        without gradient. At steps that ``mask`` excludes both are 0.
    """
    with torch.no_grad():
        rewards, values, terminated = data["rewards"], data["values"], data["terminated"]
        # A product with 0 would not do: 0 times infinity is no number.
        deltas = rewards
        if gamma:
            deltas = rewards + gamma * data["next_values"].masked_fill(terminated, 0.0)
        deltas = deltas - values
        ended = terminated | data["truncated"]
        mask = data.get("mask")
        if mask is not None:
            excluded = mask.logical_not()
            values = values.masked_fill(excluded, 0.0)
            deltas = deltas.masked_fill(excluded, 0.0)
            ended = ended | excluded
        advantages = _discounted_sums(deltas, ended, gamma * gae_lambda)
        return advantages, advantages + values


def _discounted_sums(terms: torch.Tensor, ended: torch.Tensor, decay: float) -> torch.Tensor:
    """Add to each term ``[T, ...]`` the later ones up to an end, discounted by ``decay``."""
    if not decay or not len(terms):
        return terms
    following = nothing = torch.zeros_like(terms[0])
    sums = terms.clone()
    for total, end in reversed(list(zip(sums.unbind(), ended.unbind(), strict=True))):
        following = total.add_(torch.where(end, nothing, following), alpha=decay)
    return sums

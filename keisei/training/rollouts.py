"""What a learner does with a rollout before its own update: pick observations, advantages."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Observations = torch.Tensor | Mapping[str, torch.Tensor]
"""A batch of observations: one tensor, or tensors by dotted name for a ``Dict`` space."""

_PREFIX = "observations."


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
    leaves = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in data.items()
        if name.startswith(_PREFIX)
    }
    if not leaves:
        raise KeyError(f"no observations among {', '.join(data) or 'no names at all'}")
    return leaves


def generalized_advantage_estimate(
    data: Mapping[str, torch.Tensor], *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate advantages and returns of a rollout, never across the end of an episode.

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation" (2016), equations 11 and 16. With ``next_values`` as ``GymnasiumWorker`` delivers
    them, a terminated episode is worth nothing after its end, a truncated one the value of its
    last observation, and an unfinished one the value of the observation that follows the rollout.

    Args:
        data: ``rewards``, ``values``, ``next_values`` as floats and ``terminated``, ``truncated``
            as booleans, all ``[T, ...]`` with time first; other names are ignored.
        gamma: The discount factor, 0 … 1.
        gae_lambda: The weight of longer returns, 0 (one step) … 1 (Monte Carlo).

    Returns:
        Advantages and returns (``advantages + values``), new tensors shaped like ``rewards``,
        without gradient. At steps that a ``mask`` excludes they mean nothing.
    """
    with torch.no_grad():
        values = data["values"]
        deltas = data["rewards"] + gamma * data["next_values"] - values
        ended = data["terminated"] | data["truncated"]
        decays = (gamma * gae_lambda) * ended.logical_not().to(deltas.dtype)
        advantages = torch.empty_like(deltas)
        following = torch.zeros_like(deltas[0])
        rows = zip(deltas.unbind(), decays.unbind(), advantages.unbind(), strict=True)
        for delta, decay, advantage in reversed(list(rows)):
            following = torch.addcmul(delta, decay, following, out=advantage)
        return advantages, advantages + values

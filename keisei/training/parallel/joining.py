"""How several batches become one: their tensors, their info, and their provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keisei.training.legal_actions import LegalActions

Tensors = Mapping[str, torch.Tensor]

_MERGED: dict[str, Callable[[list[Any]], Any]] = {
    "num_steps": sum,
    "weights_version": min,
    "staleness": max,
}
"""How the fields of several batches become one field, where they differ and it can be said."""
_LISTS = frozenset({"legal_actions", "legal_offsets"})


def join_tensors(
    parts: Sequence[Tensors], labels: Sequence[str], dim: int
) -> dict[str, torch.Tensor]:
    """Copy the tensors of several mappings into one new tensor for each name.

    Args:
        parts: Mappings with the same names; tensors of one name have the same dtype and device,
            and the same shape but for ``dim``.
        labels: What to call each part in an error.
        dim: The dimension along which they are put one behind the other. The states of recurrent
            policies have no time, and are joined along the dimension before it.

    Raises:
        ValueError: They do not fit; names each tensor and part.
    """
    first = parts[0]
    states, lists_of_first = states_in(first), lists_in(first)
    dims = dict.fromkeys(first, dim)
    dims |= dict.fromkeys(states, max(dim - 1, 0) if dim >= 0 else dim)  # they have no time
    dims |= dict.fromkeys(lists_of_first, 0)
    problems = [
        problem
        for part, label in zip(parts[1:], labels[1:], strict=True)
        for problem in _misfits(first, part, labels[0], label, dims)
    ]
    problems += [
        f"{name} of shape {list(tensor.shape)} has no dimension {dims[name]}"
        for name, tensor in first.items()
        if not -tensor.dim() <= dims[name] < tensor.dim()
    ]
    if states and dim == 0:
        problems.append("its states are those at the beginning of one rollout: use dim=1")
    if lists_of_first and dim != 0:
        problems.append(
            "its legal_actions are lists in the order of all rows: flatten the batches to "
            "[T * N, ...], use dim=0, or join them with LegalActions"
        )
    if problems:
        raise ValueError(f"batches cannot be joined along dim {dim}: {'; '.join(problems)}")
    joined = {name: torch.cat([part[name] for part in parts], dims[name]) for name in first}
    if lists_of_first:
        lists = [LegalActions(part["legal_actions"], part["legal_offsets"]) for part in parts]
        joined["legal_offsets"] = LegalActions.cat(lists).offsets
    return joined


def states_in(data: Tensors) -> frozenset[str]:
    """Return the names of a recurrent policy's states, which are ``[N, ...]`` for a rollout."""
    if "episode_starts" not in data:
        return frozenset()
    return frozenset(name for name in data if name.partition(".")[0] == "states")


def lists_in(data: Tensors) -> frozenset[str]:
    """Return the names of the lists of legal actions, which have lengths of their own."""
    return _LISTS if data.keys() >= _LISTS else frozenset()


def _misfits(
    first: Tensors, part: Tensors, label: str, other: str, dims: Mapping[str, int]
) -> list[str]:
    """Say in which ways ``part`` does not fit the first one, a line for each."""
    lines = [f"{other} has no {name}, which {label} has" for name in first if name not in part]
    lines += [f"{other} has {name}, which {label} has not" for name in part if name not in first]
    for name, tensor in part.items():
        if name not in first:
            continue
        for what in ("dtype", "device"):
            mine, theirs = getattr(first[name], what), getattr(tensor, what)
            if mine != theirs:
                lines.append(f"{name} has the {what} {mine} in {label} and {theirs} in {other}")
        shapes = [list(first[name].shape), list(tensor.shape)]
        if _without(shapes[0], dims[name]) != _without(shapes[1], dims[name]):
            lines.append(f"{name} has the shape {shapes[0]} in {label} and {shapes[1]} in {other}")
    return lines


def _without(shape: list[int], dim: int) -> list[int | None]:
    return [None if at in (dim, dim + len(shape)) else size for at, size in enumerate(shape)]


def join_info(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the lists that every info has under the same key; other values stay with the parts."""
    return {
        key: [one for info in infos for one in info[key]]
        for key in infos[0]
        if all(isinstance(info.get(key), list) for info in infos)
    }


def join_field(name: str, values: Sequence[Any]) -> Any:
    """Say in one value what several batches tell in a field of provenance.

    Where they agree it is that value. Otherwise the oldest weights, the largest staleness, and -1
    for other numbers; of mappings, each entry that all of them have, joined likewise.
    """
    values = list(values)
    if name in _MERGED:
        return _MERGED[name](values)
    if all(isinstance(value, Mapping) for value in values):
        common = [key for key in values[0] if all(key in value for value in values)]
        return {key: min(value[key] for value in values) for key in common}
    return values[0] if all(value == values[0] for value in values) else -1

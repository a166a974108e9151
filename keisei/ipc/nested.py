"""Nested experiences, among them TensorDicts, as flat ones: names of one level, joined by dots."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

_DEPTH = 64
"""Levels of mappings in one another; more are taken for a mapping that contains itself."""


def flatten(data: Any) -> Any:
    """Replace mappings within an experience by their entries, under dotted names.

    ``{"next": {"obs": x}}`` becomes ``{"next.obs": x}``. Mappings of any kind may be nested, also
    TensorDicts and tensorclasses; tensordict itself is not imported for it.

    Args:
        data: What ``collect`` returned.

    Returns:
        A new dict of the same tensors and arrays; or ``data`` itself, if it is no mapping at all.

    Raises:
        TypeError: A nested mapping is empty, contains itself, has a key that is no string or is
            empty, or two entries get the same dotted name; or a TensorDict holds what is no
            tensor, or stacks what does not fit together. Names the key.
    """
    if not _is_branch(data):
        return data
    flat: dict[Any, Any] = {}
    for path, value in _leaves(data, ()):
        # Keys of the first level are checked where all of a flat experience is.
        name = path[0] if len(path) == 1 else ".".join(path)
        if name in flat:
            raise TypeError(
                f"two entries of the experience have the name {name!r}: a nested entry is named "
                "by its keys joined by dots; rename one of them"
            )
        flat[name] = value
    return flat


def steps_of(data: Any) -> int | None:
    """Return how many steps the batch size of a TensorDict counts; ``None`` for other mappings."""
    batch_size = getattr(data, "batch_size", None)
    if not isinstance(batch_size, torch.Size) or not batch_size:
        return None
    return batch_size.numel()


def _is_branch(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and tensordict.is_tensor_collection(value)


def _leaves(branch: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if len(path) > _DEPTH:
        raise TypeError(f"{_where(path[:1])} contains itself, or nests more than {_DEPTH} mappings")
    for key, value in _items_of(branch, path):
        is_branch = _is_branch(value)
        if path or is_branch:
            if not isinstance(key, str):
                refuse_key(key)
            if not key:
                raise TypeError(f"{_where(path)} has an empty key, which no dotted name can hold")
        below = (*path, key)
        if not is_branch:
            yield below, value
            continue
        _refuse_non_tensor(value, below)
        is_empty = True
        for leaf in _leaves(value, below):
            is_empty = False
            yield leaf
        if is_empty:
            raise TypeError(
                f"{_where(below)} is an empty mapping, of which nothing would arrive; leave it out"
            )


def _items_of(branch: Any, path: tuple[Any, ...]) -> Any:
    """Return the entries of a mapping; those of stacked TensorDicts are stacked now."""
    members = None if type(branch) is dict else getattr(branch, "tensordicts", None)
    if not isinstance(members, list):
        return branch.items()
    names = list(branch.keys())  # to iterate over a TensorDict itself gives slices of it
    extra = sorted(set[str]().union(*(member.keys() for member in members)).difference(names))
    if extra:
        raise TypeError(
            f"{_where(path)} stacks TensorDicts of which only some have {', '.join(extra)}: give "
            "all of them the same keys"
        )
    items = []
    for key in names:
        try:
            items.append((key, branch.get(key)))
        except RuntimeError as error:
            raise TypeError(
                f"{_where((*path, key))} stacks tensors of different shapes; pad them, or join "
                "them and tell their lengths"
            ) from error
    return items


def refuse_key(key: Any) -> NoReturn:
    """Say that a key is no string, and what to write in its place.

    Raises:
        TypeError: Always.
    """
    kind = type(key).__qualname__
    remedy = ""
    if isinstance(key, tuple) and key and all(isinstance(part, str) for part in key):
        remedy = f": write {'.'.join(key)!r}, or nest mappings"
    raise TypeError(f"experience keys must be strings, not {key!r} ({kind}){remedy}")


def _refuse_non_tensor(value: Any, path: tuple[Any, ...]) -> None:
    tensordict = sys.modules.get("tensordict")
    if tensordict is not None and tensordict.is_non_tensor(value):
        raise TypeError(
            f"{_where(path)} is non-tensor data of a TensorDict; small values of other kinds "
            "travel in Experience.info"
        )


def _where(path: tuple[Any, ...]) -> str:
    return f"experience[{'.'.join(map(str, path))!r}]" if path else "the experience"

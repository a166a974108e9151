"""Named tensors as a ``TensorDict``, under names of their own or those that torchrl looks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from keisei.training.parallel.joining import lists_in, states_in

if TYPE_CHECKING:
    from tensordict import TensorDict

Tensors = Mapping[str, torch.Tensor]
Path = tuple[str, ...]

TORCHRL_KEYS: dict[str, tuple[Path, ...]] = {
    "observations": (("observation",),),
    "next_observations": (("next", "observation"),),
    "actions": (("action",),),
    "action_masks": (("action_mask",),),
    # The losses read the one or the other, as tensordict.nn.set_composite_lp_aggregate has it.
    "log_probs": (("action_log_prob",), ("sample_log_prob",)),
    "values": (("state_value",),),
    "next_values": (("next", "state_value"),),
    "rewards": (("next", "reward"),),
    "terminated": (("next", "terminated"),),
    "truncated": (("next", "truncated"),),
    "episode_starts": (("is_init",),),
}
"""Where torchrl's losses, value estimators and buffers look for the tensors of a rollout; what lies
below a name, such as the leaves of ``observations``, lies below its key. Others keep their name."""

_COLUMNS = {"values", "next_values", "rewards", "terminated", "truncated", "episode_starts"}
"""What torchrl wants with a last dimension of one."""


def make_tensordict(
    data: Tensors,
    *,
    batch_size: Sequence[int] | None,
    num_steps: int,
    provenance: Mapping[str, Any],
) -> TensorDict:
    """Nest tensors by the dots in their names; they are the same tensors.

    Args:
        data: Tensors by dotted name.
        batch_size: Leading dimensions that all have; ``None`` takes those that all share, and of
            these only as many as count ``num_steps``, if some do.
        num_steps: Steps in ``data``.
        provenance: Numbers, and mappings of numbers, that every row gets.

    Raises:
        ImportError: tensordict is not installed.
        ValueError: A tensor has not the batch size, or a name lies below another tensor's.
    """
    paths = [(tuple(name.split(".")), tensor) for name, tensor in data.items()]
    if batch_size is None:
        batch_size = _common_size(data.values(), num_steps)
    return _built(paths, batch_size, provenance)


def make_transitions(
    data: Tensors, *, batch_size: Sequence[int] | None, provenance: Mapping[str, Any]
) -> TensorDict:
    """Name the tensors of a rollout as torchrl does, ``TORCHRL_KEYS``; arguments as above.

    The first dimension is named ``"time"``, by which ``GAE`` finds it. ``("next", "done")`` is
    added. The states of recurrent policies and lists of legal actions are left out.

    Raises:
        ImportError: tensordict is not installed.
        ValueError: There are no rewards, or another tensor has not their shape first.
    """
    if batch_size is None:
        if "rewards" not in data:
            raise ValueError(
                "a rollout for torchrl has rewards; this one has "
                f"{', '.join(data) or 'no tensors'}: give batch_size"
            )
        batch_size = data["rewards"].shape
    left_out = states_in(data) | lists_in(data)
    paths = [
        (key, tensor.unsqueeze(-1) if name in _COLUMNS else tensor)
        for name, tensor in data.items()
        if name not in left_out
        for key in _torchrl_keys(name)
    ]
    if "terminated" in data and "truncated" in data:
        done = (data["terminated"] | data["truncated"]).unsqueeze(-1)
        paths.append((("next", "done"), done))
    names = ["time", *[None] * (len(batch_size) - 1)] if batch_size else None
    return _built(paths, batch_size, provenance, names)


def _torchrl_keys(name: str) -> Iterator[Path]:
    head, _, below = name.partition(".")
    for key in TORCHRL_KEYS.get(head, ((head,),)):
        yield (*key, *below.split(".")) if below else key


def _common_size(tensors: Any, num_steps: int) -> tuple[int, ...]:
    """Return the leading dimensions that all tensors share, cut where they count the steps."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    common: list[int] = []
    size = 1
    for sizes in zip(*shapes, strict=False):
        if len(set(sizes)) > 1 or (common and size == num_steps):
            break
        common.append(sizes[0])
        size *= sizes[0]
    return tuple(common)


def _built(
    paths: Sequence[tuple[Path, torch.Tensor]],
    batch_size: Sequence[int],
    provenance: Mapping[str, Any],
    names: Sequence[str | None] | None = None,
) -> TensorDict:
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise ImportError(
            'TensorDicts need tensordict; install it with: pip install "keisei[tensordict]"'
        ) from error
    size = tuple(batch_size)
    misfits = [
        f"{'.'.join(path)} has the shape {list(tensor.shape)}"
        for path, tensor in paths
        if tuple(tensor.shape[: len(size)]) != size
    ]
    if misfits:
        raise ValueError(f"the batch size {list(size)} does not fit: {'; '.join(misfits)}")
    tree: dict[str, Any] = {}
    for path, tensor in (*paths, *_rows_of(("provenance",), provenance, size)):
        _plant(tree, path, tensor)
    return TensorDict(tree, batch_size=size, names=names)


def _rows_of(
    path: Path, values: Mapping[str, Any], size: tuple[int, ...]
) -> Iterator[tuple[Path, torch.Tensor]]:
    """Give every row the same numbers, so that rows may be mixed with those of other batches."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _rows_of((*path, name), value, size)
        else:
            yield (*path, name), torch.full(size, value, dtype=torch.int64)


def _plant(tree: dict[str, Any], path: Path, tensor: torch.Tensor) -> None:
    """Put a tensor into nested dicts, where nothing else stands."""
    node = tree
    for at, part in enumerate(path[:-1], 1):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            _refuse(path, f"it would lie below the tensor {'.'.join(path[:at])!r}")
    taken = node.setdefault(path[-1], tensor)
    if isinstance(taken, dict):
        _refuse(path, "other tensors lie below it")
    if taken is not tensor:
        _refuse(path, "two tensors have this key")


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{'.'.join(path)!r} has no place in a TensorDict: {why}; rename one of them")

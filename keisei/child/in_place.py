"""May weights be copied straight into a model's tensors? Only where it is provably the same.

``load_state_dict`` of a plain module copies each entry into the tensor of that name, in the order
of the state dict, and does nothing else. Then the detour by a copy of all weights can be left out.
Hooks, overridden methods, extra states, lazy or foreign tensors and containers: any of them may
make it do more, and the model's own ``load_state_dict`` is called instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from keisei import state_dicts
from keisei.ipc.layout import Layout

_PLAIN: dict[str, Any] = {
    name: getattr(nn.Module, name)
    for name in (
        "state_dict",
        "load_state_dict",
        "_save_to_state_dict",
        "get_extra_state",
        "set_extra_state",
    )
}
# Those of the norms fill in what older state dicts lack; here every entry is there.
_LOADERS = frozenset(
    one._load_from_state_dict  # noqa: SLF001 - what subclasses override
    for one in (nn.Module, _NormBase, _InstanceNorm)
)
_OVERRIDABLE = (*_PLAIN, "_load_from_state_dict")
_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_CONTAINERS = ("_parameters", "_buffers", "_modules")
_TENSORS = frozenset({torch.Tensor, nn.Parameter})


class _NotPlain(Exception):
    """The model's ``load_state_dict`` may do more than copy."""


class InPlace:
    """Finds the tensors of one model into which weights may be copied."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._own: list[str] = []
        self._given: list[str] = []

    def targets(self, model: Any, layout: Layout) -> dict[str, torch.Tensor] | None:
        """Return the model's tensors by the names in ``layout``, in the order of its state dict.

        The whole model is looked through each time, which costs a fraction of ``state_dict()``:
        whatever was added to it since the last time is found.

        Returns:
            ``None`` if the model's ``load_state_dict`` must be called.
        """
        if (
            not isinstance(model, nn.Module)
            or torch.__future__.get_swap_module_params_on_conversion()
        ):
            return None
        try:
            tensors = dict(_entries(model, "", set()))
        except _NotPlain:
            return None
        own = list(tensors)
        if layout is not self._layout or own != self._own:
            self._match(own, layout)
        if len(self._given) != len(own):
            return None
        targets = dict(zip(self._given, tensors.values(), strict=True))
        if any(targets[field.name].shape != field.shape for field in layout.fields):
            return None
        return targets

    def _match(self, own: list[str], layout: Layout) -> None:
        """Find the model's names among those of ``layout``."""
        names = state_dicts.translation([field.name for field in layout.fields], own)
        given = {ours: name for name, ours in names.items()}
        self._layout, self._own = layout, own
        self._given = [given[name] for name in own] if given.keys() == set(own) else []


def _entries(
    module: nn.Module, prefix: str, types: set[type]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the entries of a plain module's state dict, the tensors themselves.

    Raises:
        _NotPlain: This module or one inside it is not plain.
    """
    own = vars(module)
    if type(module) not in types:
        _check_type(type(module))
        types.add(type(module))
    if any(own[hooks] for hooks in _HOOKS) or any(name in own for name in _OVERRIDABLE):
        raise _NotPlain
    if any(type(own[container]) not in (dict, OrderedDict) for container in _CONTAINERS):
        raise _NotPlain
    fleeting = own["_non_persistent_buffers_set"]
    persistent = [item for item in own["_buffers"].items() if item[0] not in fleeting]
    for name, tensor in (*own["_parameters"].items(), *persistent):
        if tensor is not None:
            if type(tensor) not in _TENSORS or tensor.is_meta:
                raise _NotPlain
            yield prefix + name, tensor
    for name, child in own["_modules"].items():
        if child is not None:
            yield from _entries(child, f"{prefix}{name}.", types)


def _check_type(kind: type) -> None:
    """Refuse a class that has methods of its own in place of those that load."""
    if any(getattr(kind, name, None) is not plain for name, plain in _PLAIN.items()):
        raise _NotPlain
    if getattr(kind, "_load_from_state_dict", None) not in _LOADERS:
        raise _NotPlain

"""What can be pushed as weights: modules, state dicts, learners and snapshots, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from keisei.exceptions import WeightsError
from keisei.training.parallel.snapshots import PreparedModel, cpu_copies, unpack_all

_COMPILED = "_orig_mod."
_EXTRA_STATE = "_extra_state"


class HasStateDict(Protocol):
    """A module, a learner, or anything else that names its tensors."""

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors by name."""
        ...


WeightsSource = HasStateDict | Mapping[str, torch.Tensor] | PreparedModel
"""What ``push_weights`` takes."""


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict by the names that the plain module has for them.

    The ``_orig_mod.`` that ``torch.compile`` puts before a module's names is left out.

    Raises:
        WeightsError: It holds something that is not a dense tensor with values, or nothing.
    """
    bad = [f"{name} is {flaw}" for name, value in state.items() if (flaw := _flaw(name, value))]
    if bad:
        raise WeightsError("weights must be dense tensors: " + "; ".join(bad))
    if not state:
        raise WeightsError("weights must hold at least one tensor; this state dict is empty")
    if not any(_COMPILED in name for name in state):
        return dict(state)
    plain = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise WeightsError(
            f"the state dict holds the same tensor with and without {_COMPILED!r} in its name: it "
            "names a module and its compiled form; push one of them"
        )
    return plain


def state_of(source: WeightsSource) -> Mapping[str, Any]:
    """Return the state dict of what is to be pushed, without copying.

    A ``DataParallel`` or ``DistributedDataParallel`` wrapper is left out.

    Raises:
        WeightsError: It is a snapshot with a damaged payload.
    """
    if isinstance(source, PreparedModel):
        tensors, damaged = unpack_all(source.model_data)
        if damaged:
            raise WeightsError("the snapshot cannot be pushed: " + "; ".join(damaged))
        return tensors
    if isinstance(source, Mapping):
        return source
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    if isinstance(source, parallel):
        state: Mapping[str, Any] = source.module.state_dict()
        return state
    return source.state_dict()


def copy_of(source: WeightsSource) -> dict[str, torch.Tensor]:
    """Return copies of what is to be pushed, on the CPU, by the names of the plain module.

    Raises:
        WeightsError: It holds something that is not a dense tensor with values, or nothing.
    """
    return cpu_copies(tensors_of(state_of(source)))


def _flaw(name: str, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        if name.rpartition(".")[2] == _EXTRA_STATE:
            return (
                "extra state of a module (get_extra_state), which is no tensor; leave it out of "
                "what you push, or keep what it holds in buffers"
            )
        return f"a {type(value).__qualname__}"
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        return "a nested, quantized or sparse tensor"
    return "on the meta device and has no values" if value.is_meta else ""

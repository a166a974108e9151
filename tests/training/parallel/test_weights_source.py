"""What can be pushed as weights: modules, state dicts and learners, named tensor by tensor."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from keisei.exceptions import WeightsError
from keisei.training.parallel.weights_source import state_of, tensors_of


def test_tensors_are_taken_from_modules_and_mappings_alike():
    """A module, anything with a state_dict, and a mapping give their tensors, not copies."""
    module = torch.nn.Linear(2, 3)
    state = module.state_dict()
    for source in (module, state, SimpleNamespace(state_dict=lambda: state)):
        tensors = tensors_of(state_of(source))
        assert type(tensors) is dict
        assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == {
            "weight": module.weight.data_ptr(),
            "bias": module.bias.data_ptr(),
        }


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: {"a": torch.zeros(1), "b": 3, "c": [torch.zeros(1)]},
            "weights must be dense tensors: b is a int; c is a list",
        ),
        (
            lambda: {"s": torch.eye(2).to_sparse()},
            "weights must be dense tensors: s is a nested, quantized or sparse tensor",
        ),
        (
            lambda: {"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
            "weights must be dense tensors: q is a nested, quantized or sparse tensor",
        ),
        (
            lambda: torch.nn.Linear(1, 1, bias=False, device="meta"),
            "weights must be dense tensors: weight is on the meta device and has no values",
        ),
        (dict, "weights must hold at least one tensor; this state dict is empty"),
        (torch.nn.ReLU, "weights must hold at least one tensor; this state dict is empty"),
    ],
)
def test_what_cannot_be_published_is_named(make, message):
    """Values that are no dense tensors, and empty state dicts, are refused by name."""
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        tensors_of(state_of(make()))

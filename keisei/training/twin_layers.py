"""Hidden layers of an actor and a critic that share no weights and run as one batched product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import nn


class TwinNetwork(nn.Sequential):
    """Linear layers with tanh, twice: ``[2, B, inputs]`` to ``[2, B, outputs]``.

    Args:
        sizes: Units of the input and of each layer.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        layers = [(_TwinLinear(*pair), nn.Tanh()) for pair in pairwise(sizes)]
        super().__init__(*chain.from_iterable(layers))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the features; hooks of the ``Tanh`` modules do not run.

        With networks of this size the call of a module takes as long as the tanh itself.
        """
        for layer in self:
            inputs = inputs.tanh() if isinstance(layer, nn.Tanh) else layer(inputs)
        return inputs


class _TwinLinear(nn.Module):
    """One linear layer of the actor and one of the critic: ``[2, B, inputs]`` to ``outputs``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(2, 1, outputs))
        for weight in self.weight.unbind():
            nn.init.orthogonal_(weight, math.sqrt(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


def output_layer(inputs: int, outputs: int, *, gain: float) -> nn.Linear:
    """Make the last layer of the actor or the critic, with biases of 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer

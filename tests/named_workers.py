"""Workers for the tests of named weights; child processes import this module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from keisei.testing.failpoints import failpoint
from keisei.worker import Experience, Worker, WorkerContext


class Scale(torch.nn.Module):
    """One parameter, of any size."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(size))


class Several(Worker):
    """Has a model for some names, and asks for others when it collects.

    Args:
        names: The names that it has models for.
        asked: The names that it asks for in each ``collect``.
        size: Of each model.
    """

    context: WorkerContext

    def __init__(
        self, names: Sequence[str] = ("main",), asked: Sequence[str] = (), size: int = 3
    ) -> None:
        self.names = names
        self.asked = list(asked)
        self.size = size
        self.kept: list[Any] = []

    def setup(self, context: WorkerContext) -> None:
        self.context = context
        self.models = {name: Scale(self.size) for name in self.names}

    def collect(self) -> Experience:
        data = {f"model {name}": model.w.detach() for name, model in self.models.items()}
        info: dict[str, Any] = {"pid": os.getpid()}
        for name in self.asked:
            tensors, info[name] = self.context.weights(name)
            data[f"asked {name}"] = tensors["w"]
        failpoint("collected")
        return Experience(data or {"x": torch.zeros(1)}, info, num_steps=1)

    def on_command(self, command: str, data: Any) -> Any:
        match command:
            case "ask":
                self.asked = data
            case "add":
                self.models[data] = Scale(self.size)
            case "look":
                tensors, version = self.context.weights(data)
                return {name: tensor.tolist() for name, tensor in tensors.items()}, version
            case "keep":
                self.kept.append(self.context.weights(data).tensors)
            case "kept":
                return [tensors["w"].tolist() for tensors in self.kept]
            case "sum kept":
                return sum(float(tensors["w"].sum(dtype=torch.float64)) for tensors in self.kept)
            case "scribble":
                tensors, _ = self.context.weights(data)
                tensors["w"].fill_(-1.0)
                return tensors["w"].tolist()
            case "same":
                first, second = (self.context.weights(data).tensors["w"] for _ in range(2))
                return first.data_ptr() == second.data_ptr()
            case "descriptors":
                return len(list(Path("/proc/self/fd").iterdir()))
            case "reach":
                failpoint(data)
            case _:
                return super().on_command(command, data)
        return None


class CoroutineSeveral(Several):
    """The same, with a coroutine that collects."""

    async def collect(self) -> Experience:  # type: ignore[override]
        return super().collect()


class AsksInSetup(Several):
    """Needs weights before it can begin."""

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        self.first = context.weights("base").tensors["w"].tolist()

    def on_command(self, command: str, data: Any) -> Any:
        return self.first if command == "first" else super().on_command(command, data)


class DelicateModel(Scale):
    """Cannot be loaded with what is not finite."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        if not torch.isfinite(state["w"]).all():
            raise ArithmeticError("not finite")
        return super().load_state_dict(state, strict, assign)


class Delicate(Several):
    """Its models cannot be loaded, or its ``collect`` used, with what is not finite."""

    def __init__(self, names: Sequence[str], where: str) -> None:
        super().__init__(names)
        self.where = where

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        if self.where == "load_weights":
            self.models = {name: DelicateModel() for name in self.names}

    def collect(self) -> Experience:
        for name, model in self.models.items():
            if not torch.isfinite(model.w).all():
                raise ArithmeticError(f"{name} is not finite")
        return super().collect()


def weights(value: float, size: int = 3) -> dict[str, torch.Tensor]:
    return {"w": torch.full((size,), float(value))}

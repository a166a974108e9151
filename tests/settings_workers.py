"""Workers for the tests of settings and checkpoints; child processes import this module."""

from __future__ import annotations

from typing import Any

import torch

from keisei.testing.failpoints import Gate
from keisei.worker import Experience, Worker, WorkerContext


class Set(Worker):
    """Tells with each experience what it is set to, and refuses what it is told to refuse.

    Args:
        gate: Each ``collect`` stands there first, as "worker.incarnation".
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate

    def setup(self, context: WorkerContext) -> None:
        self.context = context
        self.current = dict(context.settings)
        self.heard: list[dict[str, Any]] = []

    def configure(self, settings: dict[str, Any]) -> None:
        assert settings == dict(self.context.settings)
        self.heard.append(dict(settings))
        refusal = settings.get("refuse")
        if refusal == self.context.worker_id:
            raise ValueError("these settings will not do")
        self.current = settings

    def experience(self) -> Experience:
        return Experience({"x": torch.zeros(1)}, {"settings": dict(self.current)})

    def collect(self) -> Experience:
        if self.gate is not None:
            self.gate.hold(f"{self.context.worker_id}.{self.context.incarnation}")
        return self.experience()

    def on_command(self, command: str, data: Any) -> Any:
        match command:
            case "heard":
                return self.heard
            case "context":
                return dict(self.context.settings)
            case _:
                return super().on_command(command, data)


class SetByCoroutines(Set):
    """The same, with coroutines for hooks."""

    async def configure(self, settings: dict[str, Any]) -> None:  # type: ignore[override]
        super().configure(settings)

    async def collect(self) -> Experience:  # type: ignore[override]
        before = dict(self.context.settings)
        if self.gate is not None:
            await self.gate.wait(f"{self.context.worker_id}.{self.context.incarnation}")
        assert before == dict(self.context.settings) == self.current, "changed during a collect"
        return self.experience()


class NeverSatisfied(Set):
    """Refuses every change, and what it had before it too."""

    def configure(self, settings: dict[str, Any]) -> None:
        raise ValueError("never")


class FailsAtFirst(Worker):
    """Raises in the first collect of some of its slots' first processes, or later."""

    def __init__(self, at: int = 1, worker_id: int = 0, always: bool = True) -> None:
        self.at, self.worker_id, self.always, self.number = at, worker_id, always, 0

    def setup(self, context: WorkerContext) -> None:
        self.context = context

    def collect(self) -> dict[str, torch.Tensor]:
        self.number += 1
        is_hit = self.context.worker_id == self.worker_id and self.number >= self.at
        if is_hit and (self.always or self.context.incarnation == 0):
            raise ValueError("a mistake in collect")
        return {"x": torch.zeros(1)}

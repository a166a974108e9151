"""The worker of the soak: every experience can be proven whole, and tells its weights."""

from __future__ import annotations

import random
import zlib

import torch

from keisei.worker import Experience, Worker, WorkerContext

WEIGHTS = 4096


class SoakWorker(Worker):
    """Delivers random bytes with their checksum, and a summary of the weights it holds."""

    def setup(self, context: WorkerContext) -> None:
        self.context = context
        self.random = random.Random(context.seed)
        self.count = 0
        self.model = torch.nn.Linear(WEIGHTS, 1, bias=False)

    def collect(self) -> Experience:
        payload = self.random.randbytes(self.random.choice((1, 1000, 20_000, 300_000)))
        weights = self.model.weight.detach()
        self.count += 1
        return Experience(
            {
                "payload": torch.frombuffer(bytearray(payload), dtype=torch.uint8),
                "weights": torch.stack([weights.min(), weights.max()]),
            },
            info={"count": self.count, "checksum": zlib.crc32(payload)},
            num_steps=1,
        )

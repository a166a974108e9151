"""ExperienceBatch: an experience as the learner receives it, with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keisei.naming import public
from keisei.protocol.batches import PendingBatch

if TYPE_CHECKING:
    import torch


@public
@dataclass(slots=True, eq=False, repr=False)
class ExperienceBatch:
    """Named tensors that one ``collect`` of one worker returned.

    The tensors lie in memory shared with the worker; nothing was copied since the worker wrote
    them. They are the receiver's alone: the worker writes there again only when the last tensor,
    view or slice of them is gone, in whatever thread. Keeping many keeps their memory; ``clone``
    copies.

    Attributes:
        data: Tensors by name, on the CPU, writable.
        info: The small values that came along.
        num_steps: Environment steps in ``data``.
        worker_id: The slot that collected it.
        incarnation: The process of that slot.
        sequence: 0, 1, 2 … within the incarnation, without gaps unless batches were dropped.
        weights_version: The version that it was collected with; 0 is none.
        staleness: Versions pushed since, when it was delivered (the policy lag).
        seed: The worker's seed.
    """

    data: Mapping[str, torch.Tensor]
    info: Mapping[str, Any]
    num_steps: int
    worker_id: int = 0
    incarnation: int = 0
    sequence: int = 0
    weights_version: int = 0
    staleness: int = 0
    seed: int = 0

    @classmethod
    def of(cls, pending: PendingBatch, newest_version: int) -> ExperienceBatch:
        """Wrap the shared memory of what has arrived as tensors, which own the memory too."""
        return cls(
            pending.opened(),
            pending.info,
            pending.num_steps,
            pending.worker_id,
            pending.incarnation,
            pending.sequence,
            pending.version,
            max(0, newest_version - pending.version),
            pending.seed,
        )

    def release(self) -> None:
        """Drop this batch's tensors; ``data`` is empty afterwards.

        The memory goes back to the worker as soon as no other tensor refers to it, so a tensor
        that was kept is never overwritten. Deleting the batch has the same effect.
        """
        self.data = {}

    def clone(self) -> ExperienceBatch:
        """Return a copy in ordinary memory, which keeps nothing of the worker's."""
        copies = {name: tensor.clone() for name, tensor in self.data.items()}
        return replace(self, data=copies, info=dict(self.info))

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}: {list(v.shape)} {v.dtype}" for k, v in self.data.items())
        return (
            f"<ExperienceBatch worker {self.worker_id}.{self.incarnation} #{self.sequence} "
            f"v{self.weights_version} ({self.num_steps} steps) {{{fields}}}>"
        )

"""ExperienceBatch: an experience as the learner receives it, with its provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from keisei.naming import public
from keisei.protocol.batches import PendingBatch
from keisei.training.parallel.joining import join_field, join_info, join_tensors
from keisei.training.parallel.tensordicts import make_tensordict, make_transitions

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDict

_NOT_OF_A_ROW = {"data", "info", "num_steps", "parts"}


@public
@dataclass(slots=True, eq=False, repr=False)
class ExperienceBatch(Mapping[str, "torch.Tensor"]):
    """Named tensors that one ``collect`` of one worker returned: a mapping, with its provenance.

    ``batch["rewards"]``, ``"rewards" in batch``, ``len(batch)``, ``batch.items()`` and iteration
    are those of ``data``; a nested entry has its dotted name, or a tuple:
    ``batch["next", "obs"]`` is ``batch["next.obs"]``. Two batches are equal only if they are the
    same object.

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
        weights_versions: The version of each name of weights that the worker had taken: those that
            its models were filled with, and those that it asked for. ``weights_version`` is that
            of "main".
        settings_version: The version of the settings that it was collected with; 0 is those that
            the manager began with.
        parts: What ``cat`` joined, in order: each batch's provenance and info, without tensors.
            Empty for a batch that a worker sent.
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
    weights_versions: Mapping[str, int] = field(default_factory=dict)
    settings_version: int = 0
    parts: tuple[ExperienceBatch, ...] = ()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

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
            weights_versions=dict(pending.versions),
            settings_version=pending.settings_version,
        )

    @classmethod
    def cat(cls, batches: Sequence[ExperienceBatch], dim: int = 0) -> ExperienceBatch:
        """Join batches to one, whose tensors are copies in ordinary memory.

        The batches stay as they are, and keep their shared memory as long as they live. Rollouts
        ``[T, N]`` of several workers are joined along ``dim=1``: along 0 the last step of one
        would come before the first of another. Where a rollout has ``episode_starts``, its
        ``states`` ``[N, ...]`` are joined along 0 then. Lists of legal actions can be joined along
        0 only.

        Args:
            batches: At least one; with the same names, dtypes and devices, and the same shapes
                but for ``dim``.
            dim: The dimension along which each tensor is joined, negative from the last.

        Returns:
            A batch whose ``parts`` are the provenance of each. Its own ``num_steps`` is the sum.
            Where the parts agree its provenance is theirs; otherwise ``weights_version`` is the
            oldest, ``staleness`` the largest, and other numbers are -1. Of ``info``, lists that
            all have under a key are joined; other values are in ``parts[i].info``.

        Raises:
            ValueError: There are none, or they do not fit; names the tensors and batches.
        """
        if not batches:
            raise ValueError("there are no batches to join: cat() needs at least one")
        labels = [f"batches[{number}]" for number in range(len(batches))]
        data = join_tensors([batch.data for batch in batches], labels, dim)
        told = {
            field.name: join_field(field.name, [getattr(batch, field.name) for batch in batches])
            for field in fields(cls)
            if field.name not in ("data", "info", "parts")
        }
        parts = (part for batch in batches for part in batch.parts or (replace(batch, data={}),))
        info = join_info([batch.info for batch in batches])
        return cls(data=data, info=info, parts=tuple(parts), **told)

    def release(self) -> None:
        """Drop this batch's tensors; ``data`` is empty afterwards.

        The memory goes back to the worker as soon as no other tensor refers to it, so a tensor
        that was kept is never overwritten. Deleting the batch has the same effect.
        """
        self.data = {}

    def clone(self) -> ExperienceBatch:
        """Return a copy in ordinary memory, which keeps nothing of the worker's."""
        return self._with(lambda tensor: tensor.clone())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ExperienceBatch:
        """Return a batch whose tensors are on ``device``, with the same provenance.

        Tensors that are there already are the same ones, in the same memory, as with
        ``torch.Tensor.to``; others are copies, and this batch may be released at once.

        Args:
            device: Where to.
            non_blocking: Let copies to a GPU go on beside the program. Only those from pinned
                memory do (``pin_memory``). Copies to the CPU must be waited for
                (``torch.cuda.synchronize``) before they are read.
        """
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ExperienceBatch:
        """Return a copy in page-locked memory, from which a GPU copies beside the program.

        It keeps nothing of the worker's. It pays where the copy to the GPU overlaps with work;
        ``to`` alone is faster where it does not.

        Raises:
            RuntimeError: There is no accelerator that knows of such memory.
        """
        return self._with(lambda tensor: tensor.pin_memory())

    def to_tensordict(
        self,
        keys: Literal["own", "torchrl"] = "own",
        *,
        batch_size: Sequence[int] | None = None,
        provenance: bool = True,
    ) -> TensorDict:
        """Return the tensors as a ``TensorDict``, nested by the dots in their names.

        They are the same tensors, in the same memory. ``info`` stays here.

        Args:
            keys: ``"own"`` keeps the names. ``"torchrl"`` gives the tensors of a rollout the keys
                that torchrl's losses, ``GAE`` and buffers look for: ``observations`` becomes
                ``"observation"``, ``rewards`` ``("next", "reward")`` of shape ``[T, N, 1]``, and
                so on (``keisei.training.parallel.tensordicts.TORCHRL_KEYS``); it names the first
                dimension ``"time"`` and adds ``("next", "done")``. What belongs to a rollout and
                not to its steps is left out: ``states`` (beside ``episode_starts``), and
                ``legal_actions`` with ``legal_offsets``.
            batch_size: Leading dimensions that every tensor has. By default those that all share,
                up to where they count ``num_steps`` (``"own"``), or those of ``rewards``
                (``"torchrl"``).
            provenance: Whether to add ``("provenance", "worker_id")``, ``"weights_version"``,
                ``"staleness"`` and the like, each ``int64`` and of the batch size, so that
                rows tell where they come from also in a replay buffer. To keep them apart, join
                TensorDicts rather than batches.

        Raises:
            ImportError: tensordict is not installed: ``pip install "keisei[tensordict]"``.
            ValueError: The tensors have not the batch size, or their names cannot be nested; says
                which.
        """
        told = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if provenance and field.name not in _NOT_OF_A_ROW
        }
        if keys == "torchrl":
            return make_transitions(self.data, batch_size=batch_size, provenance=told)
        if keys != "own":
            raise ValueError(f'keys = {keys!r}: must be "own" or "torchrl"')
        return make_tensordict(
            self.data, batch_size=batch_size, num_steps=self.num_steps, provenance=told
        )

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ExperienceBatch:
        changed = {name: change(tensor) for name, tensor in self.data.items()}
        return replace(self, data=changed, info=dict(self.info))

    def __getitem__(self, name: str | tuple[str, ...]) -> torch.Tensor:
        key: str = _dotted(name)
        try:
            return self.data[key]
        except KeyError:
            known = f"it has {', '.join(self.data)}" if self.data else "it was released"
            raise KeyError(f"no tensor {key!r} in this batch: {known}") from None

    def __contains__(self, name: object) -> bool:
        return _dotted(name) in self.data

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}: {list(v.shape)} {v.dtype}" for k, v in self.data.items())
        origin = f"worker {self.worker_id}.{self.incarnation} #{self.sequence}"
        origin = f"of {len(self.parts)}" if self.parts else origin
        steps = f"({self.num_steps} steps)"
        return f"<ExperienceBatch {origin} v{self.weights_version} {steps} {{{shown}}}>"


def _dotted(name: Any) -> Any:
    return ".".join(map(str, name)) if isinstance(name, tuple) else name

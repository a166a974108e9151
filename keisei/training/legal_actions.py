"""LegalActions: which of very many actions each position allows, as index lists of any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class LegalActions:
    """For each of B positions the indices of the actions that it allows.

    Where an action set is very wide and few of it are legal, such as the moves of a board game, the
    lists are much shorter than a mask ``[B, n]``, and policies that are given them compute
    probabilities of the legal actions alone. An index counts from 0, as the logits do, also where
    the action space has a ``start``; each stands in its list once.

    Nothing is copied: the tensors are the caller's. The lists of row i are
    ``indices[offsets[i]:offsets[i + 1]]``; a list may be empty, but no action can be drawn there.

    Attributes:
        indices: ``int64 [K]``, the lists of all positions, one after the other.
        offsets: ``int64 [B + 1]``, 0 … K, on the same device.

    Raises:
        ValueError: The tensors have other dtypes or dimensions.
    """

    indices: torch.Tensor
    offsets: torch.Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("indices", self.indices), ("offsets", self.offsets)):
            if tensor.dtype is not torch.int64 or tensor.dim() != 1:
                raise ValueError(
                    f"{name} must be int64 with one dimension, not {tensor.dtype} "
                    f"{list(tensor.shape)}; LegalActions.from_lists makes them from plain lists"
                )
        if not len(self.offsets):
            raise ValueError("offsets must have one entry more than there are positions")

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> LegalActions:
        """Make the lists from a mask ``[B, n]`` that is true where an action is allowed."""
        counts = mask.count_nonzero(-1)
        return cls(mask.nonzero()[:, 1], _offsets_of(counts))

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int] | torch.Tensor]) -> LegalActions:
        """Make the tensors, on the CPU, from one list or integer array for each position.

        Raises:
            ValueError: An index is negative or stands in its list twice.
        """
        rows = [torch.as_tensor(one, dtype=torch.int64).reshape(-1) for one in lists]
        for number, row in enumerate(rows):
            if len(row) and (row.min() < 0 or len(set(row.tolist())) < len(row)):
                raise ValueError(
                    f"the legal actions of row {number} hold a negative index or one twice: "
                    f"{row.tolist()}"
                )
        counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        indices = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        return cls(indices, _offsets_of(counts))

    @classmethod
    def cat(cls, parts: Sequence[LegalActions]) -> LegalActions:
        """Put the positions of several together, in their order; copies.

        Raises:
            ValueError: There is no part.
        """
        if not parts:
            raise ValueError("there are no LegalActions to put together")
        counts = torch.cat([part.counts for part in parts])
        return cls(torch.cat([part.indices for part in parts]), _offsets_of(counts))

    @property
    def counts(self) -> torch.Tensor:
        """How many actions each position allows, ``int64 [B]``."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pick(self, rows: torch.Tensor) -> LegalActions:
        """Copy the lists of some positions: of a minibatch, or of those that a mask keeps.

        Args:
            rows: Positions ``int64 [R]``, in any order and number, or ``bool [B]``.

        Raises:
            IndexError: There is no such position.
        """
        counts = self.counts[rows]
        offsets = _offsets_of(counts)
        # For each index that is kept: how far its list moved.
        moved = (self.offsets[:-1][rows] - offsets[:-1]).repeat_interleave(counts)
        places = moved + torch.arange(len(moved), device=moved.device)
        return LegalActions(self.indices[places], offsets)

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the lists as a rectangle.

        Returns:
            Indices ``int64 [B, M]``, M being the longest list's length and at least 1, and a mask
            ``bool [B, M]`` that is false where a row is only filled up, with arbitrary indices.
        """
        counts = self.counts
        longest = max(int(counts.max()), 1) if len(counts) else 1
        columns = torch.arange(longest, device=counts.device)
        valid = columns < counts.unsqueeze(-1)
        if not len(self.indices):
            return torch.zeros_like(valid, dtype=torch.int64), valid
        places = (self.offsets[:-1].unsqueeze(-1) + columns).clamp(max=len(self.indices) - 1)
        return self.indices[places], valid

    def to_mask(self, num_actions: int) -> torch.Tensor:
        """Give the mask ``bool [B, num_actions]``.

        Raises:
            IndexError: An index is not below ``num_actions``.
        """
        mask = self.offsets.new_zeros((len(self), num_actions), dtype=torch.bool)
        rows = torch.arange(len(self), device=mask.device).repeat_interleave(self.counts)
        mask[rows, self.indices] = True
        return mask

    def to(self, device: torch.device | str) -> LegalActions:
        """Copy to a device; the same tensors where they are there already."""
        return LegalActions(self.indices.to(device), self.offsets.to(device))


def _offsets_of(counts: torch.Tensor) -> torch.Tensor:
    offsets = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def sample_legal(
    logits: torch.Tensor, legal: LegalActions, *, deterministic: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from a softmax over each list; the cost is that of the lists, not of all logits.

    Args:
        logits: ``[B, n]``; those of other actions are not read.
        legal: The lists of the same B positions.
        deterministic: Take the likeliest, the first of several in its list.

    Returns:
        Indices ``int64 [B]`` and their log-probabilities ``[B]``: no numbers in rows where nothing
        is legal or a legal action's logit is not finite; the index is arbitrary then, and so it may
        be in later rows.

    Raises:
        ValueError: The positions are not as many.
        IndexError: An index is not below n.
    """
    if len(legal) == len(logits) == 1 and len(legal.indices):
        return _sample_one(logits[0], legal.indices, deterministic)
    scores = _Scores(logits, legal)
    if not len(legal.indices):
        return legal.offsets[:-1].clone(), torch.full_like(scores.maxima, torch.nan)
    ends = legal.offsets[1:]
    if deterministic:
        best = (scores.shifted == 0).nonzero().squeeze(-1)
        first = torch.searchsorted(best, legal.offsets[:-1]).clamp(max=len(best) - 1)
        places = best[first] if len(best) else legal.offsets[:-1]
        log_totals = scores.log_totals()
    else:
        # The inverse of the distribution function: one random number for each position. Sums in
        # double precision keep millions of indices apart.
        sums = scores.shifted.exp().cumsum(0, dtype=torch.float64)
        bounds = torch.cat([sums.new_zeros(1), sums])
        below, totals = bounds[legal.offsets[:-1]], bounds[legal.offsets].diff()
        places = torch.searchsorted(sums, below + torch.rand_like(totals) * totals, right=True)
        places = torch.minimum(places, ends - 1)
        log_totals = totals.log().to(logits.dtype)
    places = places.clamp(min=0, max=len(legal.indices) - 1)
    log_probs = scores.shifted[places] - log_totals
    nothing = legal.offsets[:-1] == ends
    return legal.indices[places], log_probs.masked_fill(nothing, torch.nan)


def evaluate_legal(
    logits: torch.Tensor, legal: LegalActions, choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judge choices by a softmax over each list, with gradients.

    Args:
        logits: ``[B, n]``; those of other actions are not read, and their gradient is 0.
        legal: The lists of the same B positions.
        choices: Indices ``int64 [B]``.

    Returns:
        Log-probabilities, minus infinity for what is not in its list, and entropies, each ``[B]``.

    Raises:
        ValueError: The positions are not as many.
        IndexError: An index is not below n.
    """
    scores = _Scores(logits, legal)
    log_totals = scores.log_totals()
    log_probs = scores.shifted - log_totals[scores.rows]
    is_choice = legal.indices == choices[scores.rows]
    # Of a list that has no such choice, or of one that has it, exactly one term is not 0.
    chosen = _sums(torch.where(is_choice, log_probs, 0.0), scores.rows, len(legal))
    has_choice = _sums(is_choice.to(logits.dtype), scores.rows, len(legal)) > 0
    # A probability of 0 must not become 0 times infinity, nor in the gradient.
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    entropies = -_sums(log_probs.exp() * finite, scores.rows, len(legal))
    return torch.where(has_choice, chosen, -torch.inf), entropies


def _sample_one(
    logits: torch.Tensor, indices: torch.Tensor, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample for a single position, where the number of calls is what costs."""
    log_probs = logits.index_select(0, indices).log_softmax(-1)
    noise = -log_probs
    if not deterministic:
        noise = torch.empty_like(log_probs).exponential_().log_().sub_(log_probs)
    place = noise.argmin(0, keepdim=True)
    return indices[place], log_probs[place]


class _Scores:
    """The logits of the legal actions, less the largest of each list.

    Attributes:
        rows: The position of each index, ``int64 [K]``.
        maxima: ``[B]``, without gradient; minus infinity of an empty list.
        shifted: ``[K]``.
    """

    def __init__(self, logits: torch.Tensor, legal: LegalActions) -> None:
        if logits.shape[:-1] != (len(legal),):
            raise ValueError(
                f"legal_actions are for {len(legal)} positions, "
                f"the logits for {list(logits.shape[:-1])}"
            )
        indices, num_actions = legal.indices, logits.shape[-1]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < num_actions:
            raise IndexError(
                f"legal_actions hold indices from {int(indices.min())} to {int(indices.max())}, "
                f"there are logits for 0 … {num_actions - 1}"
            )
        positions = torch.arange(len(legal), device=indices.device)
        self.rows = positions.repeat_interleave(legal.counts, output_size=len(indices))
        scores = logits.reshape(-1).index_select(0, self.rows * num_actions + indices)
        self.maxima = logits.new_full((len(legal),), -torch.inf).scatter_reduce(
            0, self.rows, scores.detach(), "amax"
        )
        self.shifted = scores - self.maxima[self.rows]

    def log_totals(self) -> torch.Tensor:
        """Give the logarithms ``[B]`` of the sums of each list's exponentials."""
        return _sums(self.shifted.exp(), self.rows, len(self.maxima)).log()


def _sums(terms: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    return terms.new_zeros(num_rows).index_add(0, rows, terms)

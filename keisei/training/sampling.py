"""What the sampling of actions checks: masks that fit, something allowed, outputs that are numbers.

Sampling reads one number back for each call and nothing else; where that is not finite, the reason
is looked for. Under ``torch.compile`` and in ``torch.func.vmap`` no value can be read, so nothing
is checked there.
"""

from __future__ import annotations

import math

import torch

from keisei.training.legal_actions import LegalActions

Allowed = torch.Tensor | LegalActions
"""Which actions may be taken: a mask ``[..., n]``, true where one is allowed, or lists of them."""

_FEW = 64
_SHOWN = 8


def name_of(allowed: Allowed) -> str:
    """Return the keyword by which policies are given it."""
    return "legal_actions" if isinstance(allowed, LegalActions) else "action_mask"


def one_of(
    action_mask: torch.Tensor | None, legal_actions: LegalActions | None
) -> torch.Tensor | LegalActions | None:
    """Return the one that is given.

    Raises:
        ValueError: Both are.
    """
    if action_mask is None:
        return legal_actions
    if legal_actions is None:
        return action_mask
    raise ValueError("give an action_mask or legal_actions, not both")


def fitting_mask(mask: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the mask as booleans.

    Raises:
        ValueError: It has another shape than the logits.
    """
    if mask.shape != logits.shape:
        raise ValueError(
            f"the action_mask has the shape {list(mask.shape)}, the logits {list(logits.shape)}: "
            "it needs one entry for each logit of each row"
        )
    return mask if mask.dtype is torch.bool else mask != 0


def masked_logits(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put minus infinity, without gradient, in the place of logits that the mask forbids.

    Raises:
        ValueError: The mask has another shape than the logits.
    """
    return torch.where(fitting_mask(mask, logits), logits, -math.inf)


def check_numbers(
    results: torch.Tensor, outputs: torch.Tensor, allowed: Allowed | None = None
) -> None:
    """See that what was sampled is finite: a single sum, read back once.

    Args:
        results: Not finite where ``outputs`` are not, or where nothing is allowed.
        outputs: ``[..., n]``, which ``results`` were computed from.
        allowed: Which of the actions were.

    Raises:
        ValueError: They are not; the message names the rows and says why.
    """
    if torch.compiler.is_compiling():
        return
    try:
        if results.dim() == 1 and results.numel() <= _FEW:
            total = math.fsum(results.tolist())  # of few numbers faster than a kernel
        else:
            total = results.sum().item()
    except (RuntimeError, OverflowError, ValueError):
        # In vmap there are no values to be read. Sums of opposite infinities are ValueErrors.
        if _has_no_values(results):
            return
        total = math.nan
    if not math.isfinite(total):
        raise ValueError(_reason(results, outputs, allowed))


def check_allowed(allowed: Allowed) -> None:
    """See that every row allows something.

    Raises:
        ValueError: A row does not.
    """
    if torch.compiler.is_compiling():
        return
    counts = allowed.counts if isinstance(allowed, LegalActions) else allowed.any(-1)
    try:
        fine = bool(counts.all())
    except RuntimeError:
        if _has_no_values(counts):
            return
        raise
    if not fine:
        raise ValueError(_nothing_allowed(counts, allowed))


def _has_no_values(tensor: torch.Tensor) -> bool:
    try:
        tensor.reshape(-1)[:1].tolist()
    except RuntimeError:
        return True
    return False


def _nothing_allowed(counts: torch.Tensor, allowed: Allowed) -> str:
    rows = (counts == 0).nonzero().squeeze(-1).tolist()
    return (
        f"the {name_of(allowed)} allow nothing in {_rows(rows)}: every position in which the "
        "policy acts needs at least one allowed action; an episode without one has ended"
    )


def _reason(results: torch.Tensor, outputs: torch.Tensor, allowed: Allowed | None) -> str:
    if allowed is not None:
        counts = allowed.counts if isinstance(allowed, LegalActions) else allowed.count_nonzero(-1)
        if not counts.all():
            return _nothing_allowed(counts, allowed)
    bad = results.isfinite().logical_not().reshape((*outputs.shape[:-1], -1)).any(-1)
    rows = bad.nonzero().squeeze(-1).tolist()
    first = outputs[tuple(bad.nonzero()[0])].tolist() if rows else []
    shown = ", ".join(f"{one:g}" for one in first[:_SHOWN]) + (", …" if len(first) > _SHOWN else "")
    return (
        f"the policy's outputs are not finite in {_rows(rows)} of {bad.numel()}, the first being "
        f"[{shown}]: its weights diverged, or an observation was not finite"
    )


def _rows(rows: list[object]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"

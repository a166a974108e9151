"""Running statistics that are one for a whole pool: of observations, and of discounted returns.

They are buffers of the policy: pushed to the workers with its weights, saved with it, applied where
it acts and values, and updated by the learner alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

_EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance of everything seen so far, of each component by itself.

    Batches are merged by the formula of Chan et al., "Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances" (1979), in double precision: in whatever parts and order the
    samples come, the result is that of a single pass over them.

    Args:
        shape: Of one sample.

    Attributes:
        count: Samples so far, a ``float64`` scalar.
        mean: ``float64 [*shape]``.
        squares: The sum of squared distances from the mean, ``float64 [*shape]``.
    """

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(shape, dtype=torch.float64))

    @property
    def variance(self) -> torch.Tensor:
        """The population variance, ``float64 [*shape]``; 1 before the first sample."""
        if not self.count:
            return torch.ones_like(self.mean)
        return self.squares / self.count

    @torch.no_grad()
    def update(self, samples: torch.Tensor) -> None:
        """Count samples ``[..., *shape]``, of any number, none included.

        Raises:
            ValueError: They have another shape, or one is not finite; nothing is changed.
        """
        shape = self.mean.shape
        leading = samples.dim() - len(shape)
        if leading < 1 or samples.shape[leading:] != shape:
            raise ValueError(
                f"samples of shape {list(samples.shape)} do not end in {list(shape)} after at "
                "least one dimension of samples"
            )
        flat = samples.reshape(-1, *shape).to(self.mean)
        if not len(flat):
            return
        mean = flat.mean(0)
        squares = (flat - mean).square().sum(0)
        if not (mean.isfinite().all() and squares.isfinite().all()):
            bad = flat.isfinite().logical_not().sum().item()
            raise ValueError(
                f"{bad} of {flat.numel()} numbers are not finite and would spoil the running "
                "statistics for good; find the environment that makes them"
            )
        count = self.count + len(flat)
        distance = mean - self.mean
        self.squares += squares + distance.square() * (self.count * len(flat) / count)
        self.mean += distance * (len(flat) / count)
        self.count.copy_(count)


class ObservationNormalizer(nn.Module):
    """Centres and scales vectors by running statistics, and clips them.

    Args:
        size: Components of one vector.
        is_scaled: ``bool [size]``, the components that are; ``None`` scales all. The others, such
            as one-hot codes, stay as they are.
        clip: Largest absolute value of a scaled component.
    """

    is_scaled: torch.Tensor
    limits: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, size: int, *, is_scaled: torch.Tensor | None = None, clip: float = 10.0
    ) -> None:
        super().__init__()
        self.moments = RunningMoments((size,))
        is_scaled = torch.ones(size, dtype=torch.bool) if is_scaled is None else is_scaled
        self.register_buffer("is_scaled", is_scaled, persistent=False)
        # Made from the moments by each update, so that applying them takes two products.
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        limits = torch.where(is_scaled, clip, torch.inf)
        self.register_buffer("limits", limits, persistent=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., size]``; before the first update they are only clipped."""
        scaled = (vectors - self.offset) * self.scale
        return torch.minimum(torch.maximum(scaled, -self.limits), self.limits)

    @torch.no_grad()
    def update(self, vectors: torch.Tensor) -> None:
        """Count vectors ``[..., size]``; for the learner alone.

        Raises:
            ValueError: They have another size, or a number is not finite; nothing is changed.
        """
        self.moments.update(vectors)
        is_scaled = self.is_scaled
        mean, variance = self.moments.mean, self.moments.variance
        self.offset.copy_(torch.where(is_scaled, mean, 0.0))
        self.scale.copy_(torch.where(is_scaled, (variance + _EPSILON).rsqrt(), 1.0))


class Rollout(Protocol):
    """What reward normalisation reads of a batch; ``ExperienceBatch`` is one."""

    @property
    def data(self) -> Mapping[str, torch.Tensor]:
        """``rewards``, ``terminated``, ``truncated`` and perhaps ``mask``, ``[T, N]`` each."""
        ...

    @property
    def worker_id(self) -> int:
        """The slot that collected it."""
        ...

    @property
    def incarnation(self) -> int:
        """The process of that slot."""
        ...

    @property
    def sequence(self) -> int:
        """Its number within the incarnation."""
        ...


class RewardNormalizer(nn.Module):
    """Scales rewards by the running deviation of discounted returns; they are not centred.

    The return is the discounted sum of an episode's rewards so far, as in Gymnasium's and Stable
    Baselines' ``NormalizeReward``, but its statistics are one for all environments of the pool.
    The sums in progress are kept for each worker and go on from one batch to the next. They begin
    anew where the worker's process was replaced or one of its batches is missing.

    Args:
        clip: Largest absolute value of a scaled reward.
    """

    def __init__(self, *, clip: float = 10.0) -> None:
        super().__init__()
        self.moments = RunningMoments()
        self._clip = clip
        # By slot: incarnation and number of the batch that would continue, and the sums [N].
        self._running: dict[int, tuple[int, int, torch.Tensor]] = {}

    def forward(self, rewards: torch.Tensor) -> torch.Tensor:
        """Scale rewards of any shape; before the first update they are only clipped."""
        deviation = (self.moments.variance + _EPSILON).sqrt().to(rewards.dtype)
        return (rewards / deviation).clamp(-self._clip, self._clip)

    @torch.no_grad()
    def update(self, batch: Rollout, *, gamma: float) -> None:
        """Count the returns of a batch; for the learner alone, once for each batch.

        Steps that ``mask`` excludes are no steps: they are not counted and change no sum.

        Args:
            batch: In the order in which its worker collected them.
            gamma: The discount factor, 0 … 1.

        Raises:
            ValueError: A reward that counts is not finite; nothing is changed.
        """
        data = batch.data
        rewards = data["rewards"].to(torch.float64)
        ended = data["terminated"] | data["truncated"]
        mask = data.get("mask", torch.ones_like(ended))
        worker, incarnation, sequence = batch.worker_id, batch.incarnation, batch.sequence
        *place, sums = self._running.get(worker, (-1, -1, rewards[0]))
        if place != [incarnation, sequence] or sums.shape != rewards[0].shape:
            sums = torch.zeros_like(rewards[0])
        returns = []
        for reward, end, is_step in zip(rewards, ended, mask, strict=True):
            total = reward + gamma * sums
            returns.append(total)
            sums = torch.where(is_step, torch.where(end, 0.0, total), sums)
        self.moments.update(torch.stack(returns)[mask])
        self._running[worker] = (incarnation, sequence + 1, sums)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the sums in progress out of copies and pickles: they are of this learner's pool."""
        return {**self.__dict__, "_running": {}}

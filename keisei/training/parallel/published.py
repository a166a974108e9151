"""PublishedWeights: one set of weights in the memory that all workers share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from keisei.exceptions import WeightsError
from keisei.ipc.layout import describe
from keisei.ipc.threads import to_the_end
from keisei.ipc.weights import WeightsPublisher
from keisei.protocol import messages
from keisei.protocol.line import Line
from keisei.training.parallel.weights_source import tensors_of

_QUICK_COPY = 1 << 22
"""Bytes that are copied in the event loop: in less time than a thread takes, or not much more."""
_QUICK_COUNT = 1000
"""Tensors that are compared and copied in the event loop."""


class _Checked(NamedTuple):
    """Tensors that fit, and the shared memory; with the frame about it where that is new."""

    publisher: WeightsPublisher
    tensors: dict[str, torch.Tensor]
    arena: Any


class PublishedWeights:
    """The shared memory of one set of weights, made for the first of them, and its versions."""

    def __init__(
        self,
        *,
        check_finite: bool,
        on_arena: Callable[[], None],
        on_published: Callable[[int, int, bool], None],
    ) -> None:
        """Start without memory.

        Args:
            check_finite: Look whether weights hold NaN or infinity.
            on_arena: Called when the memory was made, and workers can be told where it is.
            on_published: Called with each new version, its bytes, and whether all of its values
                are finite, as far as that was looked at.
        """
        self._check_finite = check_finite
        self._on_arena = on_arena
        self._on_published = on_published
        self._publisher: WeightsPublisher | None = None
        self._arena: Any = None  # the packed frame that tells where the weights lie
        self._publishing = asyncio.Lock()

    def newest_version(self) -> int:
        """Return the newest version; 0 is none. Also while one is being published in a thread."""
        return self._publisher.version if self._publisher is not None else 0

    @property
    def has_memory(self) -> bool:
        """Whether there were weights."""
        return self._publisher is not None

    def introduce(self, line: Line) -> None:
        """Tell a worker where the weights lie, if there are any."""
        if self._publisher is not None:
            line.announce(self._arena, self._publisher.fd)

    async def publish(self, state: Mapping[str, Any]) -> int:
        """Check, copy and publish a state dict, and return its version.

        A few small tensors are moved in the event loop, large or many ones in a thread. When
        cancelled, the version is published and told, or nothing is.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights.
            OSError: There is no memory for the first weights.
        """
        async with self._publishing:
            publisher, tensors = await self._checked(state)
            if publisher.num_bytes <= _QUICK_COPY and len(tensors) <= _QUICK_COUNT:
                return self._told(publisher, *self._copied(publisher, tensors))
            # Shielded: a copy that was made is also told.
            copying = asyncio.ensure_future(to_the_end(lambda: self._copied(publisher, tensors)))
            try:
                await asyncio.shield(copying)
            except asyncio.CancelledError:
                await asyncio.wait([copying])
                if copying.exception() is None:
                    self._told(publisher, *copying.result())
                raise
            return self._told(publisher, *copying.result())

    async def _checked(
        self, state: Mapping[str, Any]
    ) -> tuple[WeightsPublisher, dict[str, torch.Tensor]]:
        """Return the shared memory and the tensors that fit into it; make it for the first ones."""
        publisher = self._publisher
        if publisher is not None and len(state) <= _QUICK_COUNT:
            tensors = tensors_of(state)
            publisher.check(tensors)
            return publisher, tensors
        made: list[_Checked] = []
        try:
            await to_the_end(lambda: made.append(_check(state, publisher)))
        except BaseException:
            for checked in made:
                if checked.arena is not None:
                    checked.publisher.close()
            raise
        (checked,) = made
        if checked.arena is not None:
            self._publisher, self._arena = checked.publisher, checked.arena
            self._on_arena()
        return checked.publisher, checked.tensors

    def _copied(
        self, publisher: WeightsPublisher, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[int, bool]:
        is_finite = not self._check_finite or _is_finite(tensors)
        return publisher.publish(tensors), is_finite

    def _told(self, publisher: WeightsPublisher, version: int, is_finite: bool) -> int:
        self._on_published(version, publisher.num_bytes, is_finite)
        return version

    def revert(self) -> int:
        """Publish the weights before the newest again, as a new version, which is returned.

        Raises:
            WeightsError: There are none before them.
        """
        if self._publisher is None or self._publisher.version <= 1:
            raise WeightsError("there are no weights before these")
        return self._publisher.revert()

    async def newest(self) -> dict[str, torch.Tensor]:
        """Return a copy of the newest weights, made in a thread.

        Raises:
            WeightsError: There are none yet.
        """
        publisher = self._publisher
        if publisher is None:
            raise WeightsError("there is nothing to take a snapshot of: push weights first")
        async with self._publishing:  # none is written meanwhile
            return await to_the_end(publisher.newest)

    def close(self) -> None:
        """Give the shared memory back."""
        if self._publisher is not None:
            self._publisher.close()


def _check(state: Mapping[str, Any], publisher: WeightsPublisher | None) -> _Checked:
    tensors = tensors_of(state)
    if publisher is not None:
        publisher.check(tensors)
        return _Checked(publisher, tensors, None)
    layout = describe(tensors)
    return _Checked(WeightsPublisher(layout), tensors, messages.pack(messages.Arena(layout)))


def _is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors.values()
        if tensor.is_floating_point() or tensor.is_complex()
    )

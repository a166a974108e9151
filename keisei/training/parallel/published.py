"""PublishedWeights: the weights of one name, in the memory that all workers share."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from keisei.exceptions import WeightsError
from keisei.ipc.board import Board
from keisei.ipc.layout import Layout, describe
from keisei.ipc.threads import finished, in_thread, to_the_end
from keisei.ipc.weights import WeightsPublisher
from keisei.protocol import messages
from keisei.training.parallel.weights_source import tensors_of

_QUICK_COPY = 1 << 22
"""Bytes that are copied in the event loop: in less time than a thread takes, or not much more."""
_QUICK_COUNT = 1000
"""Tensors that are compared and copied in the event loop."""


class Pushed(NamedTuple):
    """A version that was published: its bytes, and whether all of its values are finite."""

    version: int
    num_bytes: int
    is_finite: bool


class PublishedWeights:
    """The weights of one name: their shared memory and their versions.

    The first version makes the memory. That of "main" has room for two versions, and every push
    copies into it. That of another name has room for one, which never changes, so that a frozen
    opponent costs its memory once and workers need no copy; the second version makes memory for
    two. After ``drop`` the next version makes memory anew, of any layout; versions go on.

    Attributes:
        name: The name.
        number: Stands for the name in frames; 0 is "main".
    """

    def __init__(
        self,
        name: str,
        number: int,
        board: Callable[[], Board],
        *,
        check_finite: bool,
        on_memory: Callable[[PublishedWeights], None],
        on_pushed: Callable[[PublishedWeights, Pushed], None],
    ) -> None:
        """Start without memory.

        Args:
            name: The name.
            number: Stands for it in frames.
            board: Returns the page on which workers see that something was published.
            check_finite: Look whether weights hold NaN or infinity.
            on_memory: Called when there is new memory with a version in it, for workers to be
                told where it is.
            on_pushed: Called with each version.
        """
        self.name = name
        self.number = number
        self._board = board
        self._check_finite = check_finite
        self._on_memory = on_memory
        self._on_pushed = on_pushed
        self._publisher: WeightsPublisher | None = None
        self._before = 0
        self._publishing = asyncio.Lock()

    def newest_version(self) -> int:
        """Return the newest version; 0 is none. Also while one is being published in a thread."""
        publisher = self._publisher
        return publisher.version if publisher is not None else self._before

    @property
    def has_memory(self) -> bool:
        """Whether there are weights."""
        return self._publisher is not None

    @property
    def memory(self) -> WeightsPublisher:
        """The memory that there is now.

        Raises:
            WeightsError: There is none.
        """
        if self._publisher is None:
            raise WeightsError(f"there are no weights {self.name!r}: push them first")
        return self._publisher

    def frame(self, edition: int) -> Any:
        """Return the packed frame that tells where the weights lie."""
        publisher = self.memory
        return messages.pack(
            messages.Arena(self.number, edition, publisher.is_final, self.name, publisher.layout)
        )

    async def publish(self, state: Mapping[str, Any]) -> int:
        """Check, copy and publish a state dict, and return its version.

        A few small tensors are moved in the event loop, large or many ones in a thread. When
        cancelled, the version is published and told, or nothing is.

        Raises:
            WeightsError: Keys, shapes or dtypes differ from those of the first weights, or they
                were dropped meanwhile.
            OSError: There is no memory or no descriptor for them.
        """
        async with self._publishing:
            former = publisher = self._publisher
            tensors: Mapping[str, torch.Tensor] | None = None
            if publisher is not None and not publisher.is_full and len(state) <= _QUICK_COUNT:
                tensors = tensors_of(state)
                publisher.check(tensors)
                if publisher.num_bytes <= _QUICK_COPY:
                    return self._told(publisher, self._copied(publisher, tensors))
            moving = in_thread(lambda: self._moved(state, tensors))
            cancelled = await finished(moving)
            if cancelled is not None and moving.exception() is not None:
                raise cancelled
            publisher, pushed = moving.result()
            if self._publisher is not former:  # nothing but ``drop`` changes it meanwhile
                self._before = max(self._before, pushed.version)
                publisher.close()
                raise WeightsError(f"weights {self.name!r} were dropped while they were pushed")
            version = self._told(publisher, pushed)
            if cancelled is not None:
                raise cancelled
            return version

    def _moved(
        self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None
    ) -> tuple[WeightsPublisher, Pushed]:
        """Copy a version into the memory, or into memory that is made for it; in a thread."""
        publisher = self._publisher
        if tensors is None:
            tensors = tensors_of(state)
            if publisher is not None:
                publisher.check(tensors)
        if publisher is not None and not publisher.is_full:
            return publisher, self._copied(publisher, tensors)
        made = self._made(publisher, tensors)
        try:
            return made, self._copied(made, tensors)
        except BaseException:
            made.close()
            raise

    def _made(
        self, former: WeightsPublisher | None, tensors: Mapping[str, torch.Tensor]
    ) -> WeightsPublisher:
        """Make memory: for the first version, or for two after one that is full."""
        if former is None:
            return self._memory_for(
                describe(tensors), before=self._before, is_final=self.number != 0
            )
        made = self._memory_for(former.layout, before=former.version - 1, is_final=False)
        try:
            made.publish(former.newest())  # what ``revert`` goes back to
        except BaseException:
            made.close()
            raise
        return made

    def _memory_for(self, layout: Layout, *, before: int, is_final: bool) -> WeightsPublisher:
        try:
            return WeightsPublisher(layout, before=before, is_final=is_final, board=self._board())
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                error.add_note(
                    "each name of weights takes a descriptor of the application: drop names that "
                    "are not needed any more (manager.drop_weights), or raise its limit (ulimit -n)"
                )
            raise

    def _copied(self, publisher: WeightsPublisher, tensors: Mapping[str, torch.Tensor]) -> Pushed:
        is_finite = not self._check_finite or _is_finite(tensors)
        return Pushed(publisher.publish(tensors), publisher.num_bytes, is_finite)

    def _told(self, publisher: WeightsPublisher, pushed: Pushed) -> int:
        former = self._publisher
        if publisher is not former:
            self._publisher = publisher
            self._on_memory(self)
            if former is not None:
                former.close()
        self._on_pushed(self, pushed)
        return pushed.version

    def drop(self) -> None:
        """Give the memory back; versions go on from the newest one if weights are pushed again.

        Raises:
            WeightsError: There is none.
        """
        publisher = self.memory
        self._before = publisher.version
        self._publisher = None
        publisher.close()

    @property
    def can_revert(self) -> bool:
        """Whether the weights before the newest are still there."""
        return self._publisher is not None and self._publisher.can_revert

    def revert(self) -> int:
        """Publish the weights before the newest again, as a new version, which is returned.

        Raises:
            WeightsError: There are none before them.
        """
        return self.memory.revert()

    async def newest(self) -> dict[str, torch.Tensor]:
        """Return a copy of the newest weights, made in a thread.

        Raises:
            WeightsError: There are none.
        """
        async with self._publishing:  # none is written meanwhile
            publisher = self.memory
            return await to_the_end(publisher.newest)

    def close(self) -> None:
        """Give the shared memory back; what is told then is the newest version all the same."""
        if self._publisher is not None:
            self._publisher.close()


def _is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors.values()
        if tensor.is_floating_point() or tensor.is_complex()
    )

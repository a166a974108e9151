"""What a backend must do: start one incarnation on its endpoints."""

from __future__ import annotations

from typing import Protocol

from keisei.protocol.endpoints import WorkerEndpoints
from keisei.supervision.process import ProcessHandle


class Backend(Protocol):
    """Starts workers somewhere.

    A backend may also have ``close()``, which does as ``aclose`` at once and without an event loop,
    for a pool that is dropped or whose loop ends without ``stop``.
    """

    async def open(self) -> None:
        """Prepare; called once before the first ``start``."""
        ...

    async def start(self, endpoints: WorkerEndpoints, name: str) -> ProcessHandle:
        """Start one incarnation, which takes ``endpoints`` over.

        Raises:
            OSError: It could not be started; everything is closed.
        """
        ...

    def abort_starts(self) -> None:
        """Make starts that are under way fail soon."""
        ...

    async def aclose(self) -> None:
        """Give back what ``open`` took; called after every incarnation has ended."""
        ...

"""The event loop that the library needs: asyncio's."""

from __future__ import annotations

import asyncio
import sys

from keisei.exceptions import ManagerStateError


def require_asyncio() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        ManagerStateError: asyncio runs none here; names what runs instead, if that is trio.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        where = "under trio" if _is_in_trio() else "where no asyncio event loop is running"
        raise ManagerStateError(
            f"a pool was used {where}; keisei needs asyncio: run it by asyncio.run(), or by "
            'anyio.run(..., backend="asyncio")'
        ) from None


def _is_in_trio() -> bool:
    """Ask trio, if the application has it; a release that cannot be asked is not trio's fault."""
    lowlevel = getattr(sys.modules.get("trio"), "lowlevel", None)
    try:
        return bool(lowlevel is not None and lowlevel.current_trio_token())
    except RuntimeError:
        return False

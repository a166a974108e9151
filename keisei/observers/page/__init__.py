"""A live page of a pool, for the application's own web server.

::

    from keisei.observers.page import pool_page

    app.mount("/pool", pool_page(manager))  # FastAPI, Starlette, or any other ASGI application

The page is a plain ASGI callable: it needs no other package, no build step, and loads nothing from
other hosts. It only shows, unless it is given an ``authorize`` hook.
"""

from __future__ import annotations

from keisei.observers.page.actions import ACTIONS, Authorize
from keisei.observers.page.app import PoolPage, pool_page

__all__ = ["ACTIONS", "Authorize", "PoolPage", "pool_page"]

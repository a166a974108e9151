"""The little of ASGI that the page needs: paths, headers, bodies and whole responses."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = tuple[tuple[str, str], ...]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
)
SAFE: Headers = (
    ("content-security-policy", _POLICY),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "SAMEORIGIN"),
    ("referrer-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)
"""Headers of every response: a browser runs and loads what comes from this page alone."""
FRESH: Headers = (("cache-control", "no-store"),)


def path_within(scope: Scope) -> str:
    """Return the path below the place at which the application is mounted: "" or "/…".

    Servers and frameworks differ in whether ``path`` includes ``root_path``; both are understood.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path


def header(scope: Scope, name: str) -> str | None:
    """Return the first header of a name, in lower case, or ``None``."""
    key = name.encode()
    for found, value in scope["headers"]:
        if found.lower() == key:
            text: str = value.decode("latin-1")
            return text
    return None


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """Return the body of a request, ``None`` if it is longer than ``limit`` or cut short."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part: bytes = message.get("body", b"")
        body += part
        if len(body) > limit:
            return None
        if not message.get("more_body", False):
            return body


async def start(send: Send, status: int, kind: str, headers: Headers = FRESH) -> None:
    """Begin a response of the media type ``kind``, with the headers of every response."""
    all_headers = (("content-type", kind), *headers, *SAFE)
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in all_headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def respond(
    send: Send, status: int, body: bytes, kind: str, headers: Headers = FRESH
) -> None:
    """Send a whole response."""
    await start(send, status, kind, (("content-length", str(len(body))), *headers))
    await send({"type": "http.response.body", "body": body})


async def respond_text(send: Send, status: int, text: str, headers: Headers = FRESH) -> None:
    """Send a response in plain text."""
    body = f"{text}\n".encode(errors="replace")
    await respond(send, status, body, "text/plain; charset=utf-8", headers)


async def respond_json(send: Send, status: int, value: Any) -> None:
    """Send a response in JSON."""
    await respond(send, status, dumps(value), "application/json")


async def redirect(send: Send, location: str) -> None:
    """Send a browser to another place, to be read with GET."""
    headers = (("location", location), *FRESH)
    await respond(send, 303, b"", "text/plain; charset=utf-8", headers)


def dumps(value: Any) -> bytes:
    """Return ``value`` as JSON in ASCII, on one line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()

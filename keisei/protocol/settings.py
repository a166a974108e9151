"""Settings on their way to a worker: each value pickled by itself, one behind the other.

So a value is pickled once, however many workers and later processes it goes to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from keisei.ipc import wire
from keisei.protocol import messages


def configure(version: int, values: Mapping[str, wire.Payload]) -> messages.Configure:
    """Return the message about pickled ``values``, which are not copied."""
    entries: list[tuple[str, int]] = []
    parts: list[wire.Part] = []
    for name, payload in values.items():
        nbytes = wire.nbytes_of(payload)
        entries.append((name, nbytes))
        parts += payload if isinstance(payload, tuple) else (payload,)
        if pad := wire.padding(nbytes):
            parts.append(pad)
    return messages.Configure(version, tuple(entries), tuple(parts))


def values_of(message: messages.Configure) -> Iterator[tuple[str, memoryview]]:
    """Yield the names in a message that has arrived, and views of the pickled values.

    Raises:
        ValueError: The values are longer than the payload.
    """
    payload = memoryview(message.payload)  # type: ignore[arg-type]  # what arrives is one piece
    at = 0
    for name, nbytes in message.entries:
        if nbytes > len(payload) - at:
            raise ValueError(f"the value of setting {name!r} is cut")
        yield name, payload[at : at + nbytes]
        at += nbytes + -nbytes % wire.ALIGNMENT

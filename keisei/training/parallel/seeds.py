"""Seeds: one root, and from it a different one for every slot and incarnation."""

from __future__ import annotations

import hashlib
import secrets

_BITS = 63


def draw_root() -> int:
    """Return a fresh root seed from the operating system."""
    return secrets.randbits(_BITS)


def worker_seed(root: int, worker_id: int, incarnation: int) -> int:
    """Return the 63-bit seed of one process.

    A hash, so that neighbouring roots, slots and incarnations share nothing.
    """
    text = f"keisei/{root}/{worker_id}/{incarnation}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

"""Reads the rows of a W&B run that is kept on disk: records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32_768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(raw: bytes) -> Iterator[bytes]:
    """Yield each record of the file; the first seven bytes are its head."""
    at, parts = 7, b""
    while at + 7 <= len(raw):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        at += 7
        parts += raw[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def rows(folder: Path) -> list[dict[str, object]]:
    """Return what was logged in the one run below ``folder``."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append(
                {(one.key or ".".join(one.nested_key)): json.loads(one.value_json) for one in items}
            )
    return found

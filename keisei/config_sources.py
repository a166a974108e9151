"""Where a configuration may come from: OmegaConf, Hydra, YAML, dataclasses, the environment."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from keisei.exceptions import ConfigurationError


def plain_values(values: Any) -> dict[str, Any]:
    """Return a mapping or an instance of a dataclass as plain dicts, tuples and values.

    OmegaConf's containers, with their interpolations resolved, are among them; members of
    enumerations become their values.

    Raises:
        ConfigurationError: A value cannot be read, such as one that OmegaConf marks as missing.
    """
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {one.name: getattr(values, one.name) for one in dataclasses.fields(values)}
    found: dict[str, Any] = {}
    problems: list[str] = []
    for key in values:
        try:
            found[str(key)] = _plain(values[key])
        except ConfigurationError as error:
            problems += [f"{key}.{problem}" for problem in error.problems]
        except Exception as error:  # noqa: BLE001 - code of the mapping's class
            problems.append(f"{key}: {str(error).partition(chr(10))[0] or type(error).__name__}")
    if problems:
        raise ConfigurationError(problems)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, str | bytes | int | float) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return plain_values(value)
    if isinstance(value, Sequence) and type(value) not in (list, tuple):
        return tuple(map(_plain, value))  # a list of OmegaConf's, which is no list
    return value


_LISTS = ("preload", "worker_device_map")


def from_text(option: str, text: str) -> Any:
    """Return the value of a variable; numbers and truth values are read by the validation."""
    text = text.strip()
    if text.lower() in ("none", "null", ""):
        return None
    if option in _LISTS and ("," in text or option == "preload"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text

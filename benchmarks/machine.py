"""Names the machine and the versions, so that figures can be judged."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "gymnasium",
    "numpy",
    "torchrl",
    "tensordict",
    "stable-baselines3",
    "ray",
    "aiomultiprocess",
)
GIB = 1 << 30


def describe() -> dict[str, str]:
    """Return processor, memory, system and package versions."""
    return {
        "processor": f"{os.cpu_count()} x {_processor()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def load() -> float:
    """Return the mean number of processes that wanted to run in the last minute."""
    return os.getloadavg()[0]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

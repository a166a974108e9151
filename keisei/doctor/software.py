"""What is installed: this library, Python, and what the library needs or can use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import keisei
from keisei.doctor.findings import Finding, Verdict

NEEDED = ("aiomultiprocess", "anyio", "numpy", "pydantic", "torch")
"""Distributions without which the library does not work."""
OPTIONAL = (
    "cloudpickle",
    "gymnasium",
    "ipykernel",
    "mlflow-skinny",
    "omegaconf",
    "opentelemetry-sdk",
    "prometheus-client",
    "rich",
    "structlog",
    "tensorboard",
    "uvloop",
    "wandb",
)
"""Distributions that extras install, or that change how an application runs."""
_OLDEST = (3, 11)


def findings() -> Iterator[Finding]:
    """Look at what is installed; imports none of it."""
    yield _library()
    yield _python()
    yield Finding("software", "interpreter", sys.executable or "none: embedded in a program")
    yield Finding("software", "system", f"{platform.platform()} {_libc()}".strip())
    for name in NEEDED:
        version = _version(name)
        if version is None:
            note = f"pip install {name}"
            yield Finding("software", name, "not installed", Verdict.PROBLEM, note)
        else:
            yield Finding("software", name, version, Verdict.OK)
    for name in OPTIONAL:
        yield Finding("software", name, _version(name) or "not installed")
    for name in sorted(os.environ):
        if re.match(r"(KEISEI|OMP_NUM|MKL_NUM|CUDA_VIS|PYTORCH|TORCH)_?", name):
            yield Finding("environment", name, os.environ[name])


def _library() -> Finding:
    where = Path(keisei.__file__).parent
    text = f"{keisei.__version__} in {where}"
    try:
        found = importlib.metadata.distribution("keisei")
    except importlib.metadata.PackageNotFoundError:
        return Finding("software", "keisei", f"{text}, not installed (a checkout)", Verdict.OK)
    if found.version != keisei.__version__:
        note = (
            f"an installation says {found.version}, so two copies are mixed: pip uninstall keisei, "
            "and install this one again"
        )
        return Finding("software", "keisei", text, Verdict.WARNING, note)
    return Finding("software", "keisei", text, Verdict.OK)


def _python() -> Finding:
    text = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info < _OLDEST:
        return Finding("software", "python", text, Verdict.PROBLEM, "take Python 3.11 or later")
    return Finding("software", "python", text, Verdict.OK)


def _libc() -> str:
    return " ".join(part for part in platform.libc_ver() if part)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

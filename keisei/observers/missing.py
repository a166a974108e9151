"""The error of an observer whose extra is not installed."""

from __future__ import annotations

import importlib.util


def missing(user: str, package: str, extra: str) -> ImportError:
    """Return the error that names the command that helps.

    Args:
        user: The module that needs the package.
        package: What it needs.
        extra: The extra of this library that installs it.
    """
    return ImportError(f'{user} needs {package}: pip install "keisei[{extra}]"', name=package)


def require(module: str, user: str, package: str, extra: str) -> None:
    """Raise unless ``module`` can be found; imports nothing of it but its parents.

    Raises:
        ImportError: It is not installed; names the command that helps.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent is missing, or it was blocked in sys.modules
        found = None
    if found is None:
        raise missing(user, package, extra)

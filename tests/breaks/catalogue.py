"""Breaks: changes to the package that break one guarantee each, and the tests that must notice.

They are data: a TOML file for each guarantee lies beside this module. ``old`` is text of ``file``
that occurs there once, ``new`` takes its place.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Break:
    """One break.

    Attributes:
        guarantee: The number of the guarantee in the README.
        name: Unique among all of them.
        file: The module that is changed, from the repository's root.
        old: Text that occurs once in it.
        new: The text in its place.
        tests: Ids of tests, any of which must fail.
        why: What is broken.
    """

    guarantee: int
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def broken(self, source: str) -> str:
        """Return the source of ``file`` with the break in it.

        Raises:
            ValueError: ``old`` is not there, or more than once.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: its old text occurs {count} times in {self.file}")
        return source.replace(self.old, self.new)


def all_breaks(folder: Path = FOLDER) -> list[Break]:
    """Return every break, by guarantee and in the order of the files."""
    found: list[Break] = []
    for path in sorted(folder.glob("*.toml")):
        with path.open("rb") as file:
            content = tomllib.load(file)
        for fields in content["breaks"]:
            tests = tuple(fields.pop("tests"))
            found.append(Break(guarantee=content["guarantee"], tests=tests, **fields))
    return found


def chosen(breaks: Iterable[Break], words: Iterable[str]) -> list[Break]:
    """Return the breaks whose name has one of ``words`` in it, or all if there are none.

    A number chooses a guarantee.
    """
    wanted = list(words)
    return [
        one
        for one in breaks
        if not wanted or any(w == str(one.guarantee) or w in one.name for w in wanted)
    ]

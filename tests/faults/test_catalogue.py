"""The tables of guarantees and of faults in tests/README.md name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
FOLDERS = {"F": "tests/faults", "P": "tests/training/parallel"}
README = (TESTS / "README.md").read_text(encoding="utf-8")
FIGURES = "| guarantee | breaks | caught |"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.sub(rf"{re.escape(FIGURES)}(\n\|.*)*", "", README).splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| fault |", "| guarantee |"))
]


def names_in(path):
    """Return the names of the functions in a file, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


def test_every_row_names_a_test_or_says_why_not():
    """Each fault has the id of a test, or is "open" with a reason in the last column."""
    assert len(ROWS) > 55
    for fault, tests, how in ROWS:
        assert fault
        assert re.search(r"`\S+::test_\w+`", tests) or how.startswith("open: "), fault


def test_every_test_of_the_table_exists():
    """No row names a test that was renamed or removed."""
    ids = {tuple(one.split("::")) for _, tests, _ in ROWS for one in re.findall(r"`(\S+)`", tests)}
    for file, name in ids:
        folder, _, rest = file.partition("/")
        path = TESTS.parent / FOLDERS.get(folder, folder) / rest
        assert name in names_in(path), f"{file} has no {name}"


def test_every_test_of_the_catalogue_is_in_the_table():
    """What is tested is named in the table, or it would be forgotten when a row changes."""
    named = set(re.findall(r"`F/(\S+)`", README))
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path != Path(__file__):
            names = {name for name in names_in(path) if name.startswith("test_")}
            assert {f"{path.name}::{name}" for name in names} <= named


def test_every_guarantee_of_the_readme_has_a_row():
    """Each numbered guarantee is held by tests that the table names."""
    section = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    section = section.partition("## What it guarantees")[2].partition("\n## ")[0]
    promised = {int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}
    held = {int(row[0].partition(":")[0]) for row in ROWS if re.match(r"\d+:", row[0])}
    assert len(promised) >= 13
    assert held == promised

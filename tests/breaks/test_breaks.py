"""The breaks fit the package as it is; that each is caught is what ``run.py`` finds out."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from breaks import mutants
from breaks.catalogue import ROOT, all_breaks, chosen

BREAKS = all_breaks()
AT_LEAST = 5
"""Breaks of each guarantee."""


def names_in(path: Path) -> set[str]:
    """Return the names of the functions in a file, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_break_fits_the_package(one):
    """Its old text occurs once, what it makes of the module compiles, and its tests exist."""
    source = (ROOT / one.file).read_text(encoding="utf-8")
    broken = one.broken(source)
    assert broken != source
    compile(broken, one.file, "exec")
    assert one.tests
    for test in one.tests:
        path, _, name = test.partition("::")
        assert not name or name.partition("[")[0] in names_in(ROOT / path), test
    assert one.why.endswith(".")


def test_every_guarantee_is_broken_in_five_ways():
    """The guarantees are those of the README; no two breaks have one name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## What it guarantees")[2].partition("\n## ")[0]
    promised = {int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}
    counts = Counter(one.guarantee for one in BREAKS)
    assert promised
    assert counts.keys() == promised
    assert min(counts.values()) >= AT_LEAST
    assert max(Counter(one.name for one in BREAKS).values()) == 1


def test_the_figures_are_those_of_the_breaks_that_there_are():
    """The table of tests/README.md counts each guarantee's, as ``run.py`` prints it."""
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    told = {int(guarantee): int(breaks) for guarantee, breaks, _ in rows}
    assert told == Counter(one.guarantee for one in BREAKS)


def test_breaks_are_chosen_by_their_name_or_guarantee():
    """Words are looked for in names; a number is a guarantee; nothing chooses all."""
    assert chosen(BREAKS, []) == BREAKS
    assert {one.guarantee for one in chosen(BREAKS, ["3"])} == {3}
    (one,) = chosen(BREAKS, ["50 ms at every push"])
    assert one.guarantee == 7


def test_old_text_that_moved_is_told():
    """A break whose text is gone, or is there twice, does not apply."""
    one = BREAKS[0]
    for source in ("", one.old * 2):
        with pytest.raises(ValueError, match=re.escape(one.name)):
            one.broken(source)


def test_a_mutant_is_one_change_of_a_module():
    """Every place of a module can be changed, each in its own way, to what compiles."""
    file = "keisei/protocol/coalescer.py"
    source = ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    made = [
        mutants.mutant(file, place, ()).new
        for place in range(len([*mutants.places(ast.parse(source))]))
    ]
    assert len({source, *made}) == len(made) + 1
    for text in made:
        compile(text, file, "exec")


def test_mutants_are_drawn_by_a_seed():
    """The same ones by the same seed, of the modules that are named."""
    first = mutants.drawn(["protocol/", "rounds.py"], 10, 3)
    assert first == mutants.drawn(["protocol/", "rounds.py"], 10, 3)
    assert len(set(first)) == 10
    assert all("protocol/" in file or file.endswith("rounds.py") for file, _ in first)

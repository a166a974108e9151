"""Mutants: small random changes to the package, and whether the tests of its room notice.

``nox -s mutation -- [--number N] [--seed S] [--all] [ROOM ...]`` draws changes of
modules whose path has one of the words in it: comparisons and arithmetic turned around, conditions
negated, numbers off by one, calls left out. Each is applied to a copy of the repository, as breaks
are. First the tests of the module itself are run, then those of its room; a mutant that both pass
is printed with its place. Some of these change nothing that anybody could see.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:0] = [] if "breaks" in sys.modules else [str(Path(__file__).parent.parent)]

from breaks.catalogue import ROOT, Break  # noqa: E402 - this is a program, and tested as a module
from breaks.run import CAUGHT, MISSED, Copy, show  # noqa: E402 - as above

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.LShift: ast.RShift,
}


def _changed(node: ast.AST) -> ast.AST | None:
    """Return a change of ``node``, ``None`` if there is none for its kind."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            new.ops = [COMPARISONS[type(op)]()]
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            new.op = ARITHMETIC[type(op)]()
        case ast.BoolOp(op=op):
            new.op = ast.And() if isinstance(op, ast.Or) else ast.Or()
        case ast.If() | ast.While():
            new.test = ast.UnaryOp(ast.Not(), new.test)
        case ast.Constant(value=bool() as value):
            new.value = not value
        case ast.Constant(value=int() as value):
            new.value = value + 1
        case ast.Expr(value=ast.Call() | ast.Await(ast.Call())):
            return ast.copy_location(ast.Pass(), node)
        case _:
            return None
    return new


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yield every node that can be changed: its parent, the field, and the place in a list."""
    for parent in ast.walk(tree):
        if isinstance(parent, ast.JoinedStr | ast.Raise):  # words of errors
            continue
        for field, value in ast.iter_fields(parent):
            if field in {"annotation", "returns", "decorator_list"}:
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.AST) and _changed(node) is not None:
                    yield parent, field, index


def mutant(file: str, number: int, tests: tuple[str, ...]) -> Break:
    """Return the change at place ``number`` of a module, as a break of the whole file."""
    source = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    parent, field, index = list(places(tree))[number]
    value = getattr(parent, field)
    node = value if index is None else value[index]
    new = _changed(node)
    before = ast.unparse(node).splitlines()[0]
    if index is None:
        setattr(parent, field, new)
    else:
        value[index] = new
    after = ast.unparse(ast.fix_missing_locations(new)).splitlines()[0]
    name = f"{file}:{node.lineno}: {before}  →  {after}"
    return Break(0, name, file, source, ast.unparse(tree), tests, "A mutant.")


def tests_of(file: str) -> list[tuple[str, ...]]:
    """Return the tests to run, in the order in which they are tried."""
    below = Path(file).relative_to("keisei")
    own = Path("tests") / below.parent / f"test_{below.name}"
    room = Path("tests") / below.parent
    wanted = [own, room, Path("tests/training/parallel")]
    found = [str(path) for path in wanted if (ROOT / path).exists() and path != Path("tests")]
    return [(path,) for path in dict.fromkeys(found)]


def drawn(words: Sequence[str], number: int | None, seed: int) -> list[tuple[str, int]]:
    """Return modules and places in them: so many, drawn by ``seed``, or all of them."""
    every: list[tuple[str, int]] = []
    for path in sorted((ROOT / "keisei").rglob("*.py")):
        file = str(path.relative_to(ROOT))
        if not words or any(word in file for word in words):
            count = sum(1 for _ in places(ast.parse(path.read_text(encoding="utf-8"))))
            every += [(file, place) for place in range(count)]
    if number is None or number >= len(every):
        return every
    return random.Random(seed).sample(every, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mutants and print the score of each room."""
    parser = argparse.ArgumentParser(description=__doc__, prog="tests/breaks/mutants.py")
    parser.add_argument("words", nargs="*", help="parts of the paths of modules")
    parser.add_argument("--number", type=int, default=20, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="every mutant: that takes days")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for each run")
    options = parser.parse_args(arguments)
    results: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Copy(Path(folder))
        tree.check()
        number = None if options.all else options.number
        for file, place in drawn(options.words, number, options.seed):
            result, one = MISSED, mutant(file, place, ())
            for tests in tests_of(file):
                result, _ = tree.result(dataclasses.replace(one, tests=tests), options.deadline)
                if result == CAUGHT:
                    break
            room = str(Path(file).parent)
            results[room, CAUGHT if result == CAUGHT else MISSED] += 1
            show(f"{result:14} {one.name}")
    show("\n| room | mutants | caught |\n|---|---|---|")
    for room in sorted({room for room, _ in results}):
        total = sum(n for (name, _), n in results.items() if name == room)
        show(f"| {room} | {total} | {results[room, CAUGHT]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

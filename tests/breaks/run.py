"""Break one guarantee after the other, and see whether the tests notice.

``nox -s mutation -- --breaks [NAME ...]`` runs the breaks whose name has a word in it, or those of
a guarantee by its number; without arguments all of them. Each is applied to a copy of the
repository, which the tests and every process that they start import, and only the tests that are
named with it are run. Before that the same tests are run without a break: a test that fails anyway
proves nothing.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path[:0] = [] if "breaks" in sys.modules else [str(Path(__file__).parent.parent)]

from breaks.catalogue import (  # noqa: E402 - this is a program, and tested as a module
    ROOT,
    Break,
    all_breaks,
    chosen,
)

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "out")
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=line")
PASSED, FAILED = 0, 1
CAUGHT, MISSED, STALE = "caught", "NOT CAUGHT", "DOES NOT APPLY"


class Copy:
    """A copy of the repository in which the package may be broken."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "copy"
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT)
        # What a break changes is compiled anew, as its time is another; nothing is written then.
        compileall.compile_dir(self.root / "keisei", quiet=1)

    def check(self) -> None:
        """Raise ``RuntimeError`` if a process would import the package from elsewhere."""
        program = "import keisei; print(keisei.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", program],
            **self._surroundings(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        if not Path(done.stdout.strip()).is_relative_to(self.root):
            raise RuntimeError(f"the package is imported from {done.stdout.strip()}")

    def _surroundings(self) -> dict:
        known = [str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(known),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self._temporary),
        }
        left = {key: value for key, value in os.environ.items() if key != "KEISEI_TEST_INSTALLED"}
        return {"cwd": self.root, "env": {**left, **variables}}

    def run(self, tests: Iterable[str], deadline: float) -> tuple[int | None, str]:
        """Run tests; return pytest's exit code, ``None`` after the deadline, and what it wrote."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *OPTIONS, f"--timeout={deadline}", *tests],
            **self._surroundings(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            text, _ = process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # workers go with it
            text, _ = process.communicate()
            return None, text
        return process.returncode, text

    def result(self, one: Break, deadline: float) -> tuple[str, str]:
        """Run a break; return what came of it, and a line that tells more."""
        path = self.root / one.file
        source = path.read_text(encoding="utf-8")
        try:
            path.write_text(one.broken(source), encoding="utf-8")
            code, text = self.run(one.tests, deadline)
        except ValueError as error:
            return STALE, str(error)
        finally:
            path.write_text(source, encoding="utf-8")
        if code == PASSED:
            return MISSED, ", ".join(one.tests)
        if code is None or "+++ Timeout +++" in text:
            return CAUGHT, f"nothing came of {', '.join(one.tests)} in time"
        if code < 0:
            return CAUGHT, f"{signal.Signals(-code).name} ended {', '.join(one.tests)}"
        if code == FAILED:
            return CAUGHT, _last(text, "FAILED ", "ERROR ")
        return STALE, f"pytest ended with {code}: {_last(text, 'ERROR', 'E ')}"


def _last(text: str, *beginnings: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith(beginnings)]
    return (lines or text.strip().splitlines() or [""])[-1]


def show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen breaks; the exit code is 0 if every one of them was caught."""
    parser = argparse.ArgumentParser(description=__doc__, prog="tests/breaks/run.py")
    parser.add_argument("names", nargs="*", help="parts of names, or numbers of guarantees")
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds for each break")
    parser.add_argument("--trust", action="store_true", help="do not run the tests unbroken first")
    options = parser.parse_args(arguments)
    breaks = chosen(all_breaks(), options.names)
    results: Counter[tuple[int, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="breaks-") as folder:
        copy = Copy(Path(folder))
        copy.check()
        if not options.trust:
            tests = sorted({test for one in breaks for test in one.tests})
            code, text = copy.run(tests, options.deadline * len(breaks))
            if code != PASSED:
                show(f"the tests fail without any break:\n{text}")
                return 1
            show(f"{len(tests)} tests pass without a break")
        for one in breaks:
            began = time.monotonic()
            result, more = copy.result(one, options.deadline)
            results[one.guarantee, result] += 1
            seconds = time.monotonic() - began
            show(f"{result:14} {seconds:6.1f} s  {one.guarantee:2}  {one.name}\n{'':15}{more}")
    show("\n| guarantee | breaks | caught |\n|---|---|---|")
    for guarantee in sorted({guarantee for guarantee, _ in results}):
        total = sum(n for (number, _), n in results.items() if number == guarantee)
        show(f"| {guarantee} | {total} | {results[guarantee, CAUGHT]} |")
    return int(any(result != CAUGHT for _, result in results))


if __name__ == "__main__":
    sys.exit(main())

"""The README is true: its tables are the configuration's, and its program runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from keisei.config import ParallelConfig, RestartPolicy
from keisei.testing.conformance import BACKEND_CHECKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_after(heading: str) -> dict[str, str]:
    """Return the first two columns of the table under a heading row."""
    rows = README[README.index(heading) :].splitlines()[2:]
    cells = {}
    for row in rows:
        if not row.startswith("|"):
            break
        key, default = (cell.strip().strip("`") for cell in row.split("|")[1:3])
        cells[key] = default
    return cells


def defaults_of(model: type[ParallelConfig] | type[RestartPolicy]) -> dict[str, str]:
    """Return every field's default as Python writes it."""
    values = dict(model())
    return {
        name: "RestartPolicy()" if isinstance(value, RestartPolicy) else repr(value)
        for name, value in values.items()
    }


def test_the_configuration_table_has_every_key_and_its_default():
    """The first table under Configuration is ParallelConfig, in its order."""
    assert table_after("| key | default | meaning |") == defaults_of(ParallelConfig)


def test_the_restart_table_has_every_key_and_its_default():
    """The second table under Configuration is RestartPolicy, in its order."""
    assert table_after("| `restart.` key | default | meaning |") == defaults_of(RestartPolicy)


@pytest.mark.timeout(120)
def test_the_program_of_the_readme_runs_and_learns(tmp_path):
    """Both blocks, saved under the names they are given, learn the best arm."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "quickstart_worker.py").write_text(blocks[0], encoding="utf-8")
    (tmp_path / "quickstart.py").write_text(blocks[1], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stderr == ""
    metrics = re.fullmatch(r"\{'mean_return': (.*)\}\n", done.stdout)
    assert metrics is not None
    assert float(metrics[1]) > 0.9


def test_the_program_of_the_readme_is_short():
    """Worker and learner together take no more than 40 lines that are not blank."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks[:2] for line in block.splitlines() if line.strip()]
    assert len(lines) <= 40


@pytest.mark.timeout(120)
def test_the_tests_of_the_readme_pass(tmp_path):
    """The block under Testing, with the plugin loaded as it says, tests the worker above."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    plugins = re.search(r"`(pytest_plugins = .*?)`", README)
    assert plugins is not None
    (tmp_path / "conftest.py").write_text(plugins[1], encoding="utf-8")
    (tmp_path / "quickstart_worker.py").write_text(blocks[0], encoding="utf-8")
    (tests,) = [block for block in blocks if "import asyncio, pytest" in block]
    (tmp_path / "test_mine.py").write_text(tests, encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:anyio"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert re.search(rf"^{1 + len(BACKEND_CHECKS)} passed in ", done.stdout, re.MULTILINE)


def test_every_session_that_the_readme_names_exists():
    """``nox -s NAME`` in the README names a session of the noxfile."""
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def (\w+)\(session", noxfile, re.MULTILINE))
    named = set(re.findall(r"nox -s (\w+)", README))
    assert named
    assert named <= sessions


def test_every_test_that_the_readme_names_exists():
    """Each test in the audit's table stands in the file that is named with it."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::([\w:]+))?`", README)
    assert named
    for path, test in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        for part in filter(None, test.split("::")):
            assert re.search(rf"(def|class) {part}\b", text), f"{path} has no {part}"

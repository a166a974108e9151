"""A worker class in the main module: it works where a worker can import it, or is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from backends.application import START

PROGRAM = textwrap.dedent(
    """
    import asyncio, torch
    from keisei import ParallelManager, Worker

    class Own(Worker):
        def collect(self):
            return {"x": torch.ones(1)}

    async def main(**config):
        async with ParallelManager(Own, config={"num_workers": 1, **config}) as manager:
            print("collected", (await manager.collect())[0].data["x"].item())

    def told(work):
        try:
            work()
        except Exception as error:
            print(type(error).__name__, error, sep=": ")

    if __name__ == "__main__":
        told(lambda: ParallelManager(Own) and print("constructed"))
    """
)
RUNS = 'if __name__ == "__main__":\n    told(lambda: asyncio.run(main()))\n'
INLINE = 'told(lambda: asyncio.run(main(backend="inline")))\n'
TYPED = "typed or piped into an interpreter or a notebook"
AN_ENTRY = "is what a package, folder or archive runs, and is not for import"
REFUSED = (
    "SerializationError: the worker factory Own cannot be sent: its class or an argument is "
    "defined in the main module, which worker processes cannot import: "
)
REMEDY = "define it in a module of its own, a .py file, and import it from there"


def run(folder: Path, *command: str, typed: str = "") -> str:
    """Run an interpreter in a folder, and return what it prints."""
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(folder), *([known] if known else [])])
    done = subprocess.run(
        [sys.executable, *command],
        input=typed,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["file", "-m"])
def test_what_a_worker_can_import_works(tmp_path, way):
    """A script that is run by its path, and a module that is run by its name."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tool.py").write_text(PROGRAM + RUNS, encoding="utf-8")
    command = ["package/tool.py"] if way == "file" else ["-m", "package.tool"]
    assert run(tmp_path, *command).split("\n") == ["constructed", "collected 1.0", ""]


@pytest.mark.parametrize("way", ["-c", "stdin", "-", "package", "folder", "zipapp"])
def test_what_a_worker_cannot_import_is_refused_by_the_constructor(tmp_path, way):
    """The error names the cause and the remedy before any process starts; inline it works."""
    program, typed, why = PROGRAM + INLINE, "", AN_ENTRY
    entry = tmp_path / "package" / "__main__.py"
    match way:
        case "-c":
            command, why = ["-c", program], TYPED
        case "stdin":
            command, typed, why = [], program, TYPED
        case "-":
            command, typed, why = ["-"], program, TYPED
        case "package" | "folder":
            entry.parent.mkdir()
            (entry.parent / "__init__.py").touch()
            entry.write_text(program, encoding="utf-8")
            command = ["-m", "package"] if way == "package" else ["package"]
        case "zipapp":
            with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
                archive.writestr("__main__.py", program)
            command = ["app.pyz"]
    refused, inline, _ = run(tmp_path, *command, typed=typed).split("\n")
    assert refused.startswith(REFUSED)
    assert why in refused
    assert REMEDY in refused
    assert inline == "collected 1.0"


@pytest.mark.parametrize("command", [("-i", "-q"), ("-m", "asyncio")], ids=["python", "asyncio"])
def test_what_is_typed_is_refused_by_the_constructor(tmp_path, command):
    """In the interactive interpreter and in asyncio's, whose classes are in no module at all."""
    typed = textwrap.dedent(
        """
        from keisei import ParallelManager, Worker
        class Own(Worker):
            def collect(self): return {}

        try: ParallelManager(Own)
        except Exception as error: print(type(error).__name__, error, sep=": ")

        """
    )
    out = run(tmp_path, *command, typed=typed)
    assert "SerializationError: the worker factory Own cannot be" in out
    assert REMEDY in out or "define the worker class at the top level of a module" in out

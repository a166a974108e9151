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
def test_what_a_worker_cannot_import_is_sent_by_value(tmp_path, way):
    """What was typed or piped, and what a package or archive runs: the code itself is sent."""
    program, typed = PROGRAM + RUNS + INLINE, ""
    entry = tmp_path / "package" / "__main__.py"
    match way:
        case "-c":
            command = ["-c", program]
        case "stdin":
            command, typed = [], program
        case "-":
            command, typed = ["-"], program
        case "package" | "folder":
            entry.parent.mkdir()
            (entry.parent / "__init__.py").touch()
            entry.write_text(program, encoding="utf-8")
            command = ["-m", "package"] if way == "package" else ["package"]
        case "zipapp":
            with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
                archive.writestr("__main__.py", program)
            command = ["app.pyz"]
    lines = run(tmp_path, *command, typed=typed).split("\n")
    assert lines == ["constructed", "collected 1.0", "collected 1.0", ""]


def test_without_cloudpickle_the_error_names_what_installs_it(tmp_path):
    """It comes from the constructor, before any process starts, with cause and remedies."""
    program = f"import sys; sys.modules['cloudpickle'] = None\n{PROGRAM}"
    refused, _ = run(tmp_path, "-c", program).split("\n")
    assert refused.startswith("SerializationError: the worker factory Own cannot be sent: ")
    assert TYPED in refused
    assert 'pip install "keisei[notebook]"' in refused
    assert "define it in a module of its own, a .py file, and import it from there" in refused


def test_code_that_refers_to_what_cannot_be_pickled_is_refused(tmp_path):
    """The error names what it is; nothing was started."""
    program = PROGRAM.replace('"x": torch.ones(1)', '"x": torch.ones(1), "y": LOCK')
    program = "import threading; LOCK = threading.Lock()\n" + program
    refused, _ = run(tmp_path, "-c", program).split("\n")
    assert refused.startswith("SerializationError: the worker factory Own cannot be sent: ")
    assert "_thread.lock" in refused


@pytest.mark.parametrize("command", [("-i", "-q"), ("-m", "asyncio")], ids=["python", "asyncio"])
def test_what_is_typed_works(tmp_path, command):
    """In the interactive interpreter and in asyncio's, whose classes are in no module at all."""
    typed = textwrap.dedent(
        """
        import asyncio, torch
        from keisei import ParallelManager, Worker
        class Own(Worker):
            def collect(self): return {"x": torch.ones(1) * 7}

        async def main():
            async with ParallelManager(Own, config={"num_workers": 1}) as manager:
                print("collected", (await manager.collect())[0].data["x"].item())

        """
    )
    ends = "await main()\n" if command == ("-m", "asyncio") else "asyncio.run(main())\n"
    assert "collected 7.0" in run(tmp_path, *command, typed=typed + ends)


def test_an_environment_that_the_application_has_registered(tmp_path):
    """A class of the main module, registered with Gymnasium there, is known to the workers."""
    pytest.importorskip("gymnasium", reason="needs the extra 'gymnasium'")
    program = textwrap.dedent(
        """
        import asyncio, functools
        import gymnasium as gym
        from keisei import ParallelManager
        from keisei.training.gymnasium import ActorCritic, GymnasiumWorker

        class Mine(gym.Env):
            observation_space = gym.spaces.Box(-1, 1, (3,))
            action_space = gym.spaces.Discrete(2)
            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                return self.observation_space.sample(), {}
            def step(self, action):
                return self.observation_space.sample(), 1.0, False, False, {}

        gym.register("Mine-v0", entry_point=Mine)

        async def main():
            worker = functools.partial(GymnasiumWorker, "Mine-v0", ActorCritic)
            async with ParallelManager(worker, config={"num_workers": 1}) as manager:
                print("rewards", (await manager.collect())[0].data["rewards"].mean().item())

        asyncio.run(main())
        """
    )
    assert run(tmp_path, "-c", program) == "rewards 1.0\n"

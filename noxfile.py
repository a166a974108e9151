"""Every check of this project, each in an environment of its own: ``nox -l`` lists them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nox

# The one pin of this project: sessions install it first, so that runs are reproducible and a
# build for the CPU that is at hand satisfies everything that follows. The library is not pinned.
TORCH = "torch==2.13.0"

nox.needs_version = ">=2025.2.9"
# What the benchmarks compare with. One that cannot be installed is told as a row of the table.
PEERS = ("torchrl", "tensordict", "stable-baselines3", "ray[rllib]")
# pip, not uv, is the installer: it honours the user's own pip configuration.
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "no"

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
EXTRAS = (
    "gymnasium",
    "pettingzoo",
    "progress",
    "testing",
    "examples",
    "mlflow",
    "notebook",
    "opentelemetry",
    "prometheus",
    "structlog",
    "tensorboard",
    "tensordict",
    "wandb",
)


def working_python() -> str | None:
    """Return the interpreter for all sessions: ``None`` is the one that runs nox, if it will do.

    Otherwise it is the newest one at hand that the project names and that starts: a name on the
    path may be a stub that does not.
    """
    named = [
        found.group(1)
        for line in PYPROJECT["project"]["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
    ]
    if "{}.{}".format(*sys.version_info) in named:
        return None
    for version in reversed(named):
        program = shutil.which(f"python{version}")
        if program is None:
            continue
        start = [program, "-c", ""]
        done = subprocess.run(start, check=False, capture_output=True)  # noqa: S603 - a Python
        if done.returncode == 0:
            return version
    return None


PYTHON = working_python()


def install(session: nox.Session, *groups: str, extras: tuple[str, ...] = EXTRAS) -> None:
    """Install torch, then the built package with ``extras``, then the dependency ``groups``."""
    session.install(TORCH)
    package = f".[{','.join(extras)}]" if extras else "."
    session.install(package, *nox.project.dependency_groups(PYPROJECT, *groups))


def lowest(requirement: str) -> str:
    """Turn ``name>=1.2,<2`` into ``name==1.2``; torch stays at the pin.

    Torch's lower releases have no build for the CPU alone on the package index, only builds that
    bring a GPU's libraries of several gigabytes, so its lower bound is not run here.
    """
    name, version = re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:,.*)?", requirement).groups()
    return TORCH if name == "torch" else f"{name}=={version}"


@nox.session(python=PYTHON)
def tests(session: nox.Session) -> None:
    """Run the tests against the built and installed package with every extra."""
    install(session, "test")
    # The console script, not "python -m pytest", which would import the source tree instead.
    session.run("pytest", *session.posargs, env={"KEISEI_TEST_INSTALLED": "1"})


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Check style and format with ruff, and what would be published with twine and its kin."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    session.run("check-wheel-contents", *map(str, dist.glob("*.whl")))


@nox.session(python=PYTHON)
def typing(session: nox.Session) -> None:
    """Check the package and tests/typing with mypy, strictly."""
    install(session, "typing")
    session.run("mypy", *session.posargs)


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """Solve CartPole with two supervised workers, one of which is killed on the way."""
    install(session, extras=("examples",))
    session.run("python", "examples/train_cartpole.py", *session.posargs)


@nox.session(python=PYTHON)
def examples(session: nox.Session) -> None:
    """Run every example at its smallest size."""
    install(session)
    for example in sorted((ROOT / "examples").glob("*.py")):
        # A file without the guard is a module that the examples import, such as their workers.
        if '__name__ == "__main__"' in example.read_text(encoding="utf-8"):
            session.run("python", f"examples/{example.name}", "--smoke", *session.posargs)


@nox.session(python=PYTHON, default=False)
def soak(session: nox.Session) -> None:
    """Verify every batch of pools under the chaos monkey; ``-- --minutes N``, 10 by default."""
    install(session)
    session.run("python", "tests/soak.py", *session.posargs)


@nox.session(python=PYTHON, default=False)
def stress(session: nox.Session) -> None:
    """Repeat every race a hundred times: the tests marked ``stress``."""
    install(session, "test")
    env = {"KEISEI_TEST_INSTALLED": "1"}
    session.run("pytest", "-m", "stress", "--timeout=900", *session.posargs, env=env)


@nox.session(python=PYTHON, default=False)
def mutation(session: nox.Session) -> None:
    """Mutate the package at random, or break each guarantee: ``-- --breaks [NAME ...]``."""
    install(session, "test")
    arguments = [argument for argument in session.posargs if argument != "--breaks"]
    program = "run" if "--breaks" in session.posargs else "mutants"
    session.run("python", f"tests/breaks/{program}.py", *arguments)


@nox.session(python=PYTHON, default=False)
def refused(session: nox.Session) -> None:
    """Run the tests where the kernel refuses pidfds, memfds, seals and fallocate."""
    install(session, "test")
    env = {"KEISEI_TEST_INSTALLED": "1", "KEISEI_TEST_REFUSE": "1"}
    session.run("pytest", *session.posargs, env=env)


@nox.session(python=PYTHON, default=False)
def browser(session: nox.Session) -> None:
    """Look at the page in a real Chromium; the screenshots are kept in build/screenshots."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        session.error(
            f"no {' and no '.join(missing)} on the PATH; on Debian: apt-get install chromium "
            "chromium-driver (as root), elsewhere install Chromium and the ChromeDriver of its "
            "version under these names"
        )
    install(session, "browser")
    env = {"KEISEI_TEST_INSTALLED": "1"}
    session.run("pytest", "-m", "browser", "tests/observers/page", *session.posargs, env=env)


@nox.session(python=PYTHON, default=False)
def bench(session: nox.Session) -> None:
    """Measure keisei beside its peers in one run; ``-- --quick`` takes three minutes."""
    install(session)
    for peer in PEERS:
        # torch is named again, so that no peer brings another build of it.
        session.install(TORCH, peer, success_codes=[0, 1])
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(python=PYTHON, default=False)
def core(session: nox.Session) -> None:
    """Run the tests with no extra installed; those that need one are skipped."""
    install(session, "test", extras=())
    session.run("pytest", *session.posargs, env={"KEISEI_TEST_INSTALLED": "1"})


@nox.session(python=PYTHON, default=False)
def minimums(session: nox.Session) -> None:
    """Run the tests with the lowest declared version of every dependency but torch."""
    project = PYPROJECT["project"]
    optional = project["optional-dependencies"].values()
    declared = {*project["dependencies"], *(one for extra in optional for one in extra)}
    install(session, "test")
    session.install(*sorted(map(lowest, declared)))
    session.run("pytest", *session.posargs, env={"KEISEI_TEST_INSTALLED": "1"})

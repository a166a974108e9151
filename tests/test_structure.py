"""How the package hangs together: layers, public names, import weight, dependencies, habits."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import keisei

PACKAGE = Path(keisei.__file__).parent
TESTS = Path(__file__).parent
ROOT = TESTS.parent

# Who may import whom: a room sees those of lower rank, and its own.
RANKS = {
    "naming": 0,
    "jsonable": 0,
    "exceptions": 0,
    "config": 0,
    "config_sources": 0,
    "config_types": 0,
    "devices": 0,
    "events": 0,
    "state_dicts": 0,
    "worker": 0,
    "ipc": 1,
    "protocol": 2,
    "supervision": 3,
    "child": 3,
    "backends": 4,
    "observers": 5,  # the manager tells them; what they may import is a test of its own
    "training": 5,
    "testing": 6,
    "": 6,  # the package itself, whose names lead into every room below
    "doctor": 6,
    "__main__": 7,
}

PUBLIC_NAMES = [
    "AsyncQueue",
    "CollectTimeout",
    "CommandError",
    "CommandTimeout",
    "ConfigurationError",
    "Evaluation",
    "Experience",
    "ExperienceBatch",
    "Incident",
    "KeiseiError",
    "Learner",
    "LearnerTimeout",
    "ManagerStateError",
    "ModelSynchronizer",
    "ParallelConfig",
    "ParallelManager",
    "PoisonedWeights",
    "PoolExhausted",
    "QueueBroken",
    "QueueClosed",
    "QueueEnded",
    "QueueError",
    "QueueTimeout",
    "QueueWouldBlock",
    "RestartPolicy",
    "RunReport",
    "SerializationError",
    "Weights",
    "WeightsError",
    "Worker",
    "WorkerCommunicator",
    "WorkerContext",
    "WorkerError",
    "WorkerLost",
    "WorkerStartError",
    "warm_fork_server",
]

# Modules that may import what only an extra installs, and the distributions that they may import.
EXTRAS_AT_HOME = {
    "keisei.testing.pytest_plugin": {"pytest"},
    "keisei.observers.mlflow": {"mlflow"},
    "keisei.observers.opentelemetry": {"opentelemetry"},
    "keisei.observers.progress": {"IPython", "rich"},
    "keisei.observers.prometheus": {"prometheus_client"},
    "keisei.observers.structlog": {"structlog"},
    "keisei.observers.tensorboard": {"tensorboard"},
    "keisei.observers.wandb": {"wandb"},
    "keisei.training.agent_envs": {"pettingzoo"},
    "keisei.training.spaces": {"gymnasium", "numpy"},
    "keisei.training.parallel.batch": {"tensordict"},
    "keisei.training.parallel.by_value": {"cloudpickle"},
    "keisei.training.parallel.registrations": {"gymnasium"},
    "keisei.training.parallel.tensordicts": {"tensordict"},
}

# Distributions that are called otherwise than the package that they install.
DISTRIBUTIONS = {
    "mlflow": "mlflow-skinny",
    "opentelemetry": "opentelemetry-api",
    "prometheus_client": "prometheus-client",
}


@dataclass(frozen=True)
class Import:
    """One import statement: who, what, where, and whether it runs when the module is loaded."""

    importer: str
    target: str
    line: int
    at_load: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules_of(package: Path) -> dict[str, Path]:
    """Return the modules of a package, by name."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = modules_of(PACKAGE)
BENCHMARKS = modules_of(ROOT / "benchmarks")
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(module: str, modules: dict[str, Path]) -> Iterator[Import]:
    """Find every import of a module, in functions and under TYPE_CHECKING too."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, at_load)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno} is a relative import"
                for alias in child.names:
                    target = f"{child.module}.{alias.name}"
                    known = target in modules or child.module is None
                    name = target if known else str(child.module)
                    yield Import(module, name, child.lineno, at_load)
            else:
                late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                hidden = isinstance(child, ast.stmt) and is_type_checking(child)
                yield from visit(child, at_load and not late and not hidden)

    yield from visit(ast.parse(modules[module].read_text(encoding="utf-8")), at_load=True)


def circles_in(modules: dict[str, Path]) -> list[str]:
    """Return the names on a circle of imports, annotations and functions included, or nothing."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module in modules:
        graph[module] = {one.target for one in imports_of(module, modules)} & {*modules} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


IMPORTS = [found for module in MODULES for found in imports_of(module, MODULES)]
INTERNAL = [one for one in IMPORTS if one.target.partition(".")[0] == "keisei"]
EXTERNAL = [
    one
    for one in IMPORTS
    if one.target.partition(".")[0] not in {"keisei", *sys.stdlib_module_names}
]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_lives_in_a_known_room():
    """Each module belongs to a room that the layering below knows."""
    assert {room(module) for module in MODULES} <= {*RANKS, ""}


def test_imports_point_one_way():
    """A room imports only itself and the rooms beneath it, also for types and inside functions."""
    wrong = [
        str(one)
        for one in INTERNAL
        if room(one.importer) in RANKS
        and RANKS.get(room(one.target), 99) > RANKS[room(one.importer)]
    ]
    assert wrong == []


def test_observers_know_only_events():
    """Observers import the events, what makes them JSON, and each other."""
    wrong = [
        str(one)
        for one in INTERNAL
        if room(one.importer) == "observers"
        and room(one.target) not in {"observers", "events", "jsonable"}
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "modules", [MODULES, BENCHMARKS, EXAMPLES], ids=["keisei", "benchmarks", "examples"]
)
def test_no_modules_import_each_other(modules):
    """There is no circle of imports, and imports for annotations or in functions count too."""
    assert len(modules) > 5
    assert circles_in(modules) == []


def test_circles_through_annotations_and_functions_are_found(tmp_path):
    """Each way of importing closes a circle: at load, for types alone, and inside a function."""
    package = tmp_path / "ring"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from ring import two\n")
    (package / "two.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ring.three import x\n"
    )
    (package / "three.py").write_text("def x():\n    import ring.one\n")
    assert set(circles_in(modules_of(package))) == {"ring.one", "ring.two", "ring.three"}
    (package / "three.py").write_text("def x():\n    import ring\n")
    assert circles_in(modules_of(package)) == []


@pytest.mark.parametrize("modules", [BENCHMARKS, EXAMPLES], ids=["benchmarks", "examples"])
def test_programs_use_the_public_names(modules):
    """Benchmarks and examples import what is public, from where it is public.

    ``keisei.worker`` and ``keisei.events`` are public modules; the former is all that a worker's
    module needs.
    """
    wrong = []
    for module in modules:
        for node in ast.walk(ast.parse(modules[module].read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.partition(".")[0] != "keisei":
                continue
            for alias in node.names:
                elsewhere = node.module not in {"keisei", "keisei.worker", "keisei.events"}
                is_private = "._" in f"{node.module}.{alias.name}"
                if is_private or (elsewhere and alias.name in keisei.__all__):
                    wrong.append(f"{module}: from {node.module} import {alias.name}")
    assert wrong == []


def test_ipc_and_supervision_know_nothing_of_learning():
    """The lower rooms import no optimiser, no environment and no network layer."""
    wrong = [
        str(one)
        for one in IMPORTS
        if room(one.importer) in {"ipc", "supervision"}
        and one.target.startswith(("gymnasium", "torch.nn", "torch.optim"))
    ]
    assert wrong == []


def test_training_knows_nothing_of_file_descriptors():
    """The upper room imports none of the modules that deal in descriptors."""
    low = {"fcntl", "mmap", "os", "select", "selectors", "signal", "socket", "multiprocessing"}
    wrong = [
        str(one)
        for one in IMPORTS
        if room(one.importer) == "training" and one.target.partition(".")[0] in low
    ]
    assert wrong == []


def test_aiomultiprocess_is_confined_to_one_module():
    """The package that polls and starts a manager process has one importer, a backend."""
    users = {one.importer for one in EXTERNAL if one.target.startswith("aiomultiprocess")}
    assert len(users) == 1
    assert {room(user) for user in users} == {"backends"}


def test_the_public_names_are_these():
    """The public names are a decision: this list changes together with the changelog."""
    assert keisei.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_exists_and_is_documented(name):
    """Each public name can be imported from the package, knows its name, and has a docstring."""
    value = getattr(keisei, name)
    assert value.__name__ == name
    assert value.__module__ == "keisei"
    own = vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__
    assert len(inspect.cleandoc(own or "")) > 20


def test_dir_shows_the_public_names_before_they_are_used():
    """Completion in a shell finds names that were not imported yet."""
    program = "import keisei; assert set(keisei.__all__) <= set(dir(keisei))"
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)


def test_an_unknown_name_is_an_attribute_error():
    """The package answers for names that it does not have as any module does."""
    with pytest.raises(AttributeError, match=r"^module 'keisei' has no attribute 'Pool'$"):
        keisei.Pool  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize(
    "module", ["keisei", "keisei.worker", "keisei.exceptions", "keisei.child.forkserver"]
)
def test_a_workers_module_pays_for_nothing_that_it_does_not_use(module):
    """Importing the light modules loads neither torch nor any other third party."""
    program = (
        f"import sys; before = set(sys.modules); import {module}\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - {'keisei'} - sys.stdlib_module_names))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout == "[]\n"


def test_every_public_name_works_without_any_extra():
    """The package imports where neither Gymnasium, NumPy nor rich is installed."""
    program = (
        "import sys\n"
        "for name in ('gymnasium', 'numpy', 'rich', 'matplotlib', 'tensordict'):\n"
        "    sys.modules[name] = None\n"
        "import keisei, keisei.observers.log\n"
        "for name in keisei.__all__: getattr(keisei, name)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)


def test_other_systems_get_a_clear_error():
    """Where there is no POSIX the import says so, and names the way out."""
    program = "import os, sys, signal, enum, typing; os.name = 'nt'; import keisei"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: keisei needs a POSIX system: its pool rests on process groups, signals and "
        "the passing of file descriptors. On Windows use WSL 2."
    )


def names_in(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in requirements}


@pytest.fixture
def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def test_only_declared_dependencies_are_imported(project):
    """What a module imports is a dependency, or belongs to the extra that the module is for."""
    declared = names_in(project["dependencies"])
    wrong = [
        str(one)
        for one in EXTERNAL
        if (root := one.target.partition(".")[0]) not in declared
        and root not in EXTRAS_AT_HOME.get(one.importer, set())
    ]
    assert wrong == []


def test_every_dependency_is_used(project):
    """Nobody installs what the package never imports."""
    used = {one.target.partition(".")[0] for one in EXTERNAL}
    assert names_in(project["dependencies"]) - used == set()


def test_what_the_extras_install_is_declared(project):
    """Each module with an extra of its own has it declared."""
    extras = project["optional-dependencies"]
    assert sorted(extras) == [
        "examples",
        "gymnasium",
        "mlflow",
        "notebook",
        "opentelemetry",
        "pettingzoo",
        "progress",
        "prometheus",
        "structlog",
        "tensorboard",
        "tensordict",
        "testing",
        "wandb",
    ]
    declared = set().union(*(names_in(one) for one in extras.values()))
    imported = set().union(*EXTRAS_AT_HOME.values()) - {"IPython"}  # of the notebook itself
    assert {DISTRIBUTIONS.get(name, name) for name in imported} - declared == set()


def test_the_installed_package_is_the_one_that_is_tested():
    """Under nox the tests import the built package, not the source tree, with its type marker."""
    if "KEISEI_TEST_INSTALLED" not in os.environ:
        pytest.skip("only in the nox sessions, which install the package")
    assert PACKAGE.parent != ROOT
    assert (PACKAGE / "py.typed").is_file()
    assert importlib.metadata.version("keisei") == keisei.__version__


# These modules run in processes that the library made, which may treat themselves as they like;
# the last one gives back what hooks have taken.
ELSEWHERE = {
    "keisei.child.entry",
    "keisei.child.forkserver",
    "keisei.child.process",
    "keisei.child.loops",
}
TEST_FILES = sorted(TESTS.rglob("*.py"))


def test_nothing_waits_by_sleeping():
    """No module and no test calls sleep: time is awaited by events and deadlines."""
    call = re.compile(r"\bsleep" + r"\(")
    found = [
        f"{path.name}:{number}"
        for path in [*MODULES.values(), *TEST_FILES]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if call.search(line)
    ]
    assert found == []


def test_nothing_global_is_taken():
    """In the application's process nobody sets signals, start methods, loops or reaps strangers."""
    taken = re.compile(
        r"\b(signal\.signal|set_start_method|set_event_loop_policy|set_wakeup_fd|waitpid\(-1)\b"
    )
    found = [
        f"{module}: {line.strip()}"
        for module, path in MODULES.items()
        if module not in ELSEWHERE
        for line in path.read_text(encoding="utf-8").splitlines()
        if taken.search(line) and not line.lstrip().startswith(("#", '"', "``"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "path", TEST_FILES, ids=lambda path: str(path.relative_to(TESTS).with_suffix(""))
)
def test_every_test_says_what_behaviour_it_holds(path):
    """Each test has a docstring of one sentence; each file of tests says what it is for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    tests = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]
    silent = [test.name for test in tests if not (ast.get_docstring(test) or "").endswith(".")]
    assert silent == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is_for(module):
    """The first line of each module of the package is its docstring."""
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.startswith('"""')

"""Public names: the module that they carry, their pickles, their sources and their annotations."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pickle
import subprocess
import sys
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import keisei
from keisei.events import ExitCause, Incident, PoolStarted
from keisei.naming import home_of
from keisei.training.parallel.run import RunReport
from keisei.worker import Experience, WorkerContext

PACKAGE = Path(keisei.__file__).parent
NAMES = pytest.mark.parametrize("name", keisei.__all__)


def run(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout


@NAMES
def test_a_public_name_says_where_it_is_public(name):
    """Repr, module and pickle of each public name say keisei, and find it there."""
    value = getattr(keisei, name)
    assert value.__module__ == "keisei"
    assert f"keisei.{name}" in repr(value) or inspect.isfunction(value)
    pickled = pickle.dumps(value, protocol=4)
    assert pickle.loads(pickled) is value
    assert b"keisei." not in pickled


@NAMES
def test_a_public_name_stays_where_it_is_defined(name):
    """The defining module has it under the same name, so pickles of before can be read."""
    value = getattr(keisei, name)
    home = importlib.import_module(home_of(value))
    assert home.__name__ != "keisei"
    assert getattr(home, name) is value
    old = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (home.__name__, name)
    )
    assert pickle.loads(old + b"\x93.") is value


@NAMES
def test_the_source_of_a_public_name_is_found(name):
    """Its home holds its definition, and inspect finds functions and methods there."""
    value = getattr(keisei, name)
    path = Path(importlib.import_module(home_of(value)).__file__ or "")
    kinds = (ast.ClassDef, ast.FunctionDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert [node.name for node in body if isinstance(node, kinds) and node.name == name] == [name]
    functions = [value] if inspect.isfunction(value) else vars(value).values()
    for function in filter(inspect.isfunction, functions):
        if Path(inspect.unwrap(function).__code__.co_filename).is_relative_to(PACKAGE):
            source = inspect.getsource(function)
            assert f"def {function.__name__}(" in source
            assert source in path.read_text(encoding="utf-8")


def test_no_wrong_source_of_a_class_is_shown():
    """Where inspect cannot find a class it says so, rather than show lines of another file."""
    for value in map(keisei.__getattr__, keisei.__all__):
        if inspect.isclass(value):
            with pytest.raises(OSError, match=r"source|class definition"):
                inspect.getsource(value)


def test_the_home_of_anything_else_is_its_module():
    """Names that are not public, and values that are neither class nor function, have theirs."""
    assert home_of(PoolStarted) == "keisei.events"
    assert home_of(Path) == Path.__module__
    assert home_of(7) == ""

    class ParallelManager:
        """Only called as a public class is."""

    assert home_of(ParallelManager) == __name__


@pytest.mark.parametrize("name", [n for n in keisei.__all__ if n != "warm_fork_server"])
def test_annotations_are_resolved_as_before(name):
    """Tools that resolve a class's annotations look in its module, and need no look there."""
    value = getattr(keisei, name)
    home = vars(importlib.import_module(home_of(value)))
    missing = {"torch": torch}  # some modules import it for type checkers alone
    assert typing.get_type_hints(value, None, missing) == typing.get_type_hints(
        value, home, missing
    )


def test_resolved_annotations_are_types():
    """The fields of the public values have types that a tool can use."""
    assert typing.get_type_hints(Incident)["cause"] is ExitCause
    assert typing.get_type_hints(RunReport)["incidents"] == tuple[Incident, ...]
    assert typing.get_type_hints(Experience)["data"] == Mapping[str, Any]
    assert typing.get_type_hints(WorkerContext)["seed"] is int
    model = typing.get_type_hints(keisei.Worker, None, {"torch": torch})["model"]
    assert model == torch.nn.Module | None
    assert [field.name for field in dataclasses.fields(Experience)] == ["data", "info", "num_steps"]


def test_a_traceback_names_the_error_as_users_import_it():
    """The last line of a traceback is what an except clause would name."""
    error = keisei.WorkerLost("worker 1 was lost", 1)
    assert traceback.format_exception_only(error) == ["keisei.WorkerLost: worker 1 was lost\n"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("keisei.worker", "Worker"),
        ("keisei.exceptions", "KeiseiError"),
        ("keisei.events", "Incident"),
    ],
)
def test_a_name_is_public_before_the_package_was_asked_for_it(module, name):
    """A class that was imported from its home says the same as one from the package."""
    program = f"from {module} import {name}; print({name})"
    assert run(program) == f"<class 'keisei.{name}'>\n"


def test_a_pickle_is_read_where_nothing_was_imported():
    """A process that unpickles a public value imports what it needs by itself."""
    incident = Incident(1, 2, ExitCause.SIGNAL, exitcode=-9)
    program = (
        "import pickle, sys\n"
        f"value = pickle.loads({pickle.dumps(incident)!r})\n"
        "print(value.summary, 'torch' in sys.modules)"
    )
    assert run(program) == f"{incident.summary} False\n"

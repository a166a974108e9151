"""The doctor: what it finds, the words for it, and the exit codes of ``python -m keisei``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import keisei
import pool_workers
from keisei import exceptions
from keisei.__main__ import main
from keisei.doctor import machine, report, software, trial
from keisei.doctor.findings import Finding, Verdict
from keisei.ipc import kernel
from keisei.testing.scenarios import fail_after

TESTS = Path(__file__).parent.parent
CALLS = ("memfd_create", "seals", "write_seal", "posix_fallocate", "pidfd_open")


def run(*arguments, prefix=()):
    return subprocess.run(
        [*prefix, sys.executable, "-m", "keisei", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def open_descriptors():
    return list(Path("/proc/self/fd").iterdir())


def by_name(findings):
    return {one.name: one for one in findings}


def test_the_version():
    """It is printed alone, and the exit code is 0."""
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"keisei {keisei.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("doctor", "--nonsense")])
def test_a_wrong_command_line_is_2(arguments):
    """The usage is written to standard error, and nothing to standard output."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: python -m keisei" in done.stderr


def test_the_whole_report_of_a_real_machine():
    """Pools are tried with both start methods; the text fits a bug report."""
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"keisei doctor ({keisei.__version__})"
    assert lines[-1].startswith("keisei works here")
    assert "\x1b" not in done.stdout
    assert max(map(len, lines)) <= 110
    for heading in ("software", "kernel", "limits", "memory", "processors", "gpus", "trial"):
        assert heading in lines
    for method in ("forkserver", "spawn"):
        assert any(line.startswith(f"  ok {method} ") for line in lines), done.stdout


def test_the_report_as_json():
    """It is one object; each finding has its section, name, value, verdict and note."""
    done = run("doctor", "--json", "--no-trial")
    found = json.loads(done.stdout)
    assert (done.returncode, found["keisei"], found["works"]) == (0, keisei.__version__, True)
    assert {frozenset(one) for one in found["findings"]} == {
        frozenset({"section", "name", "value", "verdict", "note"})
    }
    names = {one["name"] for one in found["findings"]}
    assert {*CALLS, "subreaper", "torch", "python", "open files (ulimit -n)"} <= names


@pytest.mark.parametrize("name", CALLS)
def test_each_call_that_is_refused_has_its_substitute_named(name, monkeypatch):
    """The finding says no, and what takes the place of the call; pools work all the same."""
    found = dict.fromkeys(CALLS, True) | {name: False}
    monkeypatch.setattr(kernel, "capabilities", lambda: found)
    findings = list(machine.findings())
    lacking = [one for one in findings if one.verdict is Verdict.SUBSTITUTE]
    assert [(one.name, one.value) for one in lacking] == [(name, False)]
    assert len(lacking[0].note) > 20
    assert report.verdict_on(findings).startswith("keisei works here: 1 thing(s) replaced")


def test_a_kernel_that_refuses_them_all():
    """Each has its substitute in the report, and the pools that are tried work all the same."""
    program = (
        "import sys, refusal; refusal.put_in_force()\n"
        "from keisei.__main__ import main\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)["findings"]
    assert {one["name"] for one in found if one["verdict"] == "substitute"} == set(CALLS)
    trials = {one["name"]: one["verdict"] for one in found if one["section"] == "trial"}
    assert trials == {"forkserver": "ok", "spawn": "ok"}


def test_every_error_is_in_the_page_about_trouble():
    """Each public error class has a row with its cause and remedy."""
    page = (TESTS.parent / "docs" / "trouble.md").read_text(encoding="utf-8")
    bases = {"KeiseiError", "WorkerError", "QueueError"}
    errors = {
        name
        for name, value in vars(exceptions).items()
        if isinstance(value, type) and issubclass(value, exceptions.KeiseiError)
    }
    assert [name for name in sorted(errors - bases) if f"`{name}`" not in page] == []


def test_every_capability_of_the_kernel_has_a_note():
    """A call that is added to the capabilities must say what takes its place."""
    assert set(kernel.capabilities()) == set(CALLS)


@pytest.mark.parametrize("name", software.NEEDED)
def test_a_dependency_that_is_missing_is_a_problem(name, monkeypatch, capsys):
    """The report names the command that installs it, no pool is tried, and the exit code is 1."""
    real = importlib.metadata.version

    def version(wanted):
        if wanted == name:
            raise importlib.metadata.PackageNotFoundError(wanted)
        return real(wanted)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert f"pip install {name}" in text
    assert text.splitlines()[-1] == f"keisei does not work here: see {name} (!!)"
    assert "not tried" in text


def test_what_a_mixed_installation_looks_like(monkeypatch):
    """An installation of another version than the code that runs is warned of."""

    class Distribution:
        version = "9.9.9"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    found = by_name(software.findings())["keisei"]
    assert found.verdict is Verdict.WARNING
    assert "pip uninstall keisei" in found.note


@pytest.mark.parametrize(
    ("limit", "workers", "verdict"),
    [(60, 0, "problem"), (256, 16, "warning"), (1024, 80, "ok"), (65536, 5456, "ok")],
)
def test_a_limit_of_open_files_is_told_in_workers(limit, workers, verdict, monkeypatch):
    """Too few for one worker is a problem, few are a warning with the command that helps."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, 65536))
    found = by_name(machine.findings())["open files (ulimit -n)"]
    assert found.value == f"{limit:,} of 65,536"
    assert found.note.startswith(f"carries about {workers:,} workers")
    assert found.verdict == verdict
    assert ("ulimit -n 4096" in found.note) is (verdict != "ok")


async def test_a_worker_takes_no_more_descriptors_than_the_doctor_says(make_manager):
    """What the estimate rests on: descriptors of a real pool, beyond those of a smaller one."""
    model = torch.nn.Linear(1, 1)
    taken = []
    async with fail_after(60):
        for number in (2, 6):
            before = len(open_descriptors())
            async with make_manager(
                pool_workers.Episodic, model=model, num_workers=number
            ) as manager:
                await manager.collect(min_steps=100)
                taken.append(len(open_descriptors()) - before)
    assert (taken[1] - taken[0]) / 4 <= machine.DESCRIPTORS_PER_WORKER
    assert taken[0] <= machine.DESCRIPTORS_OF_A_POOL


def test_a_pool_that_cannot_start_is_a_problem(monkeypatch):
    """The error stands in the report, in one line, and the exit code is 1."""

    async def fail(method, timeout):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(trial, "_try", fail)
    findings = list(trial.findings())
    assert [one.verdict for one in findings] == [Verdict.PROBLEM] * 2
    assert "Too many open files" in report.as_text(findings)
    assert report.problems_in(findings) == findings


def test_a_driver_that_complains_is_a_warning(monkeypatch):
    """What torch warns of, or raises, while it looks for GPUs is in the report."""

    def count():
        warnings.warn("the driver is too old\nmore", stacklevel=1)
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "device_count", count)
    found = [one for one in machine.findings() if one.section == "gpus"]
    assert [(one.name, one.value) for one in found] == [
        ("torch", "RuntimeError: no driver"),
        ("warning", "the driver is too old"),
    ]


def test_gpus_are_named(monkeypatch):
    """Each GPU has a line of its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    found = by_name(machine.findings())
    assert (found["cuda:0"].value, found["cuda:1"].value) == ("Card 0", "Card 1")


def test_text_and_marks():
    """Each line has its mark; long notes are wrapped under their value."""
    findings = [
        Finding("one", "fact", 1),
        Finding("one", "good", True, Verdict.OK),
        Finding("two", "lacking", False, Verdict.SUBSTITUTE, "other things " * 12),
        Finding("two", "odd", "text", Verdict.WARNING, "look"),
    ]
    lines = report.as_text(findings).splitlines()
    assert lines[2:5] == ["one", f"     {'fact':<24} 1", f"  ok {'good':<24} yes"]
    assert lines[7].startswith(f"  ~  {'lacking':<24} no: other things")
    assert lines[8].startswith(" " * 30 + "things") or lines[8].startswith(" " * 30 + "other")
    assert lines[-1] == "keisei works here: 1 thing(s) replaced by others (~), 1 warning(s) (!)"


def test_any_terminal_takes_the_report():
    """Where the encoding lacks a character of a path or a name it is escaped."""
    done = run("doctor", "--no-trial", prefix=("env", "PYTHONIOENCODING=ascii", "OMP_NUM_X=ä"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xe4" in done.stdout

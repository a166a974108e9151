"""Configurations from OmegaConf, YAML, dataclasses, the environment; copies; typed dictionaries."""

from __future__ import annotations

import dataclasses
import enum
import re
import typing

import pytest

from keisei.config import ParallelConfig, RestartPolicy
from keisei.config_types import ParallelConfigDict, RestartPolicyDict
from keisei.exceptions import ConfigurationError


class Mode(enum.Enum):
    SYNC = "sync"


@dataclasses.dataclass
class Restart:
    max_restarts: int = 3


@dataclasses.dataclass
class Pool:
    num_workers: int = 3
    mode: Mode = Mode.SYNC
    preload: list[str] = dataclasses.field(default_factory=lambda: ["json"])
    restart: Restart = dataclasses.field(default_factory=Restart)


EXPECTED = ParallelConfig(
    num_workers=3, mode="sync", preload=("json",), restart=RestartPolicy(max_restarts=3)
)
YAML = """
num_workers: 3
mode: sync
preload: [json]
restart: {max_restarts: 3}
"""


def omegaconf():
    return pytest.importorskip("omegaconf", reason="the tests' group installs it").OmegaConf


def test_a_dataclass():
    """An instance of a dataclass, nested, with members of enumerations."""
    assert ParallelConfig.of(Pool()) == EXPECTED


def test_yaml():
    """What YAML's safe loader makes of a file."""
    yaml = pytest.importorskip("yaml", reason="the tests' group installs it")
    assert ParallelConfig.of(yaml.safe_load(YAML)) == EXPECTED


@pytest.mark.parametrize("kind", ["plain", "structured", "instance", "read-only"])
def test_omegaconf(kind):
    """Plain and structured configurations, lists and nested nodes of OmegaConf's own classes."""
    make = omegaconf()
    found = {
        "plain": lambda: make.create(YAML),
        "structured": lambda: make.structured(Pool),
        "instance": lambda: make.structured(Pool()),
        "read-only": lambda: make.create(YAML),
    }[kind]()
    if kind == "read-only":
        make.set_readonly(found, True)
    assert ParallelConfig.of(found) == EXPECTED


def test_interpolations_and_environment_of_omegaconf(monkeypatch):
    """They are resolved; the text that the environment gives is read as a number."""
    monkeypatch.setenv("SOME_NUMBER", "3")
    found = omegaconf().create(
        {
            "n": "${oc.env:SOME_NUMBER}",
            "pool": {"num_workers": "${n}", "worker_device_map": ["cpu", "cpu", "cpu"]},
        }
    )
    config = ParallelConfig.of(found.pool)
    assert (config.num_workers, config.worker_device_map) == (3, ("cpu",) * 3)


def test_what_omegaconf_marks_as_missing_is_named():
    """Every missing value, and every interpolation that leads nowhere, is one problem."""
    found = omegaconf().create(
        {"num_workers": "???", "seed": "${nowhere}", "restart": {"max_restarts": "???"}}
    )
    with pytest.raises(ConfigurationError) as caught:
        ParallelConfig.of(found)
    keys = [re.split(r"[: ]", problem)[0] for problem in caught.value.problems]
    assert keys == ["num_workers", "seed", "restart.max_restarts"]


def test_hydra_composes_it(tmp_path):
    """A node that Hydra has composed, with an override, is a configuration."""
    hydra = pytest.importorskip("hydra", reason="the tests' group installs it")
    (tmp_path / "app.yaml").write_text("pool:\n  num_workers: 3\n  mode: sync\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        found = hydra.compose("app", overrides=["pool.num_workers=5", "+pool.seed=7"])
    config = ParallelConfig.of(found.pool)
    assert (config.num_workers, config.mode, config.seed) == (5, "sync", 7)


def test_the_environment():
    """Numbers, truth values, lists, nothing and the restart policy; strangers are passed over."""
    config = ParallelConfig.from_env(
        environ={
            "KEISEI_NUM_WORKERS": "3",
            "KEISEI_MODE": "sync",
            "KEISEI_CHECK_FINITE": "true",
            "KEISEI_PRELOAD": "json, re",
            "KEISEI_WORKER_DEVICE_MAP": "cpu,cpu,cpu",
            "KEISEI_POISON_THRESHOLD": "none",
            "KEISEI_COLLECT_TIMEOUT": "2.5",
            "KEISEI_RESTART__MAX_RESTARTS": "3",
            "KEISEI_TEST_INSTALLED": "1",
            "OTHER_SEED": "5",
        },
        max_queue_size=9,
    )
    assert config == ParallelConfig(
        num_workers=3,
        mode="sync",
        check_finite=True,
        preload=("json", "re"),
        worker_device_map=("cpu",) * 3,
        poison_threshold=None,
        collect_timeout=2.5,
        restart={"max_restarts": 3},
        max_queue_size=9,
    )


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("KEISEI_NUM_WORKER", "3", "KEISEI_NUM_WORKER names no option; did you mean 'num_workers'"),
        ("KEISEI_NUM_WORKERS", "many", "num_workers = 'many': must be a valid integer"),
        ("KEISEI_RESTART__MAX_RESTART", "3", "did you mean 'max_restarts'"),
        ("KEISEI_RESTART__MAX_RESTARTS", "-1", "restart.max_restarts = '-1'"),
    ],
)
def test_a_wrong_variable_is_named(name, value, problem):
    """A value that cannot work, and a name that is nearly an option's, are errors."""
    with pytest.raises(ConfigurationError) as caught:
        ParallelConfig.from_env(environ={name: value})
    assert problem in caught.value.problems[0]


def test_a_copy_with_changes_is_validated():
    """Unknown keys and impossible values are errors; the rest is kept; the original stays."""
    config = ParallelConfig(num_workers=3, restart={"max_restarts": 3})
    copy = config.model_copy(update={"num_workers": 5, "seed": 1})
    assert (copy.num_workers, copy.seed, copy.restart.max_restarts) == (5, 1, 3)
    assert config.num_workers == 3
    assert config.model_copy() == config
    restart = config.restart.model_copy(update={"backoff_base": 0.5})
    assert (restart.max_restarts, restart.backoff_base) == (3, 0.5)
    for update in ({"num_workers": 0}, {"num_worker": 4}, {"min_workers": 9}, {"mode": "no"}):
        with pytest.raises(ConfigurationError):
            config.model_copy(update=update)


@pytest.mark.parametrize(
    ("model", "typed"), [(ParallelConfig, ParallelConfigDict), (RestartPolicy, RestartPolicyDict)]
)
def test_the_typed_dictionaries_have_every_option(model, typed):
    """No option is missing in them, and none is made up; a mapping of that type validates."""
    assert set(typing.get_type_hints(typed)) == set(model.model_fields)
    assert typed.__required_keys__ == frozenset()
    given: typing.Any = {name: getattr(model(), name) for name in model.model_fields}
    assert model(**given) == model()


@pytest.mark.parametrize("value", [5, "text", [("num_workers", 2)], Pool, object()])
def test_what_is_no_mapping_is_refused(value):
    """The error says what it is and what to give."""
    with pytest.raises(ConfigurationError, match="give a ParallelConfig or a mapping"):
        ParallelConfig.of(value)

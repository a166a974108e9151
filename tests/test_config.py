"""ParallelConfig and RestartPolicy: what they accept, and the one error for all the rest."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from keisei.config import ParallelConfig, RestartPolicy
from keisei.devices import resolve_devices
from keisei.exceptions import ConfigurationError


def problems_of(**values: object) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        ParallelConfig(**values)  # type: ignore[arg-type]
    return caught.value.problems


def test_the_defaults_are_these():
    """A configuration made of nothing has exactly the documented defaults."""
    assert ParallelConfig().model_dump() == {
        "num_workers": 2,
        "mode": "async",
        "backend": "local",
        "start_method": "forkserver",
        "preload": None,
        "seed": None,
        "max_queue_size": 4,
        "overflow": "block",
        "sync_interval": 1,
        "max_staleness": None,
        "staleness_policy": "pace",
        "compression_enabled": False,
        "check_finite": False,
        "worker_device_map": "cpu",
        "max_workers_per_gpu": 1,
        "threads_per_worker": 1,
        "start_timeout": 60.0,
        "command_timeout": 30.0,
        "collect_timeout": 300.0,
        "shutdown_timeout": 5.0,
        "restart": {
            "max_restarts": 10,
            "restart_window": 60.0,
            "backoff_base": 0.1,
            "backoff_cap": 10.0,
            "reset_after": 30.0,
            "max_concurrent_starts": 8,
        },
        "min_workers": 1,
        "on_exhausted": "raise",
        "max_worker_rss": None,
        "max_experiences_per_worker": None,
        "poison_threshold": 3,
    }


@pytest.mark.parametrize("model", [ParallelConfig, RestartPolicy])
def test_every_field_is_documented_once_and_in_order(model):
    """The Attributes section of the docstring names exactly the fields, in their order."""
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(model) or "", flags=re.MULTILINE)
    assert documented == list(model.model_fields)


def test_every_problem_is_in_one_error_with_key_value_and_remedy():
    """One error lists unknown keys, bad values, broken rules and nested problems, one line each."""
    with pytest.raises(ConfigurationError) as caught:
        ParallelConfig.of(
            {
                "num_worker": 3,
                "num_workers": 0,
                "mode": "asynch",
                "worker_device_map": "gpu:0",
                "restart": {"max_restart": 1, "backoff_base": 20.0},
            }
        )
    assert str(caught.value) == (
        "6 problems in the configuration:\n"
        "  - num_workers = 0: must be greater than or equal to 1\n"
        "  - mode = 'asynch': must be 'async' or 'sync'; did you mean 'async'?\n"
        "  - worker_device_map = 'gpu:0': must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', "
        "or a list with one for each worker; did you mean 'cuda'?\n"
        "  - restart.backoff_cap = 10.0: must not be below backoff_base (20.0)\n"
        "  - restart.max_restart = 1: unknown key; did you mean 'max_restarts'?\n"
        "  - num_worker = 3: unknown key; did you mean 'num_workers'?"
    )


def test_an_unknown_key_like_no_other_is_answered_with_all_that_are_known():
    """Without a near name the remedy is the list of names."""
    with pytest.raises(ConfigurationError) as caught:
        RestartPolicy(zzz=1)  # type: ignore[call-arg]
    assert caught.value.problems == (
        "zzz = 1: unknown key; known: backoff_base, backoff_cap, max_concurrent_starts, "
        "max_restarts, reset_after, restart_window",
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_workers": 1025}, "num_workers = 1025: must be less than or equal to 1024"),
        ({"seed": -1}, "seed = -1: must be greater than or equal to 0"),
        ({"max_queue_size": 0}, "max_queue_size = 0: must be greater than or equal to 1"),
        ({"start_timeout": 0}, "start_timeout = 0: must be greater than 0"),
        ({"collect_timeout": math.inf}, "collect_timeout = inf: must be a finite number"),
        ({"command_timeout": math.nan}, "command_timeout = nan: must be a finite number"),
        (
            {"backend": "lokal"},
            "backend = 'lokal': must be 'local' or 'inline'; did you mean 'local'?",
        ),
        ({"backend": "xyz"}, "backend = 'xyz': must be 'local' or 'inline'"),
        ({"overflow": 1}, "overflow = 1: must be 'block' or 'drop_oldest'"),
        ({"preload": "torch"}, "preload = 'torch': must be a valid tuple"),
        ({"min_workers": 3}, "min_workers = 3: must not exceed num_workers (2)"),
        (
            {"mode": "sync", "max_staleness": 0},
            "max_staleness = 0: has no meaning in sync mode, where every round uses the newest "
            "weights",
        ),
        (
            {"restart": 3},
            "restart = 3: must be a valid dictionary or instance of RestartPolicy",
        ),
        (
            {"restart": {"max_restarts": -1}},
            "restart.max_restarts = -1: must be greater than or equal to 0",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_rule(values, problem):
    """Each refused value is shown with its key and what it must be."""
    assert problems_of(**values) == (problem,)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:17"])
def test_device_names_of_torch_are_accepted(device):
    """Every device string that workers can use passes for the whole pool."""
    assert ParallelConfig(worker_device_map=device).worker_device_map == device


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        (5, "must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', or a list with one for each worker"),
        (
            "cdua:1",
            "must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', or a list with one for each worker; "
            "did you mean 'cuda'?",
        ),
        (
            "cuda:01",
            "must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', or a list with one for each worker; "
            "did you mean 'cuda'?",
        ),
        (
            ["cpu", "auto"],
            "worker 1 has 'auto', which must be 'cpu', 'cuda', 'cuda:N' or 'mps'",
        ),
        (
            ["CPU", "cpu"],
            "worker 0 has 'CPU', which must be 'cpu', 'cuda', 'cuda:N' or 'mps'; "
            "did you mean 'cpu'?",
        ),
        (
            ["cpu"],
            "names 1 devices for 2 workers; give one for each, or a single string for all",
        ),
    ],
)
def test_a_device_that_no_worker_can_have_is_refused(devices, problem):
    """A device map is checked name by name, and for its length."""
    assert problems_of(worker_device_map=devices) == (
        f"worker_device_map = {devices!r}: {problem}",
    )


def test_a_mapping_becomes_the_same_value_as_keywords():
    """Any mapping validates, also as the restart policy, and lists become tuples."""
    policy = types.MappingProxyType({"max_restarts": 3})
    config = ParallelConfig.of(
        types.MappingProxyType({"worker_device_map": ["cpu", "cuda:1"], "restart": policy})
    )
    assert config == ParallelConfig(
        worker_device_map=("cpu", "cuda:1"), restart=RestartPolicy(max_restarts=3)
    )
    assert config.worker_device_map == ("cpu", "cuda:1")


def test_an_instance_is_taken_as_it_is():
    """A configuration that is one already is neither copied nor changed."""
    config = ParallelConfig(num_workers=3)
    assert ParallelConfig.of(config) is config
    assert ParallelConfig.of(None) == ParallelConfig()


def test_what_is_no_mapping_is_refused():
    """Any other type is named in a configuration error."""
    with pytest.raises(ConfigurationError) as caught:
        ParallelConfig.of([("num_workers", 2)])  # type: ignore[arg-type]
    assert caught.value.problems == ("config is a list; give a ParallelConfig or a mapping",)


@pytest.mark.parametrize("value", [ParallelConfig(), RestartPolicy()])
def test_a_configuration_cannot_be_changed(value):
    """No field of a configuration can be assigned."""
    for name in type(value).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, name, 1)


def test_a_configuration_survives_pickling():
    """A configuration that went through a pickle equals the first."""
    config = ParallelConfig(num_workers=3, restart=RestartPolicy(max_restarts=1), seed=7)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_configuration_error_is_a_value_error():
    """Applications may catch it as the built-in kind."""
    with pytest.raises(ValueError, match=r"^1 problem in the configuration:\n  - seed = 'x': "):
        ParallelConfig(seed="x")  # type: ignore[arg-type]


def test_auto_goes_round_the_gpus_and_then_to_the_cpu():
    """The map "auto" fills the GPUs in turn up to the limit; the rest get the CPU."""
    devices = resolve_devices("auto", num_workers=6, num_gpus=2, max_workers_per_gpu=2)
    assert devices == ("cuda:0", "cuda:1", "cuda:0", "cuda:1", "cpu", "cpu")
    assert resolve_devices("auto", num_workers=2, num_gpus=0) == ("cpu", "cpu")
    assert resolve_devices("auto", num_workers=1, num_gpus=8) == ("cuda:0",)


def test_a_named_device_is_for_all_and_a_list_is_gone_through_again():
    """One name serves every worker; workers beyond a list begin it anew."""
    assert resolve_devices("mps", num_workers=2, num_gpus=0) == ("mps", "mps")
    assert resolve_devices(("cpu", "cuda:1"), num_workers=3, num_gpus=2) == ("cpu", "cuda:1", "cpu")
    assert resolve_devices("cuda", num_workers=0, num_gpus=1) == ()


@settings(deadline=None)
@given(num_workers=st.integers(0, 40), num_gpus=st.integers(0, 8), limit=st.integers(1, 5))
def test_auto_never_overfills_a_gpu_and_never_moves_a_worker(num_workers, num_gpus, limit):
    """No GPU gets more than its limit, none idles beside the CPU, and growth changes nobody."""
    devices = resolve_devices(
        "auto", num_workers=num_workers, num_gpus=num_gpus, max_workers_per_gpu=limit
    )
    counts = [devices.count(f"cuda:{gpu}") for gpu in range(num_gpus)]
    assert all(count <= limit for count in counts)
    assert sum(counts) + devices.count("cpu") == num_workers
    assert devices.count("cpu") == max(0, num_workers - num_gpus * limit)
    fewer = resolve_devices(
        "auto", num_workers=num_workers // 2, num_gpus=num_gpus, max_workers_per_gpu=limit
    )
    assert devices[: num_workers // 2] == fewer

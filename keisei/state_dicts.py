"""Names in state dicts: loading weights into a model, whatever wrappers either side has.

``torch.compile`` puts ``_orig_mod.`` before the names of the module that it wraps, DataParallel
and DistributedDataParallel put ``module.`` before them. Imports nothing heavy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keisei.exceptions import WeightsError

REMEDY = "assign the network to self.model in setup(), or define load_weights(weights, version)"

_COMPILED = "_orig_mod"
_PARALLEL = "module"
_EXTRA_STATE = "_extra_state"
_SHOWN = 5


def load_into(model: Any, weights: Mapping[str, Any]) -> None:
    """Load ``weights`` by the model's own ``load_state_dict``; what that refuses is raised.

    Names that differ from the model's by wrappers' prefixes only are translated. The model's
    version numbers go along, as if the state dict of an equal model was loaded.

    Args:
        model: A module, or anything else with ``state_dict`` and ``load_state_dict``.
        weights: Tensors by name, the model's to keep.

    Raises:
        WeightsError: The model says that it does not know one of these entries.
        Exception: Whatever the model raises, with a note on what to do about it.
    """
    own: Mapping[str, Any] = model.state_dict() if hasattr(model, "state_dict") else {}
    names = translation(weights, own)
    state = OrderedDict((names.get(name, name), value) for name, value in weights.items())
    metadata = getattr(own, "_metadata", None)
    if metadata is not None:
        vars(state)["_metadata"] = metadata  # where torch's own state dicts have it
    try:
        result = model.load_state_dict(state)
    except Exception as error:
        for hint in hints(state, own):
            error.add_note(hint)
        raise
    unexpected = getattr(result, "unexpected_keys", None) or ()
    if len(unexpected) >= len(state):
        lines = [f"{type(model).__name__}.load_state_dict() took none of {_listed(list(state))}"]
        raise WeightsError("; ".join([*lines, *hints(state, own)]))


def translation(theirs: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Return what each of their names is called in the model, if they differ by wrappers only.

    Where they differ otherwise nothing is translated, and ``{}`` is returned. Extra states of the
    model, which do not travel, are left out of the comparison.
    """
    theirs = list(theirs)
    known = set(theirs)
    own = [name for name in own if name in known or not _is_extra_state(name)]
    for ours in _without_wrappers(own):
        for given in _without_wrappers(theirs):
            if given.keys() == ours.keys():
                return {name: ours[bare] for bare, name in given.items()}
    return {}


def _without_wrappers(names: list[str]) -> Iterator[dict[str, str]]:
    """Yield the names, by what they are without ever more wrappers; never two by the same."""
    yield {name: name for name in names}
    bare = {_without(_COMPILED, name): name for name in names}
    while len(bare) == len(names):
        yield bare
        if not bare or not all(name.startswith(f"{_PARALLEL}.") for name in bare):
            break
        bare = {name.removeprefix(f"{_PARALLEL}."): original for name, original in bare.items()}
    inside = {_without(_PARALLEL, name): original for name, original in bare.items()}
    if len(inside) == len(names):
        yield inside


def _without(wrapper: str, name: str) -> str:
    return ".".join(part for part in name.split(".") if part != wrapper)


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def hints(given: Iterable[str], own: Iterable[str]) -> list[str]:
    """Return what may help where ``given`` names, already translated, do not fit the model's."""
    given, own = list(given), list(own)
    missing = [name for name in own if name not in set(given)]
    unexpected = [name for name in given if name not in set(own)]
    lines = []
    if extra := [name for name in missing if _is_extra_state(name)]:
        lines.append(
            f"{_listed(extra)}: what get_extra_state() returns does not travel with weights; keep "
            "it in buffers, or define load_weights(weights, version) and load with strict=False"
        )
    for wrapper, maker in ((_COMPILED, "torch.compile"), (_PARALLEL, "DataParallel")):
        wrapped = [name for name in unexpected if wrapper in name.split(".")]
        if wrapped and not any(wrapper in name.split(".") for name in missing):
            lines.append(
                f"{_listed(wrapped)}: the prefix {wrapper + '.'!r} comes from {maker}; push the "
                f"state dict of the module inside it (model.{wrapper}.state_dict())"
            )
    if prefix := _common_prefix(missing, unexpected):
        lines.append(
            f"the worker's model has the pushed names under {prefix!r}; assign that part of it to "
            "self.model, or push a module that has it too"
        )
    if prefix := _common_prefix(unexpected, missing):
        lines.append(
            f"the pushed names have the prefix {prefix!r}, which those of the worker's model lack; "
            "push that part alone, or assign a module that has it too to self.model"
        )
    return lines


def _common_prefix(longer: list[str], shorter: list[str]) -> str:
    """Return what stands before each of ``shorter`` in ``longer``, or ""."""
    if not shorter or len(longer) < len(shorter):
        return ""
    for name in longer:
        if name.endswith(f".{shorter[0]}"):
            prefix = name.removesuffix(shorter[0])
            if {prefix + one for one in shorter} <= set(longer):
                return prefix
    return ""


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown

"""Models of many kinds, for the tests of loading weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BUILT: list[nn.Module] = []
"""Every model that a worker in this process has made."""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(3)
        self.plain = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        self.layer = nn.LayerNorm(3)


class Tied(nn.Module):
    """One parameter under two names, and one module under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)
        self.alias = self.head


class Flat(nn.Module):
    """Parameters that are parts of another one, which overlaps them."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.zeros(6)
        self.head = nn.Parameter(flat[:4])
        self.whole = nn.Parameter(flat)
        self.tail = nn.Parameter(flat[2:])


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.register_parameter("absent", None)
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("none", None)
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("scratch", torch.full((2,), 5.0), persistent=False)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def parametrized() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Linear(3, 2))


def half() -> nn.Module:
    return net().half()


class Copies(nn.Module):
    """Its state dict is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: t.detach().clone() for name, t in super().state_dict(*args, **kwargs).items()}


class CopiesInside(nn.Module):
    """The same, of a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Copies()


class Derived(nn.Module):
    """Keeps a value that is made of its weights, by one of the ways to hear of new ones."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls: list[str] = []
        self.way = way
        if way == "post hook":
            self.linear.register_load_state_dict_post_hook(lambda *_: self.refresh())
        elif way == "pre hook":
            self.register_load_state_dict_pre_hook(lambda *_: self.calls.append("before"))
        elif way == "instance":
            vars(self)["load_state_dict"] = self.load_anew
        self.refresh()

    def load_anew(self, *args: Any, **kwargs: Any) -> Any:
        result = nn.Module.load_state_dict(self, *args, **kwargs)
        self.refresh()
        return result

    def refresh(self) -> None:
        self.derived = float(self.linear.weight.detach().abs().sum())


def derived_by_post_hook() -> nn.Module:
    return Derived("post hook")


def told_by_pre_hook() -> nn.Module:
    return Derived("pre hook")


def derived_by_instance() -> nn.Module:
    return Derived("instance")


class Overrides(Derived):
    def __init__(self) -> None:
        super().__init__("class")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.load_anew(*args, **kwargs)


class LoadsInside(nn.Linear):
    """Overrides what ``load_state_dict`` calls of a module inside."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.derived = 0.0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.derived = float(self.weight.detach().sum())


def loads_inside() -> nn.Module:
    return nn.Sequential(LoadsInside(), nn.ReLU())


class Fused(nn.Module):
    """Holds query, key and value in one tensor; in state dicts they are three."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(6, 2))
        self._register_state_dict_hook(self._split)
        self._register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(module: Any, state: Any, prefix: str, _: Any) -> None:
        parts = state.pop(prefix + "fused").chunk(3)
        state.update({prefix + name: p for name, p in zip("qkv", parts, strict=True)})

    @staticmethod
    def _join(state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "fused"] = torch.cat([state.pop(prefix + name) for name in "qkv"])


class Assigns(nn.Module):
    """Makes the tensors that it is given its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=strict, assign=True)


class Versioned(nn.Linear):
    """Takes state dicts without its version number for old ones, with larger weights."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(3, 2)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"] / 10
        super()._load_from_state_dict(state, prefix, metadata, *args)


class Marked(Tensor):
    """A tensor of another class."""


def marked() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Marked))
    return model


class TensorState(nn.Module):
    """Its extra state is a tensor, which travels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.extra = torch.randn(2)

    def get_extra_state(self) -> Tensor:
        return self.extra

    def set_extra_state(self, state: Tensor) -> None:
        self.extra = state.clone()


class ObjectState(TensorState):
    """Its extra state is a dictionary, which does not."""

    def get_extra_state(self) -> Any:
        return {"steps": 3}


class LazyNet(nn.Module):
    """Does not know its shapes before it is given weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(2)


class OwnContainer(nn.Module):
    """Holds its parameters in a dictionary of its own kind."""

    class Dictionary(OrderedDict[str, Any]):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        vars(self.linear)["_parameters"] = self.Dictionary(self.linear._parameters)


PLAIN: dict[str, Any] = {
    "linear": net,
    "norms": Norms,
    "tied": Tied,
    "flat": Flat,
    "buffers": Buffers,
    "parametrized": parametrized,
    "another dtype": half,
}
OTHERS: dict[str, Any] = {
    "copies": Copies,
    "copies inside": CopiesInside,
    "post hook": derived_by_post_hook,
    "pre hook": told_by_pre_hook,
    "method of the instance": derived_by_instance,
    "method of the class": Overrides,
    "method of a module inside": loads_inside,
    "fused": Fused,
    "assigns": Assigns,
    "versioned": Versioned,
    "tensor subclass": marked,
    "extra state": TensorState,
    "own container": OwnContainer,
}
KINDS = {**PLAIN, **OTHERS}


def built(kind: str, seed: int = 0) -> nn.Module:
    """Make a model of a kind; all its tensors are drawn anew, so that none equals another."""
    torch.manual_seed(seed)
    model: nn.Module = KINDS[kind]()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.rand(tensor.shape) * 100)
    if isinstance(model, Derived):
        model.refresh()
    return model


def remembered(kind: str) -> nn.Module:
    model = built(kind)
    BUILT.append(model)
    return model


def seen(model: nn.Module) -> dict[str, Any]:
    """Return all that loading may have changed: tensors, and plain values of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = {**module._parameters, **module._buffers}
        if isinstance(module, TensorState):
            tensors["extra"] = module.extra
        for key, tensor in tensors.items():
            found[f"{name}.{key}"] = None if tensor is None else tensor.detach().clone()
        for key in ("derived", "calls"):
            if key in vars(module):
                found[f"{name}.{key}"] = vars(module)[key]
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare what two models look like, bit by bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
        return bool(a == b)

    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


class Wrapped(nn.Module):
    """Puts a prefix before the names of a model, as ``torch.compile`` and DataParallel do."""

    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        setattr(self, attribute, model)


def wrapped(*wrappers: str) -> nn.Module:
    """Return a net in wrappers, the outermost first."""
    model: nn.Module = net()
    for wrapper in reversed(wrappers):
        model = nn.DataParallel(model) if wrapper == "module" else Wrapped(model, wrapper)
    return model

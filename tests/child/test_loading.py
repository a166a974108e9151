"""Weights are received by a model, as its ``load_state_dict`` would, or refused loudly."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import nn

import child_models
import child_workers
from child_models import KINDS, PLAIN, built, equal, seen, wrapped
from child_stage import on_stage
from keisei import state_dicts
from keisei.child.in_place import InPlace
from keisei.child.runtime import WorkerRuntime
from keisei.exceptions import WeightsError, WorkerStartError
from keisei.ipc import serialize
from keisei.ipc.layout import describe
from keisei.protocol import messages
from keisei.testing.scenarios import fail_after

LIMIT = 60
REMEDY = (
    r"assign the network to self\.model in setup\(\), or define load_weights\(weights, version\)"
)


@pytest.fixture(autouse=True)
def _forget_models():
    child_models.BUILT.clear()
    yield
    child_models.BUILT.clear()


# as load_state_dict does


@pytest.mark.parametrize("kind", KINDS)
async def test_a_model_ends_up_as_by_its_own_load_state_dict(kind):
    """Tensors, buffers, hooks and values derived from weights are those of ``load_state_dict``."""
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Holding, partial(child_models.remembered, kind)))
        assert await stage.said() == messages.Ready(0, takes_weights=True)
        twin = built(kind)
        for seed in (1, 2):
            learner = built(kind, seed)
            twin.load_state_dict(learner.state_dict())
            version = await stage.publish(learner.state_dict())
            assert await stage.said() == messages.Applied(0, version)
            (model,) = child_models.BUILT
            assert equal(seen(model), seen(twin))
            assert not equal(seen(model), seen(built(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_models_are_written_to_in_place(kind):
    """Weights are copied straight into a model exactly where that is all that loading does."""
    layout = describe(built(kind, 1).state_dict())
    assert (InPlace().targets(built(kind), layout) is not None) is (kind in PLAIN)


def test_the_targets_are_the_models_own_tensors_in_its_order():
    """They are named as the pushed ones, and alias the parameters, also where ``data`` was set."""
    model = child_models.net()
    backwards = dict(reversed(model.state_dict().items()))
    in_place = InPlace()
    for _ in range(2):
        targets = in_place.targets(model, describe(backwards))
        assert list(targets) == list(model.state_dict())
        assert all(targets[name] is tensor for name, tensor in model.named_parameters())
        model[0].weight.data = torch.zeros(4, 3)


@pytest.mark.parametrize("kind", ["tied", "flat"])
@pytest.mark.parametrize("backwards", [False, True])
async def test_names_that_share_memory_get_what_load_state_dict_gives_them(kind, backwards):
    """Where pushed values contradict each other, the last name in the model's order decides."""
    weights = {name: torch.rand_like(t) for name, t in built(kind).state_dict().items()}
    if backwards:
        weights = dict(reversed(weights.items()))
    twin = built(kind)
    twin.load_state_dict(weights)
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Holding, partial(child_models.remembered, kind)))
        await stage.said()
        assert await stage.said_after_publishing(weights) == messages.Applied(0, 1)
        (model,) = child_models.BUILT
        assert equal(seen(model), seen(twin))


def add_a_hook(model):
    model[2].register_load_state_dict_post_hook(lambda *_: None)


def replace_a_layer(model):
    model[2] = nn.Linear(4, 2)


def add_a_layer(model):
    model.append(nn.Linear(2, 2))


def change_a_class(model):
    model[2].__class__ = child_models.LoadsInside


def set_a_method(model):
    model.load_state_dict = lambda state: None


@pytest.mark.parametrize(
    ("change", "is_plain"),
    [
        (add_a_hook, False),
        (change_a_class, False),
        (set_a_method, False),
        (add_a_layer, False),
        (replace_a_layer, True),
    ],
)
def test_what_changes_after_the_first_load_is_noticed(change, is_plain):
    """Whether a model is plain, and what its tensors are, is looked at for every version."""
    model, in_place = child_models.net(), InPlace()
    layout = describe(model.state_dict())
    assert in_place.targets(model, layout) is not None
    change(model)
    targets = in_place.targets(model, layout)
    assert (targets is not None) is is_plain
    if targets is not None:
        assert all(targets[name] is tensor for name, tensor in model.named_parameters())


def test_swapped_tensors_are_left_to_torch():
    """Where torch is told to exchange tensors instead of copying, it does so itself."""
    model = child_models.net()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert InPlace().targets(model, describe(model.state_dict())) is None
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


async def test_a_lazy_model_takes_its_shapes_from_the_weights():
    """What has no shape yet is made by its own ``load_state_dict``."""
    weights = {"lazy.weight": torch.ones(2, 3), "lazy.bias": torch.ones(2)}
    async with fail_after(LIMIT), on_stage() as stage:
        models = partial(child_workers.Holding, _remember_a_lazy_one)
        await stage.hello(models)
        await stage.said()
        assert await stage.said_after_publishing(weights) == messages.Applied(0, 1)
        (model,) = child_models.BUILT
        assert torch.equal(model.lazy.weight, torch.ones(2, 3))


def _remember_a_lazy_one():
    model = child_models.LazyNet()
    child_models.BUILT.append(model)
    return model


# prefixes

WRAPPERS = [
    (),
    ("_orig_mod",),
    ("module",),
    ("module", "_orig_mod"),
    ("_orig_mod", "module"),
    ("module", "module"),
]


@pytest.mark.parametrize("mine", WRAPPERS)
@pytest.mark.parametrize("theirs", WRAPPERS)
def test_wrappers_on_either_side_do_not_matter(mine, theirs):
    """Names are matched without what torch.compile and DataParallel put before them."""
    learner, model = wrapped(*theirs), wrapped(*mine)
    weights = learner.state_dict()
    state_dicts.load_into(model, weights)
    values = zip(learner.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in values)
    targets = InPlace().targets(model, describe(weights))
    named = zip(weights, model.parameters(), strict=True)
    assert all(targets[name] is tensor for name, tensor in named)


def test_a_wrapper_of_a_part_does_not_matter():
    """Nor do those of some modules inside, and a module's own attribute of such a name stays."""
    compiled = nn.Sequential(child_models.Wrapped(nn.Linear(2, 2), "_orig_mod"), nn.Linear(2, 2))
    parallel = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)), nn.Linear(2, 2))
    bare = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = child_models.Wrapped(child_models.net(), "module")
    for learner, model in [
        *itertools.permutations([compiled, parallel, bare], 2),
        (own, child_models.Wrapped(child_models.net(), "module")),
        (nn.DataParallel(own), child_models.Wrapped(child_models.net(), "module")),
    ]:
        state_dicts.load_into(model, learner.state_dict())
        values = zip(learner.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in values)


def test_names_that_would_become_one_are_not_translated():
    """A model that holds a network and its compiled form is matched by the full names only."""
    model = nn.Module()
    model.add_module("net", nn.Linear(1, 1))
    model.add_module("_orig_mod", nn.Module())
    model._orig_mod.add_module("net", nn.Linear(1, 1))
    names = list(model.state_dict())
    assert state_dicts.translation(names, names) == {name: name for name in names}
    assert state_dicts.translation(["net.weight", "net.bias"], names) == {}


def refusal(model, weights):
    with pytest.raises((RuntimeError, WeightsError)) as raised:
        state_dicts.load_into(model, weights)
    return "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


def test_an_error_names_what_is_missing_unexpected_and_of_another_shape():
    """It is torch's own, with every name."""
    text = refusal(
        child_models.net(),
        {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(5), "x": torch.ones(1)},
    )
    assert 'Missing key(s) in state_dict: "2.weight", "2.bias"' in text
    assert 'Unexpected key(s) in state_dict: "x"' in text
    assert "size mismatch for 0.bias" in text


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_an_error_says_which_prefix_is_in_the_way(wrapper):
    """Where names differ by more than a wrapper, it says what to push."""
    weights = {f"{wrapper}.{name}": t for name, t in child_models.net().state_dict().items()}
    text = refusal(
        child_models.net(), {**weights, f"{wrapper}.more": torch.zeros(1), "x": torch.ones(1)}
    )
    assert f"the prefix '{wrapper}.' comes from" in text
    assert f"(model.{wrapper}.state_dict())" in text


def test_an_error_says_which_part_was_pushed():
    """Where one side has the network inside another module, it names the attribute."""
    whole = child_models.Wrapped(child_models.net(), "policy")
    part = child_models.net().state_dict()
    assert "the worker's model has the pushed names under 'policy.'" in refusal(whole, part)
    text = refusal(child_models.net(), whole.state_dict())
    assert "the pushed names have the prefix 'policy.'" in text


def test_an_error_says_what_to_do_about_extra_states():
    """They do not travel with weights, unless they are tensors."""
    model = child_models.ObjectState()
    text = refusal(model, child_models.Copies().state_dict())
    assert 'Missing key(s) in state_dict: "_extra_state"' in text
    assert "_extra_state: what get_extra_state() returns does not travel with weights" in text
    assert "load with strict=False" in text


class Lenient(nn.Linear):
    """Takes what it knows."""

    def __init__(self):
        super().__init__(2, 2)

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict(state, strict=False)


def test_a_model_that_takes_none_of_the_weights_has_not_received_them():
    """A model that overlooks unknown names must know one of them at least."""
    text = refusal(Lenient(), {"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2)})
    assert text.startswith("Lenient.load_state_dict() took none of a.weight, a.bias; ")
    assert "the pushed names have the prefix 'a.'" in text
    model = Lenient()
    state_dicts.load_into(model, {"weight": torch.full((2, 2), 3.0), "more": torch.zeros(1)})
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))


# workers that cannot take them


@pytest.mark.parametrize(
    ("worker", "problem"),
    [
        (
            partial(child_workers.Nameless, child_models.net),
            r"Nameless has neither a self\.model nor a load_weights\(\) of its own",
        ),
        (
            partial(child_workers.Holding, child_workers.Agent),
            r"self\.model of Holding is a Agent without load_state_dict\(\)",
        ),
        (
            partial(child_workers.Holding, nn.ReLU),
            r"self\.model of Holding, a ReLU, has no parameters",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_a_worker_that_cannot_take_weights_fails_at_its_start(
    make_manager, worker, problem, backend
):
    """A pool that has weights refuses it with the remedy; it never collects with none."""
    async with fail_after(LIMIT):
        with pytest.raises(
            WorkerStartError, match=rf"{problem}, so it cannot take weights; {REMEDY}"
        ):
            await make_manager(worker, model=child_models.net(), backend=backend).start()


async def test_an_override_that_leaves_it_to_the_default_fails_without_a_model(make_manager):
    """The default ``load_weights`` raises where there is nothing to load into."""
    worker = partial(child_workers.Delegating, child_models.net)
    async with fail_after(LIMIT):
        with pytest.raises(WorkerStartError, match=rf"has no self\.model .*; {REMEDY}"):
            await make_manager(worker, model=child_models.net()).start()


async def test_a_pool_without_weights_needs_no_model(make_manager):
    """Such a worker starts and collects."""
    worker = partial(child_workers.Nameless, child_models.net)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        assert [batch.weights_version for batch in await manager.collect()][:1] == [0]


async def test_a_load_weights_that_is_set_on_the_worker_counts(make_manager):
    """Each batch was collected with the version that this method was given."""
    worker = partial(child_workers.TakesThemLate, child_models.net)
    async with fail_after(LIMIT), make_manager(worker, model=child_models.net()) as manager:
        assert await manager.push_weights(child_models.net(), wait=True) == 2
        assert {info.weights_version for info in manager.workers} == {2}


async def test_weights_that_come_later_are_not_acknowledged():
    """A worker that said it takes none fails; nothing says that it has them."""
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Nameless, child_models.net))
        assert await stage.said() == messages.Ready(0, takes_weights=False)
        failed = await stage.said_after_publishing(child_models.net().state_dict())
        assert isinstance(failed, messages.Failed)
        assert (failed.phase, failed.during_start) == ("load_weights", False)
        assert "so it cannot take weights; assign the network to self.model" in failed.message
        assert stage.status.version == 0
        assert await stage.task == 1


async def test_weights_that_do_not_fit_are_not_acknowledged():
    """The error names them, and the version that was being loaded is known."""
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Holding, child_models.net))
        await stage.said()
        failed = await stage.said_after_publishing({"0.weight": torch.zeros(1)})
        assert (failed.phase, failed.during_start) == ("load_weights", False)
        assert 'Missing key(s) in state_dict: "0.bias"' in failed.message
        assert "size mismatch for 0.weight" in failed.message
        assert stage.status.version == 1


async def test_a_model_that_raises_when_it_is_asked_for_is_the_workers_error():
    """A property in the place of ``model`` is user code."""
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(child_workers.NotReady)
        failed = await stage.said()
        assert isinstance(failed, messages.Failed)
        assert (failed.phase, failed.during_start) == ("start", True)
        assert failed.message == "LookupError: there is no model yet"


async def test_what_was_published_before_the_credit_is_what_is_collected_with():
    """A credit is used after every version that was there when it was given."""
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Holding, child_models.net))
        await stage.said()
        for expected in range(1, 6):
            await stage.publish(child_models.net().state_dict(), acknowledge=False)
            stage.grant(1)
            assert (await stage.delivered()).version == expected


async def test_what_is_published_while_the_worker_looks_elsewhere_counts_too(monkeypatch):
    """The first weights and a credit that both come after a look at the queues, in that order."""
    weights = child_models.net().state_dict()
    news, armed = WorkerRuntime._news, False

    def look_too_early(runtime):
        nonlocal armed
        found = news(runtime)
        if armed:
            armed = False
            with pytest.raises(StopIteration):  # there is room in the queue: it waits for nothing
                stage.publish(weights, acknowledge=False).send(None)
            stage.grant(1)
        return found

    monkeypatch.setattr(WorkerRuntime, "_news", look_too_early)
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Holding, child_models.net))
        await stage.said()
        armed = True
        await stage.tell(messages.Resume())
        assert (await stage.delivered()).version == 1


async def test_a_version_is_acknowledged_when_it_is_loaded():
    """Not when it is asked for, nor when an older one is loaded."""
    weights = child_models.net().state_dict()
    async with fail_after(LIMIT), on_stage() as stage:
        await stage.hello(partial(child_workers.Holding, child_models.net))
        await stage.said()
        await stage.publish(weights, acknowledge=False)
        number = stage.number_of("main")
        asked = messages.pack(messages.Announcement(number, 2, acknowledge=True))
        await stage.model.writer.put(asked)
        for sequence in (1, 2):
            await stage.tell(messages.Command(sequence, "unknown", serialize.dumps(None)))
            answer = await stage.said()
            assert (type(answer), answer.sequence) == (messages.ReplyError, sequence)
        assert stage.status.version == 1
        await stage.publish(weights, acknowledge=False)
        assert await stage.said() == messages.Applied(number, 2)


async def test_an_error_of_loading_shows_no_frames_of_the_library(make_manager):
    """The traceback begins in the model's ``load_state_dict``."""
    async with fail_after(LIMIT):
        worker = partial(child_workers.Holding, child_models.Tied)
        with pytest.raises(WorkerStartError) as raised:
            await make_manager(worker, model=child_models.net()).start()
    trace = raised.value.remote_traceback
    assert "load_state_dict" in trace
    assert "/keisei/" not in trace

"""ModelSynchronizer: when weights are due, true sizes, and snapshots that are bit for bit."""

from __future__ import annotations

import io
import pickle
import zlib

import pytest
import torch
from torch import nn

from keisei.exceptions import ConfigurationError, WeightsError
from keisei.training.parallel.model_sync import (
    ModelSynchronizer,
    PackedTensor,
    PreparedModel,
    SyncMetadata,
    SyncStats,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


class Buffers(nn.Module):
    """A model of buffers alone, which may have any dtype."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class NoTensorPickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> object:
        assert not isinstance(obj, torch.Tensor | torch.UntypedStorage)
        return NotImplemented


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any pattern of bits that the dtype can hold, NaN payloads and negative zeros included."""
    high = 2 if dtype is torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def a_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)


@pytest.mark.parametrize(
    ("step", "due"), [(0, False), (1, False), (99, False), (100, True), (101, True), (1000, True)]
)
def test_the_first_sync_is_due_after_one_interval(step, due):
    """Counting starts at step 0; only the step that completes the interval is due."""
    assert ModelSynchronizer(sync_interval=100).should_sync(step) is due


@pytest.mark.parametrize(
    ("step", "due"), [(130, False), (131, False), (229, False), (230, True), (231, True)]
)
def test_the_next_interval_counts_from_the_last_sync(step, due):
    """A sync that came late, at step 130, moves the next one to step 230."""
    synchronizer = ModelSynchronizer(sync_interval=100)
    synchronizer.mark_sync_completed(130)
    assert synchronizer.should_sync(step) is due


def test_asking_changes_nothing():
    """A due sync stays due until it is marked as completed."""
    synchronizer = ModelSynchronizer(sync_interval=1)
    assert [synchronizer.should_sync(1) for _ in range(3)] == [True] * 3
    synchronizer.mark_sync_completed(1)
    assert synchronizer.should_sync(1) is False
    assert synchronizer.should_sync(2) is True


def test_steps_do_not_go_back():
    """A sync before the last one is refused and not counted."""
    synchronizer = ModelSynchronizer(sync_interval=10)
    synchronizer.mark_sync_completed(20)
    with pytest.raises(ValueError, match=r"^step 19 lies before the last sync, at 20$"):
        synchronizer.mark_sync_completed(19)
    assert synchronizer.get_sync_stats().syncs_completed == 1


@pytest.mark.parametrize("interval", [0, -5])
def test_an_interval_below_one_is_refused(interval):
    """The error names the key and the value."""
    with pytest.raises(ConfigurationError) as caught:
        ModelSynchronizer(sync_interval=interval)
    assert caught.value.problems == (f"sync_interval = {interval}: must be at least 1",)


def test_the_metadata_of_a_plain_snapshot_is_exact():
    """Version, time, counts and sizes are those of the model; nothing was compressed."""
    synchronizer = ModelSynchronizer(clock=lambda: 1234.5)
    prepared = synchronizer.prepare_model_for_sync(a_model())
    parameters = (4 * 8 + 8) + (8 + 8) + (8 * 2 + 2)
    size = 4 * (parameters + 8 + 8) + 8  # with the mean, the variance and the int64 count
    assert prepared.metadata == SyncMetadata(
        version=1,
        timestamp=1234.5,
        total_parameters=parameters,
        compressed=False,
        original_bytes=size,
        compressed_bytes=size,
        ratio=1.0,
    )
    assert list(prepared.model_data) == list(a_model().state_dict())


def test_versions_count_the_snapshots():
    """Every snapshot has the next version and its own time."""
    times = iter([1.0, 2.5])
    synchronizer = ModelSynchronizer(clock=lambda: next(times))
    metadata = [synchronizer.prepare_model_for_sync(a_model()).metadata for _ in range(2)]
    assert [(one.version, one.timestamp) for one in metadata] == [(1, 1.0), (2, 2.5)]


def test_the_sizes_of_a_compressed_snapshot_are_true():
    """Sizes and ratio are those of the payloads that are really there."""
    model = Buffers(zeros=torch.zeros(1000), noise=random_bits(torch.float32, 1000))
    prepared = ModelSynchronizer(compression_enabled=True).prepare_model_for_sync(model)
    zeros, noise = prepared.model_data["zeros"], prepared.model_data["noise"]
    assert isinstance(zeros, PackedTensor)
    assert isinstance(noise, PackedTensor)
    assert zeros.payload == zlib.compress(bytes(4000), 1)
    assert (zeros.dtype, zeros.shape, zeros.compressed) == ("float32", (1000,), True)
    total = len(zeros.payload) + len(noise.payload)
    assert prepared.metadata.compressed is True
    assert prepared.metadata.original_bytes == 8000
    assert prepared.metadata.compressed_bytes == total
    assert prepared.metadata.ratio == 8000 / total
    assert prepared.metadata.ratio > 1.9


def test_what_cannot_be_compressed_is_kept_as_it_is():
    """Noise and tiny tensors are stored raw, so that compression never makes a model larger."""
    model = Buffers(noise=random_bits(torch.int64, 500), tiny=torch.tensor(1.0))
    prepared = ModelSynchronizer(compression_enabled=True).prepare_model_for_sync(model)
    for name, size in (("noise", 4000), ("tiny", 4)):
        entry = prepared.model_data[name]
        assert isinstance(entry, PackedTensor)
        assert (entry.compressed, len(entry.payload)) == (False, size)
    assert prepared.metadata.compressed_bytes == prepared.metadata.original_bytes == 4004
    assert prepared.metadata.ratio == 1.0


@pytest.mark.parametrize("compression_enabled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype, compression_enabled):
    """Tensors of 0, 1 and 3 dimensions and without elements come back with the same bits."""
    shapes = {"scalar": (), "empty": (3, 0), "vector": (5,), "cube": (2, 3, 4)}
    tensors = {name: random_bits(dtype, *shape) for name, shape in shapes.items()}
    synchronizer = ModelSynchronizer(compression_enabled=compression_enabled)
    prepared = synchronizer.prepare_model_for_sync(Buffers(**tensors))
    model = Buffers(**{name: torch.zeros(shape).to(dtype) for name, shape in shapes.items()})
    synchronizer.restore_model_from_sync(prepared, model)
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shapes[name])
        assert bits(tensor) == bits(tensors[name])


@pytest.mark.parametrize("compression_enabled", [False, True])
def test_strided_and_conjugated_tensors_come_back_by_value(compression_enabled):
    """Views with strides, and complex views that are conjugated lazily, are stored row by row."""
    matrix = torch.arange(12.0).reshape(3, 4)
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    synchronizer = ModelSynchronizer(compression_enabled=compression_enabled)
    prepared = synchronizer.prepare_model_for_sync(
        Buffers(transposed=matrix.T[::2], conjugate=complex_.conj(), negative=complex_.conj().imag)
    )
    model = Buffers(
        transposed=torch.zeros(2, 3),
        conjugate=torch.zeros(2, dtype=torch.complex64),
        negative=torch.zeros(2),
    )
    synchronizer.restore_model_from_sync(prepared, model)
    assert model.transposed.tolist() == [[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]]
    assert model.conjugate.tolist() == [1 - 2j, 3 + 4j]
    assert model.negative.tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("compression_enabled", [False, True])
def test_parameters_and_buffers_come_back(compression_enabled):
    """A model that took a snapshot computes exactly what the first one did, and still learns."""
    first, second = a_model(seed=1), a_model(seed=2)
    first(torch.randn(16, 4))  # moves the running statistics of the normalisation
    synchronizer = ModelSynchronizer(compression_enabled=compression_enabled)
    synchronizer.restore_model_from_sync(synchronizer.prepare_model_for_sync(first), second)
    for name, tensor in second.state_dict().items():
        assert bits(tensor) == bits(first.state_dict()[name])
    assert all(parameter.requires_grad for parameter in second.parameters())
    inputs = torch.randn(3, 4)
    assert torch.equal(first.eval()(inputs), second.eval()(inputs))


@pytest.mark.parametrize("compression_enabled", [False, True])
def test_tied_parameters_stay_tied_and_count_once(compression_enabled):
    """A weight with two names is in both entries, is one parameter, and is still one afterwards."""
    first, second = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    for model in (first, second):
        model[1].weight = model[0].weight
    synchronizer = ModelSynchronizer(compression_enabled=compression_enabled)
    prepared = synchronizer.prepare_model_for_sync(first)
    assert prepared.metadata.total_parameters == 9 + 3 + 3
    assert prepared.metadata.original_bytes == 4 * (9 + 3 + 9 + 3)
    synchronizer.restore_model_from_sync(prepared, second)
    assert second[1].weight is second[0].weight
    assert torch.equal(second[0].weight, first[0].weight)


@pytest.mark.parametrize("compression_enabled", [False, True])
def test_a_snapshot_is_independent_of_the_model(compression_enabled):
    """Later training changes no snapshot, and a model that took one does not share its memory."""
    model = Buffers(weight=torch.ones(4))
    synchronizer = ModelSynchronizer(compression_enabled=compression_enabled)
    prepared = synchronizer.prepare_model_for_sync(model)
    model.weight.fill_(2.0)
    taker = Buffers(weight=torch.zeros(4))
    synchronizer.restore_model_from_sync(prepared, taker)
    taker.weight.fill_(3.0)
    synchronizer.restore_model_from_sync(prepared, model)
    assert model.weight.tolist() == [1.0] * 4


def test_a_compressed_snapshot_pickles_without_any_tensor():
    """No tensor or storage reaches the pickler, and the snapshot that comes back restores."""
    first, second = a_model(seed=1), a_model(seed=2)
    synchronizer = ModelSynchronizer(compression_enabled=True)
    prepared = synchronizer.prepare_model_for_sync(first)
    buffer = io.BytesIO()
    NoTensorPickler(buffer).dump(prepared)
    back = pickle.loads(buffer.getvalue())
    assert back == prepared
    synchronizer.restore_model_from_sync(back, second)
    assert torch.equal(second[0].weight, first[0].weight)


@pytest.mark.parametrize("compression_enabled", [False, True])
def test_weights_that_do_not_fit_are_refused_whole(compression_enabled):
    """Each missing, unexpected, reshaped or retyped name is told; the model stays as it was."""
    synchronizer = ModelSynchronizer(compression_enabled=compression_enabled)
    prepared = synchronizer.prepare_model_for_sync(
        Buffers(same=torch.ones(2), extra=torch.ones(1), wide=torch.ones(2, 3), typed=torch.ones(2))
    )
    model = Buffers(
        same=torch.zeros(2),
        absent=torch.zeros(1),
        wide=torch.zeros(3, 2),
        typed=torch.zeros(2, dtype=torch.float64),
    )
    with pytest.raises(WeightsError) as caught:
        synchronizer.restore_model_from_sync(prepared, model)
    assert str(caught.value) == (
        "the snapshot does not fit the model: missing: absent; unexpected: extra; "
        "wide is float32 (2, 3), the model has float32 (3, 2); "
        "typed is float32 (2,), the model has float64 (2,)"
    )
    assert model.same.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("entry", "damage"),
    [
        (PackedTensor(b"not zlib", "float32", (2,), compressed=True), "Error -3 while "),
        (PackedTensor(bytes(7), "float32", (2,), compressed=False), "7 bytes instead of 8"),
        (PackedTensor(bytes(8), "float33", (2,), compressed=False), "torch has no dtype 'float33'"),
    ],
)
def test_a_damaged_payload_is_named(entry, damage):
    """What cannot be unpacked is an error with its name, and nothing is restored."""
    synchronizer = ModelSynchronizer(compression_enabled=True)
    metadata = synchronizer.prepare_model_for_sync(Buffers(bad=torch.ones(2))).metadata
    model = Buffers(good=torch.zeros(2), bad=torch.zeros(2))
    prepared = PreparedModel({"good": torch.ones(2), "bad": entry}, metadata)
    with pytest.raises(WeightsError) as caught:
        synchronizer.restore_model_from_sync(prepared, model)
    assert str(caught.value).startswith(
        f"the snapshot does not fit the model: bad is damaged ({damage}"
    )
    assert model.good.tolist() == [0.0, 0.0]


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (WithExtraState(1, 1), "_extra_state is a dict, not a tensor"),
        (
            nn.Linear(1, 1, bias=False, device="meta"),
            "weight is on the meta device and has no data",
        ),
        (Buffers(sparse=torch.eye(2).to_sparse()), "sparse is not a dense tensor"),
        (
            nn.LazyLinear(2, bias=False),
            "weight is lazy and has no shape yet; run the model once",
        ),
    ],
    ids=["extra state", "meta", "sparse", "lazy"],
)
def test_a_model_without_plain_weights_is_refused(model, problem):
    """Entries that are no dense tensors with data are named; no version is spent on them."""
    synchronizer = ModelSynchronizer()
    with pytest.raises(WeightsError) as caught:
        synchronizer.prepare_model_for_sync(model)
    assert str(caught.value) == f"the model cannot be prepared: {problem}"
    assert synchronizer.get_sync_stats().models_prepared == 0


def test_a_model_without_weights_has_a_ratio_of_one():
    """Nothing at all is nothing compressed by nothing."""
    prepared = ModelSynchronizer(compression_enabled=True).prepare_model_for_sync(nn.Identity())
    assert prepared.model_data == {}
    assert (prepared.metadata.original_bytes, prepared.metadata.ratio) == (0, 1.0)


def test_the_stats_add_up():
    """The counts are those of all syncs and snapshots so far."""
    synchronizer = ModelSynchronizer(sync_interval=10, compression_enabled=True)
    assert synchronizer.get_sync_stats() == SyncStats(10, True, 0, 0, 0, 0, 0, 1.0)
    sizes = []
    for step in (10, 25):
        model = Buffers(zeros=torch.zeros(step * 100))
        metadata = synchronizer.prepare_model_for_sync(model).metadata
        sizes.append(metadata.compressed_bytes)
        synchronizer.mark_sync_completed(step)
    assert synchronizer.get_sync_stats() == SyncStats(
        sync_interval=10,
        compression_enabled=True,
        last_sync_step=25,
        syncs_completed=2,
        models_prepared=2,
        original_bytes=4000 + 10000,
        compressed_bytes=sum(sizes),
        ratio=14000 / sum(sizes),
    )

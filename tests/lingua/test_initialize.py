"""Random weights: their distributions, and that the seed alone decides them, whatever lies on which rank."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributed import tensor as distributed_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apps.main.transformer import LMTransformer
from lingua import initialize
from lingua.initialize import normal, truncated_normal, uniform, xavier_uniform
from tests.helpers.layouts import LAYOUTS, MODELS, build, whole_weights
from tests.helpers.ranks import run_ranks

FILLS = {
    "normal": lambda parameter: normal(parameter, 0.3),
    "truncated_normal": lambda parameter: truncated_normal(parameter, 0.3),
    "uniform": lambda parameter: uniform(parameter, 0.3),
    "xavier_uniform": xavier_uniform,
}


def filled(*shape: int, fill=FILLS["normal"], seed: int = 1, **options) -> torch.Tensor:
    parameter = torch.empty(shape, **options)
    torch.manual_seed(seed)
    fill(parameter)
    return parameter


# --- distributions -------------------------------------------------------------------------------------------------


def normal_distribution(x: torch.Tensor) -> torch.Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def check_distribution(sample: torch.Tensor, probability) -> None:
    """Kolmogorov and Smirnov's distance: over 2 / sqrt(n) once in 1,500 samples, and this one is always the same."""
    x = sample.flatten().double().sort().values
    distance = (probability(x) - torch.arange(1, len(x) + 1) / len(x)).abs().max()
    assert distance < 2 / len(x) ** 0.5


@pytest.mark.parametrize("block_elements", [2**20, 5000, 1])
def test_distributions(monkeypatch, block_elements):
    """In one block, in blocks, in a block for each row."""
    monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", block_elements)
    shape = (500, 400)

    values = filled(*shape, fill=FILLS["normal"])
    assert abs(values.mean()) < 0.003
    assert values.std().item() == pytest.approx(0.3, rel=0.01)
    assert values.abs().max() > 4 * 0.3  # not cut
    check_distribution(values, lambda x: normal_distribution(x / 0.3))

    values = filled(*shape, fill=FILLS["truncated_normal"])
    assert abs(values.mean()) < 0.003
    assert values.std().item() == pytest.approx(0.9866 * 0.3, rel=0.01)
    assert 2.99 * 0.3 < values.abs().max() <= 3 * 0.3
    tail = normal_distribution(torch.tensor(-3.0))
    check_distribution(values, lambda x: (normal_distribution(x / 0.3) - tail) / (1 - 2 * tail))

    for fill, bound in ((FILLS["uniform"], 0.3), (FILLS["xavier_uniform"], (6 / 900) ** 0.5)):
        values = filled(*shape, fill=fill)
        assert -bound <= values.min() < -0.999 * bound
        assert 0.999 * bound < values.max() <= bound
        check_distribution(values, lambda x, bound=bound: (x / bound + 1) / 2)


def test_neighbours_are_not_related(monkeypatch):
    """Rows and columns beside each other, in the same block and across its border."""
    monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", 3 * 200)
    values = filled(300, 200) / 0.3
    for ours, others in (
        (values[1:], values[:-1]),
        (values[3:], values[:-3]),  # the same place of the next block
        (values[:, 1:], values[:, :-1]),
    ):
        assert abs((ours * others).mean()) < 4 / ours.numel() ** 0.5


# --- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_the_seed_decides(fill):
    values = filled(20, 30, fill=fill, seed=1)
    assert torch.equal(filled(20, 30, fill=fill, seed=1), values)
    assert not torch.isclose(filled(20, 30, fill=fill, seed=2), values).any()


def test_no_two_parameters_are_alike():
    torch.manual_seed(1)
    parameters = [torch.empty(20, 30) for _ in range(10)]
    for parameter in parameters:
        normal(parameter, 1.0)
    drawn = torch.stack(parameters).flatten().tolist()
    assert len(set(drawn)) > 0.999 * len(drawn)


def test_no_two_blocks_are_alike(monkeypatch):
    monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", 64)
    drawn = filled(400, 16).flatten().tolist()  # 100 blocks of 4 rows
    assert len(set(drawn)) > 0.999 * len(drawn)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_number_is_taken_from_the_global_generator(monkeypatch, device, fill):
    """However large the parameter, and where nothing is drawn too: what comes next is the same everywhere."""
    torch.manual_seed(1)
    torch.randint(2**62, ())
    expected = torch.rand(3)
    for block_elements in (2**20, 8):
        monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", block_elements)
        for shape in ((3, 4), (50, 7)):
            filled(*shape, fill=fill, device=device)
            assert torch.equal(torch.rand(3), expected)


def test_parameters_that_require_gradients():
    parameter = nn.Parameter(torch.empty(4, 5))
    torch.manual_seed(1)
    normal(parameter, 0.3)
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert torch.equal(parameter, filled(4, 5))


# --- shapes and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (37,), (1, 1), (1, 50), (50, 1), (5, 40), (3, 4, 5), (0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("block_elements", [8, 16, 2**20])
def test_every_element_of_any_shape_is_drawn(monkeypatch, block_elements, shape):
    """Of one dimension, of rows wider than a block, of none."""
    monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", block_elements)
    parameter = torch.full(shape, math.nan)
    torch.manual_seed(1)
    normal(parameter, 0.3)
    assert parameter.isfinite().all()
    assert len(set(parameter.flatten().tolist())) == parameter.numel()


def test_a_transposed_parameter_is_drawn_as_any_other():
    parameter = torch.empty(6, 40).t()
    torch.manual_seed(1)
    normal(parameter, 0.3)
    assert torch.equal(parameter, filled(40, 6))


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_single_precision_rounded(monkeypatch, dtype, fill):
    monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", 100)
    assert torch.equal(filled(40, 30, fill=fill, dtype=dtype), filled(40, 30, fill=fill).to(dtype))


def test_any_part_is_a_part_of_the_whole(monkeypatch):
    """All ranges of rows, against blocks of 3 rows, of 1 row, and of less."""
    for block_elements in (3 * 6, 6, 4):
        monkeypatch.setattr(initialize, "BLOCK_ELEMENTS", block_elements)
        expected = filled(11, 6)
        for first, last in itertools.combinations_with_replacement(range(12), 2):
            for columns in (slice(0, 6), slice(2, 5)):
                local = torch.full((last - first, columns.stop - columns.start), math.nan)
                with monkeypatch.context() as as_if_split:
                    place = local, (first, columns.start)
                    as_if_split.setattr(initialize, "local_part", lambda parameter, place=place: place[0])
                    as_if_split.setattr(initialize, "local_offsets", lambda parameter, place=place: place[1])
                    filled(11, 6)
                assert torch.equal(local, expected[first:last, columns])


# --- on several ranks ------------------------------------------------------------------------------------------------


def check_placements() -> None:
    """Every way to split or repeat a parameter over meshes of all ranks, in one dimension and in two."""
    initialize.BLOCK_ELEMENTS = 16
    n_ranks = torch.distributed.get_world_size()
    meshes = [init_device_mesh("cpu", sizes) for sizes in ((n_ranks,), (2, n_ranks // 2))]
    shapes = [(5, 6), (12, 8), (3, 70), (37,), (1, 16), (1,)]
    for mesh, shape, dtype in itertools.product(meshes, shapes, [torch.float32, torch.bfloat16]):
        dimensions = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for placements in itertools.product(dimensions, repeat=mesh.ndim):
            split = distributed_tensor.empty(shape, device_mesh=mesh, placements=placements, dtype=dtype)
            torch.manual_seed(1)
            normal(split, 0.3)
            assert torch.equal(split.full_tensor(), filled(*shape, dtype=dtype)), (shape, placements)


def check_fsdp_over_tensor_parallel() -> None:
    """Rows split over tensor-parallel ranks, and each part split again by FSDP."""
    initialize.BLOCK_ELEMENTS = 16
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seen = set()
    for style, (rows, columns) in itertools.product(
        (ColwiseParallel(), RowwiseParallel()), [(12, 8), (6, 8), (10, 6), (2, 4)]
    ):
        linear = parallelize_module(nn.Linear(columns, rows), mesh["tp"], style)
        fully_shard(linear, mesh=mesh["dp"])
        for parameter in linear.parameters():
            torch.manual_seed(1)
            normal(parameter, 0.3)
            assert torch.equal(parameter.full_tensor(), filled(*parameter.shape)), (parameter.placements, rows)
            seen.add(tuple(placement.is_shard() and placement.dim for placement in parameter.placements))
    assert (0, 0) in seen, "rows of a part of the rows"


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_a_split_parameter_is_the_plain_one(n_ranks):
    run_ranks(n_ranks, check_placements)


def test_a_parameter_split_twice_is_the_plain_one():
    run_ranks(4, check_fsdp_over_tensor_parallel)


def check_models(n_ranks: int) -> None:
    initialize.BLOCK_ELEMENTS = 16
    for model_name, args in MODELS.items():
        dtype = "bf16" if model_name == "one table" else "fp32"
        alone = LMTransformer(args)
        expected = alone.state_dict()
        for layout, distributed in LAYOUTS[n_ranks].items():
            torch.manual_seed(torch.distributed.get_rank())
            model, _ = build(args, model_dtype=dtype, **distributed)
            weights = whole_weights(model)
            assert list(weights) == list(expected)
            for name, weight in weights.items():
                is_half = dtype == "bf16" and ".values" in name
                wanted = expected[name].bfloat16() if is_half else expected[name]
                assert torch.equal(weight, wanted), (layout, model_name, name)
            assert torch.equal(model.rope_embeddings.table, alone.rope_embeddings.table)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_models_start_alike_in_every_layout(n_ranks):
    """Whatever each rank has drawn before."""
    run_ranks(n_ranks, check_models, n_ranks)

"""Value tables split by columns over ranks, against one process that holds the whole table and sees all tokens."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from lingua.product_key.colwise_embeddingbag import ColwiseEmbeddingBag, xFormerEmbeddingBag
from lingua.product_key.memory import HashingMemory
from lingua.product_key.value_table import SlotProducts
from tests.helpers.layouts import whole
from tests.helpers.ranks import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden"
MEMORY_LAYERS = [case for case in json.loads((GOLDEN / "manifest.json").read_text()) if case["kind"] == "memory_layer"]

# Relative, of a few terms. The gradients of scores are added up over the ranks in the table's type.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, *told: object) -> None:
    assert actual.shape == expected.shape, told
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), (*told, (error / expected.norm()).item())


class Case:
    """A table, and what is looked up in it by all tokens of all ranks.

    `x` are scores (N, bag) for weighted sums of rows, vectors (N, dim) for products with rows.
    """

    def __init__(self, kind: type[xFormerEmbeddingBag], dtype: torch.dtype, n: int, bag: int, slots: int, dim: int):
        rng = torch.Generator().manual_seed(n + bag + slots + dim)
        # All above zero, so that no sum is small beside its terms, and exact in the table's type.
        scores, vectors = (torch.rand(n, size, generator=rng).to(dtype).float() for size in (bag, dim))
        self.x, self.grad = (scores, vectors) if kind is xFormerEmbeddingBag else (vectors, scores)
        self.indices = torch.randint(slots, (n, bag), generator=rng)
        self.module = kind(slots, dim).to(dtype)
        nn.init.uniform_(self.module.weight, generator=rng)

    def exact(self, tokens: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In float64, of some of the tokens: output, gradient of `x`, gradient of the table."""
        x, table = (t.detach().double().requires_grad_() for t in (self.x[tokens], self.module.weight))
        rows = table[self.indices[tokens]]
        products = rows * x[:, None] if isinstance(self.module, SlotProducts) else rows * x[..., None]
        y = products.sum(-1 if isinstance(self.module, SlotProducts) else 1)
        y.backward(self.grad[tokens].double())
        return y, x.grad, table.grad


def check_table(mesh: DeviceMesh, kind: type[xFormerEmbeddingBag], index_type: torch.dtype, *sizes: object) -> None:
    """A group is the last dimension of the mesh; what it is told of, the tokens of its own ranks, is all it answers."""
    case = Case(kind, *sizes)
    n_tokens, rank, group = len(case.x) // dist.get_world_size(), dist.get_rank(), mesh.size(-1)
    first = rank - rank % group
    mine = slice(rank * n_tokens, (rank + 1) * n_tokens)
    expected_y, expected_x, _ = case.exact(mine)
    expected_table = case.exact(slice(first * n_tokens, (first + group) * n_tokens))[2]
    table = case.module.weight.detach().clone()
    (slots, dim), dtype = table.shape, table.dtype

    module = parallelize_module(case.module, mesh, ColwiseEmbeddingBag())
    weight = module.weight
    assert weight is dict(module.named_parameters())["weight"]
    assert weight.placements == (*[Replicate()] * (mesh.ndim - 1), Shard(1))
    assert weight.shape == (slots, dim)
    assert weight.to_local().shape == (slots, dim // group)
    assert torch.equal(weight.full_tensor(), table)

    x = case.x[mine].clone().requires_grad_()
    y = module(case.indices[mine].to(index_type), x)
    y.backward(case.grad[mine].to(y.dtype))
    assert y.dtype == (torch.float32 if kind is SlotProducts else dtype)
    assert_close(y, expected_y, TOLERANCE[dtype], "y", sizes)
    assert x.grad.dtype == x.dtype
    assert_close(x.grad, expected_x, TOLERANCE[dtype], "gradient of x", sizes)
    assert weight.grad.dtype == dtype
    assert weight.grad.placements == weight.placements
    columns = expected_table.chunk(group, dim=1)[rank % group]
    assert_close(weight.grad.to_local(), columns, TOLERANCE[dtype], "gradient of the table", sizes)


def check_tables(meshes: list[tuple[int, ...]]) -> None:
    n_ranks = dist.get_world_size()
    for mesh_sizes in meshes:
        mesh = init_device_mesh("cpu", mesh_sizes, mesh_dim_names=("replicate", "group")[-len(mesh_sizes) :])
        group = mesh_sizes[-1]
        for kind, index_type, dtype, (tokens, bag, slots, columns) in itertools.product(
            (xFormerEmbeddingBag, SlotProducts),
            (torch.int32, torch.int64),
            TOLERANCE,
            [(5, 3, 7, 3), (1, 1, 1, 1), (3, 9, 4, 5), (0, 3, 7, 2)],
        ):
            check_table(mesh, kind, index_type, dtype, tokens * n_ranks, bag, slots, columns * group)


@pytest.mark.parametrize(
    ("n_ranks", "meshes"),
    [(2, [(2,), (1, 2), (2, 1)]), (4, [(4,), (2, 2)])],
    ids=["2 ranks", "4 ranks, as one group and as two"],
)
def test_a_split_table_is_the_whole_one(n_ranks, meshes):
    run_ranks(n_ranks, check_tables, meshes)


def check_readers(dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rng = torch.Generator().manual_seed(dist.get_rank())
    slots, scores = torch.randint(7, (4, 3), generator=rng), torch.rand(4, 3, generator=rng)
    torch.manual_seed(0)
    table = xFormerEmbeddingBag(7, 6).to(dtype)
    rows = table.weight.detach().float()[slots]
    parallelize_module(table, mesh, ColwiseEmbeddingBag())

    readers = [lambda: table(slots, scores).sum(), lambda: table(slots.flip(0), 2 * scores).square().sum()]
    alone = [torch.autograd.grad(read(), table.weight)[0].to_local() for read in readers]
    sum(read() for read in readers).backward()
    assert_close(table.weight.grad.to_local(), sum(alone), TOLERANCE[dtype])

    table.weight.requires_grad_(False)
    scores.requires_grad_()
    table(slots, scores).sum().backward()
    assert_close(scores.grad, rows.sum(-1), TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(table(slots, scores), (rows * scores[..., None]).sum(1), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_split_table_has_several_readers(dtype):
    """As several layers share it: their gradients add up. And each gradient can be had alone, or none."""
    run_ranks(2, check_readers, dtype)


def check_refusal(dim: int) -> None:
    table = xFormerEmbeddingBag(7, dim)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "group"))
    with pytest.raises(ValueError, match=f"2 ranks do not divide the value table's {dim} columns"):
        parallelize_module(table, mesh, ColwiseEmbeddingBag())
    assert type(table.weight.data) is torch.Tensor


def test_columns_that_the_group_does_not_divide():
    run_ranks(4, check_refusal, 7)


# --- the numbers of the published code -----------------------------------------------------------------------------


def check_golden(case: dict, file: dict[str, torch.Tensor], alike: bool) -> None:
    """`alike`: all ranks have the whole batch; else each has its part of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = HashingMemory(**case["kwargs"])
    layer.load_state_dict({key.removeprefix("param."): t for key, t in file.items() if key.startswith("param.")})
    for table in layer.tables:
        parallelize_module(table, mesh, ColwiseEmbeddingBag())

    def share(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if alike else tensor.chunk(mesh.size())[dist.get_rank()]

    x = share(file["x"]).clone().requires_grad_()
    _, slots = layer.get_indices(layer.query_proj(x.flatten(0, 1)), layer.knn)
    assert torch.equal(slots.sort(-1).values, share(file["indices"]).sort(-1).values)
    y = layer(x)
    y.backward(share(file["grad_y"]))
    assert_close(y, share(file["y"]), 1e-5, "y")
    assert_close(x.grad, share(file["grad_x"]), 1e-5, "x")
    tables = {table.weight for table in layer.tables}
    for name, parameter in layer.named_parameters():
        grad = whole(parameter.grad)
        if parameter not in tables:  # of the own tokens; a table's is of the group's
            dist.all_reduce(grad)
        assert_close(grad / (mesh.size() if alike else 1), file[f"grad.{name}"], 1e-5, name)


def check_all_golden() -> None:
    for case, alike in itertools.product(MEMORY_LAYERS, (True, False)):
        with np.load(GOLDEN / case["file"]) as arrays:
            file = {key: torch.from_numpy(array) for key, array in arrays.items()}
        check_golden(case, file, alike)


def test_golden_memory_layers_on_two_ranks():
    assert len(MEMORY_LAYERS) == 3
    run_ranks(2, check_all_golden)

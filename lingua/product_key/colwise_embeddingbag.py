"""A value table that is split by columns over a group of ranks (memory parallelism).

The ranks of a group hold different tokens. Each looks up its columns for the tokens of all of them:

    slots, weights  (N, bag)    all-gather   ->  (m * N, bag)
    lookup of the own columns                ->  (m * N, dim / m)
    exchange (all-to-all)                    ->  (N, dim), whole rows for the own tokens

and the gradients go the same way back ("Memory Layers at Scale", section 3.2). Nothing of the table is ever moved.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from lingua.errors import UserError
from lingua.product_key.value_table import SlotProducts
from lingua.product_key.value_table import xFormerEmbeddingBag as xFormerEmbeddingBag


class ColwiseEmbeddingBag(ParallelStyle):
    """Splits a table's columns over the last dimension of a mesh; over its other dimensions they are repeated.

    For `torch.distributed.tensor.parallel.parallelize_module`. All ranks of a group must look up equally many tokens.
    The gradient of the table is the sum over the group's tokens; over the mesh's other dimensions it is the rank's own,
    to be summed by whoever averages gradients.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Raises UserError where the group does not divide the columns."""
        size, dim = module.weight.shape
        n_ranks, rank = device_mesh.size(-1), device_mesh.get_local_rank(-1)
        if dim % n_ranks:
            raise UserError(f"{n_ranks} ranks do not divide the value table's {dim} columns")
        own = module.weight.detach()[:, rank * (dim // n_ranks) : (rank + 1) * (dim // n_ranks)].contiguous()
        placements = [Replicate()] * (device_mesh.ndim - 1) + [Shard(1)]
        mesh = device_mesh if module.computed_on is None else _on_the_cpu(device_mesh)
        split = DTensor.from_local(own, mesh, placements, run_check=False, shape=(size, dim), stride=(dim, 1))
        module.weight = nn.Parameter(split)
        group = _Group(device_mesh.get_group(device_mesh.ndim - 1).group_name, n_ranks)
        forward = _products_by_columns if isinstance(module, SlotProducts) else _sums_by_columns
        module.forward = functools.partial(forward, module, group)
        return module


def _on_the_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks in the same groups, for tensors in the CPU's memory."""
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return DeviceMesh.from_group(groups, "cpu", mesh.mesh.contiguous(), mesh_dim_names=mesh.mesh_dim_names)


class _Group(NamedTuple):
    """A group of ranks as the compiler likes it: by its name."""

    name: str
    size: int


def _sums_by_columns(
    table: xFormerEmbeddingBag, group: _Group, indices: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    weight = table.weight.to_local()
    # In the table's type, to which the lookup rounds them anyway: half as many bytes to send where that is bf16.
    scores = _Gather.apply(scores.to(weight.dtype), *group)
    slots = _gather_slots(indices, len(weight), group)
    columns = table.look_up(weight, slots, scores)
    return _Exchange.apply(columns, *group, True)


def _products_by_columns(table: SlotProducts, group: _Group, indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    weight = table.weight.to_local()
    own_columns = _Exchange.apply(x, *group, False)
    products = table.look_up(weight, _gather_slots(indices, len(weight), group), own_columns)
    # Each rank's are of its columns alone: summed, every rank getting its own tokens'.
    return _SumAndSplit.apply(products, *group)


def _gather_slots(indices: torch.Tensor, n_slots: int, group: _Group) -> torch.Tensor:
    """As int32 where all slots fit: half the bytes."""
    return _gather(indices.to(torch.int32) if n_slots <= 2**31 else indices, *group)


class _Gather(torch.autograd.Function):
    """All ranks' rows, (N, ...) -> (m * N, ...); their gradient is summed over the group and split again."""

    @staticmethod
    def forward(ctx, mine, name: str, size: int):
        ctx.group = (name, size)
        return _gather(mine, name, size)

    @staticmethod
    def backward(ctx, grad):
        return _sum_and_split(grad, *ctx.group), None, None


class _SumAndSplit(torch.autograd.Function):
    """The other way round: (m * N, ...) -> (N, ...)."""

    @staticmethod
    def forward(ctx, parts, name: str, size: int):
        ctx.group = (name, size)
        return _sum_and_split(parts, name, size)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, *ctx.group), None, None


class _Exchange(torch.autograd.Function):
    """All-to-all between columns of all tokens, (m * N, dim / m), and whole rows of the own ones, (N, dim)."""

    @staticmethod
    def forward(ctx, tensor, name: str, size: int, to_rows: bool):
        ctx.group, ctx.to_rows = (name, size), to_rows
        return _exchange(tensor, name, size, to_rows)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, *ctx.group, not ctx.to_rows), None, None, None


# --- what is sent ----------------------------------------------------------------------------------------------------

# The operators themselves, which the compiler knows, each waited for at once. torch's functions around them hand out
# tensors that wait when they are first used: two exchanges can be under way then, and gloo (torch 2.13) writes into
# freed memory now and then where the slots' gathering meets the weights'.
_send = torch.ops._c10d_functional


def _gather(mine: torch.Tensor, name: str, size: int) -> torch.Tensor:
    return _send.wait_tensor(_send.all_gather_into_tensor(mine.contiguous(), size, name))


def _sum_and_split(parts: torch.Tensor, name: str, size: int) -> torch.Tensor:
    return _send.wait_tensor(_send.reduce_scatter_tensor(parts.contiguous(), "sum", size, name))


def _exchange(tensor: torch.Tensor, name: str, size: int, to_rows: bool) -> torch.Tensor:
    n_tokens = len(tensor) // size if to_rows else len(tensor)
    if not to_rows:  # the columns of each rank together, one rank's after another's
        tensor = tensor.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
    n_each = [n_tokens] * size
    received = _send.wait_tensor(_send.all_to_all_single(tensor.contiguous(), n_each, n_each, name))
    if not to_rows:
        return received
    return received.unflatten(0, (size, n_tokens)).transpose(0, 1).flatten(1)

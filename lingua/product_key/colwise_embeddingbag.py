"""The value table as a module, and the same table split by columns over a group of ranks (memory parallelism).

The ranks of a group hold different tokens. Each looks up its columns for the tokens of all of them:

    slots, weights  (N, bag)    all-gather   ->  (m * N, bag)
    lookup of the own columns                ->  (m * N, dim / m)
    exchange (all-to-all)                    ->  (N, dim), whole rows for the own tokens

and the gradients go the same way back ("Memory Layers at Scale", section 3.2). Nothing of the table is ever moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from lingua.errors import UserError
from lingua.initialize import normal
from lingua.product_key.fetched_lookup import fetched_embedding_bag, fetched_slot_products
from lingua.product_key.row_gradients import RowGradients
from lingua.product_key.xformer_embeddingbag import slot_products, xformers_embedding_bag


class xFormerEmbeddingBag(nn.Module):
    """A table of `size` rows of `dim`; `(indices (N, bag), scores (N, bag)) -> (N, dim)`, their weighted sums."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        self.row_gradients: RowGradients | None = None
        self.computed_on: torch.device | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        normal(self.weight, std=self.weight.shape[1] ** -0.5, drawn_on=self.computed_on)

    def keep_on_cpu(self, computed_on: torch.device) -> None:
        """From now on the table stays in the CPU's memory, wherever the module is moved; lookups, on `computed_on`,
        fetch the rows that they read. It has gradients by rows alone (`note_rows`).
        """
        if not self.weight.is_meta:
            self.to("cpu")
        self.computed_on = computed_on

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """What all of nn.Module's `to`, `cuda`, `to_empty`, `bfloat16`, ... come down to."""
        if self.computed_on is None:
            return super()._apply(fn, recurse)

        def apply_at_home(tensor: torch.Tensor) -> torch.Tensor:
            # What it makes of nothing shows the type and the device that it wants.
            wanted = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if wanted.device.type in ("cpu", "meta"):
                return fn(tensor)
            if tensor.is_meta:
                return torch.empty_like(tensor, dtype=wanted.dtype, device="cpu")
            return tensor.to(wanted.dtype)

        return super()._apply(apply_at_home, recurse)

    def note_rows(self, whole: bool = False) -> RowGradients:
        """From now on the table's gradient is noted by rows, and `weight.grad` stays None; until `make_whole`, with
        `whole`.
        """
        if self.row_gradients is None or self.row_gradients.whole != whole:
            self.row_gradients = RowGradients(self.weight, whole)
        return self.row_gradients

    @property
    def ticket(self) -> torch.Tensor | None:
        """What the lookup takes where gradients are noted by rows."""
        return None if self.row_gradients is None else self.row_gradients.ticket

    def forward(self, indices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.look_up(self.weight, indices, scores)

    def look_up(self, weight: torch.Tensor, indices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`forward` in `weight`, which is all of the table or some of its columns."""
        if self.computed_on is None:
            return xformers_embedding_bag(indices, weight, scores, ticket=self.ticket)
        self._refuse_whole_gradient()
        return fetched_embedding_bag(indices, weight, scores, self.ticket)

    def _refuse_whole_gradient(self) -> None:
        is_whole = self.row_gradients is None or self.row_gradients.whole
        if is_whole and self.weight.requires_grad and torch.is_grad_enabled():
            raise UserError("a table in the CPU's memory has gradients by rows only: optim.value_update=sparse")


class SlotProducts(xFormerEmbeddingBag):
    """PEER's first table: `(indices (N, bag), x (N, dim)) -> (N, bag)`, the products of each token with its rows."""

    def look_up(self, weight: torch.Tensor, indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.computed_on is None:
            return slot_products(indices, weight, x, self.ticket)
        self._refuse_whole_gradient()
        return fetched_slot_products(indices, weight, x, self.ticket)


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
    if not to_rows:  # the columns of each rank together, one rank's behind another's
        tensor = tensor.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
    n_each = [n_tokens] * size
    received = _send.wait_tensor(_send.all_to_all_single(tensor.contiguous(), n_each, n_each, name))
    if not to_rows:
        return received
    return received.unflatten(0, (size, n_tokens)).transpose(0, 1).flatten(1)

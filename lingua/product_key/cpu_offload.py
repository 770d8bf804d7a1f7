"""The lookup in a table that stays in the CPU's memory while all else is computed elsewhere, on a GPU mostly.

The rows that a batch reads, each once, are gathered on the CPU and copied to where they are used; on this small table
run the operators of xformer_embeddingbag.py. So a lookup moves as many rows as are read and never the table, which may
be larger than the GPU's memory. The operators:

    fetch_rows         slots -> the rows of the small table that hold them, and that table, kept for the backward pass
    fetched_sums       bag_sums in it
    fetched_products   bag_products in it, each the gradient of the other

How many rows there are is known when they have been read, and no sooner; a compiler wants to know it before. So they
go from operator to operator as the first of them, (1, D), in whose storage all others lie after it. Where something on
the way has made a copy of that one row (saved tensors that were moved, say), they are fetched again.
Suffixes: N tokens, K slots a token, U rows read, D dim.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator

import torch

from lingua.product_key.xformer_embeddingbag import bag_products, bag_sums, check_bags, check_slots

# Bytes of each of two pinned buffers through which rows go from and to a GPU: one is filled while the other is sent.
STAGED = 2**25


def fetched_embedding_bag(
    indices: torch.Tensor, weight: torch.Tensor, per_sample_weights: torch.Tensor, ticket: torch.Tensor | None
) -> torch.Tensor:
    """`xformers_embedding_bag` on the device of `indices`, of a `weight` in the CPU's memory.

    The table's gradient is noted by `ticket`; there is no other one.
    """
    check_bags(indices, per_sample_weights)
    table = weight.detach()
    factors = per_sample_weights.to(weight.dtype)
    return fetched_sums(indices, table, *fetch_rows(indices, table), factors, weight.dtype, ticket)


def fetched_slot_products(
    indices: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, ticket: torch.Tensor | None
) -> torch.Tensor:
    """`slot_products` in the same way."""
    table = weight.detach()
    return fetched_products(indices, table, *fetch_rows(indices, table), x, ticket)


# --- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("lingua::fetch_rows", mutates_args=())
def fetch_rows(indices: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(where in the small table the row of each place is, (N, K); the first row of the small table)."""
    check_slots(indices, len(weight), on_gpu=True)  # which is waited for anyway
    slots, positions = torch.unique(indices.to(_index_type(weight)), return_inverse=True)
    return positions.to(slots.dtype), _fetch(weight, slots, indices.device)[:1]


@torch.library.custom_op("lingua::fetched_sums", mutates_args=())
def fetched_sums(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    first_row: torch.Tensor,
    factors: torch.Tensor,
    dtype: torch.dtype,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sum_k factors[n, k] * weight[indices[n, k]]`, (N, D) of type `dtype`."""
    return bag_sums(positions, _small_table(indices, weight, first_row), factors, dtype)


@torch.library.custom_op("lingua::fetched_products", mutates_args=())
def fetched_products(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    first_row: torch.Tensor,
    vectors: torch.Tensor,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    """`<weight[indices[n, k]], vectors[n]>`, (N, K) in fp32 or more."""
    return bag_products(positions, _small_table(indices, weight, first_row), vectors)


@fetch_rows.register_fake
def _(indices: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positions = indices.new_empty(indices.shape, dtype=_index_type(weight))
    return positions, weight.new_empty(1, weight.shape[1], device=indices.device)


@fetched_sums.register_fake
def _(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    first_row: torch.Tensor,
    factors: torch.Tensor,
    dtype: torch.dtype,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    return first_row.new_empty(indices.shape[0], weight.shape[1], dtype=dtype)


@fetched_products.register_fake
def _(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    first_row: torch.Tensor,
    vectors: torch.Tensor,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    return first_row.new_empty(indices.shape, dtype=torch.promote_types(weight.dtype, torch.float32))


def _keep_for_backward(ctx, inputs, output) -> None:
    *_, ticket = inputs
    ctx.save_for_backward(*inputs[:5], ticket)


def _sums_backward(ctx, grad_ND):
    *table, factors, ticket = ctx.saved_tensors
    grad_factors = grad_ticket = None
    if ctx.needs_input_grad[4]:
        grad_factors = fetched_products(*table, grad_ND).to(factors.dtype)
    if ticket is not None:  # of row_gradients.py, which has the operator
        grad_ticket = torch.ops.lingua.record_rows(ticket, table[0], factors, grad_ND)
    return None, None, None, None, grad_factors, None, grad_ticket


def _products_backward(ctx, grad_NK):
    *table, vectors, ticket = ctx.saved_tensors
    grad_vectors = grad_ticket = None
    if ctx.needs_input_grad[4]:
        grad_vectors = fetched_sums(*table, grad_NK, vectors.dtype)
    if ticket is not None:
        grad_ticket = torch.ops.lingua.record_rows(ticket, table[0], grad_NK, vectors)
    return None, None, None, None, grad_vectors, grad_ticket


fetched_sums.register_autograd(_sums_backward, setup_context=_keep_for_backward)
fetched_products.register_autograd(_products_backward, setup_context=_keep_for_backward)


def _index_type(weight: torch.Tensor) -> torch.dtype:
    return torch.int32 if len(weight) < 2**31 else torch.int64


def _small_table(indices: torch.Tensor, weight: torch.Tensor, first_row: torch.Tensor) -> torch.Tensor:
    """(U, D), of which `first_row` is the first; fetched again where nothing lies after that."""
    dim = weight.shape[1]
    n_rows = first_row.untyped_storage().nbytes() // (dim * first_row.element_size())
    if n_rows > 1:
        return first_row.as_strided((n_rows, dim), (dim, 1))
    return _fetch(weight, indices.unique(), indices.device)


# --- between the CPU's memory and a GPU's ----------------------------------------------------------------------------


def _fetch(weight: torch.Tensor, slots: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of `slots`, on `device`, and after them some of anything: at least two in all, since a single one is
    known for a copy (`_small_table`), and of few sizes, so that the next batch gets the memory of this one.
    """
    step = 1 << max(len(slots).bit_length() - 4, 1)
    n_all = (max(len(slots), 1) + step - 1) // step * step
    rows = torch.empty(n_all, weight.shape[1], dtype=weight.dtype, device=device)
    read = rows[: len(slots)]
    if weight.device == device:
        torch.index_select(weight, 0, slots, out=read)
        return rows
    staging = _staging(device)
    n_rows = staging.n_rows(weight)
    # Here the CPU waits until the GPU has found out what is read.
    for chunk, target in zip(slots.to(weight.device).split(n_rows), read.split(n_rows), strict=True):
        with staging.next_buffer(len(chunk), weight) as (buffer, _):
            torch.index_select(weight, 0, chunk, out=buffer)
            target.copy_(buffer, non_blocking=True)
    return rows


def bring_rows(
    slots: torch.Tensor, rows: torch.Tensor, device: torch.device, n_rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Slots and rows on `device`, at most `n_rows` at once; to be used before the next ones are asked for.

    Where they come from a GPU, some are on their way while others are used.
    """
    if rows.device == device:
        yield from zip(slots.split(n_rows), rows.split(n_rows), strict=True)
        return
    staging = _staging(rows.device)
    at_once = staging.n_rows(rows)
    on_their_way = collections.deque()
    for chunk, source in zip(slots.to(device).split(at_once), rows.split(at_once), strict=True):
        with staging.next_buffer(len(chunk), rows) as (buffer, sent):
            buffer.copy_(source, non_blocking=True)
        on_their_way.append((chunk, buffer, sent))
        if len(on_their_way) == len(staging.buffers):
            yield from _arrived(*on_their_way.popleft(), n_rows)
    for left in on_their_way:
        yield from _arrived(*left, n_rows)


def _arrived(
    slots: torch.Tensor, rows: torch.Tensor, sent: torch.cuda.Event | None, n_rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if sent is not None:
        sent.synchronize()
    yield from zip(slots.split(n_rows), rows.split(n_rows), strict=True)


class _Staging:
    """Two buffers in the CPU's memory, pinned, from and to which a GPU copies while the CPU works on the other one."""

    def __init__(self, device: torch.device):
        self.device = device
        on_gpu = device.type == "cuda"
        self.buffers = [torch.empty(STAGED, dtype=torch.uint8, device="cpu", pin_memory=on_gpu) for _ in range(2)]
        self.sent = [torch.cuda.Event() if on_gpu else None for _ in self.buffers]
        self.turn = 0

    def n_rows(self, table: torch.Tensor) -> int:
        """How many rows such as the table's a buffer holds."""
        return len(self.buffers[0]) // (table.shape[1] * table.element_size())

    @contextlib.contextmanager
    def next_buffer(self, n_rows: int, table: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.cuda.Event | None]]:
        """A buffer for a number of rows like the table's, in or out of which nothing is being copied any more; and what
        tells when the copy that is begun within the context, on the current stream, is done.
        """
        self.turn = (self.turn + 1) % len(self.buffers)
        buffer, sent = self.buffers[self.turn], self.sent[self.turn]
        if sent is not None:
            sent.synchronize()
        n_bytes = n_rows * table.shape[1] * table.element_size()
        yield buffer[:n_bytes].view(table.dtype).view(n_rows, table.shape[1]), sent
        if sent is not None:
            sent.record(torch.cuda.current_stream(self.device))


@functools.cache
def _staging(device: torch.device) -> _Staging:
    return _Staging(device)

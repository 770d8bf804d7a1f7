"""The weighted lookup: for each token, the sum of `weight * table[slot]` over its bag of slots; and PEER's first half,
the products of a token with the rows of its slots.

Both are made of three operations, each the gradient of another:

    bag_sums        (N, D)    the rows of a token's slots, times factors, summed
    bag_products    (N, K)    the rows of a token's slots, times its vector
    table_gradient  (S, D)    for each slot, factors times vectors of all places that read it

They are operators of PyTorch's (namespace `lingua`), which torch.compile takes as they are. On a GPU they are Triton
kernels (lookup_kernels.py); elsewhere, and in fp64, PyTorch's own operators. Everything is summed in fp32 or more.
A slot that the table does not have is refused on a CPU. On a GPU it is looked for in debug mode alone
(`distributed.detect_anomaly`, that is torch.autograd.set_detect_anomaly): the check waits for the GPU.
With a `ticket` (row_gradients.py) nothing of the table's size is made: backward only notes what `row_sums` needs.
Suffixes: N tokens, K slots a token, S slots in all, D dim.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections import deque

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

# torch says once in a process that its sparse matrices are in beta, and (2.11) that it does not check them: here, where
# nobody hears it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)

# Elements of the table that are gathered at once, 64 MiB in fp32; the gradient of the rows read comes on top of that.
CHUNK_ELEMENTS = 2**24

# Bytes from which a result's memory is used again (`_used_again`).
LARGE = 2**24


def xformers_embedding_bag(
    indices: torch.Tensor,
    weight: torch.Tensor,
    per_sample_weights: torch.Tensor,
    mode: str = "sum",
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sums of table rows.

    Args:
        indices: (N, bag) slots, int32 or int64, each in [0, S).
        weight: (S, D) table, any floating type.
        per_sample_weights: (N, bag), any floating type; rounded to the table's.
        mode: "sum", the only one that product-key memories use.
        ticket: of the `RowGradients` that notes the table's gradient; the table then gets none of autograd's.

    Returns (N, D) of the table's type. Raises ValueError for another mode or for shapes that do not match, and
    IndexError for a slot that is not in [0, S) (on a GPU in debug mode alone: `check_slots`).
    """
    if mode != "sum":
        raise ValueError(f"mode: '{mode}' is not supported, only 'sum'")
    check_bags(indices, per_sample_weights)
    if ticket is not None:
        weight = weight.detach()
    return bag_sums(indices, weight, per_sample_weights.to(weight.dtype), weight.dtype, ticket)


def check_bags(indices: torch.Tensor, per_sample_weights: torch.Tensor) -> None:
    """Raises ValueError where not both are (N, bag)."""
    if indices.ndim != 2 or indices.shape != per_sample_weights.shape:
        raise ValueError(
            f"indices {tuple(indices.shape)} and per_sample_weights {tuple(per_sample_weights.shape)} must be (N, bag)"
        )


def check_slots(indices: torch.Tensor, n_slots: int, on_gpu: bool = False) -> None:
    """Raises IndexError for slots that are not in [0, n_slots): on a CPU, and on a GPU in debug mode or `on_gpu`."""
    if indices.numel() == 0 or (indices.is_cuda and not (on_gpu or torch.is_anomaly_enabled())):
        return
    least, most = (int(slot) for slot in indices.aminmax())
    if least < 0 or most >= n_slots:
        raise IndexError(f"indices: slots {least} to {most} are read, but the table has slots 0 to {n_slots - 1}")


def slot_products(
    indices: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, ticket: torch.Tensor | None = None
) -> torch.Tensor:
    """Inner products of each token with the rows of its slots, (N, bag), in fp32 (fp64 for such a table).

    Args:
        indices: (N, bag) slots of the table.
        weight: (S, D) table.
        x: (N, D) tokens.
        ticket: as in `xformers_embedding_bag`.

    Never holds the (N, bag, D) rows all at once, forward or backward. Raises IndexError for a slot that is not in
    [0, S) (on a GPU in debug mode alone: `check_slots`).
    """
    return bag_products(indices, weight if ticket is None else weight.detach(), x, ticket)


def runs_on_triton(tensor: torch.Tensor) -> bool:
    """The one place that decides: kernels on GPUs, and in Triton's interpreter where that is asked for."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (tensor.is_cuda or interpreted) and tensor.dtype != torch.float64 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("lingua::bag_sums", mutates_args=())
def bag_sums(
    indices: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    dtype: torch.dtype,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sum_k factors[n, k] * weight[indices[n, k]]`, (N, D) of type `dtype`."""
    check_slots(indices, len(weight))
    if runs_on_triton(weight):
        from lingua.product_key import lookup_kernels

        return lookup_kernels.sums(indices, weight, factors, dtype)
    if factors.dtype == weight.dtype:
        return F.embedding_bag(indices, weight, per_sample_weights=factors, mode="sum").to(dtype)
    return _gathered("nkd,nk->nd", indices, weight, factors).to(dtype)


@torch.library.custom_op("lingua::bag_products", mutates_args=())
def bag_products(
    indices: torch.Tensor, weight: torch.Tensor, vectors: torch.Tensor, ticket: torch.Tensor | None = None
) -> torch.Tensor:
    """`<weight[indices[n, k]], vectors[n]>`, (N, K) in fp32 or more."""
    check_slots(indices, len(weight))
    if runs_on_triton(weight):
        from lingua.product_key import lookup_kernels

        return lookup_kernels.products(indices, weight, vectors)
    is_wide = weight.dtype == vectors.dtype == _accumulator(weight.dtype)
    if weight.device.type == "cpu" and is_wide and indices.numel():
        return _products_in_place(indices, weight, vectors)
    return _gathered("nkd,nd->nk", indices, weight, vectors)


@torch.library.custom_op("lingua::table_gradient", mutates_args=())
def table_gradient(
    indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor, n_slots: int, dtype: torch.dtype
) -> torch.Tensor:
    """Row s sums `factors[n, k] * vectors[n]` over all n, k with indices[n, k] = s: (S, D) of type `dtype`."""
    check_slots(indices, n_slots)
    if runs_on_triton(vectors):
        from lingua.product_key import lookup_kernels

        return lookup_kernels.gradient(indices, factors, vectors, n_slots, dtype)
    if _has_sparse_products(vectors.device, dtype):
        return _gradient_of_all_rows(indices, factors.to(dtype), vectors.to(dtype), n_slots)
    return _gradient_of_rows_read(indices, factors, vectors, n_slots, dtype)


@bag_sums.register_fake
def _(
    indices: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    dtype: torch.dtype,
    ticket: torch.Tensor | None = None,
) -> torch.Tensor:
    return weight.new_empty(indices.shape[0], weight.shape[1], dtype=dtype)


@bag_products.register_fake
def _(
    indices: torch.Tensor, weight: torch.Tensor, vectors: torch.Tensor, ticket: torch.Tensor | None = None
) -> torch.Tensor:
    return weight.new_empty(indices.shape, dtype=_accumulator(weight.dtype))


@table_gradient.register_fake
def _(
    indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor, n_slots: int, dtype: torch.dtype
) -> torch.Tensor:
    return vectors.new_empty(n_slots, vectors.shape[1], dtype=dtype)


def _keep_for_backward(ctx, inputs, output) -> None:
    *_, ticket = inputs
    ctx.save_for_backward(*inputs[:3], ticket)


# Of row_gradients.py, without which there are no tickets.
def _record_rows(*inputs: torch.Tensor) -> torch.Tensor:
    return torch.ops.lingua.record_rows(*inputs)


def _sums_backward(ctx, grad_ND):
    indices, weight, factors, ticket = ctx.saved_tensors
    grad_weight = grad_factors = grad_ticket = None
    if ctx.needs_input_grad[1]:
        grad_weight = table_gradient(indices, factors, grad_ND, len(weight), weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_factors = bag_products(indices, weight, grad_ND).to(factors.dtype)
    if ticket is not None:
        grad_ticket = _record_rows(ticket, indices, factors, grad_ND)
    return None, grad_weight, grad_factors, None, grad_ticket


def _products_backward(ctx, grad_NK):
    indices, weight, vectors, ticket = ctx.saved_tensors
    grad_weight = grad_vectors = grad_ticket = None
    if ctx.needs_input_grad[1]:
        grad_weight = table_gradient(indices, grad_NK, vectors, len(weight), weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_vectors = bag_sums(indices, weight, grad_NK, vectors.dtype)
    if ticket is not None:
        grad_ticket = _record_rows(ticket, indices, grad_NK, vectors)
    return None, grad_weight, grad_vectors, grad_ticket


bag_sums.register_autograd(_sums_backward, setup_context=_keep_for_backward)
bag_products.register_autograd(_products_backward, setup_context=_keep_for_backward)


# For torch's FlopCounterMode.
@register_flop_formula([torch.ops.lingua.bag_sums, torch.ops.lingua.bag_products])
def _(indices_shape, weight_shape, *_: object, out_shape=None, **__: object) -> int:
    return 2 * indices_shape.numel() * weight_shape[1]


@register_flop_formula(torch.ops.lingua.table_gradient)
def _(indices_shape, factors_shape, vectors_shape, *_: object, out_shape=None, **__: object) -> int:
    return 2 * indices_shape.numel() * vectors_shape[1]


def row_sums(
    slots: torch.Tensor, tokens: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `table_gradient` has at the slots that are read at all: those, in order, and their rows in fp32 or more.

    Args:
        slots, tokens, factors: (P,), one for each place that reads: the slot it reads, for which token, how much of it.
        vectors: (N, D), the tokens'.
    """
    wide = _accumulator(torch.promote_types(factors.dtype, vectors.dtype))
    ordered, places = torch.sort(slots, stable=True)
    unique, positions, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    ends = F.pad(counts.cumsum(0), (1, 0))
    tokens, factors = tokens[places], factors[places]
    if runs_on_triton(vectors):
        from lingua.product_key import lookup_kernels

        return unique, lookup_kernels.sum_sorted(positions, ends, tokens, factors, vectors, wide)
    if slots.numel() and _has_sparse_products(vectors.device, wide):
        size = (len(unique), len(vectors))
        matrix = torch.sparse_csr_tensor(ends, tokens.long(), factors.to(wide), size, check_invariants=False)
        rows = _used_again(len(unique), vectors.shape[1], vectors.device, wide)
        return unique, torch.addmm(rows, matrix, vectors.to(wide).contiguous(), beta=0, out=rows)
    rows = torch.zeros(len(unique), vectors.shape[1], dtype=wide, device=vectors.device)
    at_once = max(CHUNK_ELEMENTS // max(vectors.shape[1], 1), 1)
    for start in range(0, len(tokens), at_once):
        chunk = slice(start, start + at_once)
        rows.index_add_(0, positions[chunk], vectors[tokens[chunk]].to(wide) * factors[chunk, None].to(wide))
    return unique, rows


# --- by PyTorch's operators ------------------------------------------------------------------------------------------


def _has_sparse_products(device: torch.device, dtype: torch.dtype) -> bool:
    """On a CPU a bag is a row of a sparse matrix, and MKL multiplies such, in fp32 and fp64, at the speed of memory."""
    return device.type == "cpu" and torch.backends.mkl.is_available() and dtype == _accumulator(dtype)


def _products_in_place(indices: torch.Tensor, weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Nothing is gathered: the products of `vectors` with all rows, at the places of a sparse matrix."""
    n, bag = indices.shape
    vectors = vectors.contiguous()
    if _has_sparse_products(weight.device, weight.dtype) and bag <= len(weight):
        # PyTorch takes a slot twice in a row, but no more places than the whole matrix has.
        dtype = torch.int32 if indices.numel() < 2**31 and len(weight) < 2**31 else torch.int64
        starts = torch.arange(n + 1, dtype=dtype) * bag
        slots = indices.flatten().to(dtype)
        places = torch.sparse_csr_tensor(
            starts, slots, weight.new_zeros(n * bag), (n, len(weight)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(places, vectors, weight.t(), beta=0).values().view(n, bag)
    # The gradient of F.embedding_bag's weights.
    bags = torch.arange(n, dtype=indices.dtype)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, weight, indices.flatten(), bags * bag, bags.repeat_interleave(bag), mode=0
    ).view(n, bag)


def _gathered(equation: str, indices: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`einsum(equation, weight[indices], other)` a chunk of tokens at a time, in fp32 or more."""
    dtype = _accumulator(weight.dtype)
    shape = indices.shape if equation.endswith("nk") else (len(indices), weight.shape[1])
    result = torch.empty(shape, dtype=dtype, device=weight.device)
    tokens = max(CHUNK_ELEMENTS // max(indices.shape[1] * weight.shape[1], 1), 1)
    for start in range(0, len(indices), tokens):
        chunk = slice(start, start + tokens)
        result[chunk] = torch.einsum(equation, weight[indices[chunk]].to(dtype), other[chunk].to(dtype))
    return result


def _by_slots(slots: torch.Tensor, factors: torch.Tensor, n_slots: int, bag: int) -> torch.Tensor:
    """The sparse matrix (S, N) of the factors: in row s the tokens that read slot s, in order. Slots are (N * K)."""
    places = torch.argsort(slots, stable=True)
    ends = torch.zeros(n_slots + 1, dtype=torch.int64, device=slots.device)
    torch.cumsum(torch.bincount(slots, minlength=n_slots), 0, out=ends[1:])
    tokens = torch.div(places, bag, rounding_mode="floor")
    size = (n_slots, len(slots) // bag)
    return torch.sparse_csr_tensor(ends, tokens, factors.flatten()[places], size, check_invariants=False)


def _gradient_of_all_rows(
    indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor, n_slots: int
) -> torch.Tensor:
    """Each row is written once, zeros too."""
    out = _used_again(n_slots, vectors.shape[1], vectors.device, vectors.dtype)
    if indices.numel() == 0:
        return out.zero_()
    matrix = _by_slots(indices.flatten(), factors, n_slots, indices.shape[1])
    return torch.addmm(out, matrix, vectors.contiguous(), beta=0, out=out)


def _gradient_of_rows_read(
    indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor, n_slots: int, dtype: torch.dtype
) -> torch.Tensor:
    """The sums of the rows that are read, in fp32 or more, put into zeros."""
    out = _used_again(n_slots, vectors.shape[1], vectors.device, dtype).zero_()
    if indices.numel() == 0:
        return out
    n, bag = indices.shape
    tokens = torch.arange(n, device=indices.device).repeat_interleave(bag)
    slots, rows = row_sums(indices.flatten(), tokens, factors.flatten(), vectors)
    out[slots.long()] = rows.to(dtype)
    return out


# Storages of earlier results, one for a table's gradient and one for what it is made from.
_storages: deque[torch.UntypedStorage] = deque(maxlen=2)


def _used_again(n_rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(n_rows, dim) with anything in it: in memory that an earlier result had, and that nobody else holds any more.

    On a CPU, fresh memory comes from the operating system a page at a time, each cleared first; for a gradient of
    256 MB that takes several times as long as writing it.
    """
    n_bytes = n_rows * dim * dtype.itemsize
    if device.type != "cpu" or n_bytes < LARGE:
        return torch.empty(n_rows, dim, dtype=dtype, device=device)

    def is_free(storage: torch.UntypedStorage) -> bool:
        return n_bytes <= storage.nbytes() <= 2 * n_bytes and torch._C._storage_Use_Count(storage._cdata) == 1

    storage = next(filter(is_free, _storages), None)
    if storage is None:
        storage = torch.UntypedStorage(n_bytes + n_bytes // 8)  # the next time it may be some more rows
        _storages.append(storage)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (n_rows, dim), (dim, 1))

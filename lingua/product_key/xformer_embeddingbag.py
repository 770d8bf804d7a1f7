"""The weighted lookup: for each token, the sum of `weight * table[slot]` over its bag of slots.

PyTorch's operator does it for fp32 tables. For a half-precision table its backward lacks the gradient of the weights
on CUDA, and on a CPU sums the table's gradient in that precision, which loses the small terms of slots that many tokens
read; so both gradients are worked out here, in fp32. PEER's first half, the products of a token with the rows of its
slots, stands beside it.
"""

import torch
import torch.nn.functional as F

# Elements of the table that are gathered at once, 64 MiB in fp32; the gradient of the rows read comes on top of that.
CHUNK_ELEMENTS = 2**24


def xformers_embedding_bag(
    indices: torch.Tensor, weight: torch.Tensor, per_sample_weights: torch.Tensor, mode: str = "sum"
) -> torch.Tensor:
    """Weighted sums of table rows.

    Args:
        indices: (N, bag) slots, int32 or int64, each in [0, S).
        weight: (S, D) table, fp32, bf16 or fp16.
        per_sample_weights: (N, bag), any floating type; rounded to the table's.
        mode: "sum", the only one that product-key memories use.

    Returns (N, D) of the table's type. Raises ValueError for another mode or for shapes that do not match.
    """
    if mode != "sum":
        raise ValueError(f"mode: '{mode}' is not supported, only 'sum'")
    if indices.ndim != 2 or indices.shape != per_sample_weights.shape:
        raise ValueError(
            f"indices {tuple(indices.shape)} and per_sample_weights {tuple(per_sample_weights.shape)} must be (N, bag)"
        )
    per_sample_weights = per_sample_weights.to(weight.dtype)
    if weight.dtype in (torch.bfloat16, torch.float16):
        return _HalfPrecisionBag.apply(indices, weight, per_sample_weights)
    return F.embedding_bag(indices, weight, per_sample_weights=per_sample_weights, mode="sum")


def slot_products(indices: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Inner products of each token with the rows of its slots, (N, bag), in fp32 (fp64 for such a table).

    Args:
        indices: (N, bag) slots of the table.
        weight: (S, D) table.
        x: (N, D) tokens.

    Never holds the (N, bag, D) rows all at once, forward or backward.
    """
    return _SlotProducts.apply(indices, weight, x)


class _HalfPrecisionBag(torch.autograd.Function):
    """`F.embedding_bag` with both gradients summed in fp32."""

    @staticmethod
    def forward(ctx, indices, weight, per_sample_weights):
        ctx.save_for_backward(indices, weight, per_sample_weights)
        return F.embedding_bag(indices, weight, per_sample_weights=per_sample_weights, mode="sum")

    @staticmethod
    def backward(ctx, grad_ND):
        indices, weight, per_sample_weights = ctx.saved_tensors
        grad_per_sample = _gathered("nkd,nd->nk", indices, weight, grad_ND).to(per_sample_weights.dtype)
        return None, _table_gradient(indices, weight, per_sample_weights, grad_ND), grad_per_sample


class _SlotProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, weight, x_ND):
        ctx.save_for_backward(indices, weight, x_ND)
        return _gathered("nkd,nd->nk", indices, weight, x_ND)

    @staticmethod
    def backward(ctx, grad_NK):
        indices, weight, x_ND = ctx.saved_tensors
        grad_x = _gathered("nkd,nk->nd", indices, weight, grad_NK).to(x_ND.dtype)
        return None, _table_gradient(indices, weight, grad_NK, x_ND), grad_x


def _accumulator(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _chunks(indices: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    tokens = max(CHUNK_ELEMENTS // max(indices.shape[1] * weight.shape[1], 1), 1)
    return [slice(start, start + tokens) for start in range(0, len(indices), tokens)]


def _gathered(equation: str, indices: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`einsum(equation, weight[indices], other)` a chunk of tokens at a time, in fp32 or more."""
    dtype = _accumulator(weight)
    shape = indices.shape if equation.endswith("nk") else (len(indices), weight.shape[1])
    result = torch.empty(shape, dtype=dtype, device=weight.device)
    for chunk in _chunks(indices, weight):
        result[chunk] = torch.einsum(equation, weight[indices[chunk]].to(dtype), other[chunk].to(dtype))
    return result


def _table_gradient(
    indices: torch.Tensor, weight: torch.Tensor, factors_NK: torch.Tensor, vectors_ND: torch.Tensor
) -> torch.Tensor:
    """The table's dense gradient: row s sums `factor * vector` over all places that read slot s, in fp32 or more."""
    dtype = _accumulator(weight)
    slots, positions = torch.unique(indices, return_inverse=True)
    rows = torch.zeros(len(slots), weight.shape[1], dtype=dtype, device=weight.device)
    for chunk in _chunks(indices, weight):
        terms_NKD = vectors_ND[chunk].to(dtype)[:, None] * factors_NK[chunk].to(dtype)[..., None]
        rows.index_add_(0, positions[chunk].flatten(), terms_NKD.flatten(0, 1))
    gradient = torch.zeros_like(weight)
    gradient[slots] = rows.to(weight.dtype)
    return gradient

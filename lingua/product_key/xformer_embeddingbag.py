"""The weighted lookup: for each token, the sum of `weight * table[slot]` over its bag of slots.

PyTorch's operator does it for fp32 tables. For a half-precision table its backward lacks the gradient of the weights on
CUDA, and on a CPU sums the table's gradient in that precision, which loses the small terms of slots that many tokens
read; so both gradients are worked out here, in fp32.
"""

import torch
import torch.nn.functional as F

# Elements that the half-precision backward gathers at once: bounds its memory to a few times 64 MiB.
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


class _HalfPrecisionBag(torch.autograd.Function):
    """`F.embedding_bag` with both gradients summed in fp32."""

    @staticmethod
    def forward(ctx, indices, weight, per_sample_weights):
        ctx.save_for_backward(indices, weight, per_sample_weights)
        return F.embedding_bag(indices, weight, per_sample_weights=per_sample_weights, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        indices, weight, per_sample_weights = ctx.saved_tensors
        slots, positions = torch.unique(indices, return_inverse=True)
        rows = torch.zeros(len(slots), weight.shape[1], dtype=torch.float32, device=weight.device)
        grad_per_sample = torch.empty(indices.shape, dtype=torch.float32, device=weight.device)
        tokens = max(CHUNK_ELEMENTS // max(indices.shape[1] * weight.shape[1], 1), 1)
        for start in range(0, len(indices), tokens):
            chunk = slice(start, start + tokens)
            grad_ND = grad[chunk].float()
            grad_per_sample[chunk] = torch.einsum("nkd,nd->nk", weight[indices[chunk]].float(), grad_ND)
            terms_NKD = grad_ND[:, None] * per_sample_weights[chunk].float()[..., None]
            rows.index_add_(0, positions[chunk].flatten(), terms_NKD.flatten(0, 1))
        grad_weight = torch.zeros_like(weight)
        grad_weight[slots] = rows.to(weight.dtype)
        return None, grad_weight, grad_per_sample.to(per_sample_weights.dtype)

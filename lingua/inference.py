"""A model for inference in fp32 on a CPU: the same numbers with fewer and faster operations.

A token at a time a model is bound by reading its weights, and a small one by the number of operations. Projections of
the same input become one, and large weights lie as oneDNN likes them, laid out once and not at each product: so it
reads them two to three times as fast as PyTorch's default.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lingua.transformer import Attention, BaseTransformer, FeedForward, apply_rotary

# Elements of a weight from which on oneDNN's layout is worth what its operator costs more at each call.
PACKED_FROM = 2**18


def can_speed_up(model: nn.Module) -> bool:
    """Whether all of the model is in fp32 on a CPU."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in model.parameters())


@torch.no_grad()
def speed_up(model: BaseTransformer) -> BaseTransformer:
    """A copy of the model, for inference alone, with the weights as they are now.

    It shares the model's tensors but for linears, which lie in memory twice.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared)
    for block in fast.layers:
        block.attention = FusedAttention(block.attention)
        if isinstance(block.feed_forward, FeedForward):
            block.feed_forward = FusedFeedForward(block.feed_forward)
    for module in list(fast.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, fast_linear(child.weight, child.bias))
    return fast


def fast_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """`x W^T + b`, (..., in) -> (..., out), of a weight (out, in)."""
    packs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return (PackedLinear if packs and weight.numel() >= PACKED_FROM else PlainLinear)(weight, bias)


class PlainLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight, self.bias = weight.detach(), bias if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = bias if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FusedAttention(Attention):
    """Attention whose queries, keys and values are one product; queries and keys are rotated together."""

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        self.head_dim, self.n_heads, self.n_kv_heads = attention.head_dim, attention.n_heads, attention.n_kv_heads
        self.wqkv = fast_linear(torch.cat([attention.wq.weight, attention.wk.weight, attention.wv.weight]))
        self.wo = fast_linear(attention.wo.weight)

    def project(self, x: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        rotated, v = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=-2)
        q, k = apply_rotary(rotated, rotation).split((self.n_heads, self.n_kv_heads), dim=-2)
        return q, k, v


class FusedFeedForward(FeedForward):
    """SwiGLU whose two first products are one."""

    def __init__(self, feed_forward: FeedForward):
        nn.Module.__init__(self)
        self.w13 = fast_linear(torch.cat([feed_forward.w1.weight, feed_forward.w3.weight]))
        self.w2 = fast_linear(feed_forward.w2.weight)

    def expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return gate, up

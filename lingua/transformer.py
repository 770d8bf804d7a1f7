"""The decoder's blocks, in plain PyTorch: RMSNorm, rotary attention, SwiGLU, and memories where they are asked for.

Knows nothing of ranks, files or YAML. Shape suffixes: B batch, T tokens, C model dim, H query heads, G key-value heads,
D head dim.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lingua.config import BaseTransformerArgs
from lingua.errors import UserError
from lingua.initialize import truncated_normal
from lingua.memories import chosen_memories
from lingua.memory_layer import MemoryLayer

ATTENTION_IMPLEMENTATIONS = ("sdpa", "flex_attention", "fmha")
INIT_STD_FACTORS = ("disabled", "global_depth", "current_depth", "dim_ratio")

# What tells attention where to look: "causal", a boolean (or additive) tensor that broadcasts to (B, H, T, S) for sdpa,
# a BlockMask for flex_attention, an xformers AttentionBias for fmha; or an AttentionState.
Mask = object


class AttentionState(ABC):
    """Stands in a mask's place where attention needs more than that: to know what came before (lingua.kv_cache)."""

    @abstractmethod
    def attend(self, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> torch.Tensor:
        """(B, T, H, D), from the queries, keys and values of the tokens at hand."""


def head_sizes(args: BaseTransformerArgs) -> tuple[int, int, int]:
    """(head_dim, n_heads, n_kv_heads), each worked out from the others where null. Raises UserError naming the key."""
    if args.head_dim is None and args.n_heads is None:
        raise UserError("model.n_heads: not set; give n_heads or head_dim")
    for name in ("head_dim", "n_heads", "n_kv_heads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"model.{name}: {value} is too small, it must be 1 or more")
    for name in ("head_dim", "n_heads"):
        other = "n_heads" if name == "head_dim" else "head_dim"
        if getattr(args, other) is None and args.dim % getattr(args, name):
            raise UserError(
                f"model.{name}: {getattr(args, name)} does not divide model.dim={args.dim}; set {other} too"
            )
    head_dim = args.head_dim or args.dim // args.n_heads
    n_heads = args.n_heads or args.dim // args.head_dim
    n_kv_heads = args.n_kv_heads or n_heads
    if n_heads % n_kv_heads:
        raise UserError(f"model.n_kv_heads: {n_kv_heads} does not divide the {n_heads} query heads")
    if head_dim % 2:
        raise UserError(f"model.head_dim: {head_dim} is odd; rotary embedding turns pairs, so it must be even")
    return head_dim, n_heads, n_kv_heads


def hidden_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Of the feed-forward: two thirds of 4 * dim, times the multiplier, rounded up to a multiple."""
    hidden = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def validate_transformer_args(args: BaseTransformerArgs) -> None:
    """Raises UserError, one line that names the key, for sizes that cannot work. Allocates nothing."""
    for name in ("dim", "n_layers", "multiple_of", "max_seqlen"):
        if getattr(args, name) < 1:
            raise UserError(f"model.{name}: {getattr(args, name)} is too small, it must be 1 or more")
    for name in ("norm_eps", "rope_theta", "init_base_std", "ffn_dim_multiplier"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"model.{name}: {value} must be a number above 0")
    try:
        hidden = hidden_size(args.dim, args.multiple_of, args.ffn_dim_multiplier)
    except OverflowError:
        raise UserError(
            f"model.ffn_dim_multiplier: {args.ffn_dim_multiplier} is too large, the feed-forward would have no end"
        ) from None
    if hidden < 1:
        raise UserError(f"model.ffn_dim_multiplier: {args.ffn_dim_multiplier} leaves the feed-forward no hidden units")
    if args.init_std_factor not in INIT_STD_FACTORS:
        raise UserError(f"model.init_std_factor: '{args.init_std_factor}' must be one of {', '.join(INIT_STD_FACTORS)}")
    head_sizes(args)
    for chosen in chosen_memories(args):
        chosen.layer.check(chosen.args, args.dim)


# --- parts -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension, in fp32 (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Turns each pair of dimensions (2i, 2i+1) by `position * theta**(-2i/D)` (Su et al., 2021)."""

    def __init__(self, theta: float, head_dim: int, max_seqlen: int):
        super().__init__()
        self.theta, self.head_dim, self.max_seqlen = theta, head_dim, max_seqlen
        self.register_buffer("table", self._table(), persistent=False)

    def _table(self, device: torch.device | None = None) -> torch.Tensor:
        frequencies = self.theta ** -(torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim)
        angles = torch.outer(torch.arange(self.max_seqlen, device=device).float(), frequencies)
        return torch.stack([angles.cos(), angles.sin()])

    def reset_parameters(self) -> None:
        self.table = self._table(self.table.device)

    def _apply(self, fn, recurse: bool = True) -> RotaryEmbedding:
        # `model.bfloat16()` and the like would round the angles too.
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32:
            self.reset_parameters()
        return self

    def forward(self, seqlen: int | None = None, tok_idx: torch.Tensor | None = None) -> torch.Tensor:
        """Cosines and sines, (2, T, D/2) for positions 0..seqlen-1, or (2, *tok_idx.shape, D/2) for given positions."""
        return self.table[:, tok_idx] if tok_idx is not None else self.table[:, :seqlen]


def apply_rotary(x_BTHD: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turns pairs in fp32; `rotation` as `RotaryEmbedding` gives it, one position a token."""
    cos, sin = rotation.unsqueeze(-2)  # the same for all heads
    pairs = x_BTHD.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        # As complex numbers: one operation in place of ten. The compiler does not know them, and needs them not.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).type_as(x_BTHD)


def create_causal_mask(
    seqlen: int, attn_impl: str = "sdpa", sliding_window: int | None = None, device: torch.device | None = None
) -> Mask:
    """The mask for which a token sees itself and what is before it: the last `sliding_window` tokens, itself included.

    Raises UserError for an unknown implementation, or fmha where it cannot run.
    """
    if attn_impl == "sdpa":
        if sliding_window is None or sliding_window >= seqlen:
            return "causal"
        position = torch.arange(seqlen, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance < sliding_window)
    if attn_impl == "flex_attention":

        def sees(batch, head, query, key):
            causal = query >= key
            return causal if sliding_window is None else causal & (query - key < sliding_window)

        return create_block_mask(sees, None, None, seqlen, seqlen, device=device or "cpu")
    if attn_impl == "fmha":
        bias = _import_fmha().attn_bias
        if sliding_window is None:
            return bias.LowerTriangularMask()
        return bias.LocalAttentionFromBottomRightMask(window_left=sliding_window - 1, window_right=0)
    raise UserError(f"attn_impl: '{attn_impl}' must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}")


def _import_fmha():
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise UserError(f"attn_impl: fmha needs xformers, which does not import here ({error}); use sdpa") from None
    if not torch.cuda.is_available():
        raise UserError("attn_impl: fmha runs on CUDA devices only, and there is none here; use sdpa or flex_attention")
    return fmha


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


def attend(
    q_BTHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, mask: Mask, attn_impl: str
) -> torch.Tensor:
    """Softmax attention, (B, T, H, D); G key-value heads serve H / G query heads each."""
    if isinstance(mask, AttentionState):
        return mask.attend(q_BTHD, k_BSGD, v_BSGD)
    grouped = q_BTHD.shape[2] != k_BSGD.shape[2]
    if attn_impl == "fmha":
        fmha = _import_fmha()
        if grouped:
            k_BSGD, v_BSGD = (x.repeat_interleave(q_BTHD.shape[2] // x.shape[2], dim=2) for x in (k_BSGD, v_BSGD))
        try:
            return fmha.memory_efficient_attention(q_BTHD, k_BSGD, v_BSGD, attn_bias=mask)
        except NotImplementedError as error:  # xformers without its CUDA operators, or none for these inputs
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"attn_impl: fmha cannot run here, use sdpa or flex_attention ({reason} ...)") from None
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    if attn_impl == "flex_attention":
        if not isinstance(mask, BlockMask):
            raise UserError(
                f"mask: flex_attention wants a BlockMask (create_causal_mask makes one), found {type(mask).__name__}"
            )
        if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise UserError("attn_impl: flex_attention has no backward on a CPU; use sdpa")
        run = _compiled_flex_attention() if q.is_cuda else flex_attention
        return run(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
    if attn_impl == "sdpa":
        causal = isinstance(mask, str) and mask == "causal"
        attn_mask = None if causal else mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal, enable_gqa=grouped)
        return y.transpose(1, 2)
    raise UserError(f"attn_impl: '{attn_impl}' must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}")


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, dim: int, head_dim: int, n_heads: int, n_kv_heads: int):
        super().__init__()
        self.head_dim, self.n_heads, self.n_kv_heads = head_dim, n_heads, n_kv_heads
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def reset_parameters(self, std: float) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wo):
            truncated_normal(linear.weight, std)

    def project(self, x: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, T, H, D) and keys (B, T, G, D), rotated to their positions, and values (B, T, G, D)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.wq, self.wk, self.wv))
        return apply_rotary(q, rotation), apply_rotary(k, rotation), v

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, mask: Mask, attn_impl: str = "sdpa") -> torch.Tensor:
        y = attend(*self.project(x, rotation), mask, attn_impl)
        return self.wo(y.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU, `w2(silu(w1 x) * w3 x)` (Shazeer, 2020)."""

    def __init__(self, dim: int, multiple_of: int, ffn_dim_multiplier: float | None):
        super().__init__()
        hidden = hidden_size(dim, multiple_of, ffn_dim_multiplier)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def reset_parameters(self, std: float | None, factor: float) -> None:
        """`std`: of all three, or None for one over the root of each one's input size; divided by `factor`."""
        for linear in (self.w1, self.w2, self.w3):
            truncated_normal(linear.weight, (std or linear.in_features**-0.5) / factor)

    def expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`w1 x` and `w3 x`."""
        return self.w1(x), self.w3(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.expand(x)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """`h = x + attention(norm(x))`, then `h + feed_forward(norm(h))`.

    The feed-forward may be a memory. Another memory may stand beside it, `memory`, whose result is added to the
    feed-forward's.
    """

    def __init__(self, args: BaseTransformerArgs, feed_forward: nn.Module, memory: MemoryLayer | None = None):
        super().__init__()
        self.attention = Attention(args.dim, *head_sizes(args))
        self.feed_forward = feed_forward
        self.memory = memory
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    @property
    def memory_name(self) -> str | None:
        """The submodule that is a memory: "feed_forward", "memory" or None."""
        if self.memory is not None:
            return "memory"
        return "feed_forward" if isinstance(self.feed_forward, MemoryLayer) else None

    @property
    def memory_layer(self) -> MemoryLayer | None:
        return None if self.memory_name is None else getattr(self, self.memory_name)

    def reset_parameters(self, std: float | None, factor: float) -> None:
        self.attention.reset_parameters((std or self.attention.wq.in_features**-0.5) / factor)
        if isinstance(self.feed_forward, FeedForward):
            self.feed_forward.reset_parameters(std, factor)
        if self.memory_layer is not None:
            self.memory_layer.reset_parameters()
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()

    def forward(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        mask: Mask,
        attn_impl: str = "sdpa",
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`tokens`: ids, (B, T), for a memory that takes them."""
        h = x + self.attention(self.attention_norm(x), rotation, mask, attn_impl)
        normed = self.ffn_norm(h)
        y = _call(self.feed_forward, normed, tokens)
        if self.memory is not None:
            y = y + _call(self.memory, normed, tokens)
        return h + y


def _call(layer: nn.Module, x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return layer(x, tokens) if isinstance(layer, MemoryLayer) and layer.takes_tokens else layer(x)


class BaseTransformer(nn.Module):
    """The stack of blocks, (B, T, C) -> (B, T, C); no embedding, no output.

    The first memory of a kind owns the tables; the later ones are handed it, if that kind shares its tables.
    """

    def __init__(self, args: BaseTransformerArgs):
        super().__init__()
        self.dim = args.dim
        self.max_seqlen = args.max_seqlen
        self.init_base_std, self.init_std_factor = args.init_base_std, args.init_std_factor
        self.rope_embeddings = RotaryEmbedding(args.rope_theta, head_sizes(args)[0], args.max_seqlen)
        of_block = {block: chosen for chosen in chosen_memories(args) for block in chosen.blocks}
        owners: dict[str, MemoryLayer] = {}
        self.layers = nn.ModuleList()
        for number in range(args.n_layers):
            memory, chosen = None, of_block.get(number)
            if chosen is not None:
                memory = chosen.layer.build(chosen.args, args.dim, owners.get(chosen.name))
                if chosen.layer.is_shared(chosen.args):
                    owners.setdefault(chosen.name, memory)
            if memory is not None and not memory.is_beside:
                self.layers.append(TransformerBlock(args, memory))
            else:
                feed_forward = FeedForward(args.dim, args.multiple_of, args.ffn_dim_multiplier)
                self.layers.append(TransformerBlock(args, feed_forward, memory))
        self.takes_tokens = any(memory.takes_tokens for memory in self.memories().values())
        self.register_load_state_dict_pre_hook(_canonicalize_before_loading)

    def memories(self) -> dict[int, MemoryLayer]:
        """Block number -> its memory, for the blocks that have one."""
        return {i: block.memory_layer for i, block in enumerate(self.layers) if block.memory_layer is not None}

    def keep_values_on_cpu(self, device: torch.device) -> None:
        """Value tables stay in the CPU's memory from now on, and all else is computed on `device`."""
        for memory in self.memories().values():
            for table in memory.own_tables:
                table.keep_on_cpu(device)

    def canonicalize(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Brings a checkpoint's names to this model's, in place: published ones repeat a shared table.

        Raises UserError where the repeated tables differ: the checkpoint is of a model with separate ones. Tensors may
        be on the meta device, where only shapes can be told apart.
        """
        names: dict[MemoryLayer, str] = {}
        for number, memory in self.memories().items():
            here = names[memory] = f"{prefix}layers.{number}.{self.layers[number].memory_name}."
            if memory.owner is memory:
                continue
            for name in memory.table_names:
                name += ".weight"
                repeated = state_dict.pop(here + name, None)
                owners_key = names[memory.owner] + name
                if repeated is None:
                    continue
                kept = state_dict.setdefault(owners_key, repeated)
                if kept.shape != repeated.shape or not (
                    kept.is_meta or kept is repeated or torch.equal(kept, repeated)
                ):
                    raise UserError(
                        f"{here}{name}: differs from {owners_key}, so this checkpoint has a table for each memory; "
                        "set model.productkey_args.mem_share_values=false"
                    )

    def init_weights(self) -> None:
        self.rope_embeddings.reset_parameters()
        for depth, block in enumerate(self.layers):
            factor = {
                "disabled": 1.0,
                "global_depth": (2 * (len(self.layers) + 1)) ** 0.5,
                "current_depth": (2 * (depth + 1)) ** 0.5,
                "dim_ratio": self.dim / 4096,
            }[self.init_std_factor]
            block.reset_parameters(self.init_base_std, factor)

    def forward(
        self,
        h: torch.Tensor,
        tok_idx: torch.Tensor | None = None,
        mask: Mask | list[Mask] = "causal",
        attn_impl: str = "sdpa",
        seqlen: int | None = None,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`tok_idx`: positions of the tokens, (T,) or (B, T), where they are not 0..T-1. `mask`: one for all blocks, or
        a list with one for each. `seqlen`: T, where `h` is a part of the sequence (which tensor parallelism splits) and
        the blocks see to the rest. `tokens`: ids, (B, T), for memories that take them.

        Raises UserError for more tokens than max_seqlen.
        """
        seqlen = h.shape[1] if seqlen is None else seqlen
        if tok_idx is None and seqlen > self.max_seqlen:
            raise UserError(f"{seqlen} tokens are more than the model's max_seqlen={self.max_seqlen}")
        rotation = self.rope_embeddings(seqlen=seqlen, tok_idx=tok_idx)
        masks = mask if isinstance(mask, list) else [mask] * len(self.layers)
        of_tokens = (tokens,) if self.takes_tokens else ()
        for block, of_block in zip(self.layers, masks, strict=True):
            h = block(h, rotation, of_block, attn_impl, *of_tokens)
        return h


def _canonicalize_before_loading(model: BaseTransformer, state_dict: dict, prefix: str, *_: object) -> None:
    model.canonicalize(state_dict, prefix)


def cross_entropy(pred: torch.Tensor, target: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """Mean token cross-entropy, in fp32, of logits (..., vocab) against ids of the same leading shape."""
    return F.cross_entropy(pred.flatten(0, -2).float(), target.flatten(), **kwargs)

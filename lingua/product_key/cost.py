"""What a product-key memory keeps for its backward pass and sends, by arithmetic (apps/main/footprint.py adds it up).

Letters: n tokens of this rank, C dim, R slots read for a token, V value dim, b bytes of an element, m ranks that a
table's columns are split over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lingua.memory_layer import FP32, Sizes

if TYPE_CHECKING:
    from lingua.product_key.memory import HashingMemory


def kept_bytes(memory: HashingMemory, sizes: Sizes, cheap_again: bool) -> int:
    """As in MemoryLayer."""
    n, C, b, m = sizes.tokens, sizes.dim, sizes.itemsize, sizes.ranks
    R, V = memory.reads, memory.v_dim
    has_swilu, has_projection = memory.swilu_projection is not None, memory.value_proj is not None
    is_gated, is_peer = memory.gating is not None, memory.peer_variant
    table = sizes.table_itemsize
    query = n * memory.heads * memory.k_dim * b
    # What the group has gathered: slots and weights of all its tokens.
    slots, weights = (m * n * R * memory.slot_itemsize(), m * n * R * table) if m > 1 else (0, 0)
    if cheap_again:
        kept = query + n * R * (FP32 + 8) + n * V * table + slots + weights
        kept += n * V * table if m > 1 else 0
        kept += (n * V * b if has_swilu else 0) + (n * C * b if has_projection else 0) + (n * b if is_gated else 0)
        if is_peer:
            kept += m * n * R * FP32 + (slots + n * C * FP32 + n * R * FP32 if m > 1 else 0)
        return kept
    kept = sizes.inputs(1 + has_swilu + is_gated) + query + n * R * (8 + FP32) + slots + weights
    if memory.query_norm is not None:
        halves, keys = 2 * n * memory.heads, memory.keys.numel()
        kept += halves * (memory.k_dim // 2) * FP32 + (halves + len(memory.keys)) * FP32
        kept += keys * FP32 if b == FP32 else 0  # the search keeps a copy in 16 bits without the norm, too
        kept += 0 if sizes.fused_norms else halves * (memory.k_dim // 2) * FP32 + keys * FP32
    if m == 1 and (table < FP32 or is_peer):
        kept += n * R * table  # the weights in the table's type, or times the hidden units
    if is_peer:
        kept += 2 * n * R * FP32 + slots  # the hidden units before and after gelu
        kept += n * C * FP32 if b < FP32 or m > 1 else 0
    if has_swilu:
        kept += n * V * (FP32 + b)
    if has_projection:
        kept += n * V * b
    if is_gated:
        kept += n * C * (b if has_projection else FP32) + n * b
    return kept


def sent_for_hidden_units(memory: HashingMemory, sizes: Sizes, is_recomputed: bool) -> Iterator[tuple[str, int]]:
    """PEER's first table, beside what MemoryLayer.sent says of the second one."""
    n, m, forwards = sizes.tokens, sizes.ranks, 2 if is_recomputed else 1
    hidden = m * n * memory.reads * FP32
    yield "all-to-all", (forwards + 1) * n * memory.input_dim * FP32
    yield "all-gather", forwards * m * n * memory.reads * memory.slot_itemsize() + hidden
    yield "reduce-scatter", forwards * hidden

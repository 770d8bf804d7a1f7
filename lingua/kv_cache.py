"""Attention over several sequences at once, packed end to end in one row of N tokens, and the cache to continue them.

All layers but attention work on the packed row (1, N, C), so nothing is computed for padding. Attention sees each
sequence by itself (block-diagonal), and what it has seen stays in the cache:

    Packing            which sequence each token belongs to, and its position there
    KVCache            keys and values of the sequences' tokens, by key-value heads
    cache.read(...)    what stands in the masks' place while prompts are read
    cache.step(...)    the same for one more token of every sequence

Shape suffixes as in lingua.transformer; N packed tokens, S places for tokens, R query heads for each key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lingua.transformer import AttentionState, BaseTransformer, Mask, attend, create_causal_mask


class Packing:
    """Sequences end to end: of each token its sequence (`rows`, N) and its place there (`positions`, N)."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
        self.lengths = list(lengths)
        self.n_rows, self.width = len(lengths), max(lengths)
        self.rows = rows.to(device)
        self.positions = (torch.arange(int(ends[-1])) - (ends - sizes)[rows]).to(device)
        self.last = (ends - 1).to(device)  # of each sequence its last token's place among the N
        self._even = min(lengths) == self.width

    def unpack(self, x_NHD: torch.Tensor) -> torch.Tensor:
        """(N, H, D) -> (B, T, H, D), shorter sequences filled up after their end with zeros."""
        if self._even:
            return x_NHD.unflatten(0, (self.n_rows, self.width))
        x_BTHD = x_NHD.new_zeros(self.n_rows, self.width, *x_NHD.shape[1:])
        x_BTHD[self.rows, self.positions] = x_NHD
        return x_BTHD

    def pack(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        return x_BTHD.flatten(0, 1) if self._even else x_BTHD[self.rows, self.positions]


class KVCache:
    """Keys and values of `n_rows` sequences, (n_rows, G, S, D) for each block.

    Args:
        length: tokens of the longest sequence, that which is to be generated included.
        sliding_window: where the model has one, S is no more than it: the token at position p lies at p % S, over one
            that no later token can see.
    """

    def __init__(
        self,
        model: BaseTransformer,
        n_rows: int,
        length: int,
        sliding_window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        attention = model.layers[0].attention
        self.length = length if sliding_window is None else min(length, sliding_window)
        shape = (n_rows, attention.n_kv_heads, self.length, attention.head_dim)
        # Zeros: what is masked out has weight 0, and 0 times what memory happens to hold may be no number.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in model.layers]
        self.sliding_window = sliding_window

    def read(self, packing: Packing) -> list[AttentionState]:
        """For each block what takes a mask's place while the sequences' first tokens are read, all of them at once."""
        kept = None
        if packing.width > self.length:
            lengths = torch.tensor(packing.lengths, device=packing.rows.device)
            kept = (packing.positions >= lengths[packing.rows] - self.length).nonzero().squeeze(1)
        rows = packing.rows if kept is None else packing.rows[kept]
        places = packing.positions if kept is None else packing.positions[kept] % self.length
        mask = causal_mask(packing, self.sliding_window)
        return [
            _Reading(packing, mask, _Room(keys, values, rows, places), kept)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def step(self, positions: torch.Tensor, n_used: int, all_alike: bool = False) -> list[AttentionState]:
        """For each block what takes a mask's place while every sequence gets one token, N = n_rows of them.

        Args:
            positions: (n_rows,) of the new tokens.
            n_used: places in use by then, that is the largest position + 1; more of them do no harm.
            all_alike: whether all positions are n_used - 1.
        """
        n_used = min(n_used, self.length)
        places = positions % self.length
        # A place in use is one that is not after the token, or any where the cache has gone round.
        visible = None if all_alike else torch.arange(n_used, device=positions.device) <= positions[:, None]
        mask = None if visible is None else visible[:, None, None]
        rows = torch.arange(len(positions), device=positions.device)
        return [
            _Stepping(_Room(keys, values, rows, places), mask, n_used)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def keep(self, rows: list[int]) -> None:
        """Forgets all sequences but these, which become 0, 1, ... in this order."""
        for tensors in (self.keys, self.values):
            index = torch.tensor(rows, device=tensors[0].device)
            for number, tensor in enumerate(tensors):
                tensors[number] = tensor[index]


def read_without_cache(packing: Packing, sliding_window: int | None) -> AttentionState:
    """What takes the mask's place in all blocks where the sequences are read once and not continued."""
    return _Reading(packing, causal_mask(packing, sliding_window), None, None)


def causal_mask(packing: Packing, sliding_window: int | None) -> Mask:
    # What a sequence is filled up with lies after its end, where its tokens do not look.
    return create_causal_mask(packing.width, "sdpa", sliding_window, packing.rows.device)


class _Room:
    """One block's part of a cache, and where in it new tokens go."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, places: torch.Tensor):
        self.keys, self.values = keys, values
        self.rows, self.places = rows, places

    def put(self, k_NGD: torch.Tensor, v_NGD: torch.Tensor) -> None:
        self.keys[self.rows, :, self.places] = k_NGD
        self.values[self.rows, :, self.places] = v_NGD


class _Reading(AttentionState):
    def __init__(self, packing: Packing, mask: Mask, room: _Room | None, kept: torch.Tensor | None):
        self.packing, self.mask, self.room, self.kept = packing, mask, room, kept

    def attend(self, q_1NHD: torch.Tensor, k_1NGD: torch.Tensor, v_1NGD: torch.Tensor) -> torch.Tensor:
        k_NGD, v_NGD = k_1NGD[0], v_1NGD[0]
        if self.room is not None:
            self.room.put(*((k_NGD, v_NGD) if self.kept is None else (k_NGD[self.kept], v_NGD[self.kept])))
        q, k, v = (self.packing.unpack(x) for x in (q_1NHD[0], k_NGD, v_NGD))
        return self.packing.pack(attend(q, k, v, self.mask, "sdpa"))[None]


class _Stepping(AttentionState):
    def __init__(self, room: _Room, mask: torch.Tensor | None, n_used: int):
        self.room, self.mask, self.n_used = room, mask, n_used

    def attend(self, q_1NHD: torch.Tensor, k_1NGD: torch.Tensor, v_1NGD: torch.Tensor) -> torch.Tensor:
        self.room.put(k_1NGD[0], v_1NGD[0])
        keys_BGSD, values_BGSD = self.room.keys[:, :, : self.n_used], self.room.values[:, :, : self.n_used]
        # The query heads of a group look at the same keys: as if they were R queries of one head, nothing is repeated.
        q_BGRD = q_1NHD[0].unflatten(1, (keys_BGSD.shape[1], -1))
        y_BGRD = F.scaled_dot_product_attention(q_BGRD, keys_BGSD, values_BGSD, attn_mask=self.mask)
        return y_BGRD.flatten(1, 2)[None]

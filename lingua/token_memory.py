"""A memory that is addressed by the token itself, beside a block's feed-forward. The example of lingua/README.md.

Each token reads a row for each of H hash functions of its id, and each row has a gate:
`y = sum_h sigmoid(w_h x + b_h) * table[hash_h(token)]`. Nothing is searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lingua.errors import UserError
from lingua.initialize import normal
from lingua.memory_layer import FP32, MemoryLayer, Part, Sizes, Tables
from lingua.product_key.value_table import xFormerEmbeddingBag

KEY = "model.memories.tokens."
# Universal hashing, a * (id + 1) modulo a prime and then modulo the number of slots (Carter & Wegman, 1979).
MULTIPLIER, PRIME = 2654435761, 2**31 - 1


@dataclass
class TokenMemoryArgs:
    """`layers`: blocks, such as "1,3"; `n_slots`: rows of the table that they share; `n_hashes`: rows a token reads;
    `value_lr`: the table's learning rate, null for the model's.
    """

    layers: str = ""
    n_slots: int = 65536
    n_hashes: int = 2
    value_lr: float | None = None


class TokenMemory(MemoryLayer):
    """(B, T, dim) and ids (B, T) -> (B, T, dim). All layers of a model read one table, each through its own gates."""

    is_beside = True
    takes_tokens = True
    read_keys = (f"{KEY}n_hashes",)

    def __init__(self, dim: int, n_slots: int, n_hashes: int, value_lr: float | None = None, owner=None):
        super().__init__(owner)
        self.size, self.reads, self.v_dim, self.value_fixed_lr = n_slots, n_hashes, dim, value_lr
        self.gate = nn.Linear(dim, n_hashes)
        if owner is None:
            self.values = xFormerEmbeddingBag(n_slots, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        normal(self.gate.weight, std=self.gate.in_features**-0.5)
        nn.init.zeros_(self.gate.bias)
        for table in self.own_tables:
            table.reset_parameters()

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        slots_NH = self.slots(tokens.flatten())
        weights_NH = torch.sigmoid(self.gate(x.reshape(-1, self.v_dim)).float())
        if self.slot_use is not None:  # each hash function is a head that reads one slot
            weights_NH = self.slot_use.watch(slots_NH[..., None], weights_NH[..., None]).squeeze(-1)
        return self.tables[0](slots_NH, weights_NH).to(x.dtype).view_as(x)

    def slots(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """(N,) -> (N, H), in [0, size)."""
        factors_H = (2 * torch.arange(self.reads, device=tokens_N.device) + 1) * MULTIPLIER % PRIME
        return (tokens_N[:, None] + 1) * factors_H % PRIME % self.size

    # --- what the trainer asks ---------------------------------------------------------------------------------------

    @classmethod
    def build(cls, args: TokenMemoryArgs, dim: int, owner: MemoryLayer | None) -> TokenMemory:
        return cls(dim, args.n_slots, args.n_hashes, args.value_lr, owner)

    @classmethod
    def check(cls, args: TokenMemoryArgs, dim: int) -> None:
        for name in ("n_slots", "n_hashes"):
            if getattr(args, name) < 1:
                raise UserError(f"{KEY}{name}: {getattr(args, name)} is too small, it must be 1 or more")
        if args.value_lr is not None and not 0 <= args.value_lr < float("inf"):
            raise UserError(f"{KEY}value_lr: {args.value_lr} must be a number of 0 or more, or null")

    @classmethod
    def tables_of(cls, args: TokenMemoryArgs, dim: int) -> Tables:
        return Tables(1, args.n_slots, dim, (f"{KEY}n_slots", "model.dim"), ("model.dim",))

    @classmethod
    def parts_of(cls, args: TokenMemoryArgs, dim: int) -> list[Part]:
        return [Part("token memories' gates", (f"{KEY}n_hashes", "model.dim"), (dim + 1) * args.n_hashes)]

    @classmethod
    def reads_of(cls, args: TokenMemoryArgs) -> int:
        return args.n_hashes

    @classmethod
    def is_shared(cls, args: TokenMemoryArgs) -> bool:
        return True

    def kept_bytes(self, sizes: Sizes, cheap_again: bool) -> int:
        n, m, H, b, table = sizes.tokens, sizes.ranks, self.reads, sizes.itemsize, sizes.table_itemsize
        # What the group has gathered: slots and weights of all its tokens.
        gathered = m * n * H * (self.slot_itemsize() + table) if m > 1 else 0
        if cheap_again:
            return n * H * b + (2 if m > 1 else 1) * n * self.v_dim * table + gathered
        kept = n * H * FP32 + (gathered or n * H * 8)  # the gates, and slots
        if table < FP32 and m == 1:
            kept += n * H * table  # the gates in the table's type
        # In fp32 the feed-forward keeps the same input.
        return kept + (n * sizes.dim * b if b < FP32 else 0)

    def reads_result(self) -> bool:
        return False  # it is added to the block's output

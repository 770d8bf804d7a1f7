"""The contract of a memory: a layer with tables of which each token reads a few rows.

A block carries one in place of its feed-forward or beside it. Optimizer groups, parallelism, planner, probe, slot
usage and checkpoints ask the layer what is defined here, and never for its class. `lingua/memories.py` lists the
memories by name; `lingua/README.md` shows how to add one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from lingua.errors import UserError
from lingua.product_key.slot_use import SlotUse
from lingua.product_key.value_table import xFormerEmbeddingBag

FP32 = 4


class Part(NamedTuple):
    """Parameters of one layer, named for the user, with the config keys that their number follows from."""

    what: str
    keys: tuple[str, ...]
    count: int


class Tables(NamedTuple):
    """The tables of one layer. `keys`: config keys that the rows follow from; `column_keys`: the columns."""

    number: int
    rows: int
    columns: int
    keys: tuple[str, ...]
    column_keys: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What the planner tells a layer of one rank.

    `tokens`: of a batch, of this rank's part of the sequence. `itemsize`, `table_itemsize`: bytes of an element where
    autocast computes, and where a table is read. `ranks`: that tables are split over by columns. `fused_norms`: whether
    a norm keeps one number for each token and not its result (on a GPU).
    """

    tokens: int
    dim: int
    itemsize: int
    table_itemsize: int
    ranks: int
    fused_norms: bool

    def inputs(self, n_linears: int) -> int:
        """Bytes that linears keep of their common input, in fp32: autocast casts it for each of them."""
        return self.tokens * self.dim * (self.itemsize * n_linears if self.itemsize < FP32 else FP32)


class MemoryLayer(nn.Module):
    """`forward(x)`, or `forward(x, tokens)` where `takes_tokens`: (B, T, dim) and ids (B, T) -> (B, T, dim).

    A subclass names its tables, which are registered under `table_names`, and sets

        size             rows of a table
        reads            rows of each table that a token reads
        v_dim            columns of a table
        value_fixed_lr   the tables' learning rate; None for the model's

    Args:
        owner: a layer of the same class whose tables this one reads. They stay the owner's alone: this layer does not
            register them, so they are stored, counted and initialized once.
    """

    is_beside: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = False
    table_names: tuple[str, ...] = ("values",)
    read_keys: ClassVar[tuple[str, ...]]  # config keys that `reads` follows from
    size: int
    reads: int
    v_dim: int
    value_fixed_lr: float | None

    def __init__(self, owner: MemoryLayer | None = None):
        super().__init__()
        self.slot_use: SlotUse | None = None  # MemoryUse sets it, to record what training reads
        # In a tuple, which nn.Module does not look into.
        self._owner = (owner,) if owner is not None else ()

    # --- of its arguments, before there is a layer -------------------------------------------------------------------

    @classmethod
    def build(cls, args: Any, dim: int, owner: MemoryLayer | None) -> MemoryLayer:
        """A layer for blocks of width `dim`. `owner`: the model's first layer of this kind, None for itself."""
        raise NotImplementedError

    @classmethod
    def check(cls, args: Any, dim: int) -> None:
        """Raises UserError, one line that names the key, for arguments that cannot work."""
        raise NotImplementedError

    @classmethod
    def tables_of(cls, args: Any, dim: int) -> Tables:
        """Of a layer that owns its tables. Works for any sizes, as nothing is allocated."""
        raise NotImplementedError

    @classmethod
    def parts_of(cls, args: Any, dim: int) -> list[Part]:
        """A layer's other parameters."""
        raise NotImplementedError

    @classmethod
    def reads_of(cls, args: Any) -> int:
        """Rows of each table that a token reads."""
        raise NotImplementedError

    @classmethod
    def is_shared(cls, args: Any) -> bool:
        """Whether the model's first layer owns the tables that all layers of this kind read."""
        raise NotImplementedError

    # --- of a layer --------------------------------------------------------------------------------------------------

    @property
    def tables(self) -> tuple[xFormerEmbeddingBag, ...]:
        """The tables that this layer reads, its own or its owner's."""
        return tuple(getattr(self.owner, name) for name in self.table_names)

    @property
    def own_tables(self) -> tuple[xFormerEmbeddingBag, ...]:
        """The tables that are registered here: those of `tables`, or none where they are the owner's."""
        return () if self._owner else self.tables

    @property
    def owner(self) -> MemoryLayer:
        """The layer whose tables this one reads; itself where they are its own."""
        return self._owner[0] if self._owner else self

    @property
    def device(self) -> torch.device:
        """Where the layer computes. Its tables may be in CPU RAM."""
        table = self.tables[0]
        return table.computed_on or table.weight.device

    def reset_parameters(self) -> None:
        """Draws all parameters anew; the tables only if they are its own."""
        raise NotImplementedError

    def lookup_flops(self) -> int:
        """Floating-point operations per token of the lookup, forward and backward (multiply and add: 2)."""
        return 3 * 2 * self.reads * self.v_dim * len(self.tables)

    # For the probe: the linear layer whose result the search starts from, and the best scores of such a result.
    query_linear: nn.Linear | None = None

    def best_scores(self, query: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    # --- what the planner asks ---------------------------------------------------------------------------------------

    def kept_bytes(self, sizes: Sizes, cheap_again: bool) -> int:
        """Bytes that autograd keeps of a batch for this layer. `cheap_again`: under selective checkpointing, which
        keeps the results of matrix products, search, lookup and exchanges between ranks.
        """
        raise NotImplementedError

    def slot_itemsize(self) -> int:
        """Bytes of a slot's number when it is sent."""
        return 4 if self.size <= 2**31 else 8

    def sent(self, sizes: Sizes, is_recomputed: bool) -> Iterator[tuple[str, int]]:
        """(collective, bytes) of a batch, where the tables' columns are split over `sizes.ranks`.

        `is_recomputed`: whether the backward pass does the forward pass again.
        """
        n, m = sizes.tokens, sizes.ranks
        forwards = 2 if is_recomputed else 1
        # What is computed again ends before the rows come, where nothing reads them for a gradient.
        of_rows = (forwards if self.reads_result() else 1) + 1
        weights = m * n * self.reads * sizes.table_itemsize
        yield "all-gather", forwards * (m * n * self.reads * self.slot_itemsize() + weights)
        yield "all-to-all", of_rows * n * self.v_dim * sizes.table_itemsize
        yield "reduce-scatter", weights

    def reads_result(self) -> bool:
        """Whether a layer after the lookup needs the lookup's result for its own gradient."""
        return True


def parse_blocks(layers: str, n_layers: int, key: str) -> list[int]:
    """The blocks that `layers`, such as "4,12,20", names, in order. Raises UserError for what does not fit."""
    try:
        numbers = [int(number) for number in layers.split(",")]
    except ValueError:
        raise UserError(f"{key}: '{layers}' is no list of blocks; wanted numbers such as \"4,12,20\"") from None
    for number in numbers:
        if not 0 <= number < n_layers:
            raise UserError(
                f"{key}: there is no block {number}, the model has 0 to {n_layers - 1} (model.n_layers={n_layers})"
            )
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{key}: '{layers}' names a block twice")
    return sorted(numbers)

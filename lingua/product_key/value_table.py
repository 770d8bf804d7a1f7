"""The value table as a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lingua.errors import UserError
from lingua.initialize import normal
from lingua.product_key.cpu_offload import fetched_embedding_bag, fetched_slot_products
from lingua.product_key.row_gradients import RowGradients
from lingua.product_key.xformer_embeddingbag import slot_products, xformers_embedding_bag


class xFormerEmbeddingBag(nn.Module):
    """A table of `size` rows of `dim`; `(indices (N, bag), scores (N, bag)) -> (N, dim)`, their weighted sums."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        self.row_gradients: RowGradients | None = None
        self.computed_on: torch.device | None = None
        self.reset_parameters()

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        n_bytes = self.weight.numel() * self.weight.element_size()
        where = ", in CPU RAM" if self.computed_on is not None else ""
        return f"{rows:,} rows of {columns}, {self.weight.dtype}, {n_bytes / 2**20:,.1f} MiB{where}"

    def reset_parameters(self) -> None:
        normal(self.weight, std=self.weight.shape[1] ** -0.5, drawn_on=self.computed_on)

    def keep_on_cpu(self, computed_on: torch.device) -> None:
        """From now on the table stays in the CPU's memory, wherever the module is moved; lookups, on `computed_on`,
        fetch the rows that they read. Its gradients are row-sparse (`note_rows`).
        """
        if not self.weight.is_meta:
            self.to("cpu")
        self.computed_on = computed_on

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """What all of nn.Module's `to`, `cuda`, `to_empty`, `bfloat16`, ... come down to."""
        if self.computed_on is None:
            return super()._apply(fn, recurse)

        def apply_at_home(tensor: torch.Tensor) -> torch.Tensor:
            # What it makes of nothing shows the type and the device that it wants.
            wanted = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if wanted.device.type in ("cpu", "meta"):
                return fn(tensor)
            if tensor.is_meta:
                return torch.empty_like(tensor, dtype=wanted.dtype, device="cpu")
            return tensor.to(wanted.dtype)

        return super()._apply(apply_at_home, recurse)

    def note_rows(self, whole: bool = False) -> RowGradients:
        """Makes the table's gradient row-sparse: `weight.grad` stays None, with `whole` only until `make_whole`."""
        if self.row_gradients is None or self.row_gradients.whole != whole:
            self.row_gradients = RowGradients(self.weight, whole)
        return self.row_gradients

    @property
    def ticket(self) -> torch.Tensor | None:
        """What the lookup takes where gradients are row-sparse."""
        return None if self.row_gradients is None else self.row_gradients.ticket

    def forward(self, indices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.look_up(self.weight, indices, scores)

    def look_up(self, weight: torch.Tensor, indices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`forward` in `weight`, which is all of the table or some of its columns."""
        if self.computed_on is None:
            return xformers_embedding_bag(indices, weight, scores, ticket=self.ticket)
        self._refuse_whole_gradient()
        return fetched_embedding_bag(indices, weight, scores, self.ticket)

    def _refuse_whole_gradient(self) -> None:
        is_whole = self.row_gradients is None or self.row_gradients.whole
        if is_whole and self.weight.requires_grad and torch.is_grad_enabled():
            raise UserError("a table in CPU RAM has row-sparse gradients only: set optim.value_update=sparse")


class SlotProducts(xFormerEmbeddingBag):
    """PEER's first table: `(indices (N, bag), x (N, dim)) -> (N, bag)`, the products of each token with its rows."""

    def look_up(self, weight: torch.Tensor, indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.computed_on is None:
            return slot_products(indices, weight, x, self.ticket)
        self._refuse_whole_gradient()
        return fetched_slot_products(indices, weight, x, self.ticket)

"""The gradient of a value table without the table: only the rows that were read, or made whole once a step.

Autograd would make it as large as the table for every layer that reads it, and add those up. A lookup that is given a
*ticket* notes in its backward pass what the gradient is made of, slots, factors and vectors, which is far less than
even the rows that were read; when all backward passes of a step are done, it is summed up at once, whichever layers and
batches read the table.

Computing the ticket's gradient (tickets.py) is the note: so it happens once in each backward pass, also where
activations are computed again and where a compiler drops what nobody uses.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lingua.product_key.tickets import holder_of, new_ticket
from lingua.product_key.xformer_embeddingbag import row_sums, table_gradient
from lingua.sharding import local_part, split_like


class RowGradients:
    """What the rows of one table, `weight`, have as their gradient since the last `clear`.

    Of a table that is split by columns over ranks: this rank's columns.

    Args:
        whole: they are to be a gradient like any other in the end, by `make_whole`.
    """

    def __init__(self, weight: torch.nn.Parameter, whole: bool = False):
        self.weight, self.whole = weight, whole
        self.ticket = new_ticket(self)
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> RowGradients:
        """A copied table's own: with a number, and without notes."""
        return RowGradients(copy.deepcopy(self.weight, memo), self.whole)

    def clear(self) -> None:
        """Forgets all rows, as `zero_grad` does."""
        self._notes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self.ticket.grad = None

    def note(self, indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor) -> None:
        """Adds `factors[n, k] * vectors[n]` to the row `indices[n, k]`, for all n, k.

        Sums up as soon as the notes of many batches take more memory than the table.
        """
        # Copies: what a compiled program hands in is its own memory, which it uses again.
        dtype = torch.int32 if len(self.weight) < 2**31 else torch.int64
        self._notes.append((indices.to(dtype, copy=True), factors.clone(), vectors.clone()))
        noted = sum(tensor.nbytes for note in self._notes for tensor in note)
        if noted > local_part(self.weight).nbytes:
            self.make_whole() if self.whole else self.rows()

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been read."""
        return self._rows is None and not self._notes

    @torch.no_grad()
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(slots, each once and in order; their rows of the gradient, in fp32 or more, which may be changed)."""
        if self._notes:
            notes, self._notes = self._notes, []
            if self._rows is not None:
                # Rows are the vectors of one-slot bags.
                slots, rows = self._rows
                notes.append((slots[:, None], rows.new_ones(len(slots), 1), rows))
            self._rows = _sum_up(notes)
        if self._rows is None:
            weight = local_part(self.weight)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            no_slots = torch.zeros(0, dtype=torch.int64, device=weight.device)
            return no_slots, weight.new_zeros((0, weight.shape[1]), dtype=dtype)
        return self._rows

    @torch.no_grad()
    def make_whole(self) -> None:
        """Adds what was noted to `weight.grad`, as autograd would have done, but once for all that read the table."""
        weight = self.weight
        notes, self._notes = self._notes, []
        for bag in {indices.shape[1] for indices, _, _ in notes}:
            alike = [note for note in notes if note[0].shape[1] == bag]
            grad = table_gradient(*map(torch.cat, zip(*alike, strict=True)), len(weight), weight.dtype)
            if weight.grad is not None:
                local_part(weight.grad).add_(grad)
            else:
                weight.grad = split_like(grad, weight)

    def replace(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Puts another gradient in its place, such as one that is summed over ranks."""
        self._notes, self._rows = [], (slots, rows)


def _sum_up(notes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, first = [], 0
    for indices, _, _ in notes:
        numbers = torch.arange(first, first + len(indices), dtype=torch.int32, device=indices.device)
        tokens.append(numbers.repeat_interleave(indices.shape[1]))
        first += len(indices)
    slots = torch.cat([indices.flatten() for indices, _, _ in notes])
    factors = torch.cat([factors.flatten() for _, factors, _ in notes])
    slots, rows = row_sums(slots, torch.cat(tokens), factors, torch.cat([vectors for _, _, vectors in notes]))
    return slots.long(), rows


@torch.library.custom_op("lingua::record_rows", mutates_args=())
def record_rows(
    ticket: torch.Tensor, indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """`RowGradients.note` for those that the ticket names; the ticket's gradient."""
    holder_of(ticket).note(indices, factors, vectors)
    return torch.zeros_like(ticket)


@record_rows.register_fake
def _(ticket: torch.Tensor, indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(ticket)


# For torch's FlopCounterMode: what the rows take that are summed up of it later.
@register_flop_formula(torch.ops.lingua.record_rows)
def _(ticket_shape, indices_shape, factors_shape, vectors_shape, *_: object, out_shape=None, **__: object) -> int:
    return 2 * indices_shape.numel() * vectors_shape[1]

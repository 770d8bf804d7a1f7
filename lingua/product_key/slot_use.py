"""Which slots a memory layer reads while it trains, and with how much weight.

It is noted in the backward pass, by an operator that a *ticket* (tickets.py) brings there: so it
happens once for each batch that is learnt from, also where activations are computed again and where a compiler drops
what nobody uses, and never in evaluation. Nothing is kept for it that the layer's own backward pass does not keep.

Suffixes: N tokens, H heads, K slots of a head, S slots in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lingua.product_key.tickets import holder_of, new_ticket


class SlotUse:
    """What one layer has read since the last `clear`. Of this rank's tokens.

    `weights_S`: the sum of the softmax weights that each slot got, in fp64, in which many small ones are not lost
    beside a large sum. `top_weights`: the sum over tokens and heads of the largest weight. `n_queries`: tokens times
    heads.
    """

    def __init__(self, n_slots: int, device: torch.device):
        self.weights_S = torch.zeros(n_slots, dtype=torch.float64, device=device)
        self.top_weights = torch.zeros((), dtype=torch.float64, device=device)
        self.n_queries = 0
        self.is_paused = False
        self.ticket = new_ticket(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotUse:
        """A copied layer's own, with a number, and without notes."""
        return SlotUse(len(self.weights_S), self.weights_S.device)

    def clear(self) -> None:
        self.weights_S.zero_()
        self.top_weights.zero_()
        self.n_queries = 0

    def watch(self, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor) -> torch.Tensor:
        """`weights_NHK`, the best slot's first, of which `note` hears when their gradient is known."""
        return _Watch.apply(weights_NHK, slots_NHK, self.ticket)

    def note(self, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor) -> None:
        if self.is_paused:
            return
        self.weights_S.scatter_add_(0, slots_NHK.flatten(), weights_NHK.flatten().double())
        self.top_weights += weights_NHK[..., 0].sum(dtype=torch.float64)
        self.n_queries += weights_NHK[..., 0].numel()


@contextlib.contextmanager
def paused(uses: Iterable[SlotUse | None]) -> Iterator[None]:
    """For backward passes that nothing is learnt from."""
    watching = [use for use in uses if use is not None]
    for use in watching:
        use.is_paused = True
    try:
        yield
    finally:
        for use in watching:
            use.is_paused = False


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights_NHK, slots_NHK, ticket):
        ctx.save_for_backward(weights_NHK, slots_NHK, ticket)
        return weights_NHK.view_as(weights_NHK)

    @staticmethod
    def backward(ctx, grad_NHK):
        weights_NHK, slots_NHK, ticket = ctx.saved_tensors
        return grad_NHK, None, note_slots(ticket, slots_NHK, weights_NHK, grad_NHK)


@torch.library.custom_op("lingua::note_slots", mutates_args=())
def note_slots(
    ticket: torch.Tensor, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor, grad_NHK: torch.Tensor
) -> torch.Tensor:
    """`SlotUse.note` for the one that the ticket names; the ticket's gradient.

    `grad_NHK` only ties it to the backward pass: what depends on nothing of that a compiler may do in the forward pass.
    """
    holder_of(ticket).note(slots_NHK, weights_NHK)
    return torch.zeros_like(ticket)


@note_slots.register_fake
def _(ticket: torch.Tensor, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor, grad_NHK: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(ticket)

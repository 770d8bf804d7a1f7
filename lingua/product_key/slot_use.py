"""Which slots a memory layer reads while it trains, and with how much weight.

It is recorded in the backward pass, by an operator that a *ticket* (tickets.py) brings there: so it
happens once for each batch that is learnt from, also where activations are computed again and where a compiler drops
what nobody uses, and never in evaluation. Nothing is kept for it that the layer's own backward pass does not keep.

Of every slot two bits are kept, in a byte that up to four layers share which read the same table. Weights are summed
for all slots of a small table, and of any table on a CPU. Of a larger one on a GPU they are summed for a random sample
and for slots that are read much.

Suffixes: N tokens, H heads, K slots of a head, S slots in all, M slots whose weights are summed, of these C chosen and
U drawn ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from lingua.product_key.tickets import holder_of, new_ticket

# Layers whose bits fit a byte.
LAYERS_PER_BYTE = 4
# Slots in the sample. A prime: slots of the same remainder are spread over all keys of both halves.
SAMPLED = 16381
# Queries of a batch whose best slots are chosen from the next log line on.
CHOSEN = 4096
NO_SLOT = 2**62
# Places, of a token, head and slot, that are recorded at once: so this takes little memory beside a backward pass.
PLACES_AT_ONCE = 2**20


def is_sampled(n_slots: int, device: torch.device) -> bool:
    """Whether the weights of some slots only are summed."""
    return n_slots > SAMPLED and device.type != "cpu"


class SlotUse:
    """What one layer has read since the last `clear`, and ever. Of this rank's tokens.

    `weights_M`: the sum of the softmax weights that each of these slots got, in fp64, in which many small ones are not
    lost beside a large sum. `top_weights`: the sum over tokens and heads of the largest weight. `n_queries`: tokens
    times heads.

    Where all slots are summed, slot s is at place s. Else (`is_sampled`) the first CHOSEN places have the slots that
    queries found best before the last `clear`, and after them place u has one of the slots s with s % SAMPLED = u,
    drawn at random, the same in every process. A slot that is chosen counts there alone. So what a few slots get is
    summed exactly, and the others are a random sample.

    Args:
        flags: (S + 1,) uint8, zeros at first, shared by at most LAYERS_PER_BYTE layers. The last one is of no slot.
        place: the layer's number among those, from 0.
    """

    def __init__(self, flags: torch.Tensor, place: int = 0):
        device, n_slots = flags.device, len(flags) - 1
        self.flags, self.flags_S = flags, flags[:-1]
        self.read_bit, self.ever_bit = 1 << 2 * place, 2 << 2 * place
        self.is_sample = is_sampled(n_slots, device)
        self.waits = device.type == "cpu"  # whether to look at values costs nothing
        self.chosen_C: torch.Tensor | None = None  # sorted; NO_SLOT after the last one
        self.drawn_U: torch.Tensor | None = None
        self.candidates_C: torch.Tensor | None = None  # for `choose`
        if self.is_sample:
            remainders = np.arange(SAMPLED)
            of_remainder = (n_slots - 1 - remainders) // SAMPLED + 1
            drawn = remainders + np.random.default_rng(0).integers(of_remainder) * SAMPLED
            self.drawn_U = torch.from_numpy(drawn).to(device)
            self.chosen_C = torch.full((CHOSEN,), NO_SLOT, device=device)
        n_summed = CHOSEN + SAMPLED if self.is_sample else n_slots
        self.weights_M = torch.zeros(n_summed, dtype=torch.float64, device=device)
        self.top_weights = torch.zeros((), dtype=torch.float64, device=device)
        self.n_queries = 0
        self.is_paused = False
        self.ticket = new_ticket(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotUse:
        """A copied layer's own, with a number, and without records."""
        return SlotUse(torch.zeros_like(self.flags))

    @property
    def n_exact(self) -> int:
        """How many of the places, the first ones, are not those of the sample."""
        return CHOSEN if self.is_sample else len(self.weights_M)

    def choose(self, candidates_C: torch.Tensor) -> None:
        """Slots, also several times each, whose weights are summed from the next `clear` on."""
        slots = candidates_C.unique()
        self.chosen_C.fill_(NO_SLOT)
        self.chosen_C[: len(slots)] = slots

    def clear(self) -> None:
        """Forgets all but which slots were ever read."""
        self.flags_S.bitwise_and_(0xFF ^ self.read_bit)
        self.weights_M.zero_()
        self.top_weights.zero_()
        self.n_queries = 0

    def watch(self, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor) -> torch.Tensor:
        """`weights_NHK`, the best slot's first, which `note` gets when their gradient is known."""
        return _Watch.apply(weights_NHK, slots_NHK, self.ticket)

    def note(self, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor) -> None:
        if self.is_paused or slots_NHK.numel() == 0:
            return
        places = zip(*(x.flatten().split(PLACES_AT_ONCE) for x in (slots_NHK, weights_NHK)), strict=True)
        for slots, weights in places:
            self._note(slots, weights)
        if self.is_sample:
            best = slots_NHK[..., 0].flatten()
            self.candidates_C = best[torch.arange(CHOSEN, device=best.device) * len(best) // CHOSEN]
        self.top_weights += weights_NHK[..., 0].sum(dtype=torch.float64)
        self.n_queries += weights_NHK[..., 0].numel()

    def _note(self, slots: torch.Tensor, weights: torch.Tensor) -> None:
        """Of places, (P,)."""
        weights = weights.double()
        is_read = weights > 0
        if not self.waits:  # all places are written, those where nothing is read in vain
            read, weights = torch.where(is_read, slots, len(self.flags_S)), torch.where(is_read, weights, 0.0)
        else:
            if not is_read.all():
                slots, weights = slots[is_read], weights[is_read]
            read = slots
        # All that write to a byte write the same.
        self.flags.scatter_(0, read, self.flags.gather(0, read) | self.read_bit)
        if self.is_sample:
            chosen, drawn = torch.searchsorted(self.chosen_C, slots).clamp_(max=CHOSEN - 1), slots % SAMPLED
            is_chosen = self.chosen_C[chosen] == slots
            weights = torch.where(is_chosen | (self.drawn_U[drawn] == slots), weights, 0.0)
            slots = torch.where(is_chosen, chosen, CHOSEN + drawn)
        self.weights_M.scatter_add_(0, slots, weights)


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

"""AdamW that touches only the rows of value tables that were read in a step (`optim.value_update: sparse`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from lingua.product_key.cpu_offload import bring_rows
from lingua.product_key.row_gradients import RowGradients
from lingua.sharding import local_offsets, local_part

# Elements of a table that are updated at once: those of each thread of a CPU stay in its cache, those of a GPU keep all
# of it busy.
AT_ONCE = {"cpu": 2**17}
AT_ONCE_ELSEWHERE = 2**24


def new_adamw_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW keeps for a parameter before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def fused_adamw(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    steps: list[torch.Tensor],
    group: dict[str, Any],
    skip: torch.Tensor | None,
) -> None:
    """PyTorch's fused AdamW, in place, with the options of `group`. Where `skip` is 1 nothing changes."""
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        grads,
        means,
        squares,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        found_inf=skip,
    )


class SparseAdamW(AdamW):
    """AdamW in which the parameters of `row_gradients` have row-sparse gradients; all others are updated as in AdamW.

    A row that was read is updated as in dense AdamW. One that was not read stays as it is, moments and weight: neither
    do its moments decay nor its weight, and it does not go on along its mean gradient. That is what
    torch.optim.SparseAdam and FBGEMM's optimizers do, too. Bias is corrected by the number of steps in which the table
    was read at all, not the row. Where every row is read in every step, the trajectory is that of dense AdamW.

    State has the same names, shapes and types as in dense AdamW: each can go on from the other's checkpoint.

    Args:
        stochastic: weights and moments of bf16 tables are rounded up or down at random, so that their expectation is
            exact. Rounded to the nearest, an update of less than half of the last digit is lost, and so is the decay
            of a second moment where beta2 is near 1.
        seed: of that rounding, together with the table's number of steps and its place: random numbers are the same on
            all replicas, and in a run that was resumed (with as many threads, where the table is in the CPU's memory).
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        row_gradients: dict[nn.Parameter, RowGradients],
        stochastic: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(params, **options)
        self.row_gradients = row_gradients
        self.stochastic, self.seed = stochastic, seed
        self._numbers = {parameter: number for number, parameter in enumerate(row_gradients)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = super().step(closure)
        self.step_rows()
        return loss

    @torch.no_grad()
    def step_rows(self) -> None:
        """Of the tables with row-sparse gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self.row_gradients.get(parameter)
                if gradient is not None and not gradient.is_empty:
                    self._update(parameter, gradient, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for gradient in self.row_gradients.values():
            gradient.clear()

    def _update(self, parameter: nn.Parameter, gradient: RowGradients, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(new_adamw_state(parameter))
        skipped = getattr(self, "found_inf", None)
        if skipped is not None:  # the table may lie in the CPU's memory
            skipped = skipped.to(parameter.device)
        state["step"] += 1
        table, mean, square = (local_part(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        dtype = torch.promote_types(table.dtype, torch.float32)
        generator = None
        if self.stochastic and table.dtype == torch.bfloat16:
            generator = self._generator(parameter, int(state["step"]))
        before = state["step"] - 1
        slots, rows = gradient.rows()
        at_once = AT_ONCE.get(table.device.type, AT_ONCE_ELSEWHERE)
        if table.device.type == "cpu":
            at_once *= torch.get_num_threads()
        n_rows = max(at_once // table.shape[1], 1)
        for read, grad in bring_rows(slots, rows, table.device, n_rows):
            m, v, weight = (tensor.index_select(0, read).to(dtype) for tensor in (mean, square, table))
            # The dense update of a small table; it counts its own step.
            fused_adamw([weight], [grad.to(dtype)], [m], [v], [before.clone()], group, skipped)
            updated = (m, v, weight)
            if generator is not None:
                updated = _round_at_random(updated, generator)
            for tensor, new in zip((mean, square, table), updated, strict=True):
                tensor.index_copy_(0, read, new.to(tensor.dtype))
        if skipped is not None:
            state["step"] -= skipped

    def _generator(self, parameter: nn.Parameter, step: int) -> torch.Generator:
        key = (self.seed, step, self._numbers[parameter], local_offsets(parameter)[1])
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator(local_part(parameter).device).manual_seed(int(state[0]))


def _round_at_random(tensors: tuple[torch.Tensor, ...], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """To bf16, up with a chance that is the distance to the lower neighbour (by magnitude) in units of the last digit.

    A bf16 number is the upper half of an fp32 one: random bits added to the lower half carry over with that chance.
    """
    count = tensors[0].numel()
    # Drawn as 64-bit numbers, since a call for each number is what takes the time. One draw serves all tensors, shifted
    # by an element, so that what belongs together is rounded independently.
    drawn = torch.empty((count + len(tensors)) // 4 + 1, dtype=torch.int64, device=tensors[0].device)
    bits = drawn.random_(-(2**63), None, generator=generator).view(torch.int16).int().bitwise_and_(0xFFFF)
    rounded = []
    for shift, tensor in enumerate(tensors):
        raised = tensor.view(torch.int32) + bits[shift : shift + count].view(tensor.shape)
        # The remaining lower half is cut off; what is not finite stays as it is.
        raised = torch.where(tensor.isfinite(), raised.bitwise_and_(-0x10000), tensor.view(torch.int32))
        rounded.append(raised.view(torch.float32).to(torch.bfloat16))
    return tuple(rounded)

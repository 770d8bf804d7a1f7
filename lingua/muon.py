"""Muon: moves a hidden matrix along its momentum, made orthogonal (Jordan et al., 2024; arXiv 2502.16982).

    m <- momentum * m + (1 - momentum) * g
    u <- orthogonalize(momentum * m + (1 - momentum) * g)         (Nesterov)
    W <- (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(max(rows, columns)) * u

The factor gives an update the size that AdamW's have, so that learning rate and weight decay of AdamW serve for both.
This is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, which can neither skip a step nor update a matrix that
is split over ranks.

A matrix that is split over ranks (DTensor) is gathered for its orthogonalization, which every rank computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lingua.sharding import in_full, local_part, local_slices, split_like

# Coefficients of the Newton-Schulz iteration, and how often it runs (Jordan et al., 2024).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# In which it computes: rounding to bf16 does it no harm, and tensor cores are fast at it.
DTYPE = torch.bfloat16
# Elements of equal matrices that are orthogonalized at once.
AT_ONCE = 2**26


def new_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    return {"momentum_buffer": torch.zeros_like(parameter)}


@torch.no_grad()
def update(
    parameters: list[nn.Parameter],
    states: list[dict[str, torch.Tensor]],
    group: dict[str, Any],
    skip: torch.Tensor | None,
) -> None:
    """Moves `parameters`, matrices with gradients. Where `skip` is 1 nothing changes. All ranks call it together."""
    is_kept = 1.0 if skip is None else 1 - skip
    by_shape: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
    for parameter, state in zip(parameters, states, strict=True):
        state["step"] += is_kept
        grad, momentum = local_part(parameter.grad), local_part(state["momentum_buffer"])
        if skip is not None:
            grad = torch.where(skip.bool(), 0, grad)  # what is not finite stays so when multiplied by 0
        momentum.add_((grad - momentum) * ((1 - group["momentum"]) * is_kept))
        direction = split_like(grad.lerp(momentum, group["momentum"]), parameter)
        by_shape.setdefault(parameter.shape, []).append((parameter, direction))
    for shape, members in by_shape.items():
        n_at_once = max(AT_ONCE // shape.numel(), 1)
        step_size = group["lr"] * 0.2 * max(shape) ** 0.5 * is_kept
        for first in range(0, len(members), n_at_once):
            some = members[first : first + n_at_once]
            directions = orthogonalize(torch.stack([in_full(direction) for _, direction in some]))
            for (parameter, _), direction in zip(some, directions, strict=True):
                weight = local_part(parameter)
                weight.mul_(1 - group["lr"] * group["weight_decay"] * is_kept)
                weight.sub_(direction[local_slices(parameter)].to(weight.dtype) * step_size)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> about U V^T of each U S V^T, in DTYPE: singular values end up between 0.5 and 1.5."""
    a, b, c = COEFFICIENTS
    x = matrices.to(DTYPE)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x

"""Random weights that do not depend on how a parameter lies on ranks.

A parameter is drawn in blocks of whole rows, each from its own seed, so that a rank that holds some rows or columns
of it (a DTensor) draws the blocks that these lie in and keeps its part: all layouts start from the same full weights,
and no rank ever holds more than its part and one block. The parameter's seed comes from torch's global CPU generator:
`torch.manual_seed` governs it, and the order of the calls, not the layout, tells the parameters apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lingua.sharding import local_offsets, local_part

# Elements that are drawn at once.
BLOCK_ELEMENTS = 2**20


def normal(parameter: torch.Tensor, std: float, drawn_on: torch.device | None = None) -> None:
    """Fills `parameter` from a normal distribution around 0. `drawn_on`: a device that is not the parameter's, whose
    random numbers it gets.
    """
    _fill(parameter, lambda block, generator: block.normal_(std=std, generator=generator), drawn_on)


def truncated_normal(parameter: torch.Tensor, std: float) -> None:
    """Fills `parameter` from a normal distribution cut at 3 standard deviations."""
    cut = 3 * std
    _fill(parameter, lambda block, generator: nn.init.trunc_normal_(block, 0, std, -cut, cut, generator=generator))


def uniform(parameter: torch.Tensor, bound: float) -> None:
    """Fills `parameter` evenly from [-bound, bound)."""
    _fill(parameter, lambda block, generator: block.uniform_(-bound, bound, generator=generator))


def xavier_uniform(weight: torch.Tensor) -> None:
    """Fills a matrix evenly within +-sqrt(6 / (rows + columns)) (Glorot & Bengio, 2010, equation 16)."""
    uniform(weight, (6 / sum(weight.shape)) ** 0.5)


@torch.no_grad()
def _fill(
    parameter: torch.Tensor,
    draw: Callable[[torch.Tensor, torch.Generator], object],
    drawn_on: torch.device | None = None,
) -> None:
    seed = int(torch.randint(2**62, (), device="cpu"))
    if parameter.is_meta:
        return
    local, start = local_part(parameter), local_offsets(parameter)
    if local.numel() == 0:
        return
    shape = parameter.shape
    n_rows = max(BLOCK_ELEMENTS // max(shape[1:].numel(), 1), 1)
    first, last = start[0], start[0] + len(local)
    columns = tuple(slice(begin, begin + size) for begin, size in zip(start[1:], local.shape[1:], strict=True))
    device = drawn_on or local.device
    generator = torch.Generator(device)
    dtype = torch.promote_types(local.dtype, torch.float32)
    for number in range(first // n_rows, (last - 1) // n_rows + 1):
        begin, end = number * n_rows, min((number + 1) * n_rows, shape[0])
        block = torch.empty((end - begin, *shape[1:]), dtype=dtype, device=device)
        draw(block, generator.manual_seed(seed + number))
        kept = slice(max(begin, first), min(end, last))
        local[kept.start - first : kept.stop - first] = block[(slice(kept.start - begin, kept.stop - begin), *columns)]

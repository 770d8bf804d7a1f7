"""Which part of a tensor is on this rank. It knows no config and no rank, so model code can import it alone."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds: all of it, unless it is split over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where in the whole tensor the first element of this rank's part is."""
    if isinstance(tensor, DTensor):
        # How torch's distributed checkpoints ask a tensor for its place. A rank may hold nothing.
        pieces = tensor.__create_chunk_list__()
        if pieces:
            return tuple(pieces[0].offsets)
    return (0,) * tensor.ndim


def local_slices(tensor: torch.Tensor) -> tuple[slice, ...]:
    """What takes this rank's part out of the whole tensor."""
    sizes = local_part(tensor).shape
    return tuple(slice(start, start + size) for start, size in zip(local_offsets(tensor), sizes, strict=True))

"""Which part of a tensor is on this rank. It knows no config and no rank, so model code can import it alone."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds: all of it, unless it is split over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

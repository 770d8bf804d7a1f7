"""Which part of a tensor is on this rank. It knows no config and no rank, so model code can import it alone.

torch.distributed.tensor takes a second to import. A process that has not done so has no DTensor.
"""

from __future__ import annotations

import sys

import torch


def is_split(tensor: torch.Tensor) -> bool:
    """Whether a tensor is split over ranks, or repeated on them: a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds: all of it, unless it is split over ranks."""
    return tensor.to_local() if is_split(tensor) else tensor


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank. All ranks that it is split over call it together."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def local_offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where in the whole tensor the first element of this rank's part is."""
    if is_split(tensor):
        # How torch's distributed checkpoints ask a tensor for its place. A rank may hold nothing.
        pieces = tensor.__create_chunk_list__()
        if pieces:
            return tuple(pieces[0].offsets)
    return (0,) * tensor.ndim


def local_slices(tensor: torch.Tensor) -> tuple[slice, ...]:
    """What takes this rank's part out of the whole tensor."""
    sizes = local_part(tensor).shape
    return tuple(slice(start, start + size) for start, size in zip(local_offsets(tensor), sizes, strict=True))


def split_like(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is split over ranks as `tensor` is, if it is, of which `part` is on this rank."""
    if not is_split(tensor):
        return part
    return type(tensor).from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )

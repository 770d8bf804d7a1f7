"""How the memories are used in training: what each layer reads, over all ranks, for a log line and for a checkpoint.

Slots are counted where they are read (lingua/product_key/slot_use.py). The ranks add up only when a log line is due, or
a checkpoint: so a step costs one addition for each place that is read, and nothing of the table's size.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lingua.distributed import local_part, reduce_sum
from lingua.product_key.memory import HashingMemory
from lingua.product_key.slot_use import SlotUse

# Rows whose change is looked at; where more were read, so many of them are drawn.
MEASURED_ROWS = 1024


@dataclass
class _Layer:
    memory: HashingMemory
    use: SlotUse
    ever_S: torch.Tensor  # bool, the same on all ranks
    # Before an update: slots that were read, how many they stand for, and this rank's part of the tables' rows there.
    slots: torch.Tensor | None = None
    n_read: int = 0
    before: list[torch.Tensor] | None = None


class MemoryUse:
    """What the memories have read since the last log line and ever. All ranks call its methods together.

    Args:
        memories: block number -> its memory, whose parameters lie where they stay.
    """

    def __init__(self, memories: dict[int, HashingMemory]):
        self.layers: dict[int, _Layer] = {}
        for number, memory in memories.items():
            device = memory.keys.device
            memory.slot_use = SlotUse(memory.size, device)
            ever_S = torch.zeros(memory.size, dtype=torch.bool, device=device)
            self.layers[number] = _Layer(memory, memory.slot_use, ever_S)

    # --- a log line ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_update(self, seed: int) -> None:
        """To be called between the backward passes and the optimizer's step of a step that `metrics` are wanted of."""
        for layer in self.layers.values():
            _sum_over_ranks(layer.use.weights_S)
            read_S = layer.use.weights_S > 0
            layer.ever_S |= read_S
            slots = read_S.nonzero().flatten()
            layer.n_read = len(slots)
            if layer.n_read > MEASURED_ROWS:
                # The same on all ranks, which may each hold some columns of a row.
                drawn = np.random.default_rng(seed).integers(layer.n_read, size=MEASURED_ROWS)
                slots = slots[torch.from_numpy(drawn).to(slots.device)]
            layer.slots = slots
            layer.before = [_rows_held(table.weight, slots) for table in layer.memory.tables]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Of each layer, and begins to count anew:

            pk/layer_{i}/read               share of the slots that were read since the last log line
            pk/layer_{i}/ever_read          since the run's start
            pk/layer_{i}/kl                 log S + sum_s z_s log z_s, where z is how the softmax weights since the last
                                            log line spread over the S slots: the entropy that is lacking to an even
                                            use (Lample et al., 2019); 0 at best, log S at worst
            pk/layer_{i}/top_weight         largest softmax weight, mean over tokens and heads
            pk/layer_{i}/value_update_norm  2-norm of all that the optimizer's step has changed in the table's rows that
                                            this layer has read since the last log line (PEER: in both tables'), as it
                                            is stored. Of more than MEASURED_ROWS rows so many are drawn, and stand for
                                            the others

        A slot is read where a weight above 0 falls on it. "Since the last log line" is since its start for a process
        that has written none. Tokens are those of all ranks.
        """
        if not self.layers:
            return {}
        found = {number: self._of_layer(layer) for number, layer in self.layers.items()}
        # Everything that still has to be summed, at once.
        summed = iter(reduce_sum([value for _, parts in found.values() for value in parts]))
        metrics = {}
        for number, (values, _) in found.items():
            top_weights, n_queries, squares = next(summed), next(summed), next(summed)
            values |= {"top_weight": top_weights / n_queries, "value_update_norm": math.sqrt(squares)}
            metrics |= {f"pk/layer_{number}/{name}": value for name, value in values.items()}
        return metrics

    def _of_layer(self, layer: _Layer) -> tuple[dict[str, float], list[float]]:
        """Values that are those of all ranks by now, and parts of this rank."""
        use, n_slots = layer.use, layer.memory.size
        total = use.weights_S.sum()
        # (sum w log w) / W - log W is sum z log z.
        kl = math.log(n_slots) + torch.special.xlogy(use.weights_S, use.weights_S).sum() / total - total.log()
        values = {
            "read": layer.n_read / n_slots,
            "ever_read": layer.ever_S.sum().item() / n_slots,
            "kl": max(kl.item(), 0.0),  # rounding makes it less
        }
        squares = 0.0
        for table, before in zip(layer.memory.tables, layer.before, strict=True):
            change = _rows_held(table.weight, layer.slots).float() - before.float()
            squares += change.square().sum(dtype=torch.float64).item() / _n_holders(table.weight)
        parts = [use.top_weights.item(), use.n_queries, squares * layer.n_read / max(len(layer.slots), 1)]
        use.clear()
        layer.slots = layer.before = None
        return values, parts

    # --- a checkpoint ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state(self) -> dict[str, str]:
        """Which slots were ever read, for `load`, as JSON takes it: block number -> bits, compressed, in base64."""
        state = {}
        for number, layer in self.layers.items():
            read_S = (layer.use.weights_S > 0).to(torch.uint8)
            if dist.is_initialized():
                dist.all_reduce(read_S, op=dist.ReduceOp.MAX)
            layer.ever_S |= read_S.bool()
            bits = np.packbits(layer.ever_S.cpu().numpy())
            state[str(number)] = base64.b64encode(zlib.compress(bits.tobytes())).decode()
        return state

    def load(self, state: Any) -> bool:
        """Whether `state` tells of these layers' slots; else none count as read so far."""
        ever = {}
        for number, layer in self.layers.items():
            try:
                bits = np.frombuffer(zlib.decompress(base64.b64decode(state[str(number)])), dtype=np.uint8)
                ever[number] = np.unpackbits(bits)[: layer.memory.size]
            except (KeyError, TypeError, ValueError, zlib.error):
                return False
            if len(bits) != -(-layer.memory.size // 8):
                return False
        for number, read_S in ever.items():
            self.layers[number].ever_S.copy_(torch.from_numpy(read_S))
        return True


def _sum_over_ranks(tensor: torch.Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)


def _rows_held(weight: nn.Parameter, slots: torch.Tensor) -> torch.Tensor:
    """A copy of what this rank holds of a table's rows `slots`: some of their columns, or some of the rows."""
    held = local_part(weight)
    slots = slots.to(held.device)
    if isinstance(weight, DTensor):
        chunks = weight.__create_chunk_list__()  # how torch's distributed checkpoints ask a tensor for its place
        first = chunks[0].offsets[0] if chunks else 0
        slots = slots[(slots >= first) & (slots < first + len(held))] - first
    return held.index_select(0, slots)


def _n_holders(weight: nn.Parameter) -> int:
    """The number of ranks that hold the same part of a table."""
    n_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(weight, DTensor):
        return n_ranks
    mesh = weight.device_mesh
    return n_ranks // math.prod(mesh.size(dim) for dim, p in enumerate(weight.placements) if not p.is_replicate())

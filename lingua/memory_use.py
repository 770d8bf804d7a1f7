"""How the memories are used in training: what each layer reads, over all ranks, for a log line and for a checkpoint.

Slots are counted where they are read (lingua/product_key/slot_use.py). The ranks add up only when a log line is due, or
a checkpoint: so a step costs a few operations for each place that is read, and none for those that are not.

On a GPU this takes a byte for each slot of a table that up to four layers share, and a third of a megabyte a layer; on
a CPU, and for small tables, eight bytes more for each slot and layer (`bytes_held`).
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
from lingua.memory_layer import MemoryLayer
from lingua.product_key.slot_use import CHOSEN, LAYERS_PER_BYTE, SAMPLED, SlotUse, is_sampled
from lingua.sharding import local_offsets

# Rows whose change is measured. Where more were read, this number of them is drawn.
MEASURED_ROWS = 1024
# Slots whose bits are looked at at once, a multiple of 8.
SLOTS_AT_ONCE = 2**22


@dataclass
class _Layer:
    memory: MemoryLayer
    use: SlotUse
    # Before an update: slots that were read, how many they stand for, and this rank's part of the tables' rows there.
    slots: torch.Tensor | None = None
    n_read: int = 0
    top_weights: float = 0.0
    n_queries: float = 0.0
    before: list[torch.Tensor] | None = None


class MemoryUse:
    """What the memories have read since the last log line and ever. All ranks call its methods together.

    Args:
        memories: block number -> its memory, whose parameters lie where they stay.
    """

    def __init__(self, memories: dict[int, MemoryLayer]):
        self.layers: dict[int, _Layer] = {}
        readers: dict[int, list[int]] = {}  # table -> blocks that read it
        for number, memory in memories.items():
            readers.setdefault(id(memory.tables[0]), []).append(number)
        for numbers in readers.values():
            for first in range(0, len(numbers), LAYERS_PER_BYTE):
                memory = memories[numbers[first]]
                flags = torch.zeros(memory.size + 1, dtype=torch.uint8, device=memory.device)
                for place, number in enumerate(numbers[first : first + LAYERS_PER_BYTE]):
                    memories[number].slot_use = SlotUse(flags, place)
                    self.layers[number] = _Layer(memories[number], memories[number].slot_use)
        self.layers = {number: self.layers[number] for number in memories}

    # --- a log line ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_update(self, seed: int) -> None:
        """To be called between the backward passes and the optimizer's step of a step that `metrics` are wanted of."""
        for layer in self.layers.values():
            use = layer.use
            sums = torch.cat((use.weights_M, use.top_weights[None], use.weights_M.new_tensor([use.n_queries])))
            _sum_over_ranks(sums)
            use.weights_M.copy_(sums[:-2])
            layer.top_weights, layer.n_queries = sums[-2:].tolist()
            counts = []
            for flags in use.flags_S.split(SLOTS_AT_ONCE):
                read = _read_by_any_rank(flags, use)
                flags |= read * (use.read_bit | use.ever_bit)
                counts.append(int(read.sum()))
            layer.n_read = sum(counts)
            if layer.n_read > MEASURED_ROWS:
                # The same on all ranks, which may each hold some columns of a row.
                wanted = np.sort(np.random.default_rng(seed).integers(layer.n_read, size=MEASURED_ROWS))
            else:
                wanted = np.arange(layer.n_read)
            layer.slots = _members(use.flags_S, use.read_bit, counts, wanted)
            layer.before = [_rows_held(table.weight, layer.slots) for table in layer.memory.tables]

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
                                            is stored. Of more than MEASURED_ROWS rows that number is drawn and
                                            stands for the others

        A slot is read where a weight above 0 falls on it. "Since the last log line" is since its start for a process
        that has written none. Tokens are those of all ranks.

        On a GPU with more than SAMPLED slots, kl is an estimate: exact in how many slots were read, and in the weights
        of those that were queries' best at the last log line; the unevenness among the others that were read is that of
        a random sample (slot_use.py), in the first line of a process all of it.
        """
        if not self.layers:
            return {}
        found = {number: self._of_layer(layer) for number, layer in self.layers.items()}
        # Everything that still has to be summed, at once.
        summed = reduce_sum([squares for _, squares in found.values()])
        metrics = {}
        for (number, (values, _)), squares in zip(found.items(), summed, strict=True):
            values |= {"value_update_norm": math.sqrt(squares)}
            metrics |= {f"pk/layer_{number}/{name}": value for name, value in values.items()}
        return metrics

    def _of_layer(self, layer: _Layer) -> tuple[dict[str, float], float]:
        """Values that are those of all ranks by now, and this rank's part of the squares of what has changed."""
        use, n_slots = layer.use, layer.memory.size
        n_ever = sum(int((flags & use.ever_bit).bool().sum()) for flags in use.flags_S.split(SLOTS_AT_ONCE))
        values = {
            "read": layer.n_read / n_slots,
            "ever_read": n_ever / n_slots,
            "kl": _divergence(use.weights_M.cpu().numpy(), use.n_exact, layer.n_queries, layer.n_read, n_slots),
            "top_weight": layer.top_weights / layer.n_queries,
        }
        squares = 0.0
        for table, before in zip(layer.memory.tables, layer.before, strict=True):
            change = _rows_held(table.weight, layer.slots).float() - before.float()
            squares += change.square().sum(dtype=torch.float64).item() / _n_holders(table.weight)
        use.clear()
        if use.is_sample:
            if dist.is_initialized():
                dist.broadcast(use.candidates_C, src=0)
            use.choose(use.candidates_C)
        squares *= layer.n_read / max(len(layer.slots), 1)
        layer.slots = layer.before = None
        return values, squares

    # --- a checkpoint ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state(self) -> dict[str, str]:
        """Which slots were ever read, for `load`, as JSON takes it: block number -> bits, compressed, in base64."""
        state = {}
        for number, layer in self.layers.items():
            use, bits = layer.use, []
            for flags in use.flags_S.split(SLOTS_AT_ONCE):
                flags |= _read_by_any_rank(flags, use) * use.ever_bit
                bits.append(np.packbits((flags & use.ever_bit).bool().cpu().numpy()))
            state[str(number)] = base64.b64encode(zlib.compress(np.concatenate(bits).tobytes())).decode()
        return state

    def load(self, state: Any) -> bool:
        """Whether `state` tells of these layers' slots; else none count as read so far."""
        ever = {}
        for number, layer in self.layers.items():
            try:
                bits = np.frombuffer(zlib.decompress(base64.b64decode(state[str(number)])), dtype=np.uint8)
                ever[number] = bits
            except (KeyError, TypeError, ValueError, zlib.error):
                return False
            if len(bits) != -(-layer.memory.size // 8):
                return False
        for number, bits in ever.items():
            use = self.layers[number].use
            for place, flags in enumerate(use.flags_S.split(SLOTS_AT_ONCE)):
                part = bits[place * SLOTS_AT_ONCE // 8 :][: SLOTS_AT_ONCE // 8]
                read = torch.from_numpy(np.unpackbits(part, count=len(flags))).to(flags.device)
                flags &= 0xFF ^ use.ever_bit
                flags |= read * use.ever_bit
        return True


def bytes_held(n_slots: int, layers_of_tables: list[int], device: torch.device) -> int:
    """Bytes that this takes on a rank. `layers_of_tables`: for each table how many layers read it."""
    summed = 16 * (CHOSEN + SAMPLED) if is_sampled(n_slots, device) else 8 * n_slots  # a sum; which slot it is of
    return sum(-(-layers // LAYERS_PER_BYTE) * (n_slots + 1) + layers * summed for layers in layers_of_tables)


def _read_by_any_rank(flags: torch.Tensor, use: SlotUse) -> torch.Tensor:
    """1 where a slot was read since the last log line, 0 elsewhere, uint8."""
    read = (flags & use.read_bit).bool().to(torch.uint8)
    if dist.is_initialized():
        dist.all_reduce(read, op=dist.ReduceOp.MAX)
    return read


def _members(flags_S: torch.Tensor, bit: int, counts: list[int], wanted: np.ndarray) -> torch.Tensor:
    """Slots that have the bit: those at the places `wanted`, sorted, among them. `counts`: how many a part has."""
    found, before = [], 0
    for part, (flags, count) in enumerate(zip(flags_S.split(SLOTS_AT_ONCE), counts, strict=True)):
        places = wanted[(wanted >= before) & (wanted < before + count)] - before
        if len(places):
            of_part = (flags & bit).nonzero().flatten()
            found.append(of_part[torch.from_numpy(places).to(flags.device)] + part * SLOTS_AT_ONCE)
        before += count
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=flags_S.device)


def _divergence(weights_M: np.ndarray, n_exact: int, n_queries: float, n_read: int, n_slots: int) -> float:
    """log S + sum_s p_s log p_s, where p_s is the share of slot s in all weights.

    The terms of the first `n_exact` slots are exact. Of all others together are known the share P and the number R that
    were read; so with x = p R / P, whose mean over those is 1, their terms are P log(P / R) + P mean(x log x - x + 1).
    The last mean is that of the sample: what is averaged is never negative, and 0 where weights are even.
    """
    chosen, others = weights_M[:n_exact], weights_M[n_exact:]
    # The weights of a query are 1 together, but for rounding, which would be left as the share of no slot.
    total = n_queries if len(others) else chosen.sum()
    shares = chosen[chosen != 0] / total
    result = math.log(n_slots) + float(np.sum(shares * np.log(shares)))
    rest, n_others = 1.0 - float(shares.sum()), n_read - len(shares)
    if len(others) and rest > 0 and n_others > 0:
        x = others[others != 0] / total * n_others / rest
        unevenness = float(np.mean(x * np.log(x) - x + 1)) if len(x) else 0.0
        result += rest * (math.log(rest / n_others) + unevenness)
    return result if result != result else max(result, 0.0)  # rounding makes it less


def _sum_over_ranks(tensor: torch.Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)


def _rows_held(weight: nn.Parameter, slots: torch.Tensor) -> torch.Tensor:
    """A copy of what this rank holds of a table's rows `slots`: some of their columns, or some of the rows."""
    held = local_part(weight)
    slots = slots.to(held.device)
    if isinstance(weight, DTensor):
        first = local_offsets(weight)[0]
        slots = slots[(slots >= first) & (slots < first + len(held))] - first
    return held.index_select(0, slots)


def _n_holders(weight: nn.Parameter) -> int:
    """The number of ranks that hold the same part of a table."""
    n_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(weight, DTensor):
        return n_ranks
    mesh = weight.device_mesh
    return n_ranks // math.prod(mesh.size(dim) for dim, p in enumerate(weight.placements) if not p.is_replicate())

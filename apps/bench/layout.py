"""What a rank of a layout holds and sends in a training step, measured, beside what arithmetic says (apps.main.plan).

    torchrun --nproc-per-node 4 -m apps.bench.layout config=apps/main/configs/debug.yaml distributed.tp_size=2

Bytes on the first rank, which holds most where something does not divide evenly: parameters, gradients and AdamW's
moments after a step; at the end of a forward pass all that is there beside them, which is kept for the backward pass;
the most of it in a step; and what is sent over ranks, by collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apps.bench.report import report
from apps.main.footprint import Footprint, ModelParts, footprint
from apps.main.train import TrainArgs, build_model
from lingua.args import parse_args
from lingua.distributed import (
    DTYPES,
    World,
    find_world,
    local_part,
    mesh_sizes,
    process_group,
    validate_distributed_args,
)
from lingua.launch import run_main
from lingua.optim import build_optimizer, row_gradients
from lingua.parallelize import local_bytes, parallelize, validate_parallelism
from lingua.tokenizer import build_tokenizer

# Operators that send, as torch's own functions (c10d) and its compilable ones call them.
COLLECTIVES = {
    "all_gather_into_tensor": "all-gather",
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_reduce": "all-reduce",
    "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
}


@dataclass
class BenchArgs(TrainArgs):
    """A training config."""

    out: str | None = None


class Ledger(TorchDispatchMode):
    """Within its `with`: which memory operators' results are in, and what is sent.

    `peak`: the most bytes at once, but for what an operator takes for itself.
    `sent`: (collective, ranks) -> bytes of what the group gathers, reduces, scatters or exchanges.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self._known = {local_part(tensor).untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, StorageWeakRef] = {}
        self.peak = 0
        self.sent: dict[tuple[str, int], int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with what this rank holds
        result = operator(*args, **(kwargs or {}))
        collective = COLLECTIVES.get(operator._opname) if operator.namespace in ("c10d", "_c10d_functional") else None
        if collective is not None:
            self._count(operator._opname, collective, args)
        for tensor in tree_leaves(result):
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._storages[storage._cdata] = StorageWeakRef(storage)
        self.peak = max(self.peak, self.bytes_held())
        return result

    def _count(self, name: str, collective: str, args: tuple[Any, ...]) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        group = next(filter(None, map(_group_of, reversed(args))))
        # c10d's operators take the result as well, in front.
        whole = tensors[1] if name == "_reduce_scatter_base_" else tensors[0]
        payload = whole.nbytes * (group.size() if name == "all_gather_into_tensor" else 1)
        key = (collective, group.size())
        self.sent[key] = self.sent.get(key, 0) + payload

    def bytes_held(self) -> int:
        """Of the results that are still there."""
        held = 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            else:
                held += storage.nbytes()
        return held


def _group_of(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, str):
        return dist.distributed_c10d._resolve_process_group(argument) if argument != "sum" else None
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except RuntimeError:  # another object, such as the kind of reduction
            return None
    return None


@dataclass
class Measured:
    """Bytes on this rank: `kept` by a forward pass, `peak` beside parameters and moments, `sent` as in `Ledger`."""

    parameters: int
    gradients: int
    moments: int
    kept: int
    peak: int
    sent: dict[tuple[str, int], int]


def measure(args: TrainArgs, world: World) -> tuple[Measured, Footprint]:
    """A step of `args` on these ranks, and what arithmetic says of it."""
    model = build_model(args)
    expected = footprint(args, world, ModelParts(model, args.data.seq_len))
    reducer = parallelize(model, args.distributed, world)
    model.to_empty(device=world.device)
    model.init_weights()
    optimizer, _ = build_optimizer(model, args.optim, args.steps)
    dtype = DTYPES[args.distributed.model_dtype]
    kept = 0
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        for number in range(args.grad_acc_steps):
            size = (args.data.batch_size, args.data.seq_len + 1)
            tokens = torch.randint(args.model.vocab_size, size, device=world.device)
            reducer.begin(last=number == args.grad_acc_steps - 1)
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                loss = model(tokens[:, :-1], tokens[:, 1:])
                kept = kept or ledger.bytes_held()
            loss.backward()
        reducer.finish()
    parameters: list[nn.Parameter] = list(model.parameters())
    gradients = local_bytes(parameter.grad for parameter in parameters if parameter.grad is not None)
    gradients += sum(part.nbytes for by_rows in row_gradients(model).values() for part in by_rows.rows())
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    return Measured(local_bytes(parameters), gradients, local_bytes(moments), kept, ledger.peak, ledger.sent), expected


def compare(measured: Measured, expected: Footprint) -> list[dict[str, object]]:
    """A line for each kind of bytes."""
    pairs = {
        "parameters": (measured.parameters, expected.parameters),
        "gradients": (measured.gradients, expected.gradients),
        "moments": (measured.moments, expected.moments),
        "kept for backward": (measured.kept, expected.activations + expected.copies),
        "at once in a step": (measured.peak, expected.peak),
    }
    sent: dict[tuple[str, int], float] = {}
    for exchange in expected.exchanges:
        key = (exchange.collective, exchange.ranks)
        sent[key] = sent.get(key, 0) + exchange.payload
    for collective, ranks in sorted({*sent, *measured.sent}):
        key = (collective, ranks)
        pairs[f"{collective} over {ranks}"] = (measured.sent.get(key, 0), sent.get(key, 0))
    return [
        {
            "on a rank": name,
            "MiB": found / 2**20,
            "arithmetic": said / 2**20,
            "ratio": found / said if said else float("inf"),
        }
        for name, (found, said) in pairs.items()
    ]


def main() -> None:
    args = parse_args(BenchArgs)
    args.model.max_seqlen = args.data.seq_len
    if args.model.vocab_size == -1:
        args.model.vocab_size = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path).n_words
    world = find_world()
    validate_distributed_args(args.distributed, world)
    validate_parallelism(args.distributed, args.model, args.model.vocab_size, args.data.seq_len, world)
    with process_group(world, args.distributed.timeout):
        measured, expected = measure(args, world)
    if world.rank == 0:
        replicate, shard, tp_size = mesh_sizes(args.distributed, world)
        title = f"dp_replicate {replicate} x dp_shard {shard} x tp {tp_size}"
        title = f"{title}, memory_parallel {args.distributed.memory_parallel_size}, {args.name}"
        report(title, compare(measured, expected), args.out)


if __name__ == "__main__":
    run_main(main)

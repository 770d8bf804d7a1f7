"""What a rank of a layout holds, measured after a training step, beside what arithmetic says.

    torchrun --nproc-per-node 4 -m apps.bench.layout config=apps/main/configs/debug.yaml distributed.tp_size=2

Bytes of parameters, gradients and AdamW's moments on the first rank, which holds most where something does not divide
evenly. `arithmetic` divides each kind of parameter by the number of ranks that it is split over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apps.bench.report import report
from apps.main.train import TrainArgs, build_model
from apps.main.transformer import LMTransformer
from lingua.args import parse_args
from lingua.distributed import World, find_world, mesh_sizes, process_group, run_main, validate_distributed_args
from lingua.optim import build_optimizer, split_parameters
from lingua.parallelize import local_bytes, parallelize, validate_parallelism
from lingua.tokenizer import build_tokenizer
from lingua.transformer import RMSNorm


@dataclass
class BenchArgs(TrainArgs):
    """A training config."""

    out: str | None = None


def expected_bytes(model: LMTransformer, args: TrainArgs, world: World) -> float:
    """Of the parameters of one rank, from the whole model's."""
    _, shard, tp_size = mesh_sizes(args.distributed, world)
    kinds = split_parameters(model)
    norms = {module.weight for module in model.modules() if isinstance(module, RMSNorm)}
    table_ranks = args.distributed.memory_parallel_size * tp_size
    if table_ranks == 1:
        table_ranks = shard  # FSDP splits them by rows then
    split_over = {parameter: shard * (1 if parameter in norms else tp_size) for parameter in kinds["dense"]}
    split_over |= dict.fromkeys(kinds["memory"], shard) | dict.fromkeys(kinds["values"], table_ranks)
    return sum(parameter.numel() * parameter.element_size() / ranks for parameter, ranks in split_over.items())


def measure(args: TrainArgs, world: World) -> list[dict[str, object]]:
    model = build_model(args)
    expected = expected_bytes(model, args, world)
    reducer = parallelize(model, args.distributed, world)
    model.to_empty(device=world.device)
    model.init_weights()
    optimizer, _ = build_optimizer(model, args.optim, args.steps)
    tokens = torch.randint(args.model.vocab_size, (args.data.batch_size, args.data.seq_len + 1), device=world.device)
    reducer.begin(last=True)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    reducer.finish()
    optimizer.step()
    parameters: list[nn.Parameter] = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = {
        "parameters": (parameters, 1),
        "gradients": ([parameter.grad for parameter in parameters], 1),
        "optimizer": (moments, 2),
    }
    return [
        {
            "held by a rank": name,
            "MiB": local_bytes(tensors) / 2**20,
            "arithmetic": times * expected / 2**20,
            "ratio": local_bytes(tensors) / (times * expected),
        }
        for name, (tensors, times) in found.items()
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
        rows = measure(args, world)
    if world.rank == 0:
        replicate, shard, tp_size = mesh_sizes(args.distributed, world)
        title = f"dp_replicate {replicate} x dp_shard {shard} x tp {tp_size}"
        report(f"{title}, memory_parallel {args.distributed.memory_parallel_size}, {args.name}", rows, args.out)


if __name__ == "__main__":
    run_main(main)

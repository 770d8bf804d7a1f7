"""Training steps of a config's memory model beside the same model with feed-forwards in place of its memories, and, on
one rank, beside the one whose memories search and look up by PyTorch's own operators (which need the tables there).

    python -m apps.bench.train_step config=apps/main/configs/debug.yaml [rounds=10] [out=result.json]
    torchrun --nproc-per-node 8 -m apps.bench.train_step config=... distributed.memory_parallel_size=8

All train on random tokens, in turns, so that whatever else the machine does falls on them alike, laid out over ranks
and compiled as the config says. Figures are those of one rank; `in a step` is what a GPU holds at most beside
parameters and optimizer state.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from apps.bench.memory_layer import use_plain_operators
from apps.bench.report import report
from apps.main.train import TrainArgs, build_model
from apps.main.transformer import count_flops_per_token, count_parameters
from lingua.args import parse_args
from lingua.distributed import World, find_world, process_group, validate_distributed_args
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.optim import build_optimizer
from lingua.parallelize import parallelize, validate_parallelism
from lingua.tokenizer import build_tokenizer
from lingua.training_step import TrainingStep


@dataclass
class BenchArgs(TrainArgs):
    """A training config; `rounds` of `steps_per_round` steps are measured, one more is thrown away."""

    rounds: int = 10
    steps_per_round: int = 3
    out: str | None = None


def build_step(args: TrainArgs, world: World, plain: bool = False) -> tuple[dict[str, int], Callable[[], None]]:
    """What counts of a model, and a function that trains it one step; by PyTorch's own operators, if `plain`."""
    device = world.device
    model = build_model(args)
    if plain:
        for memory in model.memories().values():
            use_plain_operators(memory)
    dense, memory = count_parameters(model)
    counts = {"dense": dense, "memory": memory, "flops": count_flops_per_token(model, args.data.seq_len)}
    reducer = parallelize(model, args.distributed, world)
    model.to_empty(device=device)
    model.init_weights()
    optimizer, _ = build_optimizer(model, args.optim, args.steps)
    tokens = torch.randint(args.model.vocab_size, (args.data.batch_size, args.data.seq_len, 2), device=device)
    training_step = TrainingStep(model, reducer, optimizer, args.distributed.model_dtype, device)

    def step() -> None:
        training_step.backward([tokens], 1)
        training_step.clip(args.optim.clip)
        training_step.update()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return counts, step


def measure(args: BenchArgs, world: World) -> list[dict[str, object]]:
    dense_args = copy.deepcopy(args)
    dense_args.model.productkey_args.is_enabled = False
    contestants = {"memory": build_step(args, world), "dense": build_step(dense_args, world)}
    if world.size == 1 and args.distributed.values_device is None:
        plain_args = copy.deepcopy(args)
        plain_args.optim.value_update, plain_args.optim.value_rounding = "dense", "nearest"
        contestants["memory, plain operators"] = build_step(plain_args, world, plain=True)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    held: dict[str, int] = {}
    on_gpu = world.device.type == "cuda"
    for _ in range(args.rounds + 1):
        for name, (_, step) in contestants.items():
            before = torch.cuda.memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(args.steps_per_round):
                step()
            times[name].append((time.perf_counter() - start) / args.steps_per_round)
            held[name] = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    tokens = args.data.batch_size * args.data.seq_len
    seconds = {name: statistics.median(laps[1:]) for name, laps in times.items()}
    rows = []
    for name, (counts, _) in contestants.items():
        rows.append(
            {
                "model": name,
                "dense params": counts["dense"],
                "memory params": counts["memory"],
                "s/step": seconds[name],
                "tokens/s": tokens / seconds[name],
                "GFLOP/s": counts["flops"] * tokens / seconds[name] / 1e9,
                "in a step": f"{held[name] / 2**30:.2f} GiB" if on_gpu else "-",
                "of dense": seconds["dense"] / seconds[name],
            }
        )
    return rows


def main() -> None:
    args = parse_args(BenchArgs)
    if args.rounds < 1 or args.steps_per_round < 1:
        raise UserError("rounds, steps_per_round: must be 1 or more")
    if not args.model.productkey_args.is_enabled:
        raise UserError("model.productkey_args.is_enabled: false, so there is nothing to compare; name a memory config")
    args.model.max_seqlen = args.data.seq_len
    if args.model.vocab_size == -1:
        args.model.vocab_size = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path).n_words
    world = find_world()
    validate_distributed_args(args.distributed, world)
    validate_parallelism(args.distributed, args.model, args.model.vocab_size, args.data.seq_len, world)
    with process_group(world, args.distributed.timeout):
        rows = measure(args, world)
    if world.rank == 0:
        report(f"training step, {args.name}, {args.data.batch_size} x {args.data.seq_len} tokens", rows, args.out)


if __name__ == "__main__":
    run_main(main)

"""Whether a config fits a number of GPUs, before there are any: what each holds and sends, and what else would fit.

    python -m apps.main.plan config=apps/main/configs/pk_7b.yaml world_size=256 gpu_memory=80 [key=value ...]

By arithmetic (apps/main/footprint.py): nothing is allocated, no data and no GPU are needed. The vocabulary is
`model.vocab_size`, else that of the tokenizer if its file is here, else the size that the kind of tokenizer usually
has, which is told.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from apps.main.config import PlanArgs
from lingua.launch import check_command_line

if __name__ == "__main__":
    check_command_line(PlanArgs)

import torch

from apps.bench.report import table
from apps.main.footprint import Footprint, ModelParts, footprint
from apps.main.train import build_model, validate_model_and_layout
from lingua.args import parse_args
from lingua.distributed import DistributedArgs, World, mesh_sizes, validate_distributed_args
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.optim import validate_optim_args
from lingua.tokenizer import build_tokenizer

# Of a GPU's memory, what the tensors of a run may take: CUDA, NCCL and gaps between tensors need the rest.
USABLE = 0.9

# Words of a tokenizer whose file is not here: Llama 2's and Llama 3's.
USUAL_VOCABULARY = {"sp": 32_000, "tiktoken": 128_256}

# Layouts that are shown.
SHOWN = 8

# Ranks of a node; what goes beyond takes a slower network, by so much (NVLink and InfiniBand of H100 nodes).
NODE, SLOWER = 8, 9

CHECKPOINTING = ("", "selective_activation_checkpointing", "checkpoint_each_layer")

GIB, GB = 2**30, 1e9


def validate_plan_args(args: PlanArgs) -> tuple[World, list[str]]:
    """Checks the config as training does, but for what data, checkpoints and evaluation are; fills in what follows.

    Returns the first of the ranks, and what the user should know. Raises UserError, one line that names the key.
    """
    if args.world_size < 1:
        raise UserError(f"world_size: {args.world_size} is too small, it must be 1 or more")
    if not 0 < args.gpu_memory < math.inf:
        raise UserError(f"gpu_memory: {args.gpu_memory} must be a number of GiB above 0")
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"out: no folder '{Path(args.out).parent}' for the file")
    for key, value in (
        ("grad_acc_steps", args.grad_acc_steps),
        ("data.batch_size", args.data.batch_size),
        ("data.seq_len", args.data.seq_len),
    ):
        if value < 1:
            raise UserError(f"{key}: {value} is too small, it must be 1 or more")
    world = World(size=args.world_size, device=torch.device("cuda"))
    notes = []
    validate_distributed_args(args.distributed, world)
    validate_optim_args(args.optim)
    if args.distributed.values_device is not None:
        raise UserError(
            f"distributed.values_device: {args.distributed.values_device} is not in this arithmetic, which has "
            "tables on GPUs; set null"
        )
    if args.model.vocab_size == -1:
        args.model.vocab_size, note = find_vocabulary(args)
        notes += note
    if args.distributed.float8_recipe is not None:
        args.distributed.float8_recipe = None  # it asks this machine for a GPU that has it
        notes.append("float8 computes in less time, and holds what is computed without it")
    if args.distributed.compile:
        notes.append("compiled blocks keep fewer activations than these, which are those of blocks that are not")
    if args.optim.value_update == "sparse":
        notes.append("sparse updates: gradients and what is sent of them follow the rows read, these are the most")
    validate_model_and_layout(args, world)
    return world, notes


def find_vocabulary(args: PlanArgs) -> tuple[int, list[str]]:
    """The number of words, and a note where it is a guess."""
    kind, file = args.data.tokenizer.name, args.data.tokenizer.path
    if kind in USUAL_VOCABULARY and not (file and Path(file).exists()):
        usual = USUAL_VOCABULARY[kind]
        missing = f"'{file}' is not here" if file else "not set"
        return usual, [f"data.tokenizer.path: {missing}; {usual:,} words are taken, set model.vocab_size for others"]
    return build_tokenizer(kind, file).n_words, []


# --- layouts -------------------------------------------------------------------------------------------------------


def other_layouts(args: PlanArgs, world: World, parts: ModelParts) -> list[tuple[DistributedArgs, Footprint]]:
    """All that training would take, of sizes that are powers of 2, or all ranks."""
    sizes = sorted({size for size in (*(2**i for i in range(12)), world.size) if world.size % size == 0})
    within_a_node = [size for size in sizes if size <= 8]
    groups = sizes if parts.memories else [1]
    splits = [(tp, 1) for tp in within_a_node] + [(1, group) for group in groups if group > 1]
    found = []
    for tp_size, group in splits:
        shards = [("no_shard", 1)]
        # full_shard with a dp_shard of 1 is over all ranks.
        shards += [("full_shard", size) for size in sizes if size * tp_size < world.size and size in (1, 8, 16, 32, 64)]
        for fsdp_type, dp_shard in shards:
            if fsdp_type == "full_shard" and world.size == tp_size:
                continue
            for checkpointing in CHECKPOINTING:
                layout = dataclasses.replace(
                    args.distributed,
                    tp_size=tp_size,
                    memory_parallel_size=group,
                    fsdp_type=fsdp_type,
                    dp_shard=dp_shard,
                    compile=args.distributed.compile and tp_size == 1,
                    **{name: name == checkpointing for name in CHECKPOINTING if name},
                )
                changed = dataclasses.replace(args, distributed=layout)
                try:
                    validate_distributed_args(layout, world)
                    validate_model_and_layout(changed, world)
                except ValueError:
                    continue
                found.append((layout, footprint(changed, world, parts)))
    return found


def best_first(layout: DistributedArgs, of_layout: Footprint) -> tuple[Any, ...]:
    """What costs time comes last: computing again, then what is sent for a token, above all between nodes."""
    again = layout.checkpoint_each_layer * 2 + layout.selective_activation_checkpointing
    within, between = sent_by_a_rank(of_layout)
    return again, (within + SLOWER * between) / of_layout.tokens_per_step, of_layout.total


def sent_by_a_rank(of_layout: Footprint) -> tuple[float, float]:
    """Bytes in a step, within nodes and between them."""
    between = sum(exchange.sent for exchange in of_layout.exchanges if exchange.span > NODE)
    return sum(exchange.sent for exchange in of_layout.exchanges) - between, between


def describe(layout: DistributedArgs) -> str:
    """Keys of `distributed` that make it, as on the command line."""
    keys = [f"{name}={getattr(layout, name)}" for name in ("fsdp_type", "dp_shard", "tp_size", "memory_parallel_size")]
    keys += [f"{name}=true" for name in CHECKPOINTING if name and getattr(layout, name)]
    defaults = ("fsdp_type=no_shard", "dp_shard=1", "tp_size=1", "memory_parallel_size=1")
    return " ".join(key for key in keys if key not in defaults) or "(nothing)"


# --- what is shown -------------------------------------------------------------------------------------------------


def verdict(of_layout: Footprint, gpu_memory: float) -> str:
    return "fits" if of_layout.total <= USABLE * gpu_memory * GIB else "does not fit"


def memory_rows(args: PlanArgs, found: Footprint) -> list[dict[str, Any]]:
    tokens = f"{args.data.batch_size} x {args.data.seq_len:,} tokens"
    kinds = {
        "parameters": found.parameters,
        "optimizer state": found.moments,
        "gradients": found.gradients,
        "weights gathered or cast": found.copies,
        f"activations, {tokens}": found.activations,
        "the last three and logits, at once": found.peak,
        "diagnostics of the memories": found.diagnostics,
        "all of it": found.total,
    }
    return [
        {"a rank holds": name, "GiB": size / GIB, f"% of {args.gpu_memory:g}": 100 * size / GIB / args.gpu_memory}
        for name, size in kinds.items()
    ]


def exchange_rows(found: Footprint) -> list[dict[str, Any]]:
    return [
        {
            "sent in a step": exchange.collective,
            "over": exchange.dimension,
            "ranks": exchange.ranks,
            "GB of the group's": exchange.payload / GB,
            "GB sent by a rank": exchange.sent / GB,
        }
        for exchange in sorted(found.exchanges, key=lambda exchange: -exchange.sent)
    ]


def layout_rows(layouts: list[tuple[DistributedArgs, Footprint]]) -> list[dict[str, Any]]:
    rows = []
    for layout, of_layout in layouts:
        within, between = (sent / of_layout.tokens_per_step / 1e3 for sent in sent_by_a_rank(of_layout))
        row = {"distributed.*": describe(layout), "GiB": of_layout.total / GIB}
        rows.append({**row, f"kB a token, in nodes of {NODE}": within, "and between": between})
    return rows


def main() -> None:
    args = parse_args(PlanArgs)
    world, notes = validate_plan_args(args)
    parts = ModelParts(build_model(args), args.data.seq_len)
    found = footprint(args, world, parts)
    layouts = other_layouts(args, world, parts)
    fitting = [pair for pair in layouts if verdict(pair[1], args.gpu_memory) == "fits"]
    if fitting:
        chosen = sorted(fitting, key=lambda pair: best_first(*pair))[:SHOWN]
        heading = (
            f"{len(fitting)} of {len(layouts)} layouts fit; first those that compute nothing again and send little:"
        )
    else:
        chosen = sorted(layouts, key=lambda pair: pair[1].total)[:SHOWN]
        heading = f"none of {len(layouts)} layouts fits; the smallest (a smaller data.batch_size or more ranks help):"
    replicate, shard, tp_size = mesh_sizes(args.distributed, world)
    title = f"{args.name} on {world.size} ranks: dp_replicate {replicate} x dp_shard {shard} x tp {tp_size}"
    title += f", memory_parallel {args.distributed.memory_parallel_size}"
    rank_tokens = found.tokens_per_step
    lines = [
        title,
        f"{found.dense:,} parameters, {found.memory:,} in value tables, {args.model.vocab_size:,} words",
        f"{found.flops_per_token:,} FLOPs a token, {found.flops_per_token * rank_tokens:.3g} a rank in a step; "
        f"{rank_tokens * world.size:,.0f} tokens a step on all",
        *(f"note: {note}" for note in notes),
        "",
        table(memory_rows(args, found)),
        f"{verdict(found, args.gpu_memory)}: {found.total / GIB:,.1f} of {args.gpu_memory:g} GiB, of which "
        f"{USABLE:.0%} are for tensors",
        "",
        *([table(exchange_rows(found)), ""] if found.exchanges else []),
        heading,
        table(layout_rows(chosen)),
    ]
    print("\n".join(lines))  # noqa: T201
    if args.out is not None:
        figures = {
            "title": title,
            "fits": verdict(found, args.gpu_memory) == "fits",
            "notes": notes,
            "rows": [dataclasses.asdict(found) | {"total": found.total}],
            "layouts": layout_rows(chosen),
            "layouts_that_fit": len(fitting),
        }
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)

"""Whether a run can fit this machine's memory: arithmetic on the config, before anything is built.

A lower bound of what a rank holds, so what is refused here could not have run; what is let through can still be too
much, which is told where it happens (`oom_as_user_error`). It is of a step: a checkpoint is read in parts into
parameters and moments (lingua/checkpoint.py), which takes less.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from lingua.data import QUEUED_BATCHES
from lingua.distributed import DTYPES, World, mesh_sizes
from lingua.errors import UserError
from lingua.loss import tokens_of_chunk
from lingua.memories import chosen_memories
from lingua.memory_layer import Part
from lingua.optim import OPTIMIZERS
from lingua.transformer import head_sizes, hidden_size

if TYPE_CHECKING:
    from apps.main.train import TrainArgs
    from lingua.config import LMTransformerArgs

# Bytes of Python's objects for a block: modules, parameters, the optimizer's state.
OBJECTS_PER_BLOCK = 40_000

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Need(NamedTuple):
    """Bytes that a rank needs for `what`, which follow from `keys` of the config."""

    what: str
    keys: tuple[str, ...]
    bytes: float


def count_feed_forwards(model: LMTransformerArgs) -> int:
    """Blocks whose feed-forward is not replaced by a memory."""
    return model.n_layers - sum(len(chosen.blocks) for chosen in chosen_memories(model) if not chosen.layer.is_beside)


def count_parameters_by_part(args: TrainArgs) -> tuple[list[Part], list[Part]]:
    """All of a model's parameters but the value tables, and the value tables of each kind of memory."""
    model = args.model
    head_dim, n_heads, n_kv_heads = head_sizes(model)
    hidden = hidden_size(model.dim, model.multiple_of, model.ffn_dim_multiplier)
    attention = 2 * model.dim * head_dim * (n_heads + n_kv_heads)
    memories, tables = [], []
    for chosen in chosen_memories(model):
        memories += [
            part._replace(count=len(chosen.blocks) * part.count)
            for part in chosen.layer.parts_of(chosen.args, model.dim)
        ]
        own = chosen.layer.tables_of(chosen.args, model.dim)
        n_tables = own.number * (1 if chosen.layer.is_shared(chosen.args) else len(chosen.blocks))
        tables.append(Part("value tables", own.keys, n_tables * own.rows * own.columns))
    dense = [
        Part(
            "embedding and output",
            ("model.vocab_size", "model.dim"),
            model.vocab_size * model.dim * (1 if model.weight_tying else 2),
        ),
        Part(
            "attention",
            ("model.n_layers", "model.dim", "model.head_dim", "model.n_heads", "model.n_kv_heads"),
            model.n_layers * (attention + 2 * model.dim) + model.dim,
        ),
        Part(
            "feed-forwards",
            ("model.n_layers", "model.dim", "model.multiple_of", "model.ffn_dim_multiplier"),
            count_feed_forwards(model) * 3 * model.dim * hidden,
        ),
    ]
    return [*dense, *memories], tables


def dense_needs(args: TrainArgs, world: World) -> list[Need]:
    """All parameters but the value tables, their gradients and the least that the optimizer keeps of them."""
    _, shard, tp_size = mesh_sizes(args.distributed, world)
    dense, _ = count_parameters_by_part(args)
    ranks = shard * tp_size
    rule = OPTIMIZERS[args.optim.name]
    copies = 2 + (2 if rule is None else min(rule.moments, 2))
    return [
        Need(f"{part.what}, with gradients and moments", part.keys, 4 * copies * part.count / ranks) for part in dense
    ]


def table_needs(args: TrainArgs, world: World) -> list[Need]:
    """The value tables, and their gradients and moments."""
    _, shard, tp_size = mesh_sizes(args.distributed, world)
    _, tables = count_parameters_by_part(args)
    table_ranks = args.distributed.memory_parallel_size * tp_size
    copies = 3 if args.optim.value_update == "sparse" else 4
    size = 2 if args.distributed.model_dtype == "bf16" else 4
    ranks = table_ranks if table_ranks > 1 else shard
    return [
        Need(
            f"{table.what}, with {'' if copies == 3 else 'gradients and '}moments",
            table.keys,
            copies * size * table.count / ranks,
        )
        for table in tables
    ]


def activation_needs(args: TrainArgs, world: World) -> Iterator[Need]:
    """What the backward pass waits for: the least of it, whatever is compiled or computed again."""
    model, distributed = args.model, args.distributed
    head_dim, n_heads, n_kv_heads = head_sizes(model)
    batch = ("data.batch_size", "data.seq_len")
    n_tokens = args.data.batch_size * args.data.seq_len
    size = DTYPES[distributed.model_dtype].itemsize
    n_words = model.vocab_size // distributed.tp_size
    logits = tokens_of_chunk(n_tokens, n_words, world.device) * n_words * size
    yield Need("logits", (*batch, "model.vocab_size"), logits)
    n_tokens /= distributed.tp_size
    yield Need("blocks' inputs", (*batch, "model.dim", "model.n_layers"), n_tokens * model.dim * size * model.n_layers)
    # At least one block's whole, where the others' are computed again.
    recomputed = distributed.checkpoint_each_layer or distributed.selective_activation_checkpointing
    kept = (lambda n_blocks: min(n_blocks, 1)) if recomputed else (lambda n_blocks: n_blocks)
    attention = head_dim * (n_heads + 2 * n_kv_heads)
    keys = (*batch, "model.n_layers", "model.head_dim", "model.n_heads", "model.n_kv_heads")
    yield Need("attention's activations", keys, n_tokens * attention * size * kept(model.n_layers))
    hidden = 2 * hidden_size(model.dim, model.multiple_of, model.ffn_dim_multiplier)
    keys = (*batch, "model.n_layers", "model.dim", "model.multiple_of", "model.ffn_dim_multiplier")
    yield Need("feed-forwards' activations", keys, n_tokens * hidden * size * kept(count_feed_forwards(model)))
    for memory in chosen_memories(model):
        slots_and_weights = n_tokens * memory.layer.reads_of(memory.args) * (8 + 4) * kept(len(memory.blocks))
        yield Need("slots and weights", (*batch, *memory.layer.read_keys), slots_and_weights)
    if model.sliding_window is not None and model.sliding_window < args.data.seq_len:
        yield Need("the mask", ("data.seq_len", "model.sliding_window"), 8 * args.data.seq_len**2)
    yield Need("rotations", ("data.seq_len", "model.head_dim"), 4 * args.data.seq_len * head_dim)


def loader_needs(args: TrainArgs) -> Iterator[Need]:
    """In the CPU's memory, whatever computes."""
    data = args.data
    rows = data.prefetch_size * data.batch_size
    keys = ("data.prefetch_size", "data.batch_size", "data.seq_len", "data.n_views")
    yield Need("the shuffle buffer", keys, 4 * rows * (data.seq_len + data.n_views - 1))
    steps_ahead = min(args.distributed.check_every or 1, args.steps)
    waiting = args.grad_acc_steps * steps_ahead + (QUEUED_BATCHES if data.load_async else 0)
    what, keys = "the batches of a step", ("grad_acc_steps", "data.batch_size", "data.seq_len", "data.n_views")
    if steps_ahead > 1:
        what, keys = "the batches up to the next check", ("distributed.check_every", *keys)
    yield Need(what, keys, 8 * waiting * data.batch_size * data.seq_len * data.n_views)
    yield Need("the blocks' objects", ("model.n_layers",), OBJECTS_PER_BLOCK * args.model.n_layers)


def cpu_memory() -> int:
    """Bytes that this process may have: its share of the machine's, or of what a container or `ulimit` leaves it."""
    limits = [psutil.virtual_memory().total]
    for file in CGROUP_LIMITS:
        if Path(file).is_file() and (text := Path(file).read_text().strip()).isdecimal():
            limits.append(int(text))
    share = min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return share if soft == resource.RLIM_INFINITY else min(share, soft - psutil.Process().memory_info().vms)


def check_memory(args: TrainArgs, world: World) -> None:
    """Raises UserError, one line that names the largest need and the keys that it follows from, for a run that cannot
    fit. Of validated `args`; takes no time, whatever the sizes.
    """
    on_device, on_cpu = [*dense_needs(args, world), *activation_needs(args, world)], list(loader_needs(args))
    (on_cpu if args.distributed.values_device == "cpu" else on_device).extend(table_needs(args, world))
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        _check(args, on_device, total, f"{torch.cuda.get_device_name(world.device)} has")
    else:
        on_cpu += on_device
    _check(args, on_cpu, cpu_memory(), "this process can have")


def _check(args: TrainArgs, needs: list[Need], limit: int, who_has: str) -> None:
    total = sum(need.bytes for need in needs)
    if total <= limit:
        return
    largest = max(needs, key=lambda need: need.bytes)
    found = ", ".join(f"{key}={_value(args, key)}" for key in largest.keys)
    raise UserError(
        f"{found}: {largest.what} take {_gib(largest.bytes)}; a rank needs {_gib(total)} at the least, and {who_has} "
        f"{_gib(limit)}; lower some of these keys, or split the model over more ranks (distributed.*)"
    )


def _value(args: TrainArgs, key: str) -> object:
    value: object = args
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _gib(n_bytes: float) -> str:
    gib = n_bytes / 2**30
    return f"{gib:,.1f} GiB" if gib < 1e6 else f"{gib:.1e} GiB"

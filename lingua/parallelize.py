"""Model -> parallel model. The model itself is plain PyTorch; all that concerns ranks is put on it here, from outside.

    tensor parallel     linears split over `tp`, the sequence between them too (Korthikanti et al., 2022)
    memory parallel     columns of the value tables split over `memory_parallel`, or over `tp`
    checkpointing       a block's activations computed again in the backward pass, all or the cheap ones
    float8, compile     of each block
    FSDP2               the rest split over `dp_shard`, repeated over `dp_replicate`

Ranks in order: those of a tensor-parallel group are neighbours, then those of a shard group. A memory-parallel group is
made of neighbours as well, which all hold different data. Value tables are averaged by `GradientReducer` and not by
FSDP, except under full_shard without memory parallelism, where FSDP splits them by rows like everything else.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lingua.distributed import DTYPES, DistributedArgs, World, local_part, mesh_sizes, set_group_timeout
from lingua.errors import UserError
from lingua.memories import chosen_memories
from lingua.product_key.colwise_embeddingbag import ColwiseEmbeddingBag
from lingua.product_key.row_gradients import RowGradients
from lingua.transformer import BaseTransformer, BaseTransformerArgs, FeedForward, head_sizes, hidden_size

# Elements of a half-precision table's gradient that are summed in fp32 at once.
REDUCED_AT_ONCE = 2**26

# --- what cannot work ----------------------------------------------------------------------------------------------


def validate_parallelism(
    args: DistributedArgs, model: BaseTransformerArgs, vocab_size: int, seq_len: int, world: World
) -> None:
    """Checks a layout that `validate_distributed_args` has passed against the model's sizes.

    Raises UserError, one line that names the key. Needs no process group.
    """
    tp_size, group = args.tp_size, args.memory_parallel_size
    if tp_size > 1:
        _, n_heads, n_kv_heads = head_sizes(model)
        hidden = hidden_size(model.dim, model.multiple_of, model.ffn_dim_multiplier)
        for name, size in (
            ("model.n_heads", n_heads),
            ("model.n_kv_heads", n_kv_heads),
            ("model.vocab_size", vocab_size),
            ("data.seq_len", seq_len),
            ("the feed-forward's hidden size", hidden),
        ):
            if size % tp_size:
                raise UserError(f"distributed.tp_size: {tp_size} does not divide {name}={size}")
    for chosen in chosen_memories(model):
        tables = chosen.layer.tables_of(chosen.args, model.dim)
        for name, size in (("memory_parallel_size", group), ("tp_size", tp_size)):
            if tables.columns % size:
                raise UserError(
                    f"distributed.{name}: {size} does not divide the {tables.columns} columns of the value table "
                    f"({', or '.join(tables.column_keys)}), which are split over that number of ranks"
                )
    if args.float8_recipe is not None:
        _refuse_float8(args, model, world)


def _refuse_float8(args: DistributedArgs, model: BaseTransformerArgs, world: World) -> None:
    key = "distributed.float8_recipe"
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) < (8, 9):
        found = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "a CPU"
        raise UserError(f"{key}: float8 needs a GPU of compute capability 8.9 or more (H100, L40, ...), found {found}")
    if args.tp_size > 1:
        raise UserError(f"{key}: not together with tp_size={args.tp_size}; set one of them back")
    try:
        re.compile(args.float8_filter)
    except re.error as error:
        raise UserError(
            f"distributed.float8_filter: '{args.float8_filter}' is no regular expression ({error})"
        ) from None
    hidden = hidden_size(model.dim, model.multiple_of, model.ffn_dim_multiplier)
    if model.dim % 16 or hidden % 16:
        raise UserError(f"{key}: sizes must be multiples of 16, found model.dim={model.dim}, hidden size {hidden}")
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(f"{key}: needs torchao ({error}); pip install torchao") from None


def splits_tables_by_rows(args: DistributedArgs, world: World) -> bool:
    """Whether FSDP splits the value tables, since neither tensor nor memory parallelism does."""
    _, shard, tp_size = mesh_sizes(args, world)
    return shard > 1 and tp_size == 1 and args.memory_parallel_size == 1


# --- the parts -----------------------------------------------------------------------------------------------------


def parallelize(model: BaseTransformer, args: DistributedArgs, world: World) -> GradientReducer:
    """Lays `model` out over the ranks of the process group, in place; it may be on the meta device.

    Parameters become DTensors where they are split; forward and backward are called as before. Whoever trains tells
    the returned reducer of each backward pass.
    """
    replicate, shard, tp_size = mesh_sizes(args, world)
    data_ranks = replicate * shard
    meshes = _build_meshes(args, world)
    if args.values_device == "cpu":
        model.keep_values_on_cpu(world.device)
    if args.float8_recipe is not None:
        _use_float8(model, args.float8_filter)
    if tp_size > 1:
        _split_tensors(model, meshes.tp)
    split_over = meshes.tp if tp_size > 1 else meshes.memory
    if split_over is not None:
        for memory in model.memories().values():
            for table in memory.own_tables:
                parallelize_module(table, split_over, ColwiseEmbeddingBag())
    by_rows = splits_tables_by_rows(args, world)
    for block in model.layers:
        # FSDP's gathering of a table in the midst of a block does not go with a choice of what to keep.
        gathers = by_rows and block.memory_layer is not None
        everything = args.checkpoint_each_layer or (args.selective_activation_checkpointing and gathers)
        # Which results to keep is the compiler's to know; a whole block is computed again around it, since torch 2.13
        # cannot compile that where parameters are DTensors.
        if args.selective_activation_checkpointing and not everything:
            _recompute(block, everything=False)
        if args.compile:
            block.forward = torch.compile(block.forward)
        if everything:
            _recompute(block, everything=True)
    if args.compile:
        torch._dynamo.config.cache_size_limit = args.compile_cache_size_limit
    if data_ranks > 1:
        _shard(model, meshes.data, args, by_rows)
    return GradientReducer(model, meshes, data_ranks, by_rows)


@dataclass
class Meshes:
    """The ranks, seen in several ways; None where there is one rank only, or (memory) where tables are not split.

    `data`: (dp_replicate, dp_shard), or (dp_shard,) where nothing is repeated. `every_data`: all data-parallel ranks in
    one dimension. `memory`: (memory_replicate, memory_parallel).
    """

    data: DeviceMesh | None = None
    every_data: DeviceMesh | None = None
    tp: DeviceMesh | None = None
    memory: DeviceMesh | None = None


def _build_meshes(args: DistributedArgs, world: World) -> Meshes:
    if world.size == 1:
        return Meshes()
    kind = world.device.type
    replicate, shard, tp_size = mesh_sizes(args, world)
    whole = init_device_mesh(kind, (replicate, shard, tp_size), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    flat = init_device_mesh(kind, (replicate * shard, tp_size), mesh_dim_names=("data", "tp"))
    sharded_only = replicate == 1 and shard > 1
    meshes = Meshes(
        data=whole["dp_shard"] if sharded_only else whole["dp_replicate", "dp_shard"],
        every_data=flat["data"],
        tp=whole["tp"],
    )
    group = args.memory_parallel_size
    if group > 1:
        names = ("memory_replicate", "memory_parallel")
        meshes.memory = init_device_mesh(kind, (world.size // group, group), mesh_dim_names=names)
    for mesh in filter(None, (whole, flat, meshes.memory)):
        set_group_timeout(mesh.get_all_groups(), args.timeout)
    return meshes


def _split_tensors(model: BaseTransformer, mesh: DeviceMesh) -> None:
    """Between the linears each rank has a part of the sequence; memories answer that part, each rank for itself."""
    parallelize_module(
        model,
        mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
        },
    )
    if isinstance(model.output, nn.Linear):
        output = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        parallelize_module(model.output, mesh, output)
    else:  # tied to the embedding, whose rows are split
        whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        parallelize_module(model.output, mesh, whole)
        logits = PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate())
        parallelize_module(model.output, mesh, logits)
    attention_input = PrepareModuleInput(
        input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
    )
    plan = {
        "attention_norm": SequenceParallel(),
        "attention": attention_input,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
    }
    dense = {
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in model.layers:
        of_block = plan | (dense if isinstance(block.feed_forward, FeedForward) else {})
        memory = block.memory_layer
        if memory is not None:
            others = (None,) if memory.takes_tokens else ()
            part = (Shard(1), *others)
            own_part = PrepareModuleInput(input_layouts=part, desired_input_layouts=part, use_local_output=True)
            of_block[block.memory_name] = own_part
            if memory.takes_tokens:
                memory.register_forward_pre_hook(functools.partial(_take_own_tokens, mesh))
        parallelize_module(block, mesh, of_block)


def _take_own_tokens(mesh: DeviceMesh, _memory: nn.Module, inputs: tuple) -> tuple:
    x, tokens = inputs
    return x, tokens.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


# Operators whose results are kept for the backward pass under selective checkpointing: matrix products, attention, the
# memory's search and lookup, exchanges between ranks. What is cheap (norms, rotations, activations) is computed again.
_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product",
    "lingua::",
    "_c10d_functional::",
    "_dtensor::",
)


def _keep_expensive(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    name = operator.name() if hasattr(operator, "name") else ""
    return CheckpointPolicy.MUST_SAVE if name.startswith(_KEPT) else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute(block: nn.Module, everything: bool) -> None:
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if not everything:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    forward = block.forward

    # No functools.partial: the compiler starts at a frame of ours, it passes over torch's own.
    def recomputed(*args: object) -> torch.Tensor:
        return checkpoint(forward, *args, **options)

    block.forward = recomputed


def _use_float8(model: nn.Module, pattern: str) -> None:
    """Linears whose names match: their three products in float8, scaled by rows (torchao)."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    wanted = re.compile(pattern)
    model.whole_logits = bool(wanted.search("output"))  # torchao's linears give nothing else
    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("rowwise"),
        module_filter_fn=lambda module, name: bool(wanted.search(name)) and _fits_float8(module),
    )


def _fits_float8(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear) or (module.in_features % 16 == 0 and module.out_features % 16 == 0)


def _shard(model: BaseTransformer, mesh: DeviceMesh, args: DistributedArgs, by_rows: bool) -> None:
    """FSDP2, a unit for each block. Repeated parameters (`no_shard`) are shards over one rank."""
    # Tensor-parallel modules return views; nothing here works on them in place, of which torch warns at each step.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    full = args.fsdp_type == "full_shard"
    dtype = None if args.model_dtype == "fp32" else DTYPES[args.model_dtype]
    tables = {table.weight for memory in model.memories().values() for table in memory.own_tables}
    options = {"mesh": mesh, "ignored_params": set() if by_rows else tables}
    # Inputs are not cast: autocast decides what is computed in what, as in a single process.
    computing = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        if by_rows and block.memory_layer is not None:
            for table in block.memory_layer.own_tables:
                fully_shard(table, **options, mp_policy=computing)
        fully_shard(block, **options, mp_policy=computing, reshard_after_forward=full)
    if isinstance(model.output, nn.Linear):  # not where tied: both ends of the model need the weight then
        fully_shard(model.tok_embeddings, **options, mp_policy=exact, reshard_after_forward=full)
        fully_shard(model.output, **options, mp_policy=computing, reshard_after_forward=False)
    fully_shard(model, **options, mp_policy=exact, reshard_after_forward=False)


def reshard(model: nn.Module) -> None:
    """Behind a forward pass without a backward one: makes parameters the shards again that they are between steps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# --- gradients -----------------------------------------------------------------------------------------------------


class GradientReducer:
    """Averages gradients over data-parallel ranks: what FSDP does not, and when it does.

    `begin(last)` before each backward pass of a step, `finish()` after the last one.
    """

    def __init__(self, model: BaseTransformer, meshes: Meshes, data_ranks: int, by_rows: bool):
        self.model = model
        self.scale = 1 / data_ranks
        memories = model.memories().values()
        self.tables = [] if by_rows else [table for memory in memories for table in memory.own_tables]
        self.table_group = None
        if meshes.memory is not None:
            self.table_group = meshes.memory["memory_replicate"].get_group()
        elif meshes.every_data is not None:
            self.table_group = meshes.every_data.get_group()
        # Each rank of a tensor-parallel group has seen a part of the sequence.
        self.tp_group = None
        self.seen_in_part: list[nn.Module] = []
        if meshes.tp is not None and meshes.tp.size() > 1:
            self.tp_group = meshes.tp.get_group()
            self.seen_in_part = list(memories)

    def begin(self, last: bool) -> None:
        """Replicas are averaged in the last backward pass only. Shards are summed in each, so gradients stay small."""
        for table in self.tables:
            if table.row_gradients is None:  # not row-sparse: dense updates
                table.note_rows(whole=True)
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)

    @torch.no_grad()
    def finish(self) -> None:
        for table in self.tables:
            if table.row_gradients.whole:
                table.row_gradients.make_whole()
            if self.table_group is None:
                continue
            if table.row_gradients.whole:
                _sum_in_fp32(local_part(table.weight.grad), self.table_group, self.scale)
            else:
                _sum_rows(table.row_gradients, self.table_group, self.scale)
        if self.tp_group is None:
            return
        for memory in self.seen_in_part:
            own = {table.weight for table in memory.own_tables}
            for parameter in memory.parameters():
                if parameter not in own:
                    dist.all_reduce(local_part(parameter.grad), group=self.tp_group)
        for parameter in self.model.parameters():  # without FSDP, which does the same
            grad = parameter.grad
            if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                parameter.grad = grad.redistribute(placements=parameter.placements)


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What this rank holds of them."""
    return sum(part.numel() * part.element_size() for part in map(local_part, tensors))


def _sum_in_fp32(grad: torch.Tensor, group: dist.ProcessGroup, scale: float) -> None:
    """Sums over the group and multiplies, rounding once where `grad` is of half precision."""
    alone = dist.get_world_size(group) == 1
    for part in grad.view(-1).split(REDUCED_AT_ONCE):
        total = part.float() if part.element_size() < 4 else part
        if not alone:
            dist.all_reduce(total, group=group)
        part.copy_(total.mul_(scale))


def _sum_rows(gradient: RowGradients, group: dist.ProcessGroup, scale: float) -> None:
    """Sums over the group and multiplies the rows that any of its ranks has read; all have all of these then."""
    slots, rows = gradient.rows()
    n_ranks = dist.get_world_size(group)
    if n_ranks > 1:
        every_slot = _gather_uneven(slots, n_ranks, group).unique()
        mine, rows = rows, rows.new_zeros(len(every_slot), rows.shape[1])
        rows[torch.searchsorted(every_slot, slots)] = mine
        dist.all_reduce(rows, group=group)
        slots = every_slot
    gradient.replace(slots, rows.mul_(scale))


def _gather_uneven(slots: torch.Tensor, n_ranks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' slots, one rank's after another's, of whom each has its own number."""
    counts = slots.new_empty(n_ranks)
    dist.all_gather_into_tensor(counts, slots.new_tensor([len(slots)]), group=group)
    counts = counts.tolist()
    padded = slots.new_zeros(max(counts))
    padded[: len(slots)] = slots
    every = slots.new_empty(n_ranks, len(padded))
    dist.all_gather_into_tensor(every.view(-1), padded, group=group)
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

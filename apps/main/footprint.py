"""What a rank of a layout holds and sends, by arithmetic: nothing is allocated, no other rank is needed.

`python -m apps.bench.layout` measures the same on ranks that there are, and tests compare the two. The figures are
those of the first rank, which holds most where something does not divide evenly.

Letters: N tokens of a batch on this rank, n those of its part of the sequence (tensor parallelism splits it), C dim,
W query width, G key-value width, F hidden size, V value dim (vocabulary at the model's end), R slots read for a token.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field, replace

from torch import nn

from apps.main.train import TrainArgs, build_model
from apps.main.transformer import LMTransformer, count_flops_per_token, count_parameters
from lingua.distributed import DTYPES, World, mesh_sizes
from lingua.loss import tokens_of_chunk
from lingua.memory_layer import FP32, Sizes
from lingua.memory_use import bytes_held
from lingua.optim import count_moments, split_parameters
from lingua.parallelize import REDUCED_AT_ONCE, splits_tables_by_rows
from lingua.transformer import FeedForward, TransformerBlock


@dataclass(frozen=True)
class Exchange:
    """One kind of collective over one dimension of the ranks.

    `payload`: bytes in a step of what a group gathers, reduces, scatters or exchanges; `span`: how many neighbouring
    ranks a group lies in; `at_most`: it depends on the data.
    """

    collective: str
    dimension: str
    ranks: int
    span: int
    payload: float
    at_most: bool = False

    @property
    def sent(self) -> float:
        """Bytes that this rank sends in a step, where the group is a ring."""
        return self.payload * (self.ranks - 1) / self.ranks * (2 if self.collective == "all-reduce" else 1)


@dataclass
class Footprint:
    """Bytes that a rank holds, by kind, and what it sends. FLOPs are the model's (speed/FLOPS), per token.

    `diagnostics`: of the memories' use (logging.memory_use). `peak`: the most that a step takes beside parameters,
    moments and diagnostics. Gradients come as activations go, so it is less than the sum of all kinds. Resuming takes
    less: parameters, moments, diagnostics, and nothing else that grows with the model.
    """

    dense: int
    memory: int
    parameters: int
    gradients: int
    moments: int
    copies: int
    activations: int
    diagnostics: int
    peak: int
    flops_per_token: int
    tokens_per_step: float
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.parameters + self.moments + self.diagnostics + self.peak


def footprint(args: TrainArgs, world: World, parts: ModelParts | None = None) -> Footprint:
    """Of validated `args` on `world.size` ranks. `parts`: of the model that `build_model` makes, where there is one.

    Where `world.device` is a GPU, what its fused kernels keep is counted; else what operators on a CPU do.
    """
    parts = parts if parts is not None else ModelParts(build_model(args), args.data.seq_len)
    return _Layout(args, world, parts).footprint()


class ModelParts:
    """What arithmetic needs of a model, whatever its layout. Blocks that are alike stand there once, with a number."""

    def __init__(self, model: LMTransformer, seq_len: int):
        self.model = model
        self.dense, self.memory = count_parameters(model)
        self.flops_per_token = count_flops_per_token(model, seq_len)
        self.memories = list(model.memories().values())
        self.tables = split_parameters(model)["values"]
        # Of each table the memories that read it.
        self.readers = {
            table: [m for m in self.memories if any(other.weight is table for other in m.tables)]
            for table in self.tables
        }
        alike: dict[tuple[type, type, bool], list[TransformerBlock]] = {}
        for block in model.layers:
            memory = block.memory_layer
            kind = (type(block.feed_forward), type(memory), memory is not None and bool(memory.own_tables))
            alike.setdefault(kind, []).append(block)
        of_tables = set(self.tables)
        self.blocks = [
            (blocks[0], len(blocks), [p for p in blocks[0].parameters() if p not in of_tables])
            for blocks in alike.values()
        ]
        self.is_tied = not isinstance(model.output, nn.Linear)
        self.ends = [model.tok_embeddings.weight, model.norm.weight, *([] if self.is_tied else [model.output.weight])]


class _Layout:
    def __init__(self, args: TrainArgs, world: World, parts: ModelParts):
        self.args, self.parts, self.model = args, parts, parts.model
        self.replicate, self.shard, self.tp = mesh_sizes(args.distributed, world)
        self.group = args.distributed.memory_parallel_size
        self.data_ranks = self.replicate * self.shard
        self.by_rows = splits_tables_by_rows(args.distributed, world)
        self.is_full = args.distributed.fsdp_type == "full_shard"
        self.n_ranks = world.size
        self.device = world.device
        self.fused_norms = world.device.type == "cuda"
        self.bytes = DTYPES[args.distributed.model_dtype].itemsize
        self.is_sparse = args.optim.value_update == "sparse"
        # Ranks that a table's columns are split over.
        self.split = self.tp if self.tp > 1 else self.group
        self.N = args.data.batch_size * args.data.seq_len
        self.n = self.N // self.tp
        self.memories, self.tables = parts.memories, parts.tables
        self.of_tables = set(self.tables)
        # Of a table's elements where it is read.
        self.table_bytes = min((p.element_size() for p in self.tables), default=FP32)
        if self.by_rows:
            self.table_bytes = min(self.table_bytes, self.bytes)
        self.sizes = Sizes(self.n, self.model.dim, self.bytes, self.table_bytes, self.split, self.fused_norms)
        self.by_columns, self.by_inputs = set(), set()
        if self.tp > 1:
            self._split_by_tensor_parallelism()

    def _split_by_tensor_parallelism(self) -> None:
        self.by_columns = {self.model.tok_embeddings.weight}
        if not self.parts.is_tied:
            self.by_columns.add(self.model.output.weight)
        for block, _, _ in self.parts.blocks:
            attention, feed_forward = block.attention, block.feed_forward
            self.by_columns |= {attention.wq.weight, attention.wk.weight, attention.wv.weight}
            self.by_inputs.add(attention.wo.weight)
            if isinstance(feed_forward, FeedForward):
                self.by_columns |= {feed_forward.w1.weight, feed_forward.w3.weight}
                self.by_inputs.add(feed_forward.w2.weight)

    # --- parameters ------------------------------------------------------------------------------------------------

    def whole(self, parameter: nn.Parameter) -> int:
        """Elements of a parameter before FSDP splits it."""
        if parameter in self.of_tables:
            return parameter.numel() // self.split
        return parameter.numel() // (self.tp if parameter in self.by_columns | self.by_inputs else 1)

    def padded(self, parameter: nn.Parameter) -> int:
        """The same, rounded up to what FSDP sends: all ranks' parts as large as the first one's."""
        return self.held(parameter) * (self.shard if self.is_sharded(parameter) else 1)

    def is_sharded(self, parameter: nn.Parameter) -> bool:
        return self.shard > 1 and (self.by_rows or parameter not in self.of_tables)

    def held(self, parameter: nn.Parameter) -> int:
        """Elements of a parameter on this rank."""
        whole = self.whole(parameter)
        if not self.is_sharded(parameter):
            return whole
        rows = parameter.shape[0] // (self.tp if parameter in self.by_columns else 1)
        return -(-rows // self.shard) * (whole // rows)

    def numbered(self) -> list[tuple[nn.Parameter, int]]:
        """All parameters, those that are alike once, with their number."""
        of_blocks = [(p, number) for _, number, parameters in self.parts.blocks for p in parameters]
        return [*of_blocks, *((p, 1) for p in (*self.tables, *self.parts.ends))]

    def footprint(self) -> Footprint:
        sizes = [(p, number, self.held(p) * p.element_size()) for p, number in self.numbered()]
        parameters = sum(number * size for _, number, size in sizes)
        moments = count_moments(self.model, self.args.optim)
        gradients = parameters
        if self.is_sparse:
            for table in self.tables:  # row-sparse: in fp32, with a number for each row
                gradients += self.rows_read(table, self.n_ranks) * (self.columns(table) * FP32 + 8)
                gradients -= self.held(table) * table.element_size()
        copies, activations = self.copies(), self.activations()
        return Footprint(
            dense=self.parts.dense,
            memory=self.parts.memory,
            parameters=parameters,
            gradients=gradients,
            moments=sum(number * size * moments[p] for p, number, size in sizes),
            copies=copies,
            activations=activations,
            diagnostics=self.diagnostics(),
            peak=max(self.at_the_loss(gradients, copies, activations), gradients + copies + self.backward()),
            flops_per_token=self.parts.flops_per_token,
            tokens_per_step=self.args.grad_acc_steps * self.N / self.tp,
            exchanges=self.exchanges(),
        )

    def diagnostics(self) -> int:
        """Bytes of what is recorded of the memories' use: on every rank, of all slots."""
        if not self.args.logging.memory_use:
            return 0
        readers = collections.Counter(memory.owner for memory in self.memories)
        return sum(bytes_held(owner.size, [number], self.device) for owner, number in readers.items())

    def columns(self, table: nn.Parameter) -> int:
        """Of a table, on this rank."""
        return table.shape[1] // self.split

    def rows_read(self, table: nn.Parameter, ranks: int) -> int:
        """Rows of a table that a number of ranks read in a step at the most."""
        reads = sum(memory.reads for memory in self.parts.readers[table])
        return min(table.shape[0], self.args.grad_acc_steps * self.n * ranks * reads)

    # --- units of FSDP ---------------------------------------------------------------------------------------------

    def units(self) -> list[tuple[str, int, list[nn.Parameter]]]:
        """What FSDP gathers at once, and how many of each: blocks, tables that are split by rows, the ends."""
        units = [("block", number, parameters) for _, number, parameters in self.parts.blocks]
        if self.by_rows:
            units += [("table", 1, [table]) for table in self.tables]
        embedding, norm, *output = self.parts.ends
        if output:
            return [*units, ("embedding", 1, [embedding]), ("output", 1, output), ("rest", 1, [norm])]
        return [*units, ("rest", 1, [embedding, norm])]

    def gathered_bytes(self, unit: str, parameters: list[nn.Parameter]) -> int:
        """Of a unit when it computes: the ends and the last norm stay exact."""
        size = FP32 if unit in ("embedding", "rest") else self.bytes
        return size * sum(self.padded(p) for p in parameters)

    def copies(self) -> int:
        """Bytes of weights beside the parameters when a forward pass ends: what FSDP has gathered and not put away, or
        what autocast has cast to half precision.
        """
        if self.data_ranks > 1:
            return sum(
                number * self.gathered_bytes(unit, parameters)
                for unit, number, parameters in self.units()
                if not self.is_full or unit in ("output", "rest")
            )
        if self.bytes == FP32:
            return 0
        copies = 0
        for block, number, parameters in self.parts.blocks:
            exact = (block.attention_norm.weight, block.ffn_norm.weight)
            copies += number * sum(self.whole(p) for p in parameters if not any(p is norm for norm in exact))
        return self.bytes * copies

    # --- activations -----------------------------------------------------------------------------------------------

    def recomputes(self, block: TransformerBlock) -> str:
        """Of a block's activations: "nothing", "cheap" ones or "everything"."""
        wanted = self.args.distributed
        gathers = self.by_rows and block.memory_layer is not None
        if wanted.checkpoint_each_layer or (wanted.selective_activation_checkpointing and gathers):
            return "everything"
        return "cheap" if wanted.selective_activation_checkpointing else "nothing"

    def activations(self) -> int:
        """Bytes that autograd keeps when the forward pass of a batch ends."""
        n, N, C, b = self.n, self.N, self.model.dim, self.bytes
        ends = n * C * FP32 + 8 * N  # the embedding's result, the tokens
        # The last norm; from the loss, the gradients of the output's input and weight.
        ends += self.norm() + N * C * b + FP32 * self.whole(self.model.output.weight)
        return ends + sum(
            number * self.kept_of(block, self.recomputes(block)) for block, number, _ in self.parts.blocks
        )

    def norm(self) -> int:
        """One number a token; on a CPU what was divided by it, too."""
        return self.n * FP32 + (0 if self.fused_norms else self.n * self.model.dim * FP32)

    def kept_of(self, block: TransformerBlock, recomputes: str) -> int:
        result = self.n * self.model.dim * FP32
        if recomputes == "everything":
            return result
        cheap_again = recomputes == "cheap"
        parts = self.attention(block, cheap_again) + (0 if cheap_again else self.norm())
        if isinstance(block.feed_forward, FeedForward):
            parts += self.feed_forward(block, cheap_again)
        if block.memory_layer is not None:
            parts += block.memory_layer.kept_bytes(self.sizes, cheap_again)
        return result + parts

    def inputs(self, n_linears: int) -> int:
        """Of linears that read the whole sequence."""
        return replace(self.sizes, tokens=self.N).inputs(n_linears)

    def results_sent(self) -> int:
        """Under tensor parallelism, what is exchanged before and after a pair of linears, where that is kept."""
        return (self.N * FP32 + self.n * self.bytes) * self.model.dim if self.tp > 1 else 0

    def attention(self, block: TransformerBlock, cheap_again: bool) -> int:
        n, N, C, b, t = self.n, self.N, self.model.dim, self.bytes, self.tp
        W, G = block.attention.wq.out_features, block.attention.wk.out_features
        heads = N * (2 * W + 2 * G) // t * b + N * block.attention.n_heads // t * FP32  # q, k, v, result, sums
        if cheap_again:
            return heads + N * C * b + self.results_sent()
        T = self.args.data.seq_len
        rotations = 8 * T * block.attention.head_dim
        mask = T * T * b if (self.model.sliding_window or T) < T else 0  # as numbers to be added to scores
        return self.norm() + self.inputs(3) + rotations + mask + heads + n * C * FP32

    def feed_forward(self, block: TransformerBlock, cheap_again: bool) -> int:
        N, C, b = self.N, self.model.dim, self.bytes
        F = block.feed_forward.w1.out_features // self.tp
        if cheap_again:
            return N * (2 * F + C) * b + self.results_sent()
        return self.inputs(2) + 4 * N * F * b

    def at_the_loss(self, gradients: int, copies: int, activations: int) -> int:
        """Bytes where the forward pass turns into the backward one: all activations and what the loss takes."""
        n, N, C, b = self.n, self.N, self.model.dim, self.bytes
        earlier = 0
        if self.args.grad_acc_steps > 1:  # those of other batches; tables have theirs when the step ends
            tables = sum(self.held(table) * table.element_size() for table in self.tables)
            earlier = self.noted() if self.is_sparse else gradients - (0 if self.by_rows else tables)
        # Its input, and the logits of a chunk of tokens.
        n_words, weight = self.args.model.vocab_size // self.tp, self.whole(self.model.output.weight)
        logits = tokens_of_chunk(N, n_words, self.device) * n_words
        loss = N * C * FP32 + (n * C * FP32 if self.tp > 1 else 0) + logits * b
        if b < FP32:  # casts, unless FSDP has gathered them; on a CPU the logits in fp32, then a product to be added
            loss += N * C * b + (weight * b if self.data_ranks == 1 or self.parts.is_tied else 0)
            loss += max(logits * FP32, weight * b) if self.device.type == "cpu" else 0
        # Or in the last block's backward pass.
        return earlier + activations + copies + max(loss, N * C * FP32 + self.gathering())

    def gathering(self) -> int:
        """Bytes that FSDP takes for a block in the backward pass, beside what stays gathered; an estimate."""
        if self.data_ranks == 1:
            return 0
        units = self.units()
        largest = max(self.gathered_bytes(unit, parameters) for unit, _, parameters in units)
        reduced = max(FP32 * sum(self.padded(p) for p in parameters) for _, _, parameters in units)
        # The weights of this unit and the next one, the gradient, and the same in fp32 on its way.
        return (2 * largest if self.is_full else 0) + largest + reduced

    def backward(self) -> int:
        """Bytes beside gradients and copies where the backward pass ends, the first block's; an estimate."""
        again = max(
            self.kept_of(block, "nothing") - self.kept_of(block, self.recomputes(block))
            for block, _, _ in self.parts.blocks
        )
        return again + self.gathering() + self.noted()

    def noted(self) -> int:
        """Bytes of what lookups note of the tables' gradients until a step's last batch, and of the sum over ranks."""
        if not self.tables or self.by_rows:
            return 0
        notes = sum(map(self.noted_of, self.tables))
        if self.is_sparse:  # the notes side by side; a table's own rows, all ranks', and them sorted
            rows = max(self.rows_read(table, self.n_ranks) * self.columns(table) for table in self.tables)
            return 2 * notes + 3 * FP32 * rows
        return notes + FP32 * min(max(map(self.whole, self.tables)), REDUCED_AT_ONCE)

    def noted_of(self, table: nn.Parameter) -> int:
        size, columns = table.element_size(), self.columns(table)
        of_a_batch = sum(memory.reads * (4 + size) + columns * size for memory in self.parts.readers[table])
        notes = self.args.grad_acc_steps * self.split * self.n * of_a_batch
        return min(notes, self.whole(table) * size)

    # --- what is sent ----------------------------------------------------------------------------------------------

    def exchanges(self) -> list[Exchange]:
        found: dict[tuple[str, str, int, bool], float] = {}
        spans = {"tp": self.tp, "dp_shard": self.tp * self.shard, "memory_parallel": self.group}

        def add(collective: str, dimension: str, ranks: int, payload: float, at_most: bool = False) -> None:
            if ranks > 1 and payload:
                key = (collective, dimension, ranks, at_most)
                found[key] = found.get(key, 0) + payload

        if self.data_ranks > 1:
            self.add_fsdp(add)
        if self.tp > 1:
            self.add_tensor_parallelism(add)
        if self.split > 1:
            for block, number, _ in self.parts.blocks:
                if block.memory_layer is not None:
                    self.add_lookups(add, block, number)
        if self.tables and not self.by_rows:
            self.add_table_gradients(add)
        return [
            Exchange(collective, dimension, ranks, spans.get(dimension, self.n_ranks), payload, at_most)
            for (collective, dimension, ranks, at_most), payload in found.items()
        ]

    def add_fsdp(self, add) -> None:
        batches = self.args.grad_acc_steps
        for unit, number, parameters in self.units():
            gathered = number * self.gathered_bytes(unit, parameters)
            elements = number * sum(self.padded(p) for p in parameters)
            passes = 1 if unit in ("output", "rest") or not self.is_full else 2
            passes *= len(self.parts.readers[parameters[0]]) if unit == "table" else 1
            add("all-gather", "dp_shard", self.shard, batches * passes * gathered)
            add("reduce-scatter", "dp_shard", self.shard, batches * FP32 * elements)
            add("all-reduce", "dp_replicate", self.replicate, FP32 * elements // self.shard)

    def add_tensor_parallelism(self, add) -> None:
        N, C, b, batches = self.N, self.model.dim, self.bytes, self.args.grad_acc_steps

        def both_ways(gathered: float, scattered: float) -> None:
            add("all-gather", "tp", self.tp, batches * gathered)
            add("reduce-scatter", "tp", self.tp, batches * scattered)

        both_ways(N * C * FP32, N * C * FP32)  # the embedding's result, and its gradient
        both_ways(N * C * FP32 + self.tp * N * 3 * FP32, N * C * FP32)  # the output's input, its gradient, the losses
        # FSDP sums the norms' gradients in each backward pass.
        times = batches if self.data_ranks > 1 else 1
        summed = times * self.held(self.model.norm.weight)
        for block, number, parameters in self.parts.blocks:
            pairs = 2 * number if isinstance(block.feed_forward, FeedForward) else number
            both_ways(pairs * N * C * (FP32 + b), pairs * N * C * (FP32 + b))
            if self.recomputes(block) == "everything":  # up to what the last product reads
                both_ways(pairs * N * C * FP32, number * N * C * b)
            # Of norms and memories each rank has seen a part of the sequence.
            norms = {block.attention_norm.weight, block.ffn_norm.weight}
            summed += number * times * sum(self.held(p) for p in norms)
            if block.memory_layer is not None:
                own = set(block.memory_layer.parameters())
                summed += number * sum(self.held(p) for p in parameters if p in own)
        add("all-reduce", "tp", self.tp, FP32 * summed)

    def add_lookups(self, add, block: TransformerBlock, number: int) -> None:
        dimension = "tp" if self.tp > 1 else "memory_parallel"
        is_recomputed = self.recomputes(block) == "everything"
        for collective, payload in block.memory_layer.sent(self.sizes, is_recomputed):
            add(collective, dimension, self.split, self.args.grad_acc_steps * number * payload)

    def add_table_gradients(self, add) -> None:
        ranks, dimension = self.data_ranks, "dp_replicate"
        if self.group > 1:
            ranks, dimension = self.n_ranks // self.group, "memory_replicate"
        elif self.is_full:
            dimension = "data"
        for table in self.tables:
            if self.is_sparse:
                # The rows that any rank has read; before, each rank's number of slots, and the slots as int64.
                add(
                    "all-reduce",
                    dimension,
                    ranks,
                    self.rows_read(table, self.n_ranks) * self.columns(table) * FP32,
                    True,
                )
                add("all-gather", dimension, ranks, 8 * ranks * (1 + self.rows_read(table, self.split)), True)
            else:
                add("all-reduce", dimension, ranks, self.whole(table) * FP32)

"""Looks inside a model: statistics of what goes through it, in a small forward and backward pass of its own.

Every `probe_freq` steps each rank sends one row of its batch through the model as the step has left it, and appends a
JSON object a line to dump_dir/probe/probe.{rank}.jsonl, one for each tensor:

    {"global_step": 20, "name": "layers.3.attention.wq", "layer": 3, "kind": "output", "n": 524288, "mean": ..., ...}

`name` is the module's, `layer` its block's number (null outside of blocks). By `kind`:

    input, output, weight      of each linear, "layers.3.attention.wq" or "output"
    grad_output, grad_weight   the loss's gradients there; the loss is the mean over the row's tokens
    residual, grad_residual    the stream after block "layers.3"; "tok_embeddings": before the first block
    attention_entropy          of "layers.3.attention", in nats: a number for each head, the mean over its queries
    memory_query               what "layers.4.feed_forward" searches with
    memory_scores              of the slots found, before the softmax
    memory_values              the rows of "layers.4.feed_forward.values" that were found, each as often as it was
    memory_output              their weighted sums, before gate and projection (PEER's `values_u`: the products)

and of each, over its `n` elements: `mean`, `std`, `rms`, `min`, `max`, `abs_max`, `kurtosis` (3 for a normal
distribution; of the finite elements, null where there is no such number), and the shares that are `zeros` and
`nonfinite`. A rank measures what it has: its own row, and of what is split over ranks (tensor and memory parallelism)
its own part. Weights that FSDP splits are gathered for the pass, and measured whole.

Nothing that training uses is written to. Gradients are asked for with respect to the residual stream alone; those of
the weights are made on the way, one linear at a time, measured and forgotten, so nothing reaches `.grad` or the
reductions after it. Compiled blocks run as plain Python meanwhile, and stay compiled.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingua.distributed import local_part
from lingua.errors import UserError
from lingua.memory_layer import MemoryLayer
from lingua.metrics import drop_metrics_after
from lingua.product_key.row_gradients import RowGradients
from lingua.product_key.value_table import xFormerEmbeddingBag
from lingua.transformer import BaseTransformer, Mask, TransformerBlock, apply_rotary

logger = logging.getLogger(__name__)

STATISTICS = ("mean", "std", "rms", "min", "max", "abs_max", "kurtosis", "zeros", "nonfinite")

# Elements that are looked at at once, 64 MiB in fp32.
AT_ONCE = 2**24


# --- the file ------------------------------------------------------------------------------------------------------


def drop_probes_after(dump_dir: Path, step: int, rank: int, n_ranks: int, keep: bool = False) -> None:
    """Takes what is past the end of `step` out of the probe files, before it is computed again.

    Each rank sees to its own file, and to its share of those of an earlier start with more ranks. `keep`: as in
    `drop_metrics_after`.
    """
    for file in (dump_dir / "probe").glob("probe.*.jsonl"):
        number = file.name.split(".")[1]
        if number.isdecimal() and int(number) % n_ranks == rank:
            drop_metrics_after(file, step, keep)


def append_probe(dump_dir: Path, step: int, rank: int, records: list[dict[str, Any]]) -> None:
    """Adds a line for each record to this rank's file. Where the disk fails, that is told, and they are left out."""
    lines = "".join(json.dumps({"global_step": step, **record}) + "\n" for record in records)
    path = dump_dir / "probe" / f"probe.{rank}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            left, end = lines.encode(), os.fstat(file.fileno()).st_size
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):  # no line in part
                    file.truncate(end)
                raise
    except OSError as error:
        logger.error("the probe of step %s is not written: %s (%s)", step, path, error.strerror)


# --- the pass ------------------------------------------------------------------------------------------------------


def probe(model: BaseTransformer, compute_loss: Callable[[], torch.Tensor]) -> list[dict[str, Any]]:
    """Calls `compute_loss`, which sends a batch through the model, and goes backward; the records, as they are written
    but for the step.

    All ranks call it together. Raises UserError for masks of which the attention's entropy cannot be told.
    """
    measured = _Measured()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_nothing_noted(model))
        hooks = stack.enter_context(_Hooks(model, measured))
        loss = compute_loss()
        hooks.is_backward = True
        torch.autograd.grad(loss, hooks.start)
    return measured.records()


class _Measured:
    """Statistics as they come in, which stay on the device until all are there."""

    def __init__(self) -> None:
        self._heads: list[dict[str, Any]] = []
        self._statistics: list[torch.Tensor] = []

    def add(self, name: str, kind: str, tensor: torch.Tensor) -> None:
        tensor = local_part(tensor.detach()).flatten()
        self.add_parts(name, kind, tensor.numel(), lambda: tensor.split(AT_ONCE))

    def add_parts(self, name: str, kind: str, n: int, parts: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Of a tensor of `n` elements that need not be there all at once; `parts` is called for each time through."""
        in_block = re.match(r"layers\.(\d+)", name)
        layer = int(in_block.group(1)) if in_block else None
        self._heads.append({"name": name, "layer": layer, "kind": kind, "n": n})
        self._statistics.append(summarize(n, parts))

    def records(self) -> list[dict[str, Any]]:
        rows = torch.stack(self._statistics).tolist()
        return [
            {**head, **{name: _rounded(value) for name, value in zip(STATISTICS, row, strict=True)}}
            for head, row in zip(self._heads, rows, strict=True)
        ]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


@contextmanager
def _nothing_noted(model: BaseTransformer) -> Iterator[None]:
    """What lookups note in a backward pass for training goes elsewhere meanwhile, and is forgotten. Logits are whole.

    Tables have their rows noted in any case: else autograd would make a gradient of the table's size, asked for or not.
    """
    memories = model.memories().values()
    tables = [table for memory in memories for table in memory.own_tables]
    stand_ins = [(table, "row_gradients", RowGradients(table.weight)) for table in tables]
    stand_ins += [(memory, "slot_use", None) for memory in memories]
    stand_ins.append((model, "whole_logits", True))
    of_training = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, value in of_training:
            setattr(module, name, value)


class _Hooks:
    """Hooks on the model's modules, within its `with`, that measure what passes.

    Those that FSDP and tensor parallelism have put there convert inputs and outputs and gather weights. Where ours come
    `first` after a module, they see what it has computed itself, with its weights there; as the last ones, what others
    get. With activation checkpointing a block runs again in the backward pass, which `is_backward` tells from the first
    time; the hooks on blocks do not run again then.
    """

    def __init__(self, model: BaseTransformer, measured: _Measured):
        self.model, self.measured = model, measured
        self.is_backward = False
        self.start: torch.Tensor
        self.outputs: dict[nn.Module, torch.Tensor] = {}  # of the linears that a block's own statistics are made from
        self.reader = ""  # the memory that is running: tables can be shared

    def __enter__(self) -> _Hooks:
        self._handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) or name == "output":
                self._behind(module, self._linear, name, first=True)
                self._behind(module, self._linear_output, name)
            elif isinstance(module, TransformerBlock):
                self._behind(module, self._block, name, first=True)
                memory, attention = module.memory_layer, module.attention
                query = None if memory is None else memory.query_linear
                for linear in filter(None, (attention.wq, attention.wk, query)):
                    self._behind(linear, self._keep_output)
            elif isinstance(module, MemoryLayer):
                self._before(module, self._enter_memory, name)
                for table in module.own_tables:
                    self._behind(table, self._table, first=True)
        self._before(self.model.layers[0], self._first_block, "tok_embeddings")
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, look: Callable, name: str) -> None:
        hook = module.register_forward_pre_hook(lambda module, inputs: look(name, module, inputs), prepend=True)
        self._handles.append(hook)

    def _behind(self, module: nn.Module, look: Callable, name: str = "", first: bool = False) -> None:
        hook = module.register_forward_hook(
            lambda module, inputs, output: look(name, module, inputs, output), prepend=first
        )
        self._handles.append(hook)

    def _first_block(self, name: str, _block: nn.Module, inputs: tuple) -> tuple:
        self.start, *others = inputs
        self.measured.add(name, "residual", self.start)
        return _Tap.apply(self.start, None, self._gradient_of(name, "grad_residual")), *others

    def _linear(self, name: str, linear: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = local_part(inputs[0].detach())
        if not self.is_backward:
            self.measured.add(name, "input", x)
            self.measured.add(name, "weight", linear.weight)
        # The tap keeps x as autograd does, so checkpointing drops it and makes it again like all else.
        return _Tap.apply(output, x, self._gradients_of_linear(name))

    def _linear_output(self, name: str, _linear: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if not self.is_backward:
            self.measured.add(name, "output", output)

    def _keep_output(self, _name: str, linear: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if not self.is_backward:
            self.outputs[linear] = output.detach()

    @torch.no_grad()
    def _block(self, name: str, block: TransformerBlock, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # Here and not where they come up: selective checkpointing takes account of all products made within a block.
        _, rotation, mask, *_ = inputs
        attention, memory = block.attention, block.memory_layer
        q, k = (
            apply_rotary(self.outputs.pop(linear).unflatten(-1, (-1, attention.head_dim)), rotation)
            for linear in (attention.wq, attention.wk)
        )
        self.measured.add(f"{name}.attention", "attention_entropy", attention_entropy(q, k, mask))
        if memory is not None and memory.query_linear is not None:
            query, of_memory = self.outputs.pop(memory.query_linear), f"{name}.{block.memory_name}"
            self.measured.add(of_memory, "memory_query", query)
            self.measured.add(of_memory, "memory_scores", memory.best_scores(query))
        self.measured.add(name, "residual", output)
        with torch.enable_grad():
            return _Tap.apply(output, None, self._gradient_of(name, "grad_residual"))

    def _enter_memory(self, name: str, _memory: MemoryLayer, _inputs: tuple) -> None:
        self.reader = name

    def _table(self, _name: str, table: xFormerEmbeddingBag, inputs: tuple, output: torch.Tensor) -> None:
        if self.is_backward:
            return
        memory = self.model.get_submodule(self.reader)
        own = next(name for name, other in zip(memory.table_names, memory.tables, strict=True) if other is table)
        name, weight, slots = f"{self.reader}.{own}", local_part(table.weight.detach()), inputs[0].flatten()
        at_once = max(AT_ONCE // weight.shape[1], 1)
        self.measured.add_parts(
            name,
            "memory_values",
            slots.numel() * weight.shape[1],
            # The table may lie in the CPU's memory.
            lambda: (weight[some.to(weight.device)].flatten().to(output.device) for some in slots.split(at_once)),
        )
        self.measured.add(name, "memory_output", output)

    def _gradient_of(self, name: str, kind: str) -> Callable:
        return lambda grad: self.measured.add(name, kind, grad)

    def _gradients_of_linear(self, name: str) -> Callable:
        def look(grad: torch.Tensor, x: torch.Tensor) -> None:
            grad = local_part(grad)
            self.measured.add(name, "grad_output", grad)
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
            self.measured.add(name, "grad_weight", grad_weight)

        return look


class _Tap(torch.autograd.Function):
    """Passes a tensor on; in the backward pass calls `look(its gradient[, what was kept])`."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, kept: torch.Tensor | None, look: Callable) -> torch.Tensor:
        ctx.look = look
        if kept is not None:
            ctx.save_for_backward(kept)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.look(grad, *ctx.saved_tensors)
        return grad, None, None


# --- the numbers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def summarize(n: int, parts: Callable[[], Iterable[torch.Tensor]]) -> torch.Tensor:
    """STATISTICS of all elements of the `parts`, `n` together, as one tensor on their device.

    In fp32, relative to the largest, so that the squares of tiny gradients are numbers, too.
    """
    lowest, highest, total, zeros, finite = [], [], [], [], []
    for part in parts():
        x = part.float()
        is_finite = x.isfinite()
        lowest.append(x.where(is_finite, math.inf).amin())
        highest.append(x.where(is_finite, -math.inf).amax())
        total.append(x.where(is_finite, 0).sum(dtype=torch.float64))
        zeros.append((x == 0).sum())
        finite.append(is_finite.sum())
    low, high, n_finite = torch.stack(lowest).amin(), torch.stack(highest).amax(), torch.stack(finite).sum()
    mean = torch.stack(total).sum() / n_finite
    abs_max = torch.maximum(-low, high)
    scale = abs_max.where(abs_max > 0, 1)
    squares, fourths = [], []
    for part in parts():
        x = part.float()
        centred = ((x - mean.float()) / scale).where(x.isfinite(), 0).square()
        squares.append(centred.sum(dtype=torch.float64))
        fourths.append(centred.square().sum(dtype=torch.float64))
    variance = torch.stack(squares).sum() / n_finite
    kurtosis = torch.stack(fourths).sum() / n_finite / variance.square()
    std = scale * variance.sqrt()
    rms = scale * (variance + (mean / scale).square()).sqrt()
    shares = (torch.stack(zeros).sum().double() / n, (n - n_finite).double() / n)
    return torch.stack([value.double() for value in (mean, std, rms, low, high, abs_max, kurtosis, *shares)])


def attention_entropy(q_BTHD: torch.Tensor, k_BSGD: torch.Tensor, mask: Mask) -> torch.Tensor:
    """How widely each head looks, (B, H): the entropy of its softmax in nats, the mean over all queries.

    Raises UserError for a mask that is neither "causal" nor a tensor, as sdpa takes them.
    """
    if not isinstance(mask, torch.Tensor) and mask != "causal":
        raise UserError(f"probe_freq: knows no attention entropy for a mask of type {type(mask).__name__}; set null")
    n_batch, n_queries, n_heads, head_dim = q_BTHD.shape
    n_keys, n_groups = k_BSGD.shape[1:3]
    q = q_BTHD.float().unflatten(2, (n_groups, -1)) * head_dim**-0.5
    k = k_BSGD.float()
    position = torch.arange(n_keys, device=q.device)
    total = q.new_zeros(n_batch, n_heads)
    at_once = max(AT_ONCE // (n_batch * n_heads * n_keys), 1)
    for start in range(0, n_queries, at_once):
        queries = slice(start, start + at_once)
        logits = torch.einsum("btghd,bsgd->bghts", q[:, queries], k).flatten(1, 2)
        if not isinstance(mask, torch.Tensor):
            seen = position[queries, None] >= position
        else:
            seen = mask[..., queries, :] if mask.shape[-2] > 1 else mask
        logits = logits.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else logits + seen
        total += torch.special.entr(logits.softmax(-1)).sum((-1, -2))
    return total / n_queries

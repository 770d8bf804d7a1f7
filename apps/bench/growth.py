"""Time, memory and parameters as a memory's table grows, all else alike: parameters grow much faster than computation.

    python -m apps.bench.growth [device=cpu] [n_keys=[128,512,2048]] [out=growth.json] [plot=growth.svg]

A table of `n_keys` squared slots, in the last of two blocks. `layer`: that block's memory alone, on random inputs, of
which search (two sets of n_keys keys are compared with, so it grows as the square root of the slots) and lookup (as
many rows whatever the table's size) are parts; `step`: the whole model forward and backward, gradients clipped,
parameters updated, with either `optim.value_update`. The last row is the same model with a feed-forward in its place.
Times are the shortest of `rounds`, in microseconds a token (of the processor where one CPU thread computes: what else
runs on the machine does not count). `peak`: of a step, model, gradients and AdamW's moments
included; on a CPU the most resident memory beyond what the process had before, in its own process for each.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from apps.bench.report import machine, report
from apps.bench.train_step import build_step
from apps.main.train import TrainArgs, build_model
from apps.main.transformer import LMTransformerArgs
from apps.plots.growth import check_picture, draw_growth
from apps.plots.style import save
from lingua.args import check_writable, parse_args
from lingua.data import DataArgs
from lingua.distributed import DTYPES, DistributedArgs, World
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.memory_layer import MemoryLayer
from lingua.optim import VALUE_UPDATES, OptimArgs
from lingua.product_key.memory import HashingMemory, ProductKeyArgs

SEQ_LEN = 256
HEAD_DIM = 64
ROOM_FOR_RESULTS = 2**20  # bytes
# Enough for most tokens of a batch to be different ones, which read different slots.
VOCABULARY = 4096


@dataclass
class BenchArgs:
    """`n_keys`: of each table; `dim`, `tokens`: of a small model where null; `out`: JSON; `plot`: .png or .svg."""

    device: str | None = None
    n_keys: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048])
    dim: int | None = None
    tokens: int | None = None
    dtype: str = "bf16"
    heads: int = 4
    knn: int = 32
    rounds: int = 5
    out: str | None = None
    plot: str | None = None


def train_args(args: BenchArgs, n_keys: int | None, value_update: str = "dense") -> TrainArgs:
    """Of the model with a table of `n_keys` keys, or with none. The key's size is half the width's, as published."""
    memory = ProductKeyArgs()
    if n_keys is not None:
        memory = ProductKeyArgs(True, "1", n_keys, args.heads, args.knn, mem_k_dim=args.dim // 2)
    model = LMTransformerArgs(
        dim=args.dim,
        n_layers=2,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_seqlen=SEQ_LEN,
        productkey_args=memory,
    )
    return TrainArgs(
        data=DataArgs(batch_size=args.tokens // SEQ_LEN, seq_len=SEQ_LEN),
        optim=OptimArgs(value_update=value_update),
        model=model,
        distributed=DistributedArgs(model_dtype=args.dtype),
    )


def shortest(args: BenchArgs, step: Callable[[], object]) -> float:
    """Microseconds a token of the fastest of `rounds` calls; two more come before, which warm up."""
    clock = time.process_time if args.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    laps = []
    for _ in range(args.rounds + 2):
        _synchronize(args)
        start = clock()
        step()
        _synchronize(args)
        laps.append(clock() - start)
    return min(laps[2:]) * 1e6 / args.tokens


def _synchronize(args: BenchArgs) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure_layer(args: BenchArgs, n_keys: int | None) -> dict[str, float]:
    """The last block's memory or feed-forward: its parts, forward, and forward and backward."""
    layer = build_model(train_args(args, n_keys)).layers[-1].feed_forward.to_empty(device=args.device)
    if isinstance(layer, MemoryLayer):
        layer.reset_parameters()
    else:
        layer.reset_parameters(std=None, factor=1.0)
    torch.manual_seed(0)
    x = torch.randn(1, args.tokens, args.dim, device=args.device, requires_grad=True)
    grad = torch.randn_like(x)
    parts = measure_parts(args, layer, x[0]) if isinstance(layer, MemoryLayer) else {}

    def forward() -> torch.Tensor:
        with autocast(args):
            return layer(x).to(x.dtype)

    def forward_and_backward() -> None:
        layer.zero_grad()
        forward().backward(grad)

    with torch.no_grad():
        time_forward = shortest(args, forward)
    return {**parts, "layer": time_forward, "layer, backward too": shortest(args, forward_and_backward)}


@torch.no_grad()
def measure_parts(args: BenchArgs, memory: HashingMemory, x_NC: torch.Tensor) -> dict[str, float]:
    """Search and lookup, forward."""
    with autocast(args):
        query = memory.query_proj(x_NC)
        scores, slots = memory.get_indices(query, memory.knn)
        weights, slots = F.softmax(scores.float(), dim=-1).flatten(1), slots.flatten(1)
        search = shortest(args, lambda: memory.get_indices(query, memory.knn))
        return {"search": search, "lookup": shortest(args, lambda: memory.lookup(x_NC, slots, weights))}


def autocast(args: BenchArgs) -> torch.autocast:
    dtype = DTYPES[args.dtype]
    return torch.autocast(args.device, dtype, enabled=dtype != torch.float32)


def measure_step(args: BenchArgs, n_keys: int | None, value_update: str) -> dict[str, float]:
    """A training step's time, the most memory in it in GiB, and the model's parameters."""
    before = _held(args)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    counts, step = build_step(train_args(args, n_keys, value_update), World(device=device))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = shortest(args, step)
    return {
        "parameters": counts["dense"] + counts["memory"],
        f"step, {value_update}": seconds,
        f"peak GiB, {value_update}": (_most_held(args) - before) / 2**30,
    }


def _held(args: BenchArgs) -> int:
    return torch.cuda.memory_allocated() if args.device == "cuda" else psutil.Process().memory_info().rss


def _most_held(args: BenchArgs) -> int:
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_alone(args: BenchArgs, measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """`measure`, on a CPU in its own process. Nothing where the memory does not suffice."""
    try:
        if args.device == "cuda":
            return measure(args, *arguments)
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["apps.bench.train_step"])
        with ProcessPoolExecutor(1, mp_context=processes) as executor:
            return executor.submit(measure, args, *arguments).result()
    except (torch.OutOfMemoryError, BrokenProcessPool):
        return {}
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def fits(args: BenchArgs, n_keys: int, value_update: str) -> bool:
    """Whether what is free suffices: for the table and AdamW's moments; with dense updates for a gradient, too, and the
    same in fp32, of which a CPU takes the norm.
    """
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else psutil.virtual_memory().available
    elements, dtype = n_keys**2 * args.dim, DTYPES[args.dtype]
    needed = elements * (4 * dtype.itemsize + 4 if value_update == "dense" else 3 * dtype.itemsize)
    return 1.1 * needed < free


COLUMNS = (
    "slots",
    "parameters",
    "search",
    "lookup",
    "layer",
    "layer, backward too",
    *(f"step, {how}" for how in VALUE_UPDATES),
    *(f"peak GiB, {how}" for how in VALUE_UPDATES),
)


def measure(args: BenchArgs) -> list[dict[str, Any]]:
    rows = []
    for n_keys in (*sorted(args.n_keys), None):
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "-")
        row["slots"] = "none: a feed-forward" if n_keys is None else n_keys**2
        for value_update in VALUE_UPDATES if n_keys is not None else ("dense",):
            if n_keys is None or fits(args, n_keys, value_update):
                row |= run_alone(args, measure_step, n_keys, value_update)
        if n_keys is None or row["parameters"] != "-":
            row |= run_alone(args, measure_layer, n_keys)
        rows.append(row)
    return rows


def main() -> None:
    args = parse_args(BenchArgs)
    if args.device not in (None, "cuda", "cpu"):
        raise UserError(f"device: '{args.device}' is neither cuda nor cpu")
    if args.dtype not in DTYPES:
        raise UserError(f"dtype: '{args.dtype}' must be one of {', '.join(DTYPES)}")
    if args.rounds < 1:
        raise UserError(f"rounds: {args.rounds} is too small, it must be 1 or more")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but there is none; set cpu")
    args = replace(
        args,
        device=device,
        dim=args.dim or (1024 if device == "cuda" else 256),
        tokens=args.tokens or (16384 if device == "cuda" else 1024),
    )
    if args.tokens % SEQ_LEN or args.tokens < 1:
        raise UserError(f"tokens: {args.tokens} is no multiple of {SEQ_LEN}, the length of a row")
    if not args.n_keys or min(args.n_keys) < args.knn:
        raise UserError(f"n_keys: {args.n_keys}; wanted a list of numbers of at least knn={args.knn}")
    if args.dim % HEAD_DIM or args.dim < 1:
        raise UserError(f"dim: {args.dim} is no multiple of {HEAD_DIM}, the size of an attention head")
    picture = None if args.plot is None else check_picture("plot", args.plot)
    for key, file in (("out", args.out), ("plot", args.plot)):
        if file is not None:
            check_writable(key, Path(file).parent, ROOM_FOR_RESULTS)
    rows = measure(args)
    title = f"growth of a table, {args.dim} columns in {args.dtype}, {args.tokens:,} tokens a step; us a token"
    report(title, rows, args.out)
    if picture is not None:
        save(draw_growth({"title": title, "machine": machine(), "rows": rows}), [picture])


if __name__ == "__main__":
    run_main(main)

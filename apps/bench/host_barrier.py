"""What a host barrier costs: all ranks agree on a few numbers through their CPUs, as training does at each check.

    python -m apps.bench.host_barrier [ranks=[2,4,8]] [out=host_barrier.json]

Each number of ranks is started on this machine (gloo, one thread each); with more ranks than free cores the figures are
those of the scheduler. In microseconds a call, the median of `rounds` rounds:

all_reduce   of the numbers that a check sends (lingua.distributed.reduce_sum)
together     the question whether any rank has an error (lingua.distributed.together), which none has

The numbers are few, so time goes by messages, whose number grows with the ranks. The last rows are a straight line
through the measured ones.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from apps.bench.report import report
from lingua.args import parse_args
from lingua.distributed import raise_on_all_ranks, reduce_sum
from lingua.errors import UserError
from lingua.launch import run_main

# What a check of a step without news sends: errors, signals, seconds; a bad step, the loss.
NUMBERS = [0.0, 0.0, 1.0, 0.0, 2.5]


@dataclass
class BenchArgs:
    """`calls` in each of `rounds`; `more`: numbers of ranks for the line; `out`: JSON."""

    ranks: list[int] = field(default_factory=lambda: [2, 4, 8])
    more: list[int] = field(default_factory=lambda: [64, 256, 1024])
    calls: int = 200
    rounds: int = 5
    out: str | None = None


def microseconds(call: Callable[[], object], args: BenchArgs) -> float:
    """Of a call, in the median round."""
    rounds = []
    for _ in range(args.rounds):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(args.calls):
            call()
        rounds.append((time.perf_counter() - start) / args.calls * 1e6)
    return statistics.median(rounds)


def agree() -> None:
    with raise_on_all_ranks():
        pass


def measure(rank: int, n_ranks: int, store: str, args: BenchArgs, results: multiprocessing.SimpleQueue) -> None:
    """On one of the ranks, the first of which reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, n_ranks), rank=rank, world_size=n_ranks)
    row = {
        "ranks": n_ranks,
        "all_reduce": microseconds(lambda: reduce_sum(NUMBERS), args),
        "together": microseconds(agree, args),
    }
    if rank == 0:
        results.put(row)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    args = parse_args(BenchArgs)
    for name in ("ranks", "more"):
        if min(getattr(args, name), default=0) < 2:
            raise UserError(f"{name}: {getattr(args, name)} must be numbers of 2 or more")
    for name in ("calls", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}: {getattr(args, name)} is too small, it must be 1 or more")
    processes = multiprocessing.get_context("spawn")
    rows = []
    for n_ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            results = processes.SimpleQueue()
            ranks = [
                processes.Process(target=measure, args=(rank, n_ranks, f"{folder}/store", args, results))
                for rank in range(n_ranks)
            ]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
            if any(rank.exitcode for rank in ranks):
                raise OSError(f"{n_ranks} ranks: one of them has failed; see its message above")
            rows.append({"": "measured", **results.get()})
    if len(rows) > 1:
        measured = [row["ranks"] for row in rows]
        lines = {name: np.polyfit(measured, [row[name] for row in rows], 1) for name in ("all_reduce", "together")}
        rows += [
            {"": "by the line", "ranks": n, **{name: float(np.polyval(line, n)) for name, line in lines.items()}}
            for n in args.more
        ]
    report("microseconds a call", rows, args.out)


if __name__ == "__main__":
    run_main(main)

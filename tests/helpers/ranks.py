"""Runs a function in several processes of this machine that form a process group (gloo), one thread each.

def add(number):
    return dist.get_rank() + number  # torch.distributed is initialized

assert run_ranks(4, add, 10) == [10, 11, 12, 13]
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Seconds; far more than anything takes here. It ends what hangs, and is no measure of speed.
PATIENCE = 240
# Seconds that the other ranks get, behind the first one that fails, to tell of their errors.
PATIENCE_WITH_OTHERS = 5

PROCESSES = multiprocessing.get_context("forkserver")


def run_ranks(n_ranks: int, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> list[Any]:
    """Calls `function(*arguments)`, of a module's top level, on `n_ranks` ranks; returns what each of them returned.

    That may be anything that torch.save and torch.load (weights_only) take. What fails on a rank fails here, with the
    tracebacks of all ranks that failed, the first one first.
    """
    # Importing torch takes seconds, so processes are forked from a server that has done it. The list is the one of
    # tests/helpers/training.py: there is one server, started by whoever comes first.
    PROCESSES.set_forkserver_preload(["apps.main.train", "pytest", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_Rank(rank, n_ranks, folder, patience, function, arguments) for rank in range(n_ranks)]
        try:
            errors = _wait_for(ranks, patience)
        finally:
            for rank in ranks:
                rank.end()
        if errors:
            raise AssertionError("\n".join(f"rank {rank} of {n_ranks}: {error}" for rank, error in errors.items()))
        return [torch.load(rank.file) for rank in ranks]


class _Rank:
    """One process, as the test sees it. Through the connection it says how it ended, and waits to be let go."""

    def __init__(self, number: int, n_ranks: int, folder: str, patience: float, function: Callable, arguments: tuple):
        self.number, self.file = number, Path(folder) / f"{number}.pt"
        self.connection, its_end = PROCESSES.Pipe()
        arguments = (number, n_ranks, folder, patience, function, arguments, its_end)
        self.process = PROCESSES.Process(target=_be_a_rank, args=arguments, daemon=True)
        self.process.start()
        its_end.close()
        self.done = False

    def error(self) -> str | None:
        """Of a rank that is done, None if all went well."""
        self.done = True
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join(PATIENCE_WITH_OTHERS)
            return f"gone without a word, exit code {self.process.exitcode}"

    def end(self) -> None:
        if not self.done:
            self.process.kill()
        self.connection.close()
        self.process.join()


def _wait_for(ranks: list[_Rank], patience: float) -> dict[int, str]:
    """Number of the rank -> its error, of those that have failed, in the order in which they did."""
    errors = {}
    deadline = time.monotonic() + patience
    waiting = {rank.connection: rank for rank in ranks}
    while waiting:
        done = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        for connection in done:
            rank = waiting.pop(connection)
            error = rank.error()
            if error is not None:
                errors[rank.number] = error
                deadline = min(deadline, time.monotonic() + PATIENCE_WITH_OTHERS)
        if not done:
            return errors | {rank.number: "no end in time" for rank in waiting.values()}
    return errors


def _be_a_rank(
    rank: int, n_ranks: int, folder: str, patience: float, function: Callable, arguments: tuple, connection: Connection
) -> None:
    """What a forked process does."""
    torch.set_num_threads(1)
    error = None
    try:
        # Whoever waits for a rank that hangs has the time to say where.
        store, timeout = dist.FileStore(f"{folder}/store", n_ranks), timedelta(seconds=patience / 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks, timeout=timeout)
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    except BaseException:
        error = traceback.format_exc()
    connection.send(error)
    if error is None:
        # Others may not be done with this rank yet; those who wait for one that failed are to find it gone.
        connection.poll(None)
    os._exit(0)

"""Runs a function in several processes of this machine that form a process group (gloo), one thread each.

def add(number):
    return dist.get_rank() + number  # torch.distributed is initialized

assert run_ranks(4, add, 10) == [10, 11, 12, 13]

The processes are a pool, one for each number of ranks, that serves many calls: starting processes is cheap, but most of
what PyTorch does for the first time in a process (DTensor, FSDP, the compiler) is not.
"""

import contextlib
import gc
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers.processes import PROCESSES

# Seconds; far more than anything takes here. It ends what hangs, and is no measure of speed.
PATIENCE = 240
# Seconds that the other ranks get, after the first one that fails, to report their errors.
PATIENCE_WITH_OTHERS = 5

# After this many calls a pool is made anew: gloo keeps the threads of groups that were destroyed, some ten a call, and
# each of them wakes a hundred times a second.
CALLS_OF_A_POOL = 5

# How names of this repository's modules begin.
OURS = ("lingua", "apps", "tests", "test_")


def run_ranks(
    n_ranks: int, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE, anew: bool = False
) -> list[Any]:
    """Calls `function(*arguments)`, of a module's top level, on `n_ranks` ranks; returns what each of them returned.

    That may be anything that torch.save and torch.load (weights_only) take. What fails on a rank fails here, with the
    tracebacks of all ranks that failed, the first one first (AssertionError); the next call gets new processes.

    Each call finds what it would find in new processes: torch's random numbers begin anew, and modules of this
    repository are as they were, whatever a call has assigned to their names. Groups that a call has made are destroyed,
    and what torch has cached of them or compiled is dropped. `anew`: in new processes in fact, to measure their RAM.
    """
    pool = _POOLS.pop(n_ranks, None)
    if pool is not None and (anew or pool.patience != patience):
        pool.end()
        pool = None
    pool = pool or _Pool(n_ranks, patience)
    try:
        results = pool.call(function, arguments)
    except BaseException:
        pool.end()
        raise
    if pool.n_calls < CALLS_OF_A_POOL:
        _POOLS[n_ranks] = pool
    else:
        pool.end()
    return results


def end_pools() -> None:
    """Ends the processes that wait for another call; their threads wake all the time."""
    while _POOLS:
        _POOLS.popitem()[1].end()


@contextlib.contextmanager
def fake_ranks(n_ranks: int) -> Iterator[None]:
    """Makes this process the first of `n_ranks` of which the others are not there.

    Collectives send nothing. Their results have the sizes that they would have, and the values of this rank: what is
    gathered is as if the others had the same, what is reduced is not added up.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    try:
        yield
    finally:
        _forget_groups()
        dist.destroy_process_group()


class _Pool:
    """Ranks that have met. It ends with this process, as its processes are daemons."""

    def __init__(self, n_ranks: int, patience: float):
        self.patience, self.n_calls = patience, 0
        self._store = dist.TCPStore("127.0.0.1", 0, n_ranks, is_master=True, wait_for_workers=False)
        self._ranks = [_Rank(rank, n_ranks, self._store.port, patience) for rank in range(n_ranks)]

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        self.n_calls += 1
        for rank in self._ranks:
            rank.start(function, arguments)
        results, errors = self._wait()
        if errors:
            n_ranks = len(self._ranks)
            raise AssertionError("\n".join(f"rank {rank} of {n_ranks}: {error}" for rank, error in errors.items()))
        return [torch.load(io.BytesIO(results[rank.number])) for rank in self._ranks]

    def _wait(self) -> tuple[dict[int, bytes], dict[int, str]]:
        """Number of the rank -> its result, and its error, of those that failed in the order in which they did."""
        results, errors = {}, {}
        deadline = time.monotonic() + self.patience
        waiting = {rank.connection: rank for rank in self._ranks}
        while waiting:
            done = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            for connection in done:
                rank = waiting.pop(connection)
                error, result = rank.outcome()
                if error is None:
                    results[rank.number] = result
                else:
                    errors[rank.number] = error
                    deadline = min(deadline, time.monotonic() + PATIENCE_WITH_OTHERS)
            if not done:
                errors |= {rank.number: "no end in time" for rank in waiting.values()}
                break
        return results, errors

    def end(self) -> None:
        for rank in self._ranks:
            rank.end()


_POOLS: dict[int, _Pool] = {}


class _Rank:
    """One process, as the test sees it."""

    def __init__(self, number: int, n_ranks: int, port: int, patience: float):
        self.number = number
        self.connection, its_end = PROCESSES.Pipe()
        self.process = PROCESSES.Process(
            target=_be_a_rank, args=(number, n_ranks, port, patience, its_end), daemon=True
        )
        self.process.start()
        its_end.close()

    def start(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone: its outcome says so
            self.connection.send(sys.path)
            self.connection.send((function, arguments))

    def outcome(self) -> tuple[str | None, bytes]:
        """Of a call that is done: the error, None if all went well, and the result."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(PATIENCE_WITH_OTHERS)
            return f"gone without a word, exit code {self.process.exitcode}", b""

    def end(self) -> None:
        self.process.kill()
        self.connection.close()
        self.process.join()


def _be_a_rank(rank: int, n_ranks: int, port: int, patience: float, connection: Connection) -> None:
    """What a forked process does: one call after the other, until one fails or the pool ends."""
    torch.set_num_threads(1)
    try:
        # Whoever waits for a rank that hangs has the time to say where.
        store, timeout = dist.TCPStore("127.0.0.1", port, n_ranks), timedelta(seconds=patience / 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks, timeout=timeout)
        random_numbers = torch.get_rng_state()
        gc.freeze()  # what is there now is looked through no more, nor its memory copied for that
        while True:
            # Test modules are found where the test process finds them.
            sys.path[:] = connection.recv()
            function, arguments = connection.recv()
            _forget_groups()
            gc.collect()
            torch.set_rng_state(random_numbers)
            with _as_they_were(_modules()):
                result = io.BytesIO()
                torch.save(function(*arguments), result)
            connection.send((None, result.getvalue()))
    except EOFError:
        pass  # the test process is gone
    except BaseException:
        connection.send((traceback.format_exc(), b""))
    # At once: those who wait for this rank are to find it gone.
    os._exit(0)


def _forget_groups() -> None:
    """Drops the groups of the call before, which all ranks are done with by now, and what is cached of them.

    DTensor's caches hold meshes that compare equal to new ones, and name groups that are no more.
    """
    torch._dynamo.reset()
    _clear_sharding_prop_cache()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(OURS)]


@contextlib.contextmanager
def _as_they_were(modules: list[ModuleType]) -> Iterator[None]:
    """Undoes what is assigned to the modules' names within, but for modules that are imported."""
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        for name in vars(module).keys() - names.keys():
            if not isinstance(vars(module)[name], ModuleType):
                del vars(module)[name]
        vars(module).update(names)

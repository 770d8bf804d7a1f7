"""The helper of the other tests: what a rank returns or raises must come out of it."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lingua import initialize
from lingua.launch import StopSignal
from tests.helpers.ranks import run_ranks


def add(number: int) -> dict[str, object]:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return {"sum": total, "own": dist.get_rank() + number, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_every_rank_returns_its_result(n_ranks):
    expected = {"sum": torch.tensor(sum(range(n_ranks))), "threads": 1}
    assert run_ranks(n_ranks, add, 10) == [{**expected, "own": 10 + rank} for rank in range(n_ranks)]


def fail_on_rank_1(how: str) -> None:
    if dist.get_rank() != 1:
        if how == "alone":
            time.sleep(1000)
        dist.barrier()
    elif how == "dies":
        os._exit(3)
    elif how == "hangs":
        time.sleep(1000)
    raise KeyError("what went wrong")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 of 3: Traceback.*fail_on_rank_1.*KeyError: 'what went wrong'.*rank . of 3: Traceback"),
        ("alone", "rank 1 of 3: Traceback.*fail_on_rank_1.*KeyError: 'what went wrong'"),
        ("dies", "rank 1 of 3: gone without a word, exit code 3"),
        ("hangs", "rank . of 3: Traceback.*barrier.*rank 1 of 3: no end in time"),
    ],
)
def test_an_error_of_any_rank_is_shown(monkeypatch, how, message):
    monkeypatch.setattr("tests.helpers.ranks.PATIENCE_WITH_OTHERS", 1)
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        run_ranks(3, fail_on_rank_1, how, patience=4 if how == "hangs" else 60)


def leave_traces() -> dict[str, object]:
    """What a call finds that the one before could have changed; then changes it."""
    found = {
        "process": os.getpid(),
        "constant": initialize.BLOCK_ELEMENTS,
        "names": sorted(vars(initialize)),
        "random": torch.rand(3).tolist(),
        "groups": len(dist.distributed_c10d._world.pg_map),
    }
    initialize.BLOCK_ELEMENTS, initialize.another = 7, 8
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = distribute_tensor(torch.arange(8.0), mesh, [Shard(0), Shard(0)])
    return {**found, "sum": (tensor + tensor).sum().full_tensor().item()}


def test_a_call_finds_nothing_of_the_one_before():
    """In the same processes. The mesh is equal to the one before, the groups that it names are others."""
    first, second = (run_ranks(4, leave_traces) for _ in range(2))
    assert first == second
    assert len({rank["process"] for rank in first}) == 4
    assert [(rank["groups"], rank["sum"]) for rank in first] == [(1, 56.0)] * 4


def test_there_are_new_processes_after_a_failure():
    before = run_ranks(2, os.getpid)
    with pytest.raises(AssertionError, match="what went wrong"):
        run_ranks(2, fail_on_rank_1, "raises")
    assert not {*before} & {*run_ranks(2, os.getpid)}


def test_stop_signals_end_forked_processes():
    """Which are others', such as a pool's workers, that a pool ends by TERM and waits for."""
    with StopSignal() as stop_signal:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop_signal.name == "SIGUSR2"

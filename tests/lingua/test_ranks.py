"""The helper of the other tests: what a rank returns or raises must come out of it."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from lingua.distributed import StopSignal
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
    monkeypatch.setattr("ranks.PATIENCE_WITH_OTHERS", 1)
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        run_ranks(3, fail_on_rank_1, how, patience=4 if how == "hangs" else 60)


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

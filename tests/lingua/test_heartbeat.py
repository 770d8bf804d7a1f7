"""Who hangs, and where: a loader that gives nothing."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from lingua import heartbeat as heartbeat_module
from lingua.data import DataArgs, build_dataloader_from_args, init_dataloader_state_from_args
from lingua.heartbeat import Watch
from tests.helpers.ranks import run_ranks

# --- the loader ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Two files of a source, each of some hundred batches."""
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "a" / f"a.chunk.{number:02d}.jsonl" for number in (0, 1)]
    for path in paths:
        path.write_text((json.dumps({"text": "some words of a document " * 10}) + "\n") * 2000)
    return paths


def read_until_it_hangs(root, hang):
    """The error, when `hang(worker)` was called behind the first batch."""
    args = DataArgs(root_dir=str(root), sources={"a": 1.0}, batch_size=4, seq_len=64, prefetch_size=1)
    with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1), timeout=4) as batches:
        next(batches)
        (worker,) = [child for child in psutil.Process().children() if "serve_batches" in " ".join(child.cmdline())]
        hang(worker)
        with pytest.raises(TimeoutError) as caught:
            for _ in batches:
                pass
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert f"process {worker.pid}, " in message
    return message


def test_a_loader_that_is_stopped(files, tmp_path):
    message = read_until_it_hangs(tmp_path, lambda worker: worker.send_signal(signal.SIGSTOP))
    assert re.match(r"data: the loader \(process \d+, stopped\) at ", message)
    assert str(files[0]) in message


def test_a_file_that_does_not_open(files, tmp_path):
    """As on a disk that does not answer: the file, not the one before it, is named."""

    def replace(_worker):
        files[1].unlink()
        os.mkfifo(files[1])

    message = read_until_it_hangs(tmp_path, replace)
    assert f"at {files[1]} has read no document for 4 s" in message


# --- ranks --------------------------------------------------------------------------------------------------------


def wait_for_one_that_sleeps(folder):
    """What a rank does that waits in something without a time limit, and one that is behind it."""
    heartbeat_module.PATIENCE_WITH_COLLECTIVES = 1
    os.dup2(os.open(f"{folder}/{dist.get_rank()}.err", os.O_CREAT | os.O_WRONLY), 2)
    with Watch(0.5, Path(folder) / "stacks") as watch:
        watch.at("waiting for data", 7)
        dist.barrier()
        if dist.get_rank() != 1:
            watch.at("computing", 7)
        time.sleep(100_000)


def test_who_waits_without_a_limit_ends(tmp_path):
    """As for a GPU, whose driver waits for ever: all but the rank that is behind end, and name it."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(3, wait_for_one_that_sleeps, str(tmp_path))
    assert re.findall(r"rank (\d) of 3: gone without a word, exit code 1", str(caught.value)) in (
        ["0", "2"],
        ["2", "0"],
    )
    stack = tmp_path / "stacks" / "rank_00001.txt"
    place = rf"on \S+, step 7, waiting for data since [\d:]+, last sign at [\d:]+, stack in {stack}"
    for rank in (0, 2):
        lines = (tmp_path / f"{rank}.err").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("error: ")]
        assert re.fullmatch(
            rf"error: lost rank 1 \({place}\): without an answer for \d+ s \(distributed.timeout\)", line
        )
    assert "wait_for_one_that_sleeps" in stack.read_text()

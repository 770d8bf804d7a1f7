"""What ranks agree on every few steps: stop signals, errors in the data, bad steps."""

import os
import re
import shutil
import signal
import time

import pytest

from lingua.distributed import CHECK_SECONDS, FEW_RANKS, DistributedArgs, World, steps_to_next_check
from lingua.launch import StopSignal
from tests.helpers.training import last_step, list_steps, read_losses, read_metrics, start_ranks, wait_until


@pytest.fixture
def start_pair(tiny, tmp_path):
    """`start_pair(*key_values, **environment)`: two ranks into tmp_path/run, which do not outlive the test."""
    started = []

    def start(*arguments, **variables):
        argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=20", *arguments]
        started.extend(ranks := start_ranks(2, argv, tmp_path, **variables))
        return ranks

    yield start
    for rank in started:
        rank.kill()
        rank.process.join()


@pytest.mark.parametrize("every", ["null", "4"])
def test_an_error_in_the_data_loses_no_step(start_pair, corpus, pair, tmp_path, every):
    """One rank has it: both save the last step that both could do, and go on from there when it is mended."""
    data = shutil.copytree(corpus, tmp_path / "data")
    file = data / "alpha" / "alpha.chunk.00.jsonl"
    good = file.read_bytes()
    lines = good.splitlines(keepends=True)
    lines[6] = b"x" + lines[6][1:]
    file.write_bytes(b"".join(lines))
    keys = [f"data.root_dir={data}", f"distributed.check_every={every}"]
    results = [rank.finish() for rank in start_pair(*keys)]
    assert [result.code for result in results] == [1, 1]
    (error,) = [result.the_error() for result in results if result.err]
    assert f"{file}:7: not a line of JSON" in error
    done = last_step(tmp_path / "run")
    assert list_steps(tmp_path / "run") == sorted({*range(5, done, 5), done})
    assert done % 5, "that is a step of the schedule's: choose another line"
    assert done % 4, "that is a step at which ranks agree: choose another line"

    file.write_bytes(good)
    results = [rank.finish().ok() for rank in start_pair(*keys)]
    assert f"starting at step {done} of 20" in results[0].out
    assert read_losses(tmp_path / "run") == read_losses(pair)


def test_signals_between_checks(start_pair, tmp_path):
    """All ranks stop at the next check, whichever of them was signaled."""
    keys = ["distributed.check_every=4", "steps=100000", "checkpoint.dump.every=100000"]
    for number, code in ((signal.SIGUSR2, 0), (signal.SIGINT, 130)):
        before = last_step(tmp_path / "run")
        first, second = start_pair(*keys)
        assert first.wait_for(lambda before=before: last_step(tmp_path / "run") >= before + 2)
        second.kill(number)
        results = [rank.finish() for rank in (first, second)]
        assert [(result.code, result.err) for result in results] == [(code, "")] * 2
        stopped = last_step(tmp_path / "run")
        assert (stopped - before) % 4 == 0
        assert f"stopped after step {stopped} by a signal" in results[0].out
        assert list_steps(tmp_path / "run")[-1] == stopped


def test_bad_steps_between_checks(start_pair, tmp_path):
    """They are skipped at once, and reported at the next check."""
    results = [rank.finish().ok() for rank in start_pair("distributed.check_every=4", "steps=11", FAULT="loss 1 5-6")]
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.findall(r"step (\d+) is skipped.*nan on rank 1", log) == ["5", "6"]
    assert "step 5, computed again with the weights of step 8, is finite everywhere\n" in log
    assert results[1].err == ""
    assert [line["guard/skipped"] for line in read_metrics(tmp_path / "run")] == [0] * 4 + [1] + [2] * 6


def test_intervals_between_checks():
    few, many = World(size=FEW_RANKS), World(size=FEW_RANKS + 1)
    args = DistributedArgs()
    assert steps_to_next_check(args, few, 1, 1e-4) == 1
    assert steps_to_next_check(args, many, 1, float("inf")) == 1
    assert [steps_to_next_check(args, many, before, 0.1) for before in (1, 2, 32, 64)] == [2, 4, 10 * CHECK_SECONDS] + [
        10 * CHECK_SECONDS
    ]
    assert steps_to_next_check(args, many, 64, CHECK_SECONDS / 3) == 3
    assert steps_to_next_check(args, many, 64, 100.0) == 1
    assert steps_to_next_check(DistributedArgs(check_every=7), few, 1, 100.0) == 7


def test_an_interrupt_is_remembered_by_the_process_itself(caplog):
    """In a forked one it is what it was before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    ready, is_ready = os.pipe()
    with StopSignal() as stop_signal:
        with stop_signal.taking_interrupts("Ctrl-C"):
            child = os.fork()
            if child == 0:
                try:
                    os.write(is_ready, b"1")
                    while True:
                        time.sleep(0.01)
                except KeyboardInterrupt:
                    os._exit(7)
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: stop_signal.is_interrupt and caplog.records)
        os.kill(os.getpid(), signal.SIGTERM)
    os.read(ready, 1)  # a signal that comes before Python has set itself up in the child is lost
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert stop_signal.name == "SIGINT"
    assert [record.getMessage() for record in caplog.records] == ["Ctrl-C"]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    os.close(ready)
    os.close(is_ready)

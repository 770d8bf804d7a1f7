"""Several ranks with a copy of the model each, on CPUs: as good as one process that has all their batches."""

import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from tests.helpers.plain import METRICS, assert_follows, load, train_plainly
from tests.helpers.training import (
    REPOSITORY,
    finish_command,
    last_step,
    list_steps,
    read_losses,
    read_metrics,
    run_command,
    start_command,
    start_ranks,
    torchrun,
    wait_until,
)

STEPS = 20


@pytest.fixture
def run(tiny, tmp_path):
    """Arguments of a run of two ranks: `run(name, *key_values)`."""
    return lambda name, *arguments: [f"config={tiny}", f"dump_dir={tmp_path / name}", f"steps={STEPS}", *arguments]


@pytest.fixture(scope="module")
def whole(tiny, build_once):
    """What an uninterrupted run of two ranks left, started as users do."""

    def build(folder):
        result = run_command(torchrun(2, [f"config={tiny}", f"dump_dir={folder / 'run'}", f"steps={STEPS}"])).ok()
        assert f"done: {STEPS} steps" in result.out

    return build_once("by torchrun", build) / "run"


def test_follows_one_process(whole, tiny):
    metrics = read_metrics(whole)
    assert [line["global_step"] for line in metrics] == list(range(1, STEPS + 1))
    argv = [f"config={tiny}", f"dump_dir={whole}", f"steps={STEPS}"]
    expected, expected_model = train_plainly(argv, 2)
    assert expected[-1][0] < 0.7 * expected[0][0], "it learns nothing, so it compares nothing"
    for line, values in zip(metrics, expected, strict=True):
        assert [line[name] for name in METRICS] == pytest.approx(values, rel=1e-3)
    assert metrics[-1]["optim/total_tokens"] == STEPS * 2 * 2 * 2 * 32
    # One copy of the weights, and the right one, is what the checkpoint holds.
    model = load(whole, STEPS)
    for name, parameter in expected_model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-2, atol=1e-3)
    places = sorted(file.name for file in (whole / "checkpoints" / "0000000020").glob("train_state_*"))
    assert places == ["train_state_00000.json", "train_state_00001.json"]


def test_clips_after_the_last_batch_of_a_step(train, plain):
    """What is averaged and clipped is the sum of a step's batches; none are of a source that is left out."""
    arguments = ["optim.clip=0.5", "data.sources.beta=0"]
    dump_dir = train("run", 2, {}, "grad_acc_steps=3", *arguments)
    assert_follows(dump_dir, plain(2, 3, *arguments))
    assert all(line["optim/grad_norm"] > 0.5 for line in read_metrics(dump_dir)), "nothing is clipped"


def test_one_rank_is_no_special_case(train, plain):
    """One process, with torchrun's variables and without, and the plain loop."""
    assert_follows(train("torchrun", 1, {}, "grad_acc_steps=2"), plain(1, 2))


def test_three_ranks(train, plain):
    """More ranks than one source has files, and a number that does not divide those of the other."""
    assert_follows(train("run", 3, {}, "grad_acc_steps=1"), plain(3, 1))


def test_killed_and_resumed(run, whole, tmp_path):
    argv = run("run")
    for goal, which in ((7, [0, 1]), (14, [1, 0])):
        ranks = start_ranks(2, argv, tmp_path)
        assert ranks[0].wait_for(lambda goal=goal: last_step(tmp_path / "run") >= goal)
        for number in which:
            ranks[number].kill()
            ranks[number].finish()
    for rank in start_ranks(2, argv, tmp_path):
        rank.finish().ok()
    assert read_losses(tmp_path / "run") == read_losses(whole)
    assert list_steps(tmp_path / "run") == [5, 10, 15, 20]


def test_signal_to_one_rank(run, whole, tmp_path):
    """All ranks stop behind the same step, with a checkpoint of it, and torchrun ends with 0."""
    argv = run("run", "checkpoint.dump.every=1000")
    launcher = start_command(torchrun(2, argv))
    wait_until(lambda: launcher.poll() is not None or last_step(tmp_path / "run") >= 4)
    for process in psutil.Process(launcher.pid).children():
        if process.environ().get("RANK") == "1":
            process.send_signal(signal.SIGUSR2)
    result = finish_command(launcher).ok()
    stopped = last_step(tmp_path / "run")
    assert f"stopped after step {stopped} by " in result.out
    assert list_steps(tmp_path / "run") == [stopped]
    assert stopped < STEPS
    for rank in start_ranks(2, argv, tmp_path):
        rank.finish().ok()
    assert read_losses(tmp_path / "run") == read_losses(whole)


def test_all_steps_done(run, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    results = [rank.finish().ok() for rank in start_ranks(2, run("run"), tmp_path)]
    assert f"all {STEPS} steps are done" in results[0].out
    assert [result.err for result in results] == ["", ""]


def test_debug_config(tmp_path):
    """The shipped config under torchrun: the first steps, of short rows."""
    data = REPOSITORY / "data" / "sample"
    if not (data / "stdlib").is_dir():
        data = tmp_path / "sample"
        script = REPOSITORY / "setup" / "make_sample_data.py"
        subprocess.run([sys.executable, script, "--out", data], check=True, capture_output=True)
    few = ["steps=3", "logging.freq=1", "data.batch_size=2", "data.seq_len=64", "data.prefetch_size=4"]
    argv = ["config=apps/main/configs/debug.yaml", f"dump_dir={tmp_path / 'run'}", f"data.root_dir={data}", *few]
    run_command(torchrun(2, argv)).ok()
    assert [step for step, _ in read_losses(tmp_path / "run")] == [1, 2, 3]
    assert list_steps(tmp_path / "run") == [3]

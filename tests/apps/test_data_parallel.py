"""Several ranks with a copy of the model each, on CPUs: as good as one process that has all their batches."""

import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer
from lingua.args import parse_args
from lingua.checkpoint import load_model
from tests.helpers.plain import train_plainly
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


def assert_follows(dump_dir, argv, n_ranks):
    metrics = read_metrics(dump_dir)
    assert [line["global_step"] for line in metrics] == list(range(1, STEPS + 1))
    plain, plain_model = train_plainly(argv, n_ranks)
    assert plain[-1][0] < 0.7 * plain[0][0], "it learns nothing, so it compares nothing"
    for line, (loss, grad_norm, value_grad_norm) in zip(metrics, plain, strict=True):
        assert line["loss/out"] == pytest.approx(loss, rel=1e-3)
        assert line["optim/grad_norm"] == pytest.approx(grad_norm, rel=1e-3)
        assert line["optim/value_grad_norm"] == pytest.approx(value_grad_norm, rel=1e-3)
    args = parse_args(TrainArgs, [str(argument) for argument in argv])
    tokens = STEPS * args.grad_acc_steps * args.data.batch_size * args.data.seq_len * n_ranks
    assert metrics[-1]["optim/total_tokens"] == tokens
    # One copy of the weights, and the right one, is what the checkpoint holds.
    model = LMTransformer(parse_config_of(dump_dir))
    load_model(dump_dir / "checkpoints" / f"{STEPS:010d}", model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain_model.get_parameter(name), rtol=1e-2, atol=1e-3)


def parse_config_of(dump_dir):
    return parse_args(TrainArgs, [f"config={dump_dir / 'config.yaml'}"]).model


def test_follows_one_process(whole, tiny):
    assert_follows(whole, [f"config={tiny}", f"dump_dir={whole}", f"steps={STEPS}"], 2)
    places = sorted(file.name for file in (whole / "checkpoints" / "0000000020").glob("train_state_*"))
    assert places == ["train_state_00000.json", "train_state_00001.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["grad_acc_steps=1", "model.productkey_args.mem_share_values=false"],
        ["grad_acc_steps=3", "optim.clip=0.5", "data.sources.beta=0"],
        ["grad_acc_steps=2", "model.weight_tying=true", "model.productkey_args.peer_variant=true"],
    ],
)
def test_variants_follow_one_process(run, tmp_path, arguments):
    argv = run("run", *arguments)
    for rank in start_ranks(2, argv, tmp_path):
        rank.finish().ok()
    assert_follows(tmp_path / "run", argv, 2)


def test_one_rank_is_no_special_case(run, tmp_path):
    """One process, with torchrun's variables and without, and the plain loop."""
    (alone,) = start_ranks(1, run("torchrun"), tmp_path)
    alone.finish().ok()
    assert_follows(tmp_path / "torchrun", run("torchrun"), 1)


def test_three_ranks(run, tmp_path):
    """More ranks than one source has files, and a number that does not divide those of the other."""
    argv = run("run", "grad_acc_steps=1")
    for rank in start_ranks(3, argv, tmp_path):
        rank.finish().ok()
    assert_follows(tmp_path / "run", argv, 3)


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

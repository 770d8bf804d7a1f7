"""Training in which steps are not finite, a rank sleeps, or a loader gives nothing."""

import re
import signal

import psutil
import pytest
import torch

from lingua.checkpoint import consolidate_checkpoints, read_consolidated
from tests.helpers.training import last_step, list_steps, read_losses, read_metrics, start_ranks


def weights(dump_dir, step):
    folder = dump_dir / "checkpoints" / f"{step:010d}"
    return read_consolidated(consolidate_checkpoints(folder) / "consolidated.pth")


def warnings_of(dump_dir):
    log = (dump_dir / "train.log").read_text()
    return [line.split(maxsplit=3)[3] for line in log.splitlines() if line.startswith("W ")]


# --- steps that are not finite --------------------------------------------------------------------------------------


def test_a_bad_step_is_passed_over(start, tmp_path):
    """It leaves what a step leaves in which the optimizer is not asked; a spike is told of."""
    for name, fault in (("bad", "loss"), ("asked not", "skip")):
        result = start(tmp_path / name, "steps=8", FAULT=f"{fault} 0 4-5").finish().ok()
        assert result.err == ""
    (*losses, bad), (*expected, _) = (read_losses(tmp_path / name) for name in ("bad", "asked not"))
    assert [step for step, loss in losses if loss is None] == [4, 5]
    assert [row for row in losses if row[1] is not None] == [row for row in expected if row[0] not in (4, 5)]
    ours, theirs = (weights(tmp_path / name, 8) for name in ("bad", "asked not"))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert [line["guard/skipped"] for line in read_metrics(tmp_path / "bad")] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert warnings_of(tmp_path / "bad") == [
        "step 4 is skipped, as if it had not been: the loss is not finite (nan)",
        "step 4, computed again, is finite everywhere: that was a passing fault, of a machine perhaps",
        "step 5 is skipped, as if it had not been: the loss is not finite (nan)",
    ]


def test_a_spike_is_told_of_and_changes_nothing(start, reference, tmp_path):
    start(tmp_path / "run", "steps=60", FAULT="spike 0 30-31").finish().ok()
    expected = read_losses(reference)
    assert [loss for step, loss in read_losses(tmp_path / "run") if step not in (30, 31)] == [
        loss for step, loss in expected if step not in (30, 31)
    ]
    (line,) = warnings_of(tmp_path / "run")
    assert re.match(r"step 30: a spike of the loss: 10\d\.\d+, \d+ times the usual deviation above the median ", line)
    counts = [(line["guard/loss_spikes"], line["guard/grad_spikes"]) for line in read_metrics(tmp_path / "run")]
    assert counts[-1] == (2, 0)


@pytest.fixture
def scontrol(tmp_path):
    """Variables of a SLURM job, in which whoever calls scontrol leaves a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path / 'called'}\n")
    (folder / "scontrol").chmod(0o755)
    return {"SLURM_JOB_ID": "7", "PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("fault", "layout", "what"),
    [
        (
            "gradient",
            "no_shard",
            r"gradients are not finite \(gradient norm nan, .*\), before averaging on rank 1 \(\S+\)",
        ),
        ("loss", "full_shard", r"the loss is not finite \(nan on rank 1 \(\S+\)\)"),
    ],
    ids=["gradient", "loss"],
)
def test_too_many_bad_steps(tiny, scontrol, tmp_path, fault, layout, what):
    """All ranks stop, with a checkpoint of the last good weights, from which the run can go on."""
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=12", "guard.max_bad_steps=3"]
    argv.append(f"distributed.fsdp_type={layout}")
    first, second = start_ranks(2, argv, tmp_path, FAULT=f"{fault} 1 6-100", **scontrol)
    error = first.finish().the_error()
    assert error.startswith("error: guard.max_bad_steps: 3 of the last 100 steps (6 to 8) were skipped, since ")
    assert "the checkpoint of step 8 has the last good weights" in error
    result = second.finish()
    assert (result.code, result.out, result.err) == (1, "", "")
    assert not (tmp_path / "called").exists(), "it asked SLURM for another go"
    lines = [line for line in warnings_of(tmp_path / "run") if "computed again" not in line]
    wanted = rf"step (\d+) is skipped, as if it had not been: {what}"
    assert [re.fullmatch(wanted, line)[1] for line in lines] == ["6", "7", "8"]
    assert list_steps(tmp_path / "run") == [5, 8]
    before, behind = weights(tmp_path / "run", 5), weights(tmp_path / "run", 8)
    assert all(torch.equal(behind[name], tensor) for name, tensor in before.items())

    results = [rank.finish().ok() for rank in start_ranks(2, argv, tmp_path)]
    assert "starting at step 8 of 12" in results[0].out
    assert list_steps(tmp_path / "run") == [5, 8, 10, 12]
    assert read_metrics(tmp_path / "run")[-1]["guard/skipped"] == 3


def test_no_checkpoint_of_weights_that_are_not_finite(start, tmp_path):
    error = start(tmp_path / "run", "steps=20", FAULT="weight 0 7").finish().the_error()
    assert error.startswith("error: step 10: weights are not finite (layers.1.attention.wq.weight), ")
    assert list_steps(tmp_path / "run") == [5]
    first, again, second = warnings_of(tmp_path / "run")
    assert (first.split()[1], second.split()[1]) == ("8", "9")
    assert again == "step 8, computed again: the first output that is not finite is that of layers.1"


# --- who hangs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def start_group(tmp_path):
    """`start_ranks`, of which nothing outlives the test."""
    started = []

    def start(n_ranks, argv, **variables):
        started.extend(ranks := start_ranks(n_ranks, argv, tmp_path, **variables))
        return ranks

    yield start
    for rank in started:
        rank.kill()
        rank.process.join()


def test_a_rank_that_sleeps_is_named_with_its_place(tiny, start_group, tmp_path):
    """The others end, and it has left its stack."""
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "distributed.timeout=5"]
    first, second, third = start_group(3, argv, FAULT="sleep 1 4")
    stack = tmp_path / "run" / "stacks" / "rank_00001.txt"
    for rank in (first, third):
        error = rank.finish().the_error()
        place = rf"on \S+, step 4, computing since [\d:]+, last sign at [\d:]+, stack in {stack}"
        assert re.match(rf"error: lost rank 1 \({place}\): dead, or ", error), error
    assert "time.sleep" in stack.read_text()
    assert second.err() == ""


def test_a_loader_that_hangs_ends_all_ranks(tiny, start_group, tmp_path):
    """In one line, on the rank whose loader it is."""
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=100000", "distributed.timeout=5"]
    first, second = start_group(2, argv)
    assert first.wait_for(lambda: last_step(tmp_path / "run") >= 2)
    (loader,) = psutil.Process(second.process.pid).children()
    loader.send_signal(signal.SIGSTOP)
    error = second.finish().the_error()
    file = rf"{tiny.parents[1]}\S*/(alpha|beta)\.chunk\.\d+\.jsonl"
    assert re.match(rf"error: data: the loader \(process {loader.pid}, stopped\) at {file} has read no ", error), error
    result = first.finish()
    assert (result.code, result.err) == (1, "")


def test_a_step_that_takes_too_long_is_told_of(start, tmp_path):
    """A process alone goes on."""
    start(tmp_path / "run", "steps=4", "distributed.timeout=3", FAULT="pause 0 3").finish().ok()
    stack = tmp_path / "run" / "stacks" / "rank_00000.txt"
    first, second = [line for line in warnings_of(tmp_path / "run") if "step 3" in line and "computing" in line]
    assert first == f"step 3: computing for 3 s by now (distributed.timeout); its stack is in {stack}"
    assert re.fullmatch(r"step 3: went on after \d+ s of computing", second)
    assert "time.sleep(4)" in stack.read_text()
    assert read_losses(tmp_path / "run")[-1][0] == 4

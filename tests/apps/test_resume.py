"""A run that is interrupted and started again computes what an uninterrupted one does, to the last bit."""

import os
import shutil
import signal

import psutil
import pytest
import torch

from lingua.checkpoint import consolidate_checkpoints, find_damage, read_consolidated
from tests.helpers.training import (
    Hold,
    computed,
    last_step,
    list_steps,
    read_losses,
    read_metrics,
    snapshot,
    wait_until,
)


def copy_run(reference, dump_dir, last):
    """A run that was ended in the middle of step `last + 3`, when its newest checkpoint was that of step `last`."""
    shutil.copytree(reference, dump_dir)
    for step in list_steps(dump_dir):
        if step > last:
            shutil.rmtree(dump_dir / "checkpoints" / f"{step:010d}")
    file = dump_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: last + 2]) + lines[last + 2][:40])


def assert_same_end(dump_dir, reference):
    assert computed(dump_dir) == computed(reference)
    states = []
    for run, copy in ((dump_dir, "a"), (reference, "b")):
        folder = shutil.copytree(run / "checkpoints" / "0000000060", dump_dir.parent / copy)
        states.append(read_consolidated(consolidate_checkpoints(folder) / "consolidated.pth"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    place = "checkpoints/0000000060/train_state_00000.json"
    assert (dump_dir / place).read_bytes() == (reference / place).read_bytes()


def test_the_loader_ends_with_its_trainer(start, tmp_path):
    run = start(tmp_path / "run", "steps=100000", "checkpoint.dump.every=100000")
    run.wait_for(lambda: last_step(tmp_path / "run") >= 3)
    (loader,) = psutil.Process(run.process.pid).children()
    run.kill()
    run.finish()
    wait_until(lambda: not loader.is_running() or loader.status() == psutil.STATUS_ZOMBIE)


def test_leftover_of_a_half_written_checkpoint(run_here, reference, tmp_path):
    dump_dir = tmp_path / "run"
    copy_run(reference, dump_dir, last=40)
    half = dump_dir / "checkpoints" / ".0000000045.tmp"
    shutil.copytree(reference / "checkpoints" / "0000000045", half)
    file = half / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (half / ".metadata").unlink()
    shutil.copytree(half, dump_dir / "checkpoints" / ".0000000005.old")

    result = run_here(dump_dir).ok()
    assert "starting at step 40 of 60" in result.out
    assert_same_end(dump_dir, reference)
    assert list_steps(dump_dir) == list(range(5, 65, 5))


@pytest.mark.parametrize("damage", ["shortened", "missing", "flipped"])
def test_damaged_newest_checkpoint(run_here, reference, tmp_path, damage):
    dump_dir = tmp_path / "run"
    copy_run(reference, dump_dir, last=45)
    file = dump_dir / "checkpoints" / "0000000045" / "__0_0.distcp"
    content = file.read_bytes()
    file.unlink()
    if damage == "shortened":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    result = run_here(dump_dir).ok()
    assert "passing over the checkpoint" in result.out
    assert "starting at step 40 of 60" in result.out
    (dump_dir / "checkpoints" / "0000000045.damaged").rename(tmp_path / "kept")
    assert_same_end(dump_dir, reference)
    assert list_steps(dump_dir) == list(range(5, 65, 5))


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_signal(start, run_here, reference, tmp_path, number):
    dump_dir = tmp_path / "run"
    keys = ("checkpoint.dump.every=1000",)
    for goal in (7, 31):
        run = start(dump_dir, *keys)
        assert run.wait_for(lambda goal=goal: last_step(dump_dir) >= goal)
        # SLURM, and whoever stops a container, signals all processes alike: the loader waits for its trainer.
        for process in (*psutil.Process(run.process.pid).children(), run.process):
            os.kill(process.pid, number)
        result = run.finish().ok()
        stopped = last_step(dump_dir)
        assert result.err == ""
        assert f"stopped after step {stopped} by {number.name}" in result.out
        assert goal <= stopped < 60
        assert list_steps(dump_dir)[-1] == stopped
    run_here(dump_dir, *keys).ok()
    assert_same_end(dump_dir, reference)


def test_interrupted_from_the_keyboard(start, run_here, reference, tmp_path):
    """The first Ctrl-C is answered by a line, and a checkpoint of the last step."""
    dump_dir = tmp_path / "run"
    run = start(dump_dir, "checkpoint.dump.every=20")
    assert run.wait_for(lambda: last_step(dump_dir) >= 25)
    for process in (*psutil.Process(run.process.pid).children(), run.process):  # as a terminal does
        os.kill(process.pid, signal.SIGINT)
    result = run.finish()
    stopped = last_step(dump_dir)
    assert (result.code, result.err) == (130, "")
    assert result.out.count("Ctrl-C: ending after this step, with a checkpoint where that takes seconds") == 1
    assert f"stopped after step {stopped} by SIGINT" in result.out
    assert list_steps(dump_dir) == [20, stopped]
    run_here(dump_dir, "checkpoint.dump.every=20").ok()
    assert_same_end(dump_dir, reference)


def test_interrupted_twice(start, run_here, reference, tmp_path):
    """It is gone at once, in the midst of writing a checkpoint; the newest one is there to go on from."""
    dump_dir = tmp_path / "run"
    hold = Hold(tmp_path / "hold", r"open .*/\.0000000040\.tmp/params\.json")
    run = start(dump_dir, "checkpoint.dump.every=20", **hold.variables)
    assert run.wait_for(hold.is_reached)
    run.kill(signal.SIGINT)
    assert run.wait_for(lambda: "Ctrl-C: " in run.out())
    run.kill(signal.SIGINT)
    result = run.finish()
    assert (result.code, result.err) == (130, "")
    assert find_damage(dump_dir / "checkpoints" / "0000000020") is None
    assert not (dump_dir / "checkpoints" / "0000000040").exists()
    run_here(dump_dir, "checkpoint.dump.every=20").ok()
    assert_same_end(dump_dir, reference)


def test_interrupted_before_the_first_step(start, tmp_path):
    """There is nothing to save yet."""
    hold = Hold(tmp_path / "hold", rf"open {tmp_path / 'run' / 'config.yaml'}")
    run = start(tmp_path / "run", **hold.variables)
    assert run.wait_for(hold.is_reached)
    run.kill(signal.SIGINT)
    hold.release()
    result = run.finish()
    assert (result.code, result.err) == (130, "")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_checkpoints_elsewhere(start, run_here, reference, tmp_path):
    keys = [f"checkpoint.path={tmp_path / 'elsewhere' / 'checkpoints'}", "checkpoint.dump.every=50"]
    run = start(tmp_path / "run", *keys)
    assert run.wait_for(lambda: last_step(tmp_path / "run") >= 52)
    run.kill()
    run.finish()
    run_here(tmp_path / "run", *keys).ok()
    assert computed(tmp_path / "run") == computed(reference)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert list_steps(tmp_path / "elsewhere") == [50, 60]
    assert "all 60 steps are done" in run_here(tmp_path / "run", *keys).ok().out


def test_signal_before_the_first_step(start, run_here, reference, tmp_path):
    dump_dir = tmp_path / "run"
    run = start(dump_dir)
    assert run.wait_for(lambda: "filling the shuffle buffer" in run.out())
    run.kill(signal.SIGUSR2)
    assert "stopped after step 0 by SIGUSR2" in run.finish().ok().out
    assert not (dump_dir / "checkpoints").exists()
    run_here(dump_dir).ok()
    assert read_losses(dump_dir) == read_losses(reference)


def test_all_steps_done(run_here, reference, tmp_path):
    dump_dir = tmp_path / "run"
    shutil.copytree(reference, dump_dir)
    before = snapshot(dump_dir)
    for steps in (60, 30):
        result = run_here(dump_dir, f"steps={steps}").ok()
        assert f"all {steps} steps are done" in result.out
        assert "nothing to do; raise steps to train on, or name another dump_dir for another run" in result.out
        assert result.err == ""
    assert snapshot(dump_dir) == before


def test_more_steps(run_here, reference, tmp_path):
    dump_dir = tmp_path / "run"
    shutil.copytree(reference, dump_dir)
    result = run_here(dump_dir, "steps=67").ok()
    assert "the learning rate of step 61 is 0.00128, and was to be 0.001 by the checkpoint's config" in result.out
    losses = read_losses(dump_dir)
    assert losses[:60] == read_losses(reference)
    assert [step for step, _ in losses] == list(range(1, 68))
    assert list_steps(dump_dir) == [*range(5, 70, 5), 67]


def test_lines_within_steps_appear_once(start, run_here, tmp_path):
    """`logging.acc_freq` writes lines between two steps; those past the newest checkpoint are computed again."""
    keys = ("logging.acc_freq=1", "grad_acc_steps=3", "steps=20", "checkpoint.dump.every=6")
    run_here(tmp_path / "whole", *keys).ok()
    run = start(tmp_path / "killed", *keys)
    assert run.wait_for(lambda: last_step(tmp_path / "killed") >= 9)
    run.kill()
    run.finish()
    run_here(tmp_path / "killed", *keys).ok()

    whole, killed = (
        [(line["global_step"], line["acc_step"], line["loss/out"]) for line in read_metrics(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert [line[:2] for line in whole] == [
        place for done in range(20) for place in ((done, 1), (done, 2), (done + 1, 0))
    ]
    assert killed == whole


def test_memory_in_bf16(run_here, tmp_path):
    """The default number format keeps the tables and their moments in bf16: they come back as they were, too."""
    keys = ("distributed.model_dtype=bf16", "steps=16", "checkpoint.dump.every=6")
    run_here(tmp_path / "whole", *keys).ok()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (12, 16):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"{step:010d}")
    run_here(tmp_path / "resumed", *keys).ok()
    assert computed(tmp_path / "resumed") == computed(tmp_path / "whole")

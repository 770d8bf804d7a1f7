"""A disk that fails in mid-run is told of on stderr, the last good checkpoint stays whole, and training goes on."""

import shutil
import signal
import subprocess

import pytest

from lingua.checkpoint import find_damage
from tests.helpers.training import (
    Training,
    bytes_of,
    last_step,
    list_steps,
    read_losses,
    read_metrics,
    small_disk,
    start_ranks,
)

# Of a run that does not end by itself, nor saves.
ENDLESS = ("steps=1000000", "checkpoint.dump.every=1000000")


def finish_quietly(runs):
    """Their results, without a traceback."""
    results = [run.finish() for run in runs]
    assert not any("Traceback" in result.err for result in results)
    return results


def stop(run, code=0):
    """By the signal that a job gets before its time is over."""
    run.kill(signal.SIGUSR2)
    (result,) = finish_quietly([run])
    assert result.code == code, result.err
    return result


def fill(disk):
    """Writes until no block is left."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.parametrize(
    ("n_ranks", "save_async", "size"),
    # Of one and 0.4 it is found before anything is written that there is no room; of one and 0.7, while writing.
    [(1, "false", 1.4), (1, "true", 1.7), (2, "false", 1.7), (2, "true", 1.4)],
)
def test_disk_without_room_for_a_second_checkpoint(tiny, pair, tmp_path, n_ranks, save_async, size):
    """Training goes on to its end, which fails, as it is not saved; with more room it goes on from the first one."""
    disk = tmp_path / "disk"
    argv = [f"config={tiny}", f"dump_dir={disk / 'run'}", f"checkpoint.save_async={save_async}", "steps=20"]
    with small_disk(disk, int(size * bytes_of(pair / "checkpoints" / "0000000005"))):
        results = finish_quietly(start_ranks(n_ranks, [*argv, "checkpoint.dump.every=8"], tmp_path))
        assert [result.code for result in results] == [1] * n_ranks
        lines = [line for result in results for line in result.err.splitlines()]
        told = [line for line in lines if "training goes on without it" in line]
        assert "checkpoint of step 16 in" in told[0]
        assert "No space left on device" in told[0]
        (error,) = [line for line in lines if line.startswith("error: ")]
        assert "checkpoint of step 20 in" in error
        assert list_steps(disk / "run") == [8]
        assert find_damage(disk / "run" / "checkpoints" / "0000000008") is None
        before = read_losses(disk / "run")
        assert [step for step, _ in before] == list(range(1, 21))

        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        (first, *_) = [rank.finish().ok() for rank in start_ranks(n_ranks, argv, tmp_path)]
        assert "starting at step 8 of 20" in first.out
        assert read_losses(disk / "run") == before
        if n_ranks == 2:
            assert before == read_losses(pair)


def test_full_disk_while_logging(start, tmp_path):
    """What could not be written of the metrics is, as soon as there is room."""
    disk = tmp_path / "disk"
    with small_disk(disk, "4m"):
        run = start(disk / "run", *ENDLESS)
        assert run.wait_for(lambda: last_step(disk / "run") >= 3)
        fill(disk)
        names = ("metrics.jsonl", "train.log")
        assert run.wait_for(lambda: all(f"{disk / 'run' / name} cannot be written" in run.err() for name in names))
        full = last_step(disk / "run")
        assert run.wait_for(lambda: f"step: {full + 20}  " in run.out())
        assert last_step(disk / "run") == full
        (disk / "filler").unlink()
        assert run.wait_for(lambda: last_step(disk / "run") > full)
        result = stop(run)
        assert result.err.count("No space left on device") == len(names)
        steps = [line["global_step"] for line in read_metrics(disk / "run")]
        assert steps == list(range(1, steps[-1] + 1))
        assert list_steps(disk / "run") == [steps[-1]]


def test_disk_that_becomes_read_only(start, tmp_path):
    """Each checkpoint is tried again before it is given up; when the disk can be written to, the next one is."""
    dump_dir = tmp_path / "run"
    run = start(dump_dir, "steps=1000000", "checkpoint.dump.every=50", "checkpoint.dump.keep=1")
    assert run.wait_for(lambda: (dump_dir / "checkpoints").is_dir() and list(dump_dir.glob("checkpoints/0*")))
    with small_disk(tmp_path / "disk", "1m"):  # that it can be, here
        pass
    subprocess.run(["mount", "--bind", str(dump_dir), str(dump_dir)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(dump_dir)], check=True)
        assert run.wait_for(lambda: "training goes on without it" in run.err())
        last = max(dump_dir.glob("checkpoints/0*"))
        assert find_damage(last) is None
    finally:
        subprocess.run(["umount", "-l", str(dump_dir)], check=True)
    assert run.wait_for(lambda: max(dump_dir.glob("checkpoints/0*")) > last)
    result = stop(run)
    assert "Read-only file system" in result.err
    assert "trying again in 1 s" in result.out
    assert "trying again in 3 s" in result.out


@pytest.mark.parametrize("fate", ["deleted", "moved away"])
def test_dump_dir_that_is_gone(start, run_here, tmp_path, fate):
    """It is made again, with what comes after that; of what was moved away the checkpoint is whole."""
    dump_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run = start(dump_dir, "steps=1000000", "checkpoint.dump.every=30")
    assert run.wait_for(lambda: list(dump_dir.glob("checkpoints/0*")))
    dump_dir.rename(elsewhere)
    if fate == "deleted":
        shutil.rmtree(elsewhere)
    assert run.wait_for(lambda: last_step(dump_dir) > 0 and list(dump_dir.glob("checkpoints/0*")))
    result = stop(run)
    assert f"{dump_dir / 'metrics.jsonl'} was deleted; it is begun anew" in result.err
    assert f"stopped after step {last_step(dump_dir)} " in (dump_dir / "train.log").read_text()
    for folder in (*dump_dir.glob("checkpoints/0*"), *elsewhere.glob("checkpoints/0*")):
        assert find_damage(folder) is None
    assert last_step(dump_dir) in list_steps(dump_dir)
    if fate == "moved away":
        shutil.rmtree(dump_dir)
        last = list_steps(elsewhere)[-1]
        result = run_here(elsewhere, f"steps={last + 1}").ok()
        assert f"starting at step {last} of" in result.out


def test_stdout_that_cannot_be_written(tiny, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / f"process.{Training._number + 1}.out").symlink_to("/dev/full")
    run = Training([f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=5"], logs)
    run.process.join()
    assert run.process.exitcode == 0
    (line,) = run.err().splitlines()
    assert "the log on stdout cannot be written ([Errno 28] No space left on device); going on without it" in line
    assert "done: 5 steps" in (tmp_path / "run" / "train.log").read_text()

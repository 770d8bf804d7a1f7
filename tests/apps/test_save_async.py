"""Checkpoints that are written in the background hold what those of a run that waits for them do, or are not there."""

import os
import shutil
import signal
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lingua.checkpoint import find_damage, find_damaged_json, read_metadata
from tests.helpers.training import Hold, last_step, list_steps, read_losses, run_in_process, start_ranks

ASYNC = "checkpoint.save_async=true"
STEPS = 20

# Where in the writing of a step's checkpoint a run can be held up.
MOMENTS = {"tensors": ("open", "/__"), "contents": ("open", r"/\.metadata"), "renaming": ("os.rename", "$")}


@pytest.fixture
def start_group(tiny, tmp_path):
    """`start_group(n_ranks, *key_values, hold=None)`: 20 steps into tmp_path/run. Nothing outlives the test."""
    started = []

    def start(n_ranks, *arguments, hold=None):
        argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", f"steps={STEPS}", ASYNC, *arguments]
        started.extend(ranks := start_ranks(n_ranks, argv, tmp_path, **(hold.variables if hold else {})))
        return ranks

    yield start
    for rank in started:
        rank.kill()
        rank.process.join()


@pytest.fixture(scope="module")
def whole(tiny, pair, build_once):
    """By number of ranks, what an uninterrupted run left that waits for its checkpoints."""

    def build(folder):
        run_in_process([f"config={tiny}", f"dump_dir={folder / 'run'}", f"steps={STEPS}"], folder).ok()

    return {1: build_once("alone", build) / "run", 2: pair}


def place_of(dump_dir, step):
    return dump_dir / "checkpoints" / f"{step:010d}"


def hold_at(tmp_path, moment, step):
    event, behind = MOMENTS[moment]
    return Hold(tmp_path / f"{moment}_{step}", rf"{event} .*/\.{step:010d}\.tmp{behind}")


def whole_steps(dump_dir):
    """The checkpoints, all of which must be whole, whatever else is in their folder."""
    steps = sorted(int(name) for name in os.listdir(dump_dir / "checkpoints") if not name.startswith("."))
    for step in steps:
        assert find_damage(place_of(dump_dir, step)) is None
        assert find_damaged_json(place_of(dump_dir, step)) is None
    return steps


def read_tensors(folder):
    entries = read_metadata(folder).state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # of loading without a process group
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def assert_same_run(dump_dir, reference):
    """Losses, and all that the checkpoints hold: weights, optimizer's moments, places in the data."""
    assert read_losses(dump_dir) == read_losses(reference)
    assert list_steps(dump_dir) == list_steps(reference)
    for step in list_steps(reference):
        ours, theirs = read_tensors(place_of(dump_dir, step)), read_tensors(place_of(reference, step))
        assert ours.keys() == theirs.keys()
        assert any(key.startswith("optim.") for key in ours)
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        for file in place_of(reference, step).glob("train_state_*.json"):
            assert (place_of(dump_dir, step) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_training_goes_on_meanwhile(start_group, whole, tmp_path, n_ranks):
    """Five steps are done before a byte of the first checkpoint is written, which holds the state of its step."""
    hold = hold_at(tmp_path, "tensors", 5)
    ranks = start_group(n_ranks, hold=hold)
    assert ranks[0].wait_for(lambda: last_step(tmp_path / "run") >= 10)
    assert hold.is_reached()
    assert whole_steps(tmp_path / "run") == []
    hold.release()
    results = [rank.finish().ok() for rank in ranks]
    assert [result.err for result in results] == [""] * n_ranks
    assert_same_run(tmp_path / "run", whole[n_ranks])


def test_split_model(start_group, tiny, tmp_path):
    """Each rank copies its parts of the tensors."""
    layout = ["distributed.fsdp_type=full_shard", "distributed.memory_parallel_size=2", "steps=7"]
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'waiting'}", *layout]
    for rank in start_ranks(2, argv, tmp_path):
        rank.finish().ok()
    for rank in start_group(2, *layout):
        rank.finish().ok()
    assert_same_run(tmp_path / "run", tmp_path / "waiting")


@pytest.mark.parametrize(
    ("n_ranks", "kills"), [(1, [("tensors", 5), ("contents", 10), ("renaming", 15)]), (2, [("tensors", 10)])]
)
def test_killed_while_writing(start_group, whole, tmp_path, n_ranks, kills):
    for moment, step in kills:
        hold = hold_at(tmp_path, moment, step)
        ranks = start_group(n_ranks, hold=hold)
        assert ranks[0].wait_for(hold.is_reached)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.finish()
        assert whole_steps(tmp_path / "run") == list(range(5, step, 5))
        assert f".{step:010d}.tmp" in os.listdir(tmp_path / "run" / "checkpoints")
    results = [rank.finish().ok() for rank in start_group(n_ranks)]
    assert f"starting at step {step - 5} of {STEPS}" in results[0].out
    assert_same_run(tmp_path / "run", whole[n_ranks])


def test_killed_at_any_moment(start_group, whole, tmp_path):
    """As soon as a checkpoint is begun, without a say in how far it is by then."""
    for step in (5, 10, 15, 20):
        beside = tmp_path / "run" / "checkpoints" / f".{step:010d}.tmp"
        (run,) = start_group(1)
        run.wait_for(lambda beside=beside, step=step: beside.exists() or place_of(tmp_path / "run", step).exists())
        run.kill()
        run.finish()
        assert whole_steps(tmp_path / "run") in ([*range(5, step, 5)], [*range(5, step + 5, 5)])
    start_group(1)[0].finish().ok()
    assert_same_run(tmp_path / "run", whole[1])


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_checkpoint_that_can_be_written_when_tried_again(start_group, whole, tmp_path, n_ranks):
    hold = hold_at(tmp_path, "tensors", 10)
    ranks = start_group(n_ranks, hold=hold)
    assert ranks[0].wait_for(hold.is_reached)
    beside = tmp_path / "run" / "checkpoints" / ".0000000010.tmp"
    shutil.rmtree(beside)
    beside.write_text("in the way")
    hold.release()
    results = [rank.finish().ok() for rank in ranks]
    assert [result.err for result in results] == [""] * n_ranks
    assert results[0].out.count("trying again in 1 s") == 1
    assert_same_run(tmp_path / "run", whole[n_ranks])


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_signal(start_group, whole, tmp_path, n_ranks):
    """While one checkpoint is being written: it is completed, and so is that of the step at which the run stops."""
    hold = hold_at(tmp_path, "tensors", 5)
    ranks = start_group(n_ranks, hold=hold)
    assert ranks[0].wait_for(lambda: hold.is_reached() and last_step(tmp_path / "run") >= 7)
    ranks[-1].kill(signal.SIGUSR2)
    hold.release()
    results = [rank.finish().ok() for rank in ranks]
    assert [result.err for result in results] == [""] * n_ranks
    stopped = last_step(tmp_path / "run")
    assert f"stopped after step {stopped} by " in results[0].out
    assert stopped < STEPS
    assert list_steps(tmp_path / "run") == whole_steps(tmp_path / "run") == sorted({*range(5, stopped, 5), stopped})

    for rank in start_group(n_ranks):
        rank.finish().ok()
    assert read_losses(tmp_path / "run") == read_losses(whole[n_ranks])


def test_rank_that_hangs_while_writing(start_group, tmp_path):
    """The other one waits for its part of the checkpoint no longer than for any answer."""
    hold = Hold(tmp_path / "second", r"open .*/\.0000000020\.tmp/__1")
    first, second = start_group(2, "distributed.timeout=5", hold=hold)
    assert first.wait_for(hold.is_reached)
    second.kill(signal.SIGSTOP)
    result = first.finish()
    assert result.code == 1
    assert result.the_error().startswith("error: ")
    assert whole_steps(tmp_path / "run") == [5, 10, 15]

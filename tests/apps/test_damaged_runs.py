"""What a run finds damaged when it is started again is never replaced, nor a run that another one is writing."""

import errno
import fcntl
import shutil

import pytest

from lingua.logger import claim
from tests.helpers.training import list_steps, read_losses, snapshot, start_ranks


def damage(dump_dir, *steps):
    """As an editor does that ends the file with a newline."""
    for step in steps:
        with open(dump_dir / "checkpoints" / f"{step:010d}" / "params.json", "a") as file:
            file.write("\n")


def copy_run(run, dump_dir, *steps):
    """With these checkpoints alone."""
    shutil.copytree(run, dump_dir)
    for step in set(list_steps(dump_dir)) - set(steps):
        shutil.rmtree(dump_dir / "checkpoints" / f"{step:010d}")
    return dump_dir


@pytest.mark.parametrize("init", [False, True])
def test_all_checkpoints_damaged(start, reference, tmp_path, init):
    dump_dir = copy_run(reference, tmp_path / "run", 40, 45)
    damage(dump_dir, 40, 45)
    before = snapshot(dump_dir)
    init_path = reference / "checkpoints" / "0000000060"
    keys = [f"checkpoint.init_ckpt_path={init_path}", "checkpoint.continue_training_from_init=true"] if init else []
    result = start(dump_dir, *keys).finish()
    error = result.the_error()
    assert error.startswith(
        f"error: '{dump_dir / 'checkpoints'}': no checkpoint is whole (of 2); the newest, 0000000045: "
    )
    assert "params.json" in error
    assert "restore one to go on from it, or move the folder away to start at step 0" in error
    assert snapshot(dump_dir) == before


def test_the_only_checkpoint_cut_short_on_two_ranks(tiny, pair, tmp_path):
    dump_dir = copy_run(pair, tmp_path / "run", 20)
    file = dump_dir / "checkpoints" / "0000000020" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    before = snapshot(dump_dir)
    first, second = start_ranks(2, [f"config={tiny}", f"dump_dir={dump_dir}", "steps=25"], tmp_path)
    assert "__1_0.distcp" in first.finish().the_error()
    result = second.finish()
    assert (result.code, result.out, result.err) == (1, "", "")
    assert snapshot(dump_dir) == before


def test_what_is_passed_over_stays(start, reference, tmp_path):
    """Damaged checkpoints under another name, and the metrics that came before them."""
    dump_dir = copy_run(reference, tmp_path / "run", 40, 45, 50)
    damage(dump_dir, 45, 50)
    damaged = [snapshot(dump_dir / "checkpoints" / f"{step:010d}") for step in (45, 50)]
    lines = (dump_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    result = start(dump_dir, "checkpoint.dump.keep=1").finish().ok()
    assert "starting at step 40 of 60" in result.out
    folder = dump_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["0000000045.damaged", "0000000050.damaged", "0000000060"]
    assert [snapshot(folder / f"{step:010d}.damaged") for step in (45, 50)] == damaged
    assert (dump_dir / "metrics.jsonl.passed_over").read_bytes() == b"".join(lines[40:])
    assert read_losses(dump_dir) == read_losses(reference)


# --- two runs in one folder -----------------------------------------------------------------------------------------


def test_a_log_that_is_gone_lets_nobody_in(start, reference, tmp_path):
    dump_dir = copy_run(reference, tmp_path / "run", 40)
    (dump_dir / "train.log").unlink()
    before = snapshot(dump_dir)
    with claim(dump_dir):
        error = start(dump_dir).finish().the_error()
    assert error.startswith(f"error: dump_dir: another run is writing into '{dump_dir}'; ")
    assert snapshot(dump_dir) == before


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """That is no reason not to run, and nothing to be silent of."""

    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    claim(tmp_path).close()
    (record,) = caplog.records
    assert "No locks available): nothing keeps a second run out of it" in record.getMessage()


# --- what it starts from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[], ["checkpoint.continue_training_from_init=true"]])
def test_initial_checkpoint_that_is_a_run(start, reference, tmp_path, keys):
    error = start(tmp_path / "run", f"checkpoint.init_ckpt_path={reference}", *keys).finish().the_error()
    assert f"checkpoint.init_ckpt_path: '{reference}' is no checkpoint; there are 12 in " in error
    assert not (tmp_path / "run").exists()

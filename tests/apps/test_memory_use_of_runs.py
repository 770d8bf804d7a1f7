"""The memories' use in a run's metrics, and over a restart."""

import json
import shutil

import pytest
from training import read_metrics, start_ranks

NAMES = {"read", "ever_read", "kl", "top_weight", "value_update_norm"}
STATE = "train_state_00000.json"


def use_in(line):
    return {name: value for name, value in line.items() if name.startswith("pk/")}


def copy_run(source, folder, step):
    shutil.copytree(source / "checkpoints" / f"{step:010d}", folder / "checkpoints" / f"{step:010d}")
    return folder / "checkpoints" / f"{step:010d}" / STATE


def test_every_log_line_tells_of_every_memory(reference):
    lines = [use_in(line) for line in read_metrics(reference)]
    assert len(lines) == 60
    for line in lines:
        assert set(line) == {f"pk/layer_{number}/{name}" for number in (1, 2) for name in NAMES}
        for number in (1, 2):
            assert 0 < line[f"pk/layer_{number}/read"] <= line[f"pk/layer_{number}/ever_read"] <= 1
    norms = [line["pk/layer_1/value_update_norm"] for line in lines]
    assert norms[0] == 0  # in the warmup's first step the learning rate is
    assert all(norm > 0 for norm in norms[1:])
    ever = [line["pk/layer_1/ever_read"] for line in lines]
    assert ever == sorted(ever)


def test_a_run_goes_on_as_one_that_was_never_stopped(start, reference, tmp_path):
    """What was ever read before it was stopped counts."""
    copy_run(reference, tmp_path / "run", 10)
    assert start(tmp_path / "run").finish().ok().err == ""
    resumed = {line["global_step"]: use_in(line) for line in read_metrics(tmp_path / "run")}
    unbroken = {line["global_step"]: use_in(line) for line in read_metrics(reference)}
    assert len(resumed) == 50
    assert resumed == {step: unbroken[step] for step in resumed}


def test_a_checkpoint_that_does_not_tell_what_was_read(start, reference, tmp_path):
    """Of an older version, say: told in the log."""
    file = copy_run(reference, tmp_path / "run", 10)
    state = json.loads(file.read_text())
    del state["memory_use"]
    file.write_text(json.dumps(state))
    (file.parent / "checksums.json").unlink()
    result = start(tmp_path / "run", "steps=20").finish().ok()
    assert "does not tell which memory slots were read: counted from here on" in result.out
    line = read_metrics(tmp_path / "run")[0]
    assert line["pk/layer_1/ever_read"] == line["pk/layer_1/read"]


def test_two_ranks_go_on_as_one(tiny, start, reference, tmp_path):
    """Both know what was read before, and tell the same of all tokens."""
    copy_run(reference, tmp_path / "run", 10)
    arguments = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=11", "grad_acc_steps=1"]
    for rank in start_ranks(2, arguments, tmp_path):
        assert rank.finish().ok().err == ""
    (line,) = read_metrics(tmp_path / "run")
    (expected,) = (line for line in read_metrics(reference) if line["global_step"] == 11)
    for name, value in use_in(expected).items():
        if not name.endswith("value_update_norm"):  # the shorter run's learning rate is another one
            assert line[name] == pytest.approx(value, rel=1e-3), name


def test_it_can_be_switched_off(start, tmp_path):
    assert start(tmp_path / "run", "steps=2", "logging.memory_use=false").finish().ok().err == ""
    assert not any(use_in(line) for line in read_metrics(tmp_path / "run"))
    assert json.loads((tmp_path / "run/checkpoints/0000000002" / STATE).read_text())["memory_use"] == {}

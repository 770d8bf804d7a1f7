"""The memories' use in a run's metrics, and over a restart."""

import shutil

import pytest

from tests.helpers.training import read_metrics, start_ranks

NAMES = {"read", "ever_read", "kl", "top_weight", "value_update_norm"}


def use_in(line):
    return {name: value for name, value in line.items() if name.startswith("pk/")}


def copy_run(source, folder, step):
    shutil.copytree(source / "checkpoints" / f"{step:010d}", folder / "checkpoints" / f"{step:010d}")


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


def test_a_run_goes_on_as_one_that_was_never_stopped(run_here, reference, tmp_path):
    """What was ever read before it was stopped counts."""
    copy_run(reference, tmp_path / "run", 40)
    assert run_here(tmp_path / "run").ok().err == ""
    resumed = {line["global_step"]: use_in(line) for line in read_metrics(tmp_path / "run")}
    unbroken = {line["global_step"]: use_in(line) for line in read_metrics(reference)}
    assert len(resumed) == 20
    assert resumed == {step: unbroken[step] for step in resumed}


def test_two_ranks_go_on_as_one(tiny, reference, tmp_path):
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


def test_switched_off_and_on_again(run_here, tmp_path):
    """A checkpoint that does not tell what was read is counted on from there, and the log says so."""
    run, off = tmp_path / "run", "logging.memory_use=false"
    assert run_here(run, "steps=5", off).ok().err == ""
    assert not any(use_in(line) for line in read_metrics(run))
    told = run_here(run, "steps=6").ok().out
    assert "does not tell which memory slots were read: counted from here on" in told
    line = read_metrics(run)[5]
    assert line["pk/layer_1/ever_read"] == line["pk/layer_1/read"]

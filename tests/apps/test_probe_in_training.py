"""Training with `probe_freq`, from the command line."""

import collections
import json
import shutil

import pytest

from tests.helpers.training import read_losses, start_ranks

PROBE = "probe_freq=4"


def read_probe(dump_dir, rank=0):
    return [json.loads(line) for line in (dump_dir / "probe" / f"probe.{rank}.jsonl").read_text().splitlines()]


def test_losses_are_those_of_a_run_without(run_here, tmp_path):
    """With two batches a step; stopped and started again in between, from a checkpoint before the last probe."""
    run = tmp_path / "run"
    assert run_here(run, PROBE, "steps=12", "optim.scheduler=constant").ok().err == ""
    assert [record["global_step"] for record in read_probe(run)][-1] == 12
    shutil.rmtree(run / "checkpoints" / "0000000012")
    result = run_here(run, PROBE, "steps=20", "optim.scheduler=constant").ok()
    assert result.err == ""
    assert "probe of step 16: " in result.out
    assert run_here(tmp_path / "plain", "steps=20", "optim.scheduler=constant").ok().err == ""
    assert read_losses(run) == read_losses(tmp_path / "plain")
    steps = collections.Counter(record["global_step"] for record in read_probe(run))
    assert list(steps) == [4, 8, 12, 16, 20]
    assert len(set(steps.values())) == 1


def test_ranks_have_files_of_their_own(tiny, pair, tmp_path):
    arguments = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=20", PROBE]
    for rank in start_ranks(2, arguments, tmp_path):
        assert rank.finish().ok().err == ""
    assert read_losses(tmp_path / "run") == read_losses(pair)
    first, second = (read_probe(tmp_path / "run", rank) for rank in range(2))
    for mine, other in zip(first, second, strict=True):
        assert all(mine[key] == other[key] for key in ("global_step", "name", "layer", "kind", "n"))
    weights, outputs = (
        [(mine["rms"], other["rms"]) for mine, other in zip(first, second, strict=True) if mine["kind"] == kind]
        for kind in ("weight", "output")
    )
    assert all(mine == pytest.approx(other) for mine, other in weights)
    assert any(mine != other for mine, other in outputs), "each looks at its own row"

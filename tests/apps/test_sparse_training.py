"""Training with `optim.value_update=sparse`, from the command line."""

import json
import re

import pytest
import torch

from apps.main.train import TrainArgs, validate_train_args
from lingua.args import parse_args
from lingua.checkpoint import consolidate_checkpoints, read_consolidated
from lingua.distributed import World
from tests.helpers.training import list_steps, read_losses, read_metrics, start_ranks

SPARSE = "optim.value_update=sparse"
STOCHASTIC = [SPARSE, "optim.value_rounding=stochastic", "distributed.model_dtype=bf16"]


def weights(dump_dir, step=60):
    folder = dump_dir / "checkpoints" / f"{step:010d}"
    return read_consolidated(consolidate_checkpoints(folder) / "consolidated.pth")


def test_losses_fall_as_with_dense_updates(start, reference, tmp_path):
    assert start(tmp_path / "run", SPARSE).finish().ok().err == ""
    losses, dense = ([loss for _, loss in read_losses(folder)] for folder in (tmp_path / "run", reference))
    assert losses[0] == dense[0]
    assert losses[:3] == pytest.approx(dense[:3], rel=1e-3)
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
    assert sum(losses[-5:]) == pytest.approx(sum(dense[-5:]), rel=0.05)
    ours, theirs = (
        [line["optim/value_grad_norm"] for line in read_metrics(folder)] for folder in (tmp_path / "run", reference)
    )
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)


def test_a_run_that_is_resumed_ends_the_same(start, tmp_path):
    """With stochastic rounding, whose random numbers are then those of the step."""
    for folder, key_values in (("whole", [[]]), ("parts", [["steps=10"], []])):
        for changes in key_values:
            options = ["steps=20", "optim.scheduler=constant", *STOCHASTIC, *changes]
            assert start(tmp_path / folder, *options).finish().ok().err == ""
        assert list_steps(tmp_path / folder)[-1] == 20
    whole, parts = (weights(tmp_path / folder, 20) for folder in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert read_losses(tmp_path / "whole") == read_losses(tmp_path / "parts")


def test_dense_and_sparse_take_over_from_each_other(start, tmp_path):
    for number, update in enumerate(("dense", "sparse", "dense"), start=1):
        start(tmp_path / "run", f"steps={10 * number}", f"optim.value_update={update}").finish().ok()
    losses = [loss for _, loss in read_losses(tmp_path / "run")]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 2


def test_tables_in_the_cpus_memory(start, tmp_path):
    """The same losses, to the last bit, and validations, which read the tables where they are, too."""
    (tmp_path / "held_out" / "words").mkdir(parents=True)
    (tmp_path / "held_out" / "words" / "a.val.jsonl").write_text('{"text": "some words of a document"}')
    evaluation = ["checkpoint.eval.every=5", f"eval.validation.root_dir={tmp_path / 'held_out'}"]
    evaluation += ["eval.validation.sources=[words]", "eval.validation.use_val_from_train_src=false"]
    runs = {name: tmp_path / name for name in ("plain", "on_cpu")}
    for name, place in (("plain", []), ("on_cpu", ["distributed.values_device=cpu"])):
        started = start(runs[name], "steps=10", SPARSE, *evaluation, *place).finish().ok()
        assert started.err == ""
        assert ("in the CPU's memory with their moments" in started.out) == (name == "on_cpu")
    assert read_losses(runs["on_cpu"]) == read_losses(runs["plain"])
    plain, on_cpu = weights(runs["plain"], 10), weights(runs["on_cpu"], 10)
    assert all(torch.equal(on_cpu[name], tensor) for name, tensor in plain.items())
    found = {name: runs[name] / "evals" / "0000000010" for name in runs}
    assert "values_device: cpu" in (found["on_cpu"] / "config.yaml").read_text()
    losses = [json.loads((folder / "validation.json").read_text())["words"]["loss"] for folder in found.values()]
    assert losses[0] == losses[1]


def test_two_ranks(tiny, tmp_path):
    arguments = [
        f"config={tiny}",
        f"dump_dir={tmp_path / 'run'}",
        "steps=10",
        "distributed.memory_parallel_size=2",
        SPARSE,
    ]
    for rank in start_ranks(2, arguments, tmp_path):
        assert rank.finish().ok().err == ""
    losses = [loss for _, loss in read_losses(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optim.value_update=spares"], ["optim.value_update", "spares"]),
        ([SPARSE, "optim.value_rounding=random"], ["optim.value_rounding", "random"]),
        (STOCHASTIC[1:], ["optim.value_rounding", "value_update"]),
        (STOCHASTIC[:2], ["optim.value_rounding", "distributed.model_dtype=fp32"]),
        (["distributed.values_device=cpu"], ["distributed.values_device", "set optim.value_update=sparse"]),
    ],
)
def test_what_does_not_go_together(tiny, arguments, words):
    args = parse_args(TrainArgs, [f"config={tiny}", *arguments])
    with pytest.raises(ValueError, match=".") as caught:
        validate_train_args(args, World())
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_tables_that_do_not_fit_the_cpus_memory(start, tmp_path):
    arguments = [SPARSE, "distributed.values_device=cpu", "model.productkey_args.mem_n_keys=1000000"]
    line = start(tmp_path / "run", *arguments).finish().the_error()
    assert "model.productkey_args.mem_n_keys=1000000" in line
    assert "value tables, with moments take 357,627.9 GiB" in line
    assert not (tmp_path / "run").exists()


def test_tables_that_are_split_by_rows_are_refused(tiny):
    args = parse_args(TrainArgs, [f"config={tiny}", "distributed.fsdp_type=full_shard", SPARSE])
    with pytest.raises(
        ValueError, match=re.escape("optim.value_update: sparse cannot be combined with distributed.fsdp_type")
    ):
        validate_train_args(args, World(size=2))
    for key_value in ("distributed.memory_parallel_size=2", "distributed.tp_size=2"):
        args = parse_args(TrainArgs, [f"config={tiny}", "distributed.fsdp_type=full_shard", SPARSE, key_value])
        validate_train_args(args, World(size=4))

"""The planner as a user meets it; what its figures are worth is in lingua/test_footprint.py."""

import dataclasses
import json
import sys

import pytest
import torch

from apps.main import plan
from apps.main.footprint import ModelParts, footprint
from apps.main.plan import PlanArgs, describe, other_layouts, validate_plan_args, verdict
from apps.main.train import build_model
from lingua.args import parse_args

CONFIGS = "apps/main/configs"
SEVEN_B = [f"config={CONFIGS}/pk_7b.yaml", "world_size=256"]
# The largest of the paper: 8192 ** 2 slots.
LARGEST = [
    f"config={CONFIGS}/llama_1B.yaml",
    "world_size=1024",
    "model.productkey_args.is_enabled=true",
    "model.productkey_args.layers=4,12,20",
    "model.productkey_args.mem_n_keys=8192",
]


def planned(*arguments):
    args = parse_args(PlanArgs, list(arguments))
    world, notes = validate_plan_args(args)
    return args, world, notes, ModelParts(build_model(args), args.data.seq_len)


def say(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()
    return capsys.readouterr().out


def test_what_is_said_of_a_7b_model(monkeypatch, capsys, tmp_path):
    out = say(monkeypatch, capsys, *SEVEN_B, "gpu_memory=80", f"out={tmp_path / 'plan.json'}")
    assert "6,464,768,000 parameters, 4,294,967,296 in value tables, 32,000 words" in out
    assert "note: data.tokenizer.path" in out
    assert "does not fit" in out
    assert "fsdp_type=full_shard dp_shard=8 memory_parallel_size=8 " in out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert not figures["fits"]
    row = figures["rows"][0]
    # fp32 weights of the dense part and an eighth of the bf16 table; gradients like them, moments twice.
    assert row["parameters"] == row["gradients"] == 4 * 6_464_768_000 + 2 * 4_294_967_296 // 8
    assert row["moments"] == 2 * row["parameters"]
    # The dense part's gradients in fp32 over all, the table's over those that hold the same columns.
    sent = {(e["collective"], e["dimension"]): (e["ranks"], e["payload"]) for e in row["exchanges"]}
    assert sent["all-reduce", "dp_replicate"] == (256, 4 * 6_464_768_000)
    assert sent["all-reduce", "memory_replicate"] == (32, 4 * 4_294_967_296 // 8)
    assert {dimension for _, dimension in sent} == {"dp_replicate", "memory_replicate", "memory_parallel"}


def test_the_paper_s_largest_table(monkeypatch, capsys):
    out = say(monkeypatch, capsys, *LARGEST, "distributed.memory_parallel_size=128")
    assert "137,438,953,472 in value tables, 128,256 words" in out
    assert "\nfits: " in out


def test_layouts_that_are_said_to_fit_are_configs_that_do(tmp_path):
    args, world, _, parts = planned(*SEVEN_B)
    layouts = other_layouts(args, world, parts)
    fitting = [pair for pair in layouts if verdict(pair[1], 80) == "fits"]
    assert 0 < len(fitting) < len(layouts)
    assert len({describe(layout) for layout, _ in layouts}) == len(layouts)
    for layout, of_layout in fitting[:: len(fitting) // 5]:
        keys = [f"distributed.{key}" for key in describe(layout).split() if key != "(nothing)"]
        defaults = ["memory_parallel_size=1", "checkpoint_each_layer=false"]
        again = planned(*SEVEN_B, *(f"distributed.{default}" for default in defaults), *keys)
        assert footprint(again[0], again[1], again[3]).total == of_layout.total


def test_nothing_fits(monkeypatch, capsys):
    out = say(monkeypatch, capsys, *SEVEN_B, "gpu_memory=1")
    assert "none of" in out


def test_one_gpu(monkeypatch, capsys):
    out = say(monkeypatch, capsys, f"config={CONFIGS}/debug.yaml")
    assert "258 words" in out  # the tokenizer of bytes needs no file
    assert "sent in a step" not in out
    assert "3 of 3 layouts fit" in out


def test_each_means_does_what_it_is_for():
    def figures(*arguments):
        args, world, _, parts = planned(f"config={CONFIGS}/pkplus_373m_1024k.yaml", "world_size=16", *arguments)
        return footprint(args, world, parts)

    plain = figures()
    assert figures("distributed.checkpoint_each_layer=true").activations < plain.activations / 4
    selective = figures("distributed.selective_activation_checkpointing=true")
    assert plain.activations / 2 < selective.activations < plain.activations
    assert figures("distributed.fsdp_type=full_shard").parameters < plain.parameters
    assert figures("distributed.memory_parallel_size=16").parameters < plain.parameters
    assert figures("grad_acc_steps=4").tokens_per_step == 4 * plain.tokens_per_step
    by_rows = figures("optim.value_update=sparse", "data.batch_size=1", "data.seq_len=16")
    assert by_rows.gradients < figures("data.batch_size=1", "data.seq_len=16").gradients
    assert any(exchange.at_most for exchange in by_rows.exchanges)
    # A CPU keeps of each norm what a GPU's kernel does not.
    args, world, _, parts = planned(f"config={CONFIGS}/debug.yaml")
    on_cpu = dataclasses.replace(world, device=torch.device("cpu"))
    assert footprint(args, on_cpu, parts).activations > footprint(args, world, parts).activations


def test_what_the_user_should_know():
    notes = planned(*SEVEN_B, "model.vocab_size=50000", "distributed.compile=true", "optim.value_update=sparse")[2]
    assert [note.split()[0] for note in notes] == ["compiled", "sparse"]
    args, _, notes, _ = planned(*SEVEN_B, "model.vocab_size=50000", "distributed.float8_recipe=rowwise")
    assert args.model.vocab_size == 50_000
    assert [note.split()[0] for note in notes] == ["float8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["world_size=0"], ["world_size", "0"]),
        (["gpu_memory=0"], ["gpu_memory"]),
        (["gpu_memory=nan"], ["gpu_memory"]),
        (["out=/no/such/plan.json"], ["out", "/no/such"]),
        (["grad_acc_steps=0"], ["grad_acc_steps"]),
        (["data.batch_size=0"], ["data.batch_size"]),
        (["data.seq_len=-1"], ["data.seq_len"]),
        (["data.tokenizer.name=words"], ["data.tokenizer.name", "words"]),
        (["model.vocab_size=0"], ["model.vocab_size"]),
        (["model.n_heads=5"], ["model.n_heads", "5"]),
        (["world_size=12"], ["distributed.memory_parallel_size", "8", "12 ranks"]),
        (["distributed.dp_shard=512"], ["distributed.dp_shard", "512"]),
        (["distributed.tp_size=8"], ["distributed.memory_parallel_size", "tp_size=8"]),
        (["distributed.model_dtype=fp8"], ["distributed.model_dtype"]),
        (["distributed.values_device=cpu"], ["distributed.values_device", "null"]),
        (["optim.value_update=rows"], ["optim.value_update"]),
        (
            ["optim.value_update=sparse", "distributed.fsdp_type=full_shard", "distributed.memory_parallel_size=1"],
            ["optim.value_update", "full_shard"],
        ),
        (["gpu_memori=80"], ["gpu_memori", "gpu_memory"]),
    ],
)
def test_wrong_input(arguments, words):
    with pytest.raises(ValueError, match=".") as caught:
        planned(*SEVEN_B, *arguments)
    assert "\n" not in str(caught.value)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, caught.value

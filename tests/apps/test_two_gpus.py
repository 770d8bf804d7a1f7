"""Layouts of two GPUs through NCCL, each beside the same on CPUs; a lost rank."""

import json
import shutil

import pytest
import torch

from tests.helpers.plain import STEPS
from tests.helpers.training import last_step, list_steps, read_losses, read_metrics, start_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices"),
]

SPARSE = "optim.value_update=sparse"
PEER = "model.productkey_args.peer_variant=true"
# distributed.*, keys
LAYOUTS = {
    "data parallel": ({}, []),
    "data parallel, accumulation, sparse updates": ({}, ["grad_acc_steps=2", SPARSE]),
    "full_shard": ({"fsdp_type": "full_shard"}, []),
    "full_shard, each layer checkpointed": ({"fsdp_type": "full_shard", "checkpoint_each_layer": True}, []),
    "tensor parallel": ({"tp_size": 2}, []),
    "tensor parallel, PEER": ({"tp_size": 2}, [PEER]),
    "memory parallel": ({"memory_parallel_size": 2}, []),
    "memory parallel, accumulation": ({"memory_parallel_size": 2}, ["grad_acc_steps=2"]),
    "memory parallel, PEER": ({"memory_parallel_size": 2}, [PEER]),
    "memory parallel, sparse updates": ({"memory_parallel_size": 2}, [SPARSE]),
    "memory parallel, full_shard": ({"memory_parallel_size": 2, "fsdp_type": "full_shard"}, []),
    "memory parallel, tables in the CPU's memory": ({"memory_parallel_size": 2, "values_device": "cpu"}, [SPARSE]),
    "memory parallel, compile": ({"memory_parallel_size": 2, "compile": True}, []),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_goes_on_as_cpus_do(name, train, tmp_path):
    """From a checkpoint of CPUs, since each kind of device draws weights of its own."""
    distributed, arguments = LAYOUTS[name]
    arguments = ["grad_acc_steps=1", "checkpoint.dump.every=5", *arguments]
    cpus = train("cpus", 2, {**distributed, "compile": False}, *arguments, CUDA_VISIBLE_DEVICES="")
    shutil.copytree(cpus / "checkpoints/0000000005", tmp_path / "gpus/checkpoints/0000000005")
    gpus = train("gpus", 2, distributed, *arguments)
    lines = read_metrics(gpus)
    assert [line["global_step"] for line in lines] == list(range(6, STEPS + 1))
    for name in ("loss/out", "optim/grad_norm", "optim/value_grad_norm"):
        expected = [line[name] for line in read_metrics(cpus)[5:]]
        assert [line[name] for line in lines] == pytest.approx(expected, rel=1e-3)
    assert lines[-1]["loss/out"] < 0.7 * read_losses(cpus)[0][1]


def test_half_precision_and_saving_beside_training(train, tmp_path):
    """In bf16, with evaluation: what was saved while training went on goes on as the run did, in another layout."""
    (tmp_path / "held_out" / "words").mkdir(parents=True)
    (tmp_path / "held_out" / "words" / "a.val.jsonl").write_text('{"text": "some words of a document"}')
    arguments = ["distributed.model_dtype=bf16", "checkpoint.save_async=true", "checkpoint.eval.every=10"]
    arguments += [f"eval.validation.root_dir={tmp_path / 'held_out'}", "eval.validation.sources=[words]"]
    arguments += ["eval.validation.use_val_from_train_src=false", "checkpoint.dump.every=5", "steps=20"]
    whole = train("whole", 2, {"memory_parallel_size": 2, "fsdp_type": "full_shard"}, *arguments)
    assert list_steps(whole) == [5, 10, 15, 20]
    for step in (10, 20):
        assert json.loads((whole / "evals" / f"{step:010d}" / "validation.json").read_text())["words"]["loss"] > 0
    shutil.copytree(whole / "checkpoints/0000000010", tmp_path / "again/checkpoints/0000000010")
    expected = dict(read_losses(whole))
    for step, loss in read_losses(train("again", 2, {"fsdp_type": "full_shard"}, *arguments)):
        assert loss == pytest.approx(expected[step], rel=5e-2)
    assert expected[20] < 0.7 * expected[1]


def test_a_lost_rank_is_named(tiny, tmp_path):
    """What waits for it in NCCL ends by itself, in one line."""
    arguments = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=1000000", "distributed.timeout=10"]
    ranks = start_ranks(2, [*arguments, "distributed.memory_parallel_size=2"], tmp_path)
    assert ranks[0].wait_for(lambda: last_step(tmp_path / "run") >= 20)
    ranks[1].kill()
    result = ranks[0].finish()
    assert result.code != 0
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "lost rank 1" in errors[0]

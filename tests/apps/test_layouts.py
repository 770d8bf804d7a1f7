"""Every layout of ranks trains as one process that has all their batches does; checkpoints go from any to any."""

import shutil

import pytest
import torch

from lingua.checkpoint import consolidate_checkpoints
from tests.helpers.plain import STEPS, assert_follows, load
from tests.helpers.training import list_steps, read_losses, read_metrics

TABLE = "layers.1.feed_forward.values.weight"

# Ranks, how many of them have different data, distributed.*. Between them: whatever `distributed` has parallelize() do.
# That each layout's gradients, norms and updates are those of one process, for any model, is proved in tests/lingua:
# test_parallelize.py, test_golden_on_ranks.py, test_sparse_adamw.py. Data parallel alone is in test_data_parallel.py.
LAYOUTS = {
    "full_shard 2, each layer checkpointed": (2, 2, {"fsdp_type": "full_shard", "checkpoint_each_layer": True}),
    "HSDP 2 x 2": (4, 4, {"fsdp_type": "full_shard", "dp_replicate": 2, "dp_shard": 2}),
    "tensor parallel 2 x data parallel 2": (4, 2, {"tp_size": 2}),
    "memory parallel 2, selective checkpointing": (
        2,
        2,
        {"memory_parallel_size": 2, "selective_activation_checkpointing": True},
    ),
    "HSDP 2 x 2, memory parallel 2": (4, 4, {"fsdp_type": "full_shard", "dp_shard": 2, "memory_parallel_size": 2}),
    "compile, memory parallel 2": (2, 2, {"compile": True, "memory_parallel_size": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_follows_one_process(name, train, plain):
    n_ranks, data_ranks, distributed = LAYOUTS[name]
    grad_acc_steps = 1 if "compile" in distributed else 2  # compiling takes long enough
    dump_dir = train("run", n_ranks, distributed, f"grad_acc_steps={grad_acc_steps}")
    assert_follows(dump_dir, plain(data_ranks, grad_acc_steps))
    places = sorted((dump_dir / "checkpoints" / f"{STEPS:010d}").glob("train_state_*.json"))
    assert len(places) == data_ranks
    assert read_metrics(dump_dir)[-1]["optim/total_tokens"] == STEPS * grad_acc_steps * data_ranks * 2 * 32


# The same four batches of two rows in each step.
BATCHES = {4: ["grad_acc_steps=1"], 2: ["grad_acc_steps=2"], 1: ["grad_acc_steps=2", "data.batch_size=4"]}


def test_checkpoints_move_between_layouts(train, plain, tmp_path):
    """Steps 1 to 4 on four ranks, to 8 on two, to 10 on one, and from 8 on four again, each in another layout."""
    legs = [
        ("first", 4, {"fsdp_type": "full_shard", "dp_shard": 2}, None),
        ("second", 2, {"memory_parallel_size": 2}, ("first", 4)),
        ("third", 1, {}, ("second", 8)),
        ("fourth", 4, {"fsdp_type": "full_shard", "memory_parallel_size": 4}, ("second", 8)),
        ("fifth", 2, {"fsdp_type": "full_shard", "checkpoint_each_layer": True}, ("fourth", 9)),
    ]
    expected, model = plain(4, 1)
    for name, n_ranks, distributed, before in legs:
        start = 0
        if before is not None:
            start = before[1]
            folder = f"checkpoints/{start:010d}"
            shutil.copytree(tmp_path / before[0] / folder, tmp_path / name / folder)
        every = "checkpoint.dump.every=1" if name == "fourth" else "checkpoint.dump.every=4"
        dump_dir = train(name, n_ranks, distributed, every, *BATCHES[n_ranks])
        losses = read_losses(dump_dir)
        assert [step for step, _ in losses] == list(range(start + 1, STEPS + 1))
        assert [loss for _, loss in losses] == pytest.approx([row[0] for row in expected[start:]], rel=1e-4)
        torch.testing.assert_close(
            load(dump_dir).get_parameter(TABLE), model.get_parameter(TABLE), rtol=1e-4, atol=1e-6
        )


def test_tensor_parallel_ranks_share_a_place_in_the_data(train, plain, tmp_path):
    """Two ranks of tensor parallelism go on as one rank, and the other way round."""
    train("split", 2, {"tp_size": 2}, "grad_acc_steps=1", "checkpoint.dump.every=4")
    shutil.copytree(tmp_path / "split/checkpoints/0000000004", tmp_path / "whole/checkpoints/0000000004")
    whole = train("whole", 1, {}, "grad_acc_steps=1", "checkpoint.dump.every=7")
    shutil.copytree(tmp_path / "whole/checkpoints/0000000007", tmp_path / "again/checkpoints/0000000007")
    again = train("again", 2, {"tp_size": 2}, "grad_acc_steps=1")
    expected, _ = plain(1, 1)
    for dump_dir, start in ((whole, 4), (again, 7)):
        assert [loss for _, loss in read_losses(dump_dir)] == pytest.approx(
            [row[0] for row in expected[start:]], rel=1e-4
        )


def test_starts_from_the_weights_of_a_consolidated_checkpoint(reference, train, tmp_path):
    """`init_ckpt_path`: the first loss is the one that the checkpoint's model has, where all that can be split is."""
    shutil.copytree(reference / "checkpoints" / "0000000010", tmp_path / "0000000010")
    consolidated = consolidate_checkpoints(tmp_path / "0000000010")
    arguments = ["steps=3", "grad_acc_steps=1", f"checkpoint.init_ckpt_path={consolidated}", "optim.warmup=0"]
    losses = []
    for run, layout in {"split": {"memory_parallel_size": 2, "fsdp_type": "full_shard"}, "plain": {}}.items():
        losses.append([loss for _, loss in read_losses(train(run, 2, layout, *arguments))])
        assert list_steps(tmp_path / run)[-1] == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] < 4.5

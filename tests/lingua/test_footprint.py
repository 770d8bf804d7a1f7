"""apps/main/footprint.py: what a rank holds and sends by arithmetic, beside what is measured on ranks."""

from typing import Any

import pytest
import torch

from apps.bench.layout import compare, measure
from apps.main.footprint import footprint
from apps.main.train import TrainArgs
from lingua.args import from_dict
from lingua.distributed import World, validate_distributed_args
from lingua.memory_use import bytes_held
from lingua.parallelize import validate_parallelism
from tests.helpers.ranks import fake_ranks, run_ranks

MEMORY = {"is_enabled": True, "layers": "1,3", "mem_n_keys": 24, "mem_heads": 2, "mem_knn": 8, "mem_k_dim": 16}
SIZES = {"dim": 64, "n_layers": 4, "n_heads": 4, "multiple_of": 40, "vocab_size": 96, "max_seqlen": 32}


def config(
    memory: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **sections: Any
) -> dict[str, Any]:
    return {
        "data": {"batch_size": 2, "seq_len": 32},
        "model": {**SIZES, **(model or {}), "productkey_args": {**MEMORY, **(memory or {})}},
        **sections,
    }


# Beside the feed-forwards of two blocks, in a model with product keys in others.
TOKENS = {"memories": {"tokens": {"layers": "0,2", "n_slots": 50, "n_hashes": 3}}}
BF16, FP32 = {"model_dtype": "bf16"}, {"model_dtype": "fp32"}
FULL = {"fsdp_type": "full_shard"}
CASES = {
    1: {
        "bf16": config(distributed=BF16),
        "fp32": config(distributed=FP32),
        "dense": config({"is_enabled": False}, {"n_kv_heads": 2, "weight_tying": True}, distributed=BF16),
        "wide heads, gated, v_dim": config(
            {"mem_gated": True, "mem_v_dim": 24}, {"head_dim": 24, "n_heads": 3}, distributed=BF16
        ),
        "qk_norm": config({"mem_qk_norm": True}, distributed=BF16),
        "qk_norm in fp32": config({"mem_qk_norm": True}, distributed=FP32),
        "bare memory": config({"swilu_projection": False, "mem_gated": True}, distributed=FP32),
        "bare memory, v_dim": config({"swilu_projection": False, "mem_v_dim": 24}, distributed=BF16),
        "separate PEER": config({"peer_variant": True, "mem_share_values": False}, distributed=BF16),
        "PEER in fp32": config({"peer_variant": True}, distributed=FP32),
        "checkpoint_each_layer": config(distributed={**BF16, "checkpoint_each_layer": True}),
        "selective": config(distributed={**BF16, "selective_activation_checkpointing": True}),
        "selective PEER in fp32": config(
            {"peer_variant": True, "mem_gated": True},
            distributed={**FP32, "selective_activation_checkpointing": True},
        ),
        "window": config(None, {"sliding_window": 7}, distributed=BF16),
        "window, selective": config(
            None, {"sliding_window": 7}, distributed={**FP32, "selective_activation_checkpointing": True}
        ),
        "fp16, PEER": config({"peer_variant": True}, distributed={"model_dtype": "fp16"}),
        "fp16": config({"mem_gated": True}, distributed={"model_dtype": "fp16"}),
        "sparse": config(optim={"value_update": "sparse"}, distributed=FP32),
        "Muon": config(optim={"name": "muon"}, distributed=BF16),
        "token memory": config(None, TOKENS, distributed=BF16),
        "token memory alone, fp32, sparse": config(
            {"is_enabled": False}, TOKENS, optim={"value_update": "sparse"}, distributed=FP32
        ),
        "token memory, selective": config(
            None, TOKENS, distributed={**BF16, "selective_activation_checkpointing": True}
        ),
    },
    2: {
        "data parallel": config(distributed=BF16, grad_acc_steps=2),
        "data parallel, fp32, tied": config(None, {"weight_tying": True}, distributed=FP32),
        "full_shard": config(None, {"vocab_size": 97}, distributed={**BF16, **FULL}, grad_acc_steps=2),
        "full_shard, checkpointed": config(
            {"mem_share_values": False},
            {"weight_tying": True},
            distributed={**BF16, **FULL, "checkpoint_each_layer": True},
        ),
        "tensor parallel": config(distributed={**BF16, "tp_size": 2}, grad_acc_steps=2),
        "tensor parallel PEER, selective": config(
            {"peer_variant": True},
            distributed={**FP32, "tp_size": 2, "selective_activation_checkpointing": True},
        ),
        "tensor parallel, checkpointed": config(
            {"swilu_projection": False, "peer_variant": True},
            distributed={**FP32, "tp_size": 2, "checkpoint_each_layer": True},
        ),
        "memory parallel": config(distributed={**BF16, "memory_parallel_size": 2}, grad_acc_steps=2),
        "memory parallel PEER, full_shard": config(
            {"peer_variant": True}, distributed={**BF16, **FULL, "memory_parallel_size": 2}
        ),
        "token memory, tensor parallel": config(None, TOKENS, distributed={**BF16, "tp_size": 2}),
        "token memory, memory parallel, sparse": config(
            None,
            TOKENS,
            optim={"value_update": "sparse"},
            distributed={**FP32, "memory_parallel_size": 2},
            grad_acc_steps=2,
        ),
        "token memory, full_shard": config(None, TOKENS, distributed={**BF16, **FULL}),
        "memory parallel, sparse, checkpointed": config(
            optim={"value_update": "sparse"},
            distributed={**FP32, "memory_parallel_size": 2, "checkpoint_each_layer": True},
        ),
    },
    4: {
        "sparse, memory parallel in pairs": config(
            optim={"value_update": "sparse"}, distributed={**BF16, "memory_parallel_size": 2}, grad_acc_steps=2
        ),
        "HSDP": config(distributed={**BF16, **FULL, "dp_shard": 2}, grad_acc_steps=2),
        "HSDP, Muon": config(optim={"name": "muon"}, distributed={**BF16, **FULL, "dp_shard": 2}),
        "memory parallel in pairs, HSDP": config(
            distributed={**BF16, **FULL, "dp_shard": 2, "memory_parallel_size": 2}
        ),
        "tensor parallel, full_shard": config(distributed={**BF16, **FULL, "tp_size": 2}, grad_acc_steps=2),
        "tensor parallel in pairs": config(distributed={**FP32, "tp_size": 2}),
    },
}


# What depends on the rows that are read, of which arithmetic knows how many there can be.
OF_ROWS = ("gradients", "all-gather over 2", "all-reduce over 2")


def validated(values: dict[str, Any], world: World) -> TrainArgs:
    args = from_dict(TrainArgs, values, "test")
    validate_distributed_args(args.distributed, world)
    validate_parallelism(args.distributed, args.model, args.model.vocab_size, args.data.seq_len, world)
    return args


def measured_lines(cases: list[dict[str, Any]], n_ranks: int) -> list[list[dict[str, Any]]]:
    """On a rank: the lines of the bench for each case."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = World(rank, rank, n_ranks)
    torch.manual_seed(rank)
    return [compare(*measure(validated(values, world), world)) for values in cases]


def check(lines: list[dict[str, Any]], name: str, at_most: tuple[str, ...] = ()) -> None:
    for line in lines:
        kind, ratio = line["on a rank"], line["ratio"]
        least, most = 0.95, 1.05
        if kind == "kept for backward":
            least, most = 0.90, 1.10
        elif kind == "at once in a step":
            # An estimate from above where the end of the backward pass is what takes most.
            least, most = 0.5, 1.10
        elif kind in at_most:
            least, most = 0.01, 1.0
        assert least <= ratio <= most, (name, line)


@pytest.mark.parametrize("name", CASES[1])
def test_on_one_rank(name):
    [lines] = measured_lines([CASES[1][name]], 1)
    kinds = ["parameters", "gradients", "moments", "kept for backward", "at once in a step"]
    assert [line["on a rank"] for line in lines] == kinds
    check(lines, name, OF_ROWS if name == "sparse" else ())


@pytest.mark.parametrize(
    ("n_ranks", "name"), [pytest.param(n, name, id=f"{n}-{name}") for n in (2, 4) for name in CASES[n]]
)
def test_on_ranks(n_ranks, name):
    """Of which the others are not there: what they would send changes no size, but for the rows that they have read."""
    with fake_ranks(n_ranks):
        [lines] = measured_lines([CASES[n_ranks][name]], n_ranks)
    assert len(lines) > 5
    check(lines, name, OF_ROWS if "sparse" in name else ())


@pytest.mark.parametrize(
    ("n_ranks", "names"),
    [(2, ["full_shard"]), (4, ["memory parallel in pairs, HSDP", "sparse, memory parallel in pairs"])],
)
def test_on_ranks_that_are_there(n_ranks, names):
    """Bytes are those that are counted where the other ranks are not."""
    cases = [CASES[n_ranks][name] for name in names]
    first_rank = run_ranks(n_ranks, measured_lines, cases, n_ranks)[0]
    for name, case, lines in zip(names, cases, first_rank, strict=True):
        check(lines, name, OF_ROWS if "sparse" in name else ())
        if "sparse" not in name:
            with fake_ranks(n_ranks):
                [alone] = measured_lines([case], n_ranks)
            for line, expected in zip(lines, alone, strict=True):
                # How long a gathered block outlives its use depends on when its collective ends.
                assert line == expected or line["on a rank"] == "at once in a step"


def test_diagnostics_are_counted():
    """A byte a slot for up to four layers that share a table; nothing where they are off."""
    shared = {"layers": "0,1,2", "mem_n_keys": 2048}
    for memory, changes, tables in (
        (shared, {}, [3]),
        (shared | {"mem_share_values": False}, {}, [1, 1, 1]),
        (shared, {"logging": {"memory_use": False}}, []),
        ({"is_enabled": False}, {}, []),
    ):
        args = from_dict(TrainArgs, config(memory, distributed=FP32, **changes), "test")
        gpu = torch.device("cuda")
        found = footprint(args, World(device=gpu))
        assert found.diagnostics == bytes_held(2048**2, tables, gpu)
        assert found.total == found.parameters + found.moments + found.peak + found.diagnostics
        assert footprint(args, World()).diagnostics == bytes_held(2048**2, tables, torch.device("cpu"))
    assert 2048**2 < bytes_held(2048**2, [3], gpu) < 1.3 * 2048**2

"""Models laid out over ranks against one process: who has which data, gradients, norms, recomputing, compiling."""

import collections
import functools
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.distributed import DistributedArgs, World, data_rank, mesh_sizes, validate_distributed_args
from lingua.initialize import normal
from lingua.optim import clip_gradients, split_parameters
from lingua.parallelize import validate_parallelism
from tests.helpers.layouts import (
    LAYOUTS,
    MODELS,
    SEQ_LEN,
    VOCABULARY,
    build,
    build_alone,
    distributed_args,
    here,
    model_args,
    whole,
)
from tests.helpers.ranks import fake_ranks, run_ranks

FULL = {"fsdp_type": "full_shard"}

# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "distributed", "sizes"),
    [
        (1, {}, (1, 1, 1)),
        (1, FULL, (1, 1, 1)),
        (8, {}, (8, 1, 1)),
        (8, FULL, (1, 8, 1)),
        (8, {"dp_shard": 8, **FULL}, (1, 8, 1)),
        (8, {"dp_shard": 2, **FULL}, (4, 2, 1)),
        (8, {"dp_shard": 4, "dp_replicate": 2, **FULL}, (2, 4, 1)),
        (8, {"dp_shard": 4, "dp_replicate": 5, **FULL}, (2, 4, 1)),  # worked out where it does not fit
        (8, {"dp_replicate": 3}, (8, 1, 1)),
        (8, {"tp_size": 2}, (4, 1, 2)),
        (8, {"tp_size": 8}, (1, 1, 8)),
        (8, {"tp_size": 2, **FULL}, (1, 4, 2)),
        (8, {"tp_size": 2, "dp_shard": 2, **FULL}, (2, 2, 2)),
        (8, {"memory_parallel_size": 4}, (8, 1, 1)),
        (8, {"memory_parallel_size": 8, **FULL}, (1, 8, 1)),
        (6, {"dp_shard": 3, **FULL}, (2, 3, 1)),
        (6, {"tp_size": 3}, (2, 1, 3)),
    ],
)
def test_mesh_sizes(world_size, distributed, sizes):
    args = DistributedArgs(**distributed)
    validate_distributed_args(args, World(size=world_size))
    assert mesh_sizes(args, World(size=world_size)) == sizes
    assert args.dp_replicate * args.dp_shard * args.tp_size == world_size


@pytest.mark.parametrize(
    ("world_size", "distributed", "numbers"),
    [
        (1, {}, [0]),
        (4, {}, [0, 1, 2, 3]),
        (4, FULL, [0, 1, 2, 3]),
        (4, {"dp_shard": 2, **FULL}, [0, 1, 2, 3]),
        (4, {"memory_parallel_size": 2}, [0, 1, 2, 3]),
        (4, {"tp_size": 4}, [0, 0, 0, 0]),
        (4, {"tp_size": 2}, [0, 0, 1, 1]),
        (4, {"tp_size": 2, **FULL}, [0, 0, 1, 1]),
        (8, {"tp_size": 2, "dp_shard": 2, **FULL}, [0, 0, 1, 1, 2, 2, 3, 3]),
        (6, {"tp_size": 3}, [0, 0, 0, 1, 1, 1]),
    ],
)
def test_data_rank(world_size, distributed, numbers):
    """Every rank has data of its own (Lingua issues 58 and 66), but for those of a tensor-parallel group."""
    args = DistributedArgs(**distributed)
    validate_distributed_args(args, World(size=world_size))
    found = [data_rank(args, World(rank, rank, world_size)) for rank in range(world_size)]
    assert found == [(number, max(numbers) + 1) for number in numbers]


DENSE = {"is_enabled": False}


@pytest.mark.parametrize(
    ("distributed", "model", "message"),
    [
        ({"tp_size": 3}, {}, "tp_size: 3 does not divide model.n_heads=4"),
        ({"tp_size": 4}, {"n_kv_heads": 2}, "tp_size: 4 does not divide model.n_kv_heads=2"),
        ({"tp_size": 2}, {"vocab_size": 21}, "tp_size: 2 does not divide model.vocab_size=21"),
        ({"tp_size": 2}, {"seq_len": 9}, "tp_size: 2 does not divide data.seq_len=9"),
        (
            {"tp_size": 2},
            {"dim": 10, "ffn_dim_multiplier": 0.6, "multiple_of": 1},
            "tp_size: 2 does not divide the feed-forward's hidden size=15",
        ),
        ({"tp_size": 2}, {"memory": {"mem_v_dim": 7}}, "tp_size: 2 does not divide the 7 columns of the value table"),
        (
            {"memory_parallel_size": 8},
            {},
            "memory_parallel_size: 8 does not divide the 12 columns of the value table",
        ),
        (
            {"memory_parallel_size": 2},
            {"memory": {"mem_v_dim": 7}},
            "memory_parallel_size: 2 does not divide the 7 columns of the value table",
        ),
        ({"float8_recipe": "rowwise"}, {}, "float8_recipe: float8 needs a GPU of compute capability 8.9 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_do_not_fit_are_refused(distributed, model, message):
    options = {"memory": None, "vocab_size": VOCABULARY, "seq_len": SEQ_LEN, **model}
    vocabulary, seq_len = options.pop("vocab_size"), options.pop("seq_len")
    with pytest.raises(ValueError, match=".") as caught:
        validate_parallelism(DistributedArgs(**distributed), model_args(**options), vocabulary, seq_len, World(size=24))
    assert str(caught.value).startswith(f"distributed.{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("distributed", "model"),
    [
        ({"tp_size": 4}, {}),
        ({"tp_size": 2}, {"n_kv_heads": 2}),
        ({"tp_size": 2}, {"memory": {"mem_v_dim": 6}}),
        ({"memory_parallel_size": 6}, {"dim": 12, "memory": {"peer_variant": True}}),
        # without memories there is no table to split
        ({"memory_parallel_size": 8}, {"memory": DENSE}),
        ({"tp_size": 2}, {"memory": {"mem_v_dim": 7, **DENSE}}),
    ],
)
def test_sizes_that_fit(distributed, model):
    validate_parallelism(DistributedArgs(**distributed), model_args(**model), VOCABULARY, SEQ_LEN, World(size=24))


# --- gradients -------------------------------------------------------------------------------------------------------

# Batches of a step, whatever the layout: rows, tokens and their successors.
N_BATCHES, ROWS = 2, 4


def some_batches() -> torch.Tensor:
    return torch.randint(VOCABULARY, (N_BATCHES, ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(5))


def gradients(args: LMTransformerArgs, **distributed: Any) -> dict[str, torch.Tensor]:
    """Of one step with accumulation; each data-parallel rank takes its part of every batch."""
    model, reducer = build(args, **distributed)
    number, n_parts = data_rank(distributed_args(**distributed), here())
    for count, batch in enumerate(some_batches(), start=1):
        part = batch.chunk(n_parts)[number]
        reducer.begin(last=count == N_BATCHES)
        (model(part[:, :-1], part[:, 1:]) / N_BATCHES).backward()
    reducer.finish()
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            assert parameter.grad.placements == parameter.placements
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@functools.cache
def plain_gradients(name: str) -> dict[str, torch.Tensor]:
    args = {**MODELS, **BARE}[name]
    model = LMTransformer(args)
    batch = some_batches().flatten(0, 1)
    model(batch[:, :-1], batch[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# What is in none of MODELS: two tables whose results go straight into the residual stream.
BARE = {"bare": model_args({"mem_share_values": False, "mem_v_dim": 8, "swilu_projection": False, "mem_gated": False})}


def check_gradients(layout: dict[str, Any]) -> None:
    models = MODELS | BARE if here().size == 2 else MODELS
    for name, args in models.items():
        expected = plain_gradients(name)
        actual = gradients(args, **layout)
        assert list(actual) == list(expected)
        for key, grad in actual.items():
            assert expected[key].any(), (name, key)
            error = (grad - expected[key]).norm() / expected[key].norm()
            assert error < 1e-5, (name, key, error.item())


@pytest.mark.parametrize(
    ("n_ranks", "layout"),
    [pytest.param(n_ranks, layout, id=f"{n_ranks}-{layout}") for n_ranks in LAYOUTS for layout in LAYOUTS[n_ranks]],
)
def test_gradients_are_those_of_one_process(n_ranks, layout):
    run_ranks(n_ranks, check_gradients, LAYOUTS[n_ranks][layout])


# --- clipping --------------------------------------------------------------------------------------------------------


def draw_gradients(model: LMTransformer) -> None:
    """Random ones, the same full ones in every layout; the tables' are small beside the others."""
    torch.manual_seed(7)
    kinds = split_parameters(model)
    for parameter in (*kinds["dense"], *kinds["memory"], *kinds["values"]):
        parameter.grad = torch.empty_like(parameter)
        normal(parameter.grad, 0.1 if parameter in set(kinds["values"]) else 3.0)


def check_norms(layouts: dict[str, dict[str, Any]]) -> None:
    args = MODELS["one table"]
    plain = build_alone(args, model_dtype="bf16")
    tables = set(split_parameters(plain)["values"])
    for layout, distributed in layouts.items():
        model, _ = build(args, **distributed, model_dtype="bf16")
        for max_norm in (0.7, 1000.0):
            draw_gradients(plain)
            draw_gradients(model)
            expected, actual = clip_gradients(plain, max_norm), clip_gradients(model, max_norm)
            for ours, theirs in zip(actual, expected, strict=True):
                assert ours.dtype == torch.float32
                assert ours.item() == pytest.approx(theirs.item(), rel=1e-5), layout
            clipped = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
            for name, parameter in plain.named_parameters():
                tolerance = 2**-7 if parameter in tables else 1e-5
                assert torch.allclose(clipped[name], parameter.grad, rtol=tolerance), (layout, name)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_norms_are_those_of_one_process(n_ranks):
    """Of gradients that are whole, split over all ranks, over some of them, in one or two dimensions, in bf16."""
    run_ranks(n_ranks, check_norms, LAYOUTS[n_ranks])


# --- activations computed again --------------------------------------------------------------------------------------

RECOMPUTING = {
    "kept": {},
    "selective": {"selective_activation_checkpointing": True},
    "each layer": {"checkpoint_each_layer": True},
}


def check_recomputing(layout: dict[str, Any]) -> None:
    for args in MODELS.values():
        kept, *others = (gradients(args, **layout, **recomputing) for recomputing in RECOMPUTING.values())
        for other in others:
            for name, grad in kept.items():
                assert torch.equal(other[name], grad), name


@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_recomputing_changes_no_gradient(layout):
    """What is computed again is what was, so it does not matter what the other rank sends."""
    with fake_ranks(2):
        check_recomputing(LAYOUTS[2][layout])


def test_recomputing_changes_no_gradient_in_one_process():
    check_recomputing({})


class CountOperators(TorchDispatchMode):
    """`aten` operators that run, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def operators_of_backward(recomputing: dict[str, Any], dtype: str) -> collections.Counter[str]:
    model, _ = build(model_args(), **recomputing, model_dtype=dtype)
    batch = some_batches()[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = model(batch[:, :-1], batch[:, 1:])
    with CountOperators() as running:
        loss.backward()
    return running.counts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_computed_again(dtype):
    """Selective: what is cheap. Each layer: the memory's search and lookup, products and attention too."""
    kept, selective, each_layer = (operators_of_backward(options, dtype) for options in RECOMPUTING.values())
    attention = {name for name in each_layer if name.startswith("_scaled_dot_product") and "backward" not in name}
    assert len(attention) == 1
    for name in ("search", "bag_sums", "mm", *attention):
        assert selective[name] == kept[name], name
        assert each_layer[name] > kept[name], name
    # Memories compute the silu of their gate again in any case.
    for name, always in (("silu", 2), ("rsqrt", 0)):
        assert kept[name] == always
        assert selective[name] == each_layer[name] > always


# --- compiling -------------------------------------------------------------------------------------------------------

# The first memory owns the table that the second one reads.
TWO_MEMORIES = model_args({"layers": "0,1"}, n_layers=2)


def check_one_graph(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any]) -> None:
    """Compiles as `distributed.compile` does, but for a graph break being an error, and without generating code."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend=backend))
    expected = gradients(TWO_MEMORIES, **layout)
    for name, recomputing in RECOMPUTING.items():
        torch._dynamo.reset()
        graphs.clear()
        actual = gradients(TWO_MEMORIES, **layout, **recomputing, compile=True)
        assert len(graphs) == TWO_MEMORIES.n_layers, name
        for key, grad in actual.items():
            assert (grad - expected[key]).norm() <= 1e-5 * expected[key].norm(), (name, key)


def test_a_block_compiles_into_one_graph(monkeypatch):
    """Whatever of it is computed again."""
    check_one_graph(monkeypatch, {})


def test_a_block_of_split_tables_compiles_into_one_graph(monkeypatch):
    """The graph and its results do not depend on what the other rank sends."""
    with fake_ranks(2):
        check_one_graph(monkeypatch, LAYOUTS[2]["memory parallel"])

"""Sparse updates of value tables against dense ones: gradients by rows, their norm, AdamW, ranks, checkpoints."""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch.optim import Optimizer

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.checkpoint import CheckpointArgs, CheckpointManager, load_training
from lingua.distributed import DistributedArgs, World, data_rank, local_part
from lingua.optim import OptimArgs, build_optimizer, clip_gradients, row_gradients, validate_optim_args
from lingua.parallelize import GradientReducer, splits_tables_by_rows
from lingua.product_key import xformer_embeddingbag
from lingua.product_key.row_gradients import RowGradients
from lingua.product_key.value_table import SlotProducts, xFormerEmbeddingBag
from lingua.sparse_adamw import SparseAdamW, _round_at_random
from tests.helpers.layouts import (
    LAYOUTS,
    MODELS,
    assert_close,
    backward,
    build,
    distributed_args,
    here,
    model_args,
    train,
    whole_state,
)
from tests.helpers.ranks import fake_ranks, run_ranks

# Learning rates large enough that errors would show.
OPTIM = {"lr": 0.01, "scheduler": "constant", "weight_decay": 0.5}

RECOMPUTING = {
    "kept": {},
    "selective": {"selective_activation_checkpointing": True},
    "each layer": {"checkpoint_each_layer": True},
}


def in_full(gradient: RowGradients) -> torch.Tensor:
    """The gradient with the rows that nobody has read."""
    slots, rows = gradient.rows()
    assert slots.equal(slots.unique()), "each slot once, and in order"
    full = rows.new_zeros(len(gradient.weight), rows.shape[1])
    full[slots] = rows
    return full


def trained(
    args: LMTransformerArgs, update: str, n_steps: int = 3, clip: float = 1.0, **distributed: Any
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Weights and optimizer state behind some steps, and the norms."""
    model, reducer = build(args, **distributed)
    optimizer, _ = build_optimizer(model, OptimArgs(**OPTIM, value_update=update), 10)
    norms = train(model, reducer, optimizer, range(n_steps), clip, **distributed)
    return whole_state(model, optimizer), norms


# --- gradients by rows -----------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from([xFormerEmbeddingBag, SlotProducts]),
    lookups=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=4),
    size=st.sampled_from([1, 3, 40, 5000]),
    dim=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    by_csr=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_rows_are_those_of_the_dense_gradient(kind, lookups, size, dim, dtype, index_dtype, by_csr, whole, seed):
    """Of several lookups of any shape; small tables are summed up in between, large ones at the end."""
    rng = torch.Generator().manual_seed(seed)
    table = kind(size, dim).to(dtype)
    gradient = table.note_rows(whole)
    exact = table.weight.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if not by_csr:
            patch.setattr(xformer_embeddingbag, "_has_sparse_products", lambda *_: False)
            patch.setattr(xformer_embeddingbag, "CHUNK_ELEMENTS", 10)
        for n, bag in lookups:
            indices = torch.randint(size, (n, bag), generator=rng).to(index_dtype)
            other = torch.randn(n, bag if kind is xFormerEmbeddingBag else dim, generator=rng).to(dtype)
            y = table(indices, other)
            grad = torch.randn(y.shape, generator=rng).to(y.dtype)
            y.backward(grad)
            rows = exact[indices.long()]
            factors = other.double()[..., None] if kind is xFormerEmbeddingBag else other.double()[:, None]
            ((rows * factors).sum(1 if kind is xFormerEmbeddingBag else 2)).backward(grad.double())
        expected = torch.zeros_like(exact) if exact.grad is None else exact.grad
        if whole:
            gradient.make_whole()
            actual = torch.zeros_like(table.weight) if table.weight.grad is None else table.weight.grad
            assert gradient.is_empty
            assert actual.dtype == dtype
            # Rounded once for each time that a small table was summed up.
            assert (actual.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm() + 1e-12
            return
        assert table.weight.grad is None
        actual = in_full(gradient)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert (actual - expected).norm() <= 2e-6 * expected.norm()
    read = [slot for slot in range(size) if expected[slot].any()]
    assert set(read) <= set(gradient.rows()[0].tolist())


def test_only_gradients_are_noted():
    table = xFormerEmbeddingBag(9, 4)
    gradient, copied = table.note_rows(), copy.deepcopy(table)
    indices, scores = torch.tensor([[1, 3]]), torch.ones(1, 2)
    with torch.no_grad():
        table(indices, scores)
    assert gradient.is_empty
    copied(indices, scores).sum().backward()
    assert gradient.is_empty, "a copied table has gradients of its own"
    table(indices, scores).sum().backward()
    assert gradient.rows()[0].tolist() == [1, 3]
    gradient.clear()
    assert gradient.is_empty
    assert gradient.rows()[1].shape == (0, 4)


def test_notes_do_not_grow_beyond_the_table():
    table = xFormerEmbeddingBag(50, 4)
    gradient = table.note_rows()
    for _ in range(100):
        table(torch.randint(50, (3, 2)), torch.ones(3, 2)).sum().backward()
        assert sum(tensor.nbytes for note in gradient._notes for tensor in note) <= table.weight.nbytes
    assert in_full(gradient).sum() == 100 * 3 * 2 * 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recomputing", RECOMPUTING.values(), ids=RECOMPUTING)
def test_gradients_of_a_model(name, recomputing):
    """Two layers that share a table or not, two tables, accumulation, activations computed again."""
    plain, plain_reducer = build(MODELS[name])
    backward(plain, plain_reducer)
    model, reducer = build(MODELS[name], **recomputing)
    build_optimizer(model, OptimArgs(value_update="sparse"), 10)
    backward(model, reducer, **recomputing)
    gradients = row_gradients(model)
    assert len(gradients) == (4 if name == "PEER" else 1)
    expected = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        actual = in_full(gradients[parameter]) if parameter in gradients else parameter.grad
        assert (parameter in gradients) == (parameter.grad is None)
        assert (actual - expected[key].grad).norm() <= 1e-5 * expected[key].grad.norm(), key


# --- AdamW -----------------------------------------------------------------------------------------------------------

# Tables so small that every row is read in every step.
ALL_READ = {
    "shared": model_args({"mem_n_keys": 2, "mem_knn": 2}),
    "separate": model_args({"mem_n_keys": 2, "mem_knn": 2, "mem_share_values": False, "value_fixed_lr": None}),
    "PEER": model_args({"mem_n_keys": 2, "mem_knn": 2, "peer_variant": True}),
}


@pytest.mark.parametrize("clip", [0.01, 1e6], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("name", ALL_READ)
def test_the_trajectory_is_the_dense_one_where_all_rows_are_read(name, clip):
    dense, dense_norms = trained(ALL_READ[name], "dense", 8, clip)
    sparse, sparse_norms = trained(ALL_READ[name], "sparse", 8, clip)
    assert_close(sparse, dense, 1e-5)
    for ours, theirs in zip(sparse_norms, dense_norms, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert all(norm > 0.01 for norm in theirs)
    model, reducer = build(ALL_READ[name])
    build_optimizer(model, OptimArgs(value_update="sparse"), 10)
    backward(model, reducer)
    assert all(len(gradient.rows()[0]) == len(gradient.weight) for gradient in row_gradients(model).values())


def table_and_optimizer(
    size: int, dim: int, dtype: torch.dtype = torch.float32, stochastic: bool = False, seed: int = 0, **options: Any
) -> tuple[xFormerEmbeddingBag, SparseAdamW]:
    torch.manual_seed(0)
    table = xFormerEmbeddingBag(size, dim).to(dtype)
    gradients = {table.weight: table.note_rows()}
    options = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True, **options}
    return table, SparseAdamW([{"params": [table.weight]}], gradients, stochastic, seed, **options)


def read_some(table: xFormerEmbeddingBag, size: int, rng: torch.Generator) -> torch.Tensor:
    indices = torch.randint(size, (3, 4), generator=rng)
    y = table(indices, torch.randn(3, 4, generator=rng))
    y.backward(torch.randn(y.shape, generator=rng).to(y.dtype))
    return indices.unique()


@pytest.mark.parametrize("at_once", [1, 2**17])
def test_torchs_own_sparse_adam(monkeypatch, at_once):
    """Without weight decay it is the same rule."""
    monkeypatch.setattr("lingua.sparse_adamw.AT_ONCE", {"cpu": at_once})
    table, optimizer = table_and_optimizer(40, 5)
    other = torch.nn.Parameter(table.weight.detach().clone())
    theirs = torch.optim.SparseAdam([other], lr=0.1, betas=(0.9, 0.95))
    rng = torch.Generator().manual_seed(1)
    for _ in range(10):
        optimizer.zero_grad()
        read_some(table, 40, rng)
        slots, rows = optimizer.row_gradients[table.weight].rows()
        other.grad = torch.sparse_coo_tensor(slots[None], rows, other.shape, check_invariants=True)
        optimizer.step()
        theirs.step()
        assert torch.allclose(table.weight, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_are_not_read_stay(dtype):
    table, optimizer = table_and_optimizer(200, 3, dtype, weight_decay=0.5)
    rng = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        state = optimizer.state[table.weight]
        before = [table.weight.detach().clone(), *(state[kind].clone() for kind in ("exp_avg", "exp_avg_sq") if state)]
        read = read_some(table, 200, rng)
        optimizer.step()
        optimizer.zero_grad()
        assert table.weight.grad is None
        after = [table.weight, state["exp_avg"], state["exp_avg_sq"]]
        for old, new in zip(before, after, strict=False):
            assert new.dtype == dtype
            changed = (old != new).any(1).nonzero().flatten()
            assert changed.tolist() == read.tolist()
        assert state["step"].item() == step
    before = table.weight.detach().clone()
    optimizer.step()
    assert torch.equal(table.weight, before), "nothing has been read"


def test_bf16_tables_are_updated_as_dense_ones():
    """To the last bit: moments in bf16, computed in fp32, rounded to the nearest."""
    table, optimizer = table_and_optimizer(6, 8, torch.bfloat16, weight_decay=0.1)
    dense = torch.nn.Parameter(table.weight.detach().clone())
    theirs = torch.optim.AdamW([dense], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(5):
        grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.row_gradients[table.weight].replace(torch.arange(6), grad.float())
        dense.grad = grad
        optimizer.step()
        theirs.step()
        assert torch.equal(table.weight, dense)
        for kind, value in theirs.state[dense].items():
            assert torch.equal(optimizer.state[table.weight][kind], value), kind


# --- stochastic rounding ---------------------------------------------------------------------------------------------


def test_rounding_is_unbiased():
    torch.manual_seed(3)
    numbers = torch.cat([torch.randn(60), torch.tensor([0.0, 1.0, -1.0, 1 + 2.0**-10, 1e-30, -3e4, 1e-40])])
    many = numbers.expand(20000, -1).contiguous()
    generator = torch.Generator().manual_seed(1)
    for rounded in _round_at_random((many, many.clone(), many.clone()), generator):
        assert rounded.dtype == torch.bfloat16
        lower, upper = rounded.double().amin(0), rounded.double().amax(0)
        # Neighbours in bf16 and nothing else; what is one of its numbers stays.
        assert torch.all((lower <= numbers) & (numbers <= upper))
        assert torch.all(upper - lower <= 2.0**-7 * numbers.double().abs() + 1e-38)
        exact = numbers.bfloat16().float() == numbers
        assert torch.equal(lower[exact], upper[exact])
        # Within five standard deviations of the mean of so many draws.
        deviation = 0.5 * (upper - lower) / len(many) ** 0.5
        assert torch.all((rounded.double().mean(0) - numbers).abs() <= 5 * deviation)


def test_what_is_rounded_together_is_independent():
    halves = torch.full((20000,), 1 + 2.0**-8)
    one, two, three = _round_at_random((halves,) * 3, torch.Generator().manual_seed(1))
    for a, b in itertools.combinations((one > 1, two > 1, three > 1), 2):
        assert (a & b).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_what_is_not_finite_stays():
    numbers = torch.tensor([float("inf"), float("-inf"), float("nan")]).repeat(50)
    (rounded,) = _round_at_random((numbers,), torch.Generator())
    assert torch.equal(rounded.float().nan_to_num(7), numbers.nan_to_num(7))


def small_updates(**options: Any) -> torch.Tensor:
    """A table of ones after 200 updates of -1e-4, each far below half of the last digit, 2^-9."""
    table, optimizer = table_and_optimizer(4, 64, torch.bfloat16, lr=1e-4, **options)
    with torch.no_grad():
        table.weight.fill_(1)
    for _ in range(200):
        optimizer.row_gradients[table.weight].replace(torch.arange(4), torch.ones(4, 64))
        optimizer.step()
    return table.weight.detach()


def test_small_updates_are_not_lost():
    assert torch.equal(small_updates(), torch.ones(4, 64, dtype=torch.bfloat16))
    updated = small_updates(stochastic=True)
    assert updated.double().mean().item() == pytest.approx(1 - 200 * 1e-4, abs=2e-3)
    assert torch.equal(updated, small_updates(stochastic=True))
    assert not torch.equal(updated, small_updates(stochastic=True, seed=1))


# --- ranks -----------------------------------------------------------------------------------------------------------


def trained_models(layout: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    return [trained(args, "sparse", clip=0.1, **layout, **options) for args in MODELS.values()]


def with_whole_rows(n_ranks: int) -> dict[str, dict[str, Any]]:
    """The layouts in which FSDP does not split tables by rows."""
    world = World(size=n_ranks)
    layouts = LAYOUTS[n_ranks].items()
    return {name: layout for name, layout in layouts if not splits_tables_by_rows(DistributedArgs(**layout), world)}


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    return trained_models({}, {})


# All layouts of 2 ranks, and those of 4 in which the ranks differ in two ways.
RANKS = [(2, layout) for layout in with_whole_rows(2)]
RANKS += [(4, layout) for layout in with_whole_rows(4) if "replicas" in layout or "HSDP" in layout]


@pytest.mark.parametrize(("n_ranks", "layout"), RANKS, ids=str)
def test_ranks_train_as_one_process(alone, n_ranks, layout):
    """Weights, moments and norms; rows that no rank has read stay on all of them."""
    ranks = run_ranks(n_ranks, trained_models, LAYOUTS[n_ranks][layout], {})
    for number, (expected, expected_norms) in enumerate(alone):
        for models in ranks:
            actual, norms = models[number]
            assert all(torch.equal(tensor, ranks[0][number][0][key]) for key, tensor in actual.items())
            assert_close(actual, expected, 1e-4)
            for ours, theirs in zip(norms, expected_norms, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4)


def test_tables_that_are_split_by_rows():
    assert splits_tables_by_rows(DistributedArgs(fsdp_type="full_shard"), World(size=2))
    assert not splits_tables_by_rows(DistributedArgs(fsdp_type="full_shard"), World(size=1))
    assert set(with_whole_rows(2)) == {*LAYOUTS[2]} - {"full_shard"}
    assert set(with_whole_rows(4)) == {*LAYOUTS[4]} - {"full_shard", "HSDP"}


def start(
    update: str, rounding: str = "nearest", **distributed: Any
) -> tuple[LMTransformer, GradientReducer, Optimizer]:
    """PEER, bf16 tables where rounding is stochastic."""
    dtype = "bf16" if rounding == "stochastic" else "fp32"
    model, reducer = build(MODELS["PEER"], **distributed, model_dtype=dtype)
    args = OptimArgs(**OPTIM, value_update=update, value_rounding=rounding)
    return model, reducer, build_optimizer(model, args, 10, seed=3)[0]


def stochastic_table(layout: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """This rank's part of a trained table, and the seed of its next rounding."""
    model, reducer, optimizer = start("sparse", "stochastic", **layout)
    train(model, reducer, optimizer, range(2), 1.0, **layout, model_dtype="bf16")
    table = next(iter(row_gradients(model)))
    return local_part(table.detach()).clone(), optimizer._generator(table, 3).initial_seed()


def test_replicas_round_alike_and_columns_do_not():
    for layout, is_same in (("data parallel", True), ("memory parallel", False)):
        (one, seed), (two, other_seed) = run_ranks(2, stochastic_table, LAYOUTS[2][layout])
        assert (seed == other_seed) == is_same
        assert torch.equal(one, two) == is_same


# --- checkpoints -----------------------------------------------------------------------------------------------------

STATE = {"step": 2, "data_loader_state": {}}


def save_after_two_steps(folder: Path, update: str, *rounding: str, **distributed: Any) -> tuple[Any, ...]:
    model, reducer, optimizer = start(update, *rounding, **distributed)
    train(model, reducer, optimizer, range(2), 1.0, **distributed)
    number, _ = data_rank(distributed_args(**distributed), here())
    CheckpointManager(CheckpointArgs(), folder, here().rank, number).save(2, model, optimizer, STATE, {})
    return model, reducer, optimizer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("sparse",), ("sparse",)),
        (("sparse", "stochastic"), ("sparse", "stochastic")),
        (("dense",), ("sparse",)),
        (("sparse",), ("dense",)),
    ],
    ids=str,
)
def test_each_goes_on_from_the_others_checkpoint(tmp_path, first, second):
    saved = save_after_two_steps(tmp_path, *first)
    loaded = start(*second)
    load_training(tmp_path / "0000000002", loaded[0], loaded[2])
    before, after = (whole_state(model, optimizer) for model, _, optimizer in (saved, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    for run in (saved, loaded):
        train(*run, range(2, 4), 1.0)
    expected, actual = (whole_state(model, optimizer) for model, _, optimizer in (saved, loaded))
    for key, tensor in expected.items():
        assert not key.endswith(" step") or tensor.item() == actual[key].item() == 4
        assert first != second or torch.equal(actual[key], tensor), key
        assert torch.isfinite(actual[key]).all()


def save_on_ranks(folder: Path, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, _, optimizer = save_after_two_steps(folder, "sparse", **layout)
    return whole_state(model, optimizer)


def test_a_checkpoint_of_ranks_loads_in_one_process(tmp_path):
    expected, _ = run_ranks(2, save_on_ranks, tmp_path, LAYOUTS[2]["memory parallel"])
    for update in ("sparse", "dense"):
        model, _, optimizer = start(update)
        load_training(tmp_path / "0000000002", model, optimizer)
        actual = whole_state(model, optimizer)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


# --- compiling -------------------------------------------------------------------------------------------------------


def check_one_graph(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], recomputing: list[str]) -> None:
    """Compiles as `distributed.compile` does, but for a graph break being an error, and without generating code."""
    args = model_args({"layers": "0,1", "peer_variant": True}, n_layers=2)
    expected, expected_norms = trained(args, "sparse", **layout)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend=aot_eager))
    for name in recomputing:
        torch._dynamo.reset()
        actual, norms = trained(args, "sparse", **layout, **RECOMPUTING[name], compile=True)
        assert_close(actual, expected, 1e-4)
        for ours, theirs in zip(norms, expected_norms, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_block_compiles_into_one_graph(monkeypatch):
    check_one_graph(monkeypatch, {}, list(RECOMPUTING))


def test_a_block_of_split_tables_compiles_into_one_graph(monkeypatch):
    """The graph and its results do not depend on what the other rank sends."""
    with fake_ranks(2):
        check_one_graph(monkeypatch, LAYOUTS[2]["memory parallel"], ["kept"])


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_update": "rows"}, "optim.value_update: 'rows' is neither dense nor sparse"),
        ({"value_update": "sparse", "value_rounding": "up"}, "optim.value_rounding: 'up' is neither nearest nor"),
        (
            {"value_rounding": "stochastic"},
            "optim.value_rounding: stochastic cannot be combined with value_update=dense",
        ),
    ],
)
def test_bad_arguments_name_their_key(options, message):
    with pytest.raises(ValueError, match=".") as caught:
        validate_optim_args(OptimArgs(**options))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_dense_model_trains():
    args = model_args({"is_enabled": False})
    sparse, dense = (trained_without_memory(args, update) for update in ("sparse", "dense"))
    assert all(torch.equal(sparse[name], weight) for name, weight in dense.items())


def trained_without_memory(args: LMTransformerArgs, update: str) -> dict[str, torch.Tensor]:
    model, reducer = build(args)
    optimizer, _ = build_optimizer(model, OptimArgs(**OPTIM, value_update=update), 10)
    backward(model, reducer)
    assert clip_gradients(model, 1.0)[1] is None
    optimizer.step()
    return whole_state(model, optimizer)

"""Tables in the CPU's memory, whose rows are fetched (`distributed.values_device: cpu`), against sparse updates of
tables that lie where the model does: all results are the same, to the last bit where rows begin at multiples of 16
bytes and a bag is no larger than the small table (how a CPU sums products depends on both).
"""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from apps.main.transformer import LMTransformerArgs
from lingua.checkpoint import CheckpointArgs, CheckpointManager, load_training
from lingua.distributed import DistributedArgs, World, data_rank, validate_distributed_args
from lingua.optim import OptimArgs, build_optimizer, clip_gradients
from lingua.product_key import cpu_offload
from lingua.product_key.value_table import SlotProducts, xFormerEmbeddingBag
from tests.helpers.layouts import LAYOUTS, MODELS, SEQ_LEN, VOCABULARY, build, distributed_args, here, whole
from tests.helpers.ranks import run_ranks

# A device that is the CPU and yet not equal to that of its tensors: rows go through the buffers, as to a GPU.
ELSEWHERE = torch.device("cpu", 0)

ON_CPU = {"values_device": "cpu"}


def noting(table: xFormerEmbeddingBag, on_cpu: bool) -> xFormerEmbeddingBag:
    if on_cpu:
        table.keep_on_cpu(torch.device("cpu"))
    table.note_rows()
    return table


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def fetches(monkeypatch) -> list[int]:
    """How many rows each fetch has brought, in order."""
    counts = []

    def counting(weight, slots, device, fetch=cpu_offload._fetch):
        counts.append(len(slots))
        return fetch(weight, slots, device)

    monkeypatch.setattr(cpu_offload, "_fetch", counting)
    return counts


# --- the lookup ------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from([xFormerEmbeddingBag, SlotProducts]),
    n=st.integers(0, 7),
    bag=st.integers(1, 9),
    size=st.sampled_from([1, 3, 40, 5000]),
    dim=st.sampled_from([1, 3, 7, 8, 12, 24]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 100),
)
def test_results_and_gradients_are_the_same(kind, n, bag, size, dim, dtype, index_dtype, seed):
    results = []
    for on_cpu in (False, True):
        torch.manual_seed(seed)
        table = noting(kind(size, dim).to(dtype), on_cpu)
        indices = torch.randint(size, (n, bag)).to(index_dtype)
        other = torch.randn(n, bag if kind is xFormerEmbeddingBag else dim).to(dtype).requires_grad_()
        y = table(indices, other)
        y.backward(torch.randn(y.shape).to(y.dtype))
        assert table.weight.grad is None
        results.append([y, other.grad, *table.row_gradients.rows()])
    n_read = len(results[0][2])
    if dim % 4 == 0 and bag <= n_read:
        assert same(*results)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_rows_are_fetched_once(fetches):
    """And again where what was kept for the backward pass is not the memory that they lie in."""
    table = noting(xFormerEmbeddingBag(50, 4), True)
    indices = torch.tensor([[7, 3, 7], [3, 3, 49]])
    scores = torch.rand(2, 3, requires_grad=True)
    table(indices, scores).square().sum().backward()
    assert fetches == [3]
    expected, scores.grad = scores.grad, None
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        table(indices, scores).square().sum().backward()
    assert fetches == [3, 3, 3]
    assert torch.equal(scores.grad, expected)


def test_a_compiled_lookup(fetches):
    """One graph, whatever number of rows a batch reads, and rows that are kept."""
    torch._dynamo.reset()
    counters.clear()
    table = noting(xFormerEmbeddingBag(50, 4), True)
    compiled = torch.compile(lambda indices, scores: table(indices, scores.softmax(-1)), backend=aot_eager)
    for high in (1, 50):
        indices = torch.randint(high, (5, 6), generator=torch.Generator().manual_seed(high))
        results = []
        for run in (compiled, lambda indices, scores: table(indices, scores.softmax(-1))):
            fetches.clear()
            table.row_gradients.clear()
            scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
            y = run(indices, scores)
            y.square().sum().backward()
            results.append([y, scores.grad, *table.row_gradients.rows()])
            assert fetches == [len(indices.unique())]
        assert same(*results)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("operator", ["fetch_rows", "fetched_sums", "fetched_products"])
def test_operators_are_sound(operator):
    weight, indices = torch.randn(20, 4), torch.tensor([[3, 7, 3], [0, 7, 19]])
    inputs = (indices, weight)
    if operator != "fetch_rows":
        inputs += cpu_offload.fetch_rows(indices, weight)
        other = (2, 3) if operator == "fetched_sums" else (2, 4)
        inputs += (torch.randn(other, requires_grad=True), *([torch.float32] if operator == "fetched_sums" else []))
    torch.library.opcheck(getattr(torch.ops.lingua, operator).default, inputs)


@pytest.mark.parametrize("staged", [1, 3, 100])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 40])
def test_rows_go_through_buffers(monkeypatch, staged, n):
    """In both directions; a buffer holds so many rows."""
    monkeypatch.setattr(cpu_offload, "STAGED", staged * 5 * 4)
    monkeypatch.setattr(cpu_offload, "_staging", lambda device, made={}: made.setdefault(0, _staging(device)))
    table, slots = torch.randn(50, 5), torch.randperm(50)[:n]
    fetched = cpu_offload._fetch(table, slots, ELSEWHERE)
    assert max(n, 2) <= len(fetched) <= max(n + 1, n * 9 // 8, 2)
    assert torch.equal(fetched[:n], table[slots])
    brought = [(some.clone(), rows.clone()) for some, rows in cpu_offload.bring_rows(slots, fetched[:n], ELSEWHERE, 2)]
    assert all(len(some) <= 2 for some, _ in brought)
    assert torch.equal(torch.cat([some for some, _ in brought]), slots)
    assert torch.equal(torch.cat([rows for _, rows in brought]), table[slots])


_staging = cpu_offload._staging.__wrapped__


# --- the module ------------------------------------------------------------------------------------------------------


def test_the_table_stays_where_it_is():
    """Only what is empty is ever moved; types change, and what has no memory gets the CPU's."""
    with torch.device("meta"):
        table = xFormerEmbeddingBag(50, 4)
    table.keep_on_cpu(torch.device("cuda"))

    def to_a_gpu(tensor: torch.Tensor) -> SimpleNamespace:
        assert tensor.numel() == 0
        return SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)

    assert table.weight.is_meta
    for _ in range(2):
        table._apply(to_a_gpu)
        assert table.weight.device.type == "cpu"
        assert table.weight.dtype == torch.bfloat16
        assert isinstance(table.weight, torch.nn.Parameter)
    values = table.weight.detach().normal_().clone()
    table.to(torch.float32)
    assert torch.equal(table.weight, values.float())
    assert table.to("meta").weight.is_meta
    assert table.to_empty(device="cpu").weight.device.type == "cpu"


def test_there_are_no_dense_gradients():
    table = xFormerEmbeddingBag(9, 4)
    table.keep_on_cpu(torch.device("cpu"))
    inputs = torch.tensor([[1, 3]]), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"row-sparse gradients only: set optim\.value_update=sparse"):
        table(*inputs)
    with torch.no_grad():
        expected = table(*inputs)
    assert torch.equal(table.requires_grad_(False)(*inputs), expected)


def test_another_place_is_refused():
    with pytest.raises(ValueError, match="distributed.values_device: 'cuda' is neither null nor cpu"):
        validate_distributed_args(DistributedArgs(values_device="cuda"), World())


# --- models ----------------------------------------------------------------------------------------------------------


def train(run: tuple[Any, ...], steps: range, **distributed: Any) -> None:
    model, reducer, optimizer = run
    number, n_parts = data_rank(distributed_args(**distributed), here())
    for step in steps:
        for count in (1, 2):
            rng = torch.Generator().manual_seed(2 * step + count)
            part = torch.randint(VOCABULARY, (4, SEQ_LEN + 1), generator=rng).chunk(n_parts)[number]
            reducer.begin(last=count == 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=distributed.get("model_dtype") == "bf16"):
                loss = model(part[:, :-1], part[:, 1:])
            loss.backward()
        reducer.finish()
        clip_gradients(model, 0.1)
        optimizer.step()
        optimizer.zero_grad()


def start(args: LMTransformerArgs, rounding: str = "nearest", **distributed: Any) -> tuple[Any, ...]:
    model, reducer = build(args, **distributed)
    optim = OptimArgs(lr=0.01, warmup=0, weight_decay=0.5, value_update="sparse", value_rounding=rounding)
    return model, reducer, build_optimizer(model, optim, 10, seed=3)[0]


def whole_state(run: tuple[Any, ...]) -> list[torch.Tensor]:
    model, _, optimizer = run
    state = []
    for parameter in model.parameters():
        state.append(whole(parameter.detach()).clone())
        state += [whole(value).clone() for value in optimizer.state[parameter].values()]
    return state


def trained(args: LMTransformerArgs, rounding: str = "nearest", **distributed: Any) -> list[torch.Tensor]:
    run = start(args, rounding, **distributed)
    train(run, range(3), **distributed)
    return whole_state(run)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selective_activation_checkpointing": True},
        {"checkpoint_each_layer": True},
        {"model_dtype": "bf16", "rounding": "stochastic"},
    ],
    ids=str,
)
def test_a_model_trains_the_same(name, options):
    """Weights and moments; two layers that share a table, two tables, accumulation, activations computed again."""
    assert same(trained(MODELS[name], **options, **ON_CPU), trained(MODELS[name], **options))


def test_each_goes_on_from_the_others_checkpoint(tmp_path):
    saved = start(MODELS["PEER"])
    train(saved, range(2))
    here_and_there = [({}, ON_CPU), (ON_CPU, {})]
    for step, (first, second) in enumerate(here_and_there, start=2):
        loaded = start(MODELS["PEER"], **second)
        state = {"step": step, "data_loader_state": {}}
        folder = CheckpointManager(CheckpointArgs(), tmp_path).save(step, saved[0], saved[2], state, {})
        load_training(folder, loaded[0], loaded[2])
        assert same(whole_state(loaded), whole_state(saved))
        for run, layout in ((saved, first), (loaded, second)):
            train(run, range(step, step + 1), **layout)
        assert same(whole_state(loaded), whole_state(saved))
        saved = loaded


def train_on_ranks(folder: Path) -> dict[str, tuple[bool, bool]]:
    """Of each layout, whether tables in the CPU's memory train the same, and load the same from a checkpoint."""
    found = {}
    layouts = {name: layout for name, layout in LAYOUTS[2].items() if name != "full_shard"}  # which splits by rows
    for (name, layout), kind in zip(layouts.items(), itertools.cycle(MODELS)):
        states = []
        for place in ({}, ON_CPU):
            run = start(MODELS[kind], **layout, **place)
            train(run, range(2), **layout)
            states.append(whole_state(run))
        number, _ = data_rank(distributed_args(**layout), here())
        manager = CheckpointManager(CheckpointArgs(), folder / name, here().rank, number)
        checkpoint = manager.save(2, run[0], run[2], {"step": 2, "data_loader_state": {}}, {})
        loaded = start(MODELS[kind], **layout, **ON_CPU)
        load_training(checkpoint, loaded[0], loaded[2])
        close = all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(*states, strict=True))
        found[name] = close, same(whole_state(loaded), states[1])
    return found


def test_ranks_train_the_same(tmp_path):
    for found in run_ranks(2, train_on_ranks, tmp_path):
        assert len(found) == 4
        assert set(found.values()) == {(True, True)}, found

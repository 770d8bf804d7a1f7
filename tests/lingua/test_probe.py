"""The probe's numbers against plain ones, and that nothing of training is touched by it, on every layout."""

import copy
import functools
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua import probe as probe_module
from lingua.distributed import data_rank, gather_objects, local_part
from lingua.memory_use import MemoryUse
from lingua.optim import OptimArgs, build_optimizer, clip_gradients
from lingua.probe import STATISTICS, append_probe, attention_entropy, drop_probes_after, probe, summarize
from lingua.transformer import apply_rotary, create_causal_mask
from tests.helpers.layouts import MODELS, SEQ_LEN, VOCABULARY, build, build_alone, distributed_args, here, model_args
from tests.helpers.ranks import run_ranks

DENSE = model_args({"is_enabled": False}, n_kv_heads=2)
LAYOUTS = {
    "data parallel": {},
    "full_shard": {"fsdp_type": "full_shard"},
    "tensor parallel": {"tp_size": 2},
    "memory parallel": {"memory_parallel_size": 2},
    "memory parallel, full_shard": {"memory_parallel_size": 2, "fsdp_type": "full_shard"},
}
RECOMPUTING = {
    "kept": {},
    "selective": {"selective_activation_checkpointing": True},
    "each layer": {"checkpoint_each_layer": True},
}


def rows(seed: int, n: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))


def probe_row(model: LMTransformer, row: torch.Tensor, dtype: str = "fp32") -> list[dict[str, Any]]:
    """Of one row of ids, (1, T + 1)."""

    def compute_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return model(row[:, :-1], row[:, 1:])

    return probe(model, compute_loss)


def by_name(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(record["name"], record["kind"]): record for record in records}
    assert len(found) == len(records), "each once"
    return found


# --- the numbers -----------------------------------------------------------------------------------------------------


def plain_statistics(tensor: torch.Tensor) -> dict[str, float]:
    """In fp64, of the finite elements."""
    x = tensor.detach().double().flatten().numpy()
    y = x[np.isfinite(x)]
    centred = y - y.mean()
    return {
        "mean": y.mean(),
        "std": y.std(),
        "rms": math.sqrt((y**2).mean()),
        "min": y.min(),
        "max": y.max(),
        "abs_max": np.abs(y).max(),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
        "zeros": (x == 0).mean(),
        "nonfinite": 1 - len(y) / len(x),
    }


def assert_measured(record: dict[str, Any], tensor: torch.Tensor) -> None:
    expected = plain_statistics(tensor)
    assert record["n"] == tensor.numel()
    if record["kind"].startswith("grad_"):  # what cancels is 0 in one order of summing, and tiny in another
        expected["zeros"] = record["zeros"]
    # Means near 0 are sums of what cancels, too.
    assert {name: record[name] for name in STATISTICS} == pytest.approx(expected, rel=2e-4, abs=2e-6 * expected["rms"])


CASES = {
    "normal": torch.randn(10, 30, generator=torch.Generator().manual_seed(0)),
    "far from 0": 1000 + torch.randn(300, generator=torch.Generator().manual_seed(0)),
    "tiny, in bf16": (1e-30 * torch.randn(300, generator=torch.Generator().manual_seed(0))).bfloat16(),
    "huge": 1e30 * torch.randn(300, generator=torch.Generator().manual_seed(0)),
    "with zeros, not contiguous": F.relu(torch.randn(10, 30, generator=torch.Generator().manual_seed(0))).T,
    "not finite": torch.tensor([1.0, math.nan, -2.0, math.inf, 0.0, -math.inf, 3.0, 4.0]),
}


@pytest.mark.parametrize("at_once", [7, 2**24])
@pytest.mark.parametrize("name", CASES)
def test_statistics(name, at_once):
    tensor = CASES[name]
    found = summarize(tensor.numel(), lambda: tensor.flatten().split(at_once)).tolist()
    expected = plain_statistics(tensor)
    assert found == pytest.approx([expected[name] for name in STATISTICS], rel=2e-4)


def test_what_is_no_number_is_null(tmp_path):
    """Of nothing but NaNs, and the kurtosis of what is all the same."""
    measured = probe_module._Measured()
    measured.add("layers.3.attention.wq", "output", torch.full((4,), math.nan))
    measured.add("output", "weight", torch.zeros(4))
    tmp_path.joinpath("probe").mkdir()
    append_probe(tmp_path, 5, 0, measured.records())
    nothing, zeros = map(json.loads, (tmp_path / "probe" / "probe.0.jsonl").read_text().splitlines())
    assert nothing == {
        "global_step": 5,
        "name": "layers.3.attention.wq",
        "layer": 3,
        "kind": "output",
        "n": 4,
        **dict.fromkeys(STATISTICS),
        "zeros": 0.0,
        "nonfinite": 1.0,
    }
    assert zeros["layer"] is None
    assert {name: zeros[name] for name in STATISTICS} == {
        **dict.fromkeys(STATISTICS, 0.0),
        "kurtosis": None,
        "zeros": 1.0,
    }


@pytest.mark.parametrize("at_once", [1, 50, 2**24])
@pytest.mark.parametrize("kind", ["causal", "window", "a mask for each head", "additive"])
def test_attention_entropy(kind, at_once, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 6, heads, 4, generator=generator) for heads in (6, 3))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    mask, seen = {
        "causal": ("causal", causal),
        "window": (create_causal_mask(6, sliding_window=2), causal & ~causal.tril(-2)),
        "a mask for each head": (causal.expand(1, 6, 6, 6), causal),
        "additive": (torch.zeros(6, 6).masked_fill(~causal, -math.inf), causal),
    }[kind]
    monkeypatch.setattr(probe_module, "AT_ONCE", at_once)
    found = attention_entropy(q, k, mask)
    for b, h in itertools.product(range(2), range(6)):
        entropies = []
        for t in range(6):
            visible = [s for s in range(6) if seen[t, s]]
            logits = [float(q[b, t, h] @ k[b, s, h // 2]) / 2 for s in visible]
            total = sum(map(math.exp, logits))
            entropies.append(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in logits))
        assert found[b, h].item() == pytest.approx(sum(entropies) / 6, rel=1e-4, abs=1e-6)


def test_a_mask_of_another_kind_is_refused():
    q = torch.randn(1, 4, 2, 4)
    with pytest.raises(ValueError, match="probe_freq: knows no attention entropy for a mask of type BlockMask"):
        attention_entropy(q, q, create_causal_mask(4, "flex_attention"))


def plain_pass(model: LMTransformer, row: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """What the probe should have seen, by the model's formulas written out and autograd's own gradients."""
    model = copy.deepcopy(model)
    seen = {}

    def note(name: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        seen[name, kind] = tensor
        if kind in ("output", "residual"):
            tensor.retain_grad()
        return tensor

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        module = model.get_submodule(name)
        note(name, "input", x)
        note(name, "weight", module.weight)
        return note(name, "output", F.linear(x, module.weight, getattr(module, "bias", None)))

    def remember(name: str, x: torch.Tensor) -> torch.Tensor:
        memory = model.get_submodule(name)
        x = x[0]
        query = note(name, "memory_query", linear(f"{name}.query_proj.query_mlps.0", x))
        halves = query.view(SEQ_LEN, memory.heads, 2, -1)
        keys = memory.keys.view(memory.heads, 2, memory.n_keys, -1)
        first, second = (torch.einsum("nhd,hkd->nhk", halves[:, :, i], keys[:, i]) for i in (0, 1))
        scores, slots = (first[..., None] + second[..., None, :]).flatten(2).topk(memory.knn, sorted=True)
        note(name, "memory_scores", scores)
        weights, slots = scores.softmax(-1).flatten(1), slots.flatten(1)
        for table, own in zip(
            memory.tables, ("values_u", "values_v") if memory.peer_variant else ("values",), strict=True
        ):
            note(f"{name}.{own}", "memory_values", table.weight[slots])
        if memory.peer_variant:
            products = torch.einsum("nkd,nd->nk", memory.tables[0].weight[slots], x)
            note(f"{name}.values_u", "memory_output", products)
            weights = weights * F.gelu(products)
        y = torch.einsum("nkd,nk->nd", memory.tables[-1].weight[slots], weights)
        note(f"{name}.{'values_v' if memory.peer_variant else 'values'}", "memory_output", y)
        y = linear(f"{name}.value_proj", y * F.silu(linear(f"{name}.swilu_projection", x)))
        return (y * linear(f"{name}.gating", x).sigmoid())[None]

    tokens = row[:, :-1]
    rotation = model.rope_embeddings(SEQ_LEN)
    h = note("tok_embeddings", "residual", model.tok_embeddings(tokens))
    for number, block in enumerate(model.layers):
        name = f"layers.{number}"
        x = block.attention_norm(h)
        q, k, v = (linear(f"{name}.attention.{w}", x).unflatten(-1, (-1, 4)) for w in ("wq", "wk", "wv"))
        q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
        k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (k, v))
        logits = torch.einsum("bthd,bshd->bhts", q, k) / 2
        logits = logits.masked_fill(~torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril(), -math.inf)
        p = logits.softmax(-1)
        note(f"{name}.attention", "attention_entropy", torch.xlogy(p, p).sum(-1).neg().mean(-1))
        h = h + linear(f"{name}.attention.wo", torch.einsum("bhts,bshd->bthd", p, v).flatten(-2))
        x, inner = block.ffn_norm(h), f"{name}.feed_forward"
        if number in model.memories():
            h = note(name, "residual", h + remember(inner, x))
        else:
            gate, up = linear(f"{inner}.w1", x), linear(f"{inner}.w3", x)
            h = note(name, "residual", h + linear(f"{inner}.w2", F.silu(gate) * up))
    F.cross_entropy(linear("output", model.norm(h))[0], row[0, 1:]).backward()
    gradients = {
        (name, f"grad_{kind}"): tensor.grad for (name, kind), tensor in seen.items() if kind in ("output", "residual")
    }
    for name, kind in list(seen):
        if kind == "weight" and name != "output":
            gradients[name, "grad_weight"] = model.get_submodule(name).weight.grad
    return seen | gradients


PLAIN = {
    "dense": DENSE,
    "one table": model_args({"mem_v_dim": 8}),
    "PEER": model_args({"mem_share_values": False, "peer_variant": True, "mem_v_dim": -1}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_measures_what_a_plain_model_computes(name, monkeypatch):
    args = PLAIN[name]
    if args.productkey_args.peer_variant:
        monkeypatch.setattr(probe_module, "AT_ONCE", 100)  # rows of tables in parts
    model, row = build_alone(args), rows(0, 1)
    for parameter in model.parameters():  # biases too
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    found, expected = by_name(probe_row(model, row)), plain_pass(model, row)
    weight = found.pop(("output", "grad_weight"))
    assert weight["n"] == VOCABULARY * args.dim
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert_measured(record, expected[key])
        assert record["layer"] == (int(key[0].split(".")[1]) if key[0].startswith("layers.") else None)


# --- nothing is touched ----------------------------------------------------------------------------------------------


def train(args: LMTransformerArgs, probing: bool, value_update: str = "dense", **distributed: Any) -> dict[str, Any]:
    """Three steps of two batches, with probes within and behind the first; all that training leaves on this rank."""
    model, reducer = build(args, **distributed)
    options = {"lr": 0.01, "scheduler": "constant", "value_update": value_update}
    optimizer, _ = build_optimizer(model, OptimArgs(**options), n_steps=3)
    tables = [table for memory in model.memories().values() for table in memory.own_tables]
    MemoryUse(model.memories())
    number, n_parts = data_rank(distributed_args(**distributed), here())
    dtype = distributed.get("model_dtype", "fp32")
    losses = []
    for step in range(3):
        for count in (1, 2):
            batch = rows(2 * step + count, 2 * n_parts).chunk(n_parts)[number]
            reducer.begin(last=count == 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = model(batch[:, :-1], batch[:, 1:])
            (loss / 2).backward()
            losses.append(loss.item())
            if probing and step == 0 and count == 1:  # gradients of the first batch are there: they stay
                assert len(probe_row(model, batch[:1], dtype)) > 80
        reducer.finish()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if probing and step == 0:
            noted = [table.row_gradients for table in tables]
            probe_row(model, batch[:1], dtype)
            assert [table.row_gradients for table in tables] == noted
            assert all(of_table is None or of_table.is_empty for of_table in noted)
            assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any(hook.__module__ == probe_module.__name__ for hook in hooks)
    states = {str(n): local_part(v) for n, state in enumerate(optimizer.state.values()) for v in state.values()}
    weights = {name: local_part(parameter.detach()) for name, parameter in model.named_parameters()}
    use = {f"use {number}": memory.slot_use.weights_M for number, memory in model.memories().items()}
    return {"losses": losses, "random": torch.get_rng_state(), **states, **weights, **use}


def check_untouched(*arguments: Any, **options: Any) -> None:
    torch.manual_seed(0)
    without = train(*arguments, probing=False, **options)
    torch.manual_seed(0)
    with_probe = train(*arguments, probing=True, **options)
    assert without.keys() == with_probe.keys()
    assert len(set(without["losses"])) == 6
    for key, value in without.items():
        same = torch.equal(value, with_probe[key]) if isinstance(value, torch.Tensor) else value == with_probe[key]
        assert same, f"{key} under {options}"


@pytest.mark.parametrize("recomputing", RECOMPUTING)
def test_training_is_untouched(recomputing):
    sparse = {"value_update": "sparse"}
    settings = [{}, sparse, {"model_dtype": "bf16"}, {"values_device": "cpu", **sparse}]
    for args, options in zip(itertools.cycle(MODELS.values()), settings, strict=False):
        check_untouched(args, **RECOMPUTING[recomputing], **options)


@pytest.mark.parametrize("recomputing", RECOMPUTING)
def test_nothing_is_compiled_again(recomputing, monkeypatch):
    """Compiles as `distributed.compile` does, but for generating no code, and counts what is compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    args = model_args({"layers": "1"}, n_layers=2)
    compiled = []
    for probing in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        compiled.append((train(args, probing, "sparse", compile=True, **RECOMPUTING[recomputing]), len(graphs)))
    (without, n_without), (with_probe, n_with) = compiled
    assert n_with == n_without >= args.n_layers
    assert with_probe["losses"] == without["losses"]
    assert all(with_probe[key].equal(value) for key, value in without.items() if isinstance(value, torch.Tensor))


def check_layout(layout: dict[str, Any]) -> None:
    """The same row on all ranks: together they measure what one process does."""
    updates = ["dense"] if layout == LAYOUTS["full_shard"] else ["dense", "sparse"]
    row = rows(0, 1)
    turns = itertools.cycle(MODELS.values()), itertools.cycle(updates), itertools.cycle(["fp32", "bf16"])
    for args, update, dtype, recomputing in zip(*turns, RECOMPUTING.values(), strict=False):
        check_untouched(args, value_update=update, model_dtype=dtype, **layout, **recomputing)
        expected = by_name(probe_row(build_alone(args), row))
        parts = gather_objects(by_name(probe_row(build(args, **layout, **recomputing)[0], row)))
        assert all(part.keys() == expected.keys() for part in parts)
        for key, record in expected.items():
            of_memory = "feed_forward" in key[0] and int(key[0].split(".")[1]) in (0, 2)
            if "tp_size" in layout and of_memory and key[1] in ("grad_weight", "memory_values"):
                continue  # each rank's are of its part of the sequence
            of_key = [part[key] for part in parts]
            n = sum(part["n"] for part in of_key)
            assert n in (record["n"], 2 * record["n"]), key
            rms = math.sqrt(sum(part["n"] * part["rms"] ** 2 for part in of_key) / n)
            assert rms == pytest.approx(record["rms"], rel=1e-3, abs=1e-8), key
            assert max(part["abs_max"] for part in of_key) == pytest.approx(record["abs_max"], rel=1e-3, abs=1e-7), key
            halved = [name for name in SPLIT if layout.get(name) and key[1] in SPLIT[name]]
            assert not halved or n == record["n"], key


# What the ranks of a group have parts of, among others.
SPLIT = {
    "tp_size": ("residual", "grad_residual", "attention_entropy", "memory_query", "memory_scores"),
    "memory_parallel_size": ("memory_values",),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(layout):
    run_ranks(2, check_layout, LAYOUTS[layout])


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_computed_again_is_dropped(tmp_path):
    """Each rank's own file, and its share of those of more ranks."""
    tmp_path.joinpath("probe").mkdir()
    for rank in range(5):
        for step in (2, 4, 6):
            append_probe(tmp_path, step, rank, [{"name": "output", "n": n} for n in range(2)])
    with open(tmp_path / "probe" / "probe.3.jsonl", "a") as file:
        file.write('{"global_step": 4, "na')  # a kill while it was written
    (tmp_path / "probe" / "probe.notes.jsonl").write_text("mine")
    drop_probes_after(tmp_path / "nothing here", 4, 0, 1)

    def steps(rank):
        lines = (tmp_path / "probe" / f"probe.{rank}.jsonl").read_text().splitlines()
        return [json.loads(line)["global_step"] for line in lines]

    drop_probes_after(tmp_path, 4, 1, 2)
    assert [steps(rank) for rank in range(5)] == [[2, 2, 4, 4, *([] if rank % 2 else [6, 6])] for rank in range(5)]
    drop_probes_after(tmp_path, 1, 0, 2)
    assert [steps(rank) for rank in range(5)] == [[2, 2, 4, 4] if rank % 2 else [] for rank in range(5)]
    assert (tmp_path / "probe" / "probe.notes.jsonl").read_text() == "mine"


def test_a_probe_that_cannot_be_written_is_told_of(tmp_path, caplog):
    append_probe(tmp_path / "run", 2, 0, [{"name": "output"}])  # makes the folder
    (tmp_path / "run" / "probe" / "probe.1.jsonl").symlink_to("/dev/full")
    append_probe(tmp_path / "run", 2, 1, [{"name": "output"}])
    assert "the probe of step 2 is not written" in caplog.text
    assert "probe.1.jsonl (No space left on device)" in caplog.text

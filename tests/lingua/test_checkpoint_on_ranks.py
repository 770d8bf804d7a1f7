"""Checkpoints that one layout of ranks writes and another one reads; value tables are in bf16, all else in fp32."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim import Optimizer

from apps.main.transformer import LMTransformer
from lingua import checkpoint
from lingua.checkpoint import (
    CheckpointArgs,
    CheckpointManager,
    consolidate_checkpoints,
    load_model,
    load_training,
    read_metadata,
)
from lingua.distributed import data_rank
from lingua.optim import OptimArgs, build_optimizer
from lingua.parallelize import GradientReducer
from tests.helpers.layouts import (
    LAYOUTS,
    SEQ_LEN,
    VOCABULARY,
    build,
    distributed_args,
    here,
    model_args,
    whole,
    whole_weights,
)
from tests.helpers.ranks import run_ranks

SAVED = {
    name: LAYOUTS[4][name]
    for name in ("full_shard", "tensor parallel, full_shard", "memory parallel, 2 replicas", "memory parallel, HSDP")
}
# Layout -> whose checkpoints it loads: between them, all of those saved, split as they are here and otherwise.
LOADED = {
    "full_shard": (*SAVED, "alone"),
    "tensor parallel": ("full_shard", "memory parallel, HSDP"),
    "memory parallel": ("tensor parallel, full_shard", "alone"),
}
OTHERS = {layout: [name for name in (*SAVED, "alone") if name not in names] for layout, names in LOADED.items()}

STEP = "0000000001"
TABLE = "layers.0.feed_forward.values.weight"


def start(distributed: dict[str, Any], **changes: Any) -> tuple[LMTransformer, GradientReducer, Optimizer]:
    """A model with enough slots that its table, which two memories share, is larger than all else."""
    model, reducer = build(model_args({"mem_n_keys": 48, "mem_v_dim": 8}, **changes), **distributed, model_dtype="bf16")
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, scheduler="constant"), 10)
    return model, reducer, optimizer


def whole_state(model: LMTransformer, optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    state = {"weight": whole_weights(model)}
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        state[kind] = {name: whole(optimizer.state[p][kind]) for name, p in model.named_parameters()}
    return state


def save(folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """Trains one step in each layout, writes its checkpoint, and beside it all that is in it as full tensors."""
    for name, distributed in layouts.items():
        model, reducer, optimizer = start(distributed)
        tokens = torch.randint(VOCABULARY, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
        reducer.begin(last=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens)
        loss.backward()
        reducer.finish()
        optimizer.step()
        number, _ = data_rank(distributed_args(**distributed), here())
        manager = CheckpointManager(CheckpointArgs(), folder / name, here().rank, number)
        assert manager.save(1, model, optimizer, {"step": 1, "data_loader_state": {}}, {}).name == STEP
        state = whole_state(model, optimizer)
        if here().rank == 0:
            torch.save(state, folder / name / "state.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with one of each of `SAVED`, and of one process alone."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(4, save, folder, SAVED)
    save(folder, {"alone": {}})
    return folder


def check_loading(folder: Path, distributed: dict[str, Any], names: Iterable[str]) -> None:
    model, _, optimizer = start(distributed, seed=9)
    for name in names:
        expected = torch.load(folder / name / "state.pt")
        # Nothing here is as large as what is read in parts.
        with mock.patch.object(checkpoint, "READ_BYTES", 700):
            load_training(folder / name / STEP, model, optimizer)
        for kind, tensors in whole_state(model, optimizer).items():
            assert tensors.keys() == expected[kind].keys()
            for key, tensor in tensors.items():
                assert tensor.dtype == expected[kind][key].dtype, (name, kind, key)
                assert torch.equal(tensor, expected[kind][key]), (name, kind, key)


@pytest.mark.parametrize("layout", LOADED)
def test_a_checkpoint_of_4_ranks_loads_on_2(saved, layout):
    """And that of one process; model and optimizer to the last bit."""
    run_ranks(2, check_loading, saved, LAYOUTS[2][layout], LOADED[layout])


@pytest.mark.long
@pytest.mark.parametrize("layout", [layout for layout in OTHERS if OTHERS[layout]])
def test_every_checkpoint_loads_in_every_layout(saved, layout):
    run_ranks(2, check_loading, saved, LAYOUTS[2][layout], OTHERS[layout])


def test_a_checkpoint_of_4_ranks_loads_on_1(saved):
    check_loading(saved, {}, (*SAVED, "alone"))


@pytest.mark.parametrize("layout", SAVED)
def test_a_checkpoint_holds_each_tensor_once(saved, layout):
    """The table too, which two memories share, and groups of ranks repeat."""
    folder = saved / layout / STEP
    alone = torch.load(saved / "alone" / "state.pt")
    stored: dict[str, int] = {}
    for index, place in read_metadata(folder).storage_data.items():
        stored[index.fqn] = stored.get(index.fqn, 0) + place.length
    of_optimizer = {kind: f"optim.state.{TABLE}.{kind}" for kind in ("exp_avg", "exp_avg_sq")}
    table = {"weight": f"model.{TABLE}", **of_optimizer}
    for kind, key in table.items():
        size = alone[kind][TABLE].nbytes
        assert size < stored[key] < 1.5 * size, key
    assert {key for key in stored if ".values" in key} == {*table.values(), f"optim.state.{TABLE}.step"}
    files = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    assert sum(stored.values()) <= files < 1.01 * sum(stored.values())


# --- weights alone -------------------------------------------------------------------------------------------------


def check_weights(folder: Path, sources: list[Path], layouts: dict[str, dict[str, Any]]) -> None:
    expected = torch.load(folder / "full_shard" / "state.pt")["weight"]
    for layout, distributed in layouts.items():
        model, _, _ = start(distributed, seed=9)
        for source in sources:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            load_model(source, model)
            for name, weight in whole_weights(model).items():
                assert torch.equal(weight, expected[name]), (source.name, layout, name)


@pytest.fixture(scope="module")
def weights(saved, tmp_path_factory) -> list[Path]:
    """The same in three forms: distributed, consolidated, and with the table repeated, as published ones have it."""
    folder = saved / "full_shard" / STEP
    consolidated = consolidate_checkpoints(folder) / "consolidated.pth"
    state = torch.load(consolidated)["model"]
    published = tmp_path_factory.mktemp("published") / "consolidated.pth"
    torch.save({"model": {**state, TABLE.replace("layers.0", "layers.2"): state[TABLE].clone()}}, published)
    return [folder, consolidated, published]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_weights_load_into_every_layout(saved, weights, n_ranks):
    run_ranks(n_ranks, check_weights, saved, weights, LAYOUTS[n_ranks])


def test_weights_load_into_one_process(saved, weights):
    check_weights(saved, weights, {"alone": {}})


# --- errors --------------------------------------------------------------------------------------------------------


def load_where_one_rank_finds_something_else(good: Path, bad: Path, kind: str) -> str:
    """What it comes to on this rank, where the second one reads `bad` and the others `good`."""
    model, _, optimizer = start(LAYOUTS[2]["memory parallel"])
    folder = bad if here().rank == 1 else good
    try:
        if kind == "training":
            load_training(folder, model, optimizer)
        else:
            load_model(folder, model)
    except ValueError as error:
        return str(error)
    except SystemExit:
        return "left"
    return "loaded"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", {"training": "no checkpoint is there", "weights": "neither .metadata nor consolidated.pth is"}),
        ("cut short", {"training": "distcp has 10 bytes, and", "weights": "distcp has 10 bytes, and"}),
    ],
)
@pytest.mark.parametrize("kind", ["training", "weights"])
def test_a_checkpoint_that_one_rank_finds_damaged(saved, tmp_path, kind, damage, words):
    """That rank says so, and no rank waits for another."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    shutil.copytree(saved / "full_shard" / STEP, good, ignore=shutil.ignore_patterns("consolidated"))
    if damage == "cut short":
        shutil.copytree(good, bad)
        largest = max(bad.glob("*.distcp"), key=lambda file: file.stat().st_size)
        os.truncate(largest, 10)
    told = run_ranks(2, load_where_one_rank_finds_something_else, good, bad, kind)
    assert told[0] == "left"
    assert str(bad) in told[1]
    assert words[kind] in told[1]


def load_published(folder: Path) -> str:
    model, _, _ = start(LAYOUTS[2]["memory parallel"], seed=9)
    try:
        load_model(folder, model)
    except ValueError as error:
        return str(error)
    except SystemExit:
        return "left"
    expected = torch.load(folder / "state.pt")
    return "same" if torch.equal(whole_weights(model)[TABLE], expected) else "other"


@pytest.mark.parametrize("column", [None, 0, 7])
def test_a_distributed_checkpoint_that_repeats_the_table(saved, tmp_path, column):
    """As published ones do. Each rank compares its own columns; the copies differ in `column`."""
    state = torch.load(consolidate_checkpoints(saved / "full_shard" / STEP) / "consolidated.pth")["model"]
    repeated = state[TABLE].clone()
    if column is not None:
        repeated[3, column] += 1
    state[TABLE.replace("layers.0", "layers.2")] = repeated
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    torch.save(state[TABLE], tmp_path / "state.pt")
    told = run_ranks(2, load_published, tmp_path)
    if column is None:
        assert told == ["same", "same"]
    else:
        finder = 0 if column < 4 else 1
        assert "mem_share_values=false" in told[finder]
        assert told[1 - finder] == "left"

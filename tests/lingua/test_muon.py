"""Muon: against torch's own, with AdamW and SparseAdamW beside it, skipped steps, ranks, resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua import muon, optim
from lingua.checkpoint import CheckpointArgs, CheckpointManager, load_training
from lingua.distributed import data_rank
from lingua.errors import UserError
from lingua.muon import orthogonalize
from lingua.optim import OPTIMIZERS, OptimArgs, OptimizerRule, build_optimizer, hidden_matrices, validate_optim_args
from lingua.parallelize import GradientReducer
from tests.helpers.layouts import (
    LAYOUTS,
    MODELS,
    assert_close,
    backward,
    build,
    distributed_args,
    here,
    train,
    whole_state,
)
from tests.helpers.ranks import run_ranks

OPTIM = {"name": "muon", "lr": 0.01, "scheduler": "constant", "weight_decay": 0.5}


def start(args: LMTransformerArgs, update: str = "dense", **distributed: Any) -> tuple[Any, ...]:
    model, reducer = build(args, **distributed)
    return model, reducer, build_optimizer(model, OptimArgs(**OPTIM, value_update=update), 10)[0]


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (3, 40), (40, 3), (1, 5)], ids=str)
def test_orthogonalize(shape):
    torch.manual_seed(0)
    matrices = torch.randn(4, *shape)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices).float()
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.3
    on_the_diagonal = torch.einsum("nri,nrc,nic->ni", left, result, right)
    assert torch.allclose(on_the_diagonal.sort().values, values.sort().values, atol=0.05)


def test_moves_as_torchs_own():
    """Hidden matrices; all else, tables too, as AdamW moves it."""
    model, reducer, optimizer = start(MODELS["one table"])
    other, other_reducer = build(MODELS["one table"])
    matrices = hidden_matrices(other)
    rest = [parameter for parameter in other.parameters() if not any(parameter is matrix for matrix in matrices)]
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.5, betas=(0.9, 0.95), fused=True),
    ]
    for memory in other.memories().values():
        memory.value_fixed_lr = None
    table = next(group for group in optimizer.param_groups if group["lr"] != 0.01)
    table["lr"] = 0.01
    for step in range(2):
        for trained, its_reducer in ((model, reducer), (other, other_reducer)):
            trained.zero_grad()
            backward(trained, its_reducer, step)
        optimizer.step()
        for one in theirs:
            one.step()
    for (name, ours), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=2e-3), name
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    kinds = {names[id(matrix)].split(".", 2)[2] for matrix in matrices}
    assert {"attention.wq.weight", "feed_forward.w1.weight", "feed_forward.value_proj.weight"} <= kinds
    assert not any("keys" in name or "values" in name for name in kinds)


@pytest.mark.parametrize("name", [name for name, rule in OPTIMIZERS.items() if rule is not None])
@pytest.mark.parametrize("update", ["dense", "sparse"])
def test_every_optimizer_skips_a_step_to_the_bit(name, update):
    model, reducer = build(MODELS["one table"])
    optimizer, _ = build_optimizer(model, OptimArgs(**OPTIM | {"name": name}, value_update=update), 10)
    optimizer.found_inf = torch.zeros(())
    train(model, reducer, optimizer, range(2), 1.0)
    before = whole_state(model, optimizer)
    backward(model, reducer, 2)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.view(-1)[0] = float("nan")
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = whole_state(model, optimizer)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    optimizer.zero_grad()
    optimizer.found_inf = torch.zeros(())
    train(model, reducer, optimizer, range(2, 3), 1.0)
    moved = whole_state(model, optimizer)
    assert all(tensor.isfinite().all() for tensor in moved.values())
    assert all(
        not torch.equal(moved[key], tensor) for key, tensor in before.items() if key in dict(model.named_parameters())
    )


def test_an_optimizer_that_cannot_skip_is_refused(monkeypatch):
    rule = OptimizerRule(lambda parameter: {}, lambda *_: None, moments=0, takes=hidden_matrices)
    monkeypatch.setitem(optim.OPTIMIZERS, "hasty", rule)
    with pytest.raises(UserError, match=r"^optim.name: hasty cannot skip a step .*can_skip=True"):
        validate_optim_args(OptimArgs(name="hasty"))
    with pytest.raises(UserError, match=r"^optim.name: 'sgd' must be one of adamw, muon, hasty$"):
        validate_optim_args(OptimArgs(name="sgd"))


# --- ranks -----------------------------------------------------------------------------------------------------------


def trained_models(layout: dict[str, Any], update: str = "dense") -> list[dict[str, torch.Tensor]]:
    """Orthogonalized in fp64: in bf16 the order in which gradients are summed would show after one step."""
    muon.DTYPE = torch.float64
    states = []
    for args in MODELS.values():
        model, reducer, optimizer = start(args, update, **layout)
        train(model, reducer, optimizer, range(3), 1.0, **layout)
        states.append(whole_state(model, optimizer))
    return states


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "DTYPE", muon.DTYPE)  # as it is put back
        return {update: trained_models({}, update) for update in ("dense", "sparse")}


# Of 2 ranks, each layout; of 4, those in which the ranks differ in two ways.
RANKS = [(2, name, "dense") for name in LAYOUTS[2]] + [(2, "memory parallel", "sparse")]
RANKS += [(4, "HSDP", "dense"), (4, "tensor parallel, full_shard", "dense"), (4, "memory parallel, HSDP", "sparse")]


@pytest.mark.parametrize(("n_ranks", "layout", "update"), RANKS, ids=str)
def test_ranks_train_as_one_process(alone, n_ranks, layout, update):
    for states in run_ranks(n_ranks, trained_models, LAYOUTS[n_ranks][layout], update):
        for actual, expected in zip(states, alone[update], strict=True):
            assert_close(actual, expected, 1e-4)


# --- resume ----------------------------------------------------------------------------------------------------------


def save_after_two_steps(folder: Path, **layout: Any) -> tuple[LMTransformer, GradientReducer, Optimizer]:
    model, reducer, optimizer = start(MODELS["one table"], "sparse", **layout)
    train(model, reducer, optimizer, range(2), 1.0, **layout)
    number, _ = data_rank(distributed_args(**layout), here())
    state = {"step": 2, "data_loader_state": {}}
    CheckpointManager(CheckpointArgs(), folder, here().rank, number).save(2, model, optimizer, state, {})
    return model, reducer, optimizer


def test_resumes_to_the_bit(tmp_path):
    saved, loaded = save_after_two_steps(tmp_path), start(MODELS["one table"], "sparse")
    load_training(tmp_path / "0000000002", loaded[0], loaded[2])
    for run in (saved, loaded):
        train(*run, range(2, 4), 1.0)
    expected, actual = (whole_state(model, optimizer) for model, _, optimizer in (saved, loaded))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def save_on_ranks(folder: Path, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, _, optimizer = save_after_two_steps(folder, **layout)
    return whole_state(model, optimizer)


def test_a_checkpoint_of_ranks_loads_in_one_process(tmp_path):
    layout = LAYOUTS[4]["memory parallel, HSDP"]
    expected = run_ranks(4, save_on_ranks, tmp_path, layout)[0]
    model, _, optimizer = start(MODELS["one table"])
    load_training(tmp_path / "0000000002", model, optimizer)
    actual = whole_state(model, optimizer)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_a_checkpoint_of_another_optimizer_says_so(tmp_path):
    save_after_two_steps(tmp_path)
    model, _ = build(MODELS["one table"])
    optimizer, _ = build_optimizer(model, OptimArgs(), 10)
    with pytest.raises(UserError, match=r"optim\.name"):
        load_training(tmp_path / "0000000002", model, optimizer)


def test_matrices_are_each_taken_once():
    model = LMTransformer(MODELS["PEER"])
    matrices = hidden_matrices(model)
    assert len({id(matrix) for matrix in matrices}) == len(matrices) > 0
    assert all(isinstance(matrix, nn.Parameter) and matrix.ndim == 2 for matrix in matrices)

"""The training that the published code did (tests/golden) on two ranks, laid out in every way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from apps.main.transformer import LMTransformerArgs
from lingua.checkpoint import load_model
from lingua.distributed import data_rank
from lingua.optim import OptimArgs, build_optimizer, clip_gradients
from lingua.product_key.memory import ProductKeyArgs
from tests.helpers.layouts import LAYOUTS, build, distributed_args, here, whole
from tests.helpers.ranks import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [case for case in json.loads((GOLDEN / "manifest.json").read_text()) if case["kind"] == "train"]


def train(case: dict[str, Any], initial: str, distributed: dict[str, Any]) -> dict[str, Any]:
    """The case's steps, as apps/main/train.py does them. Each data-parallel rank has its part of the batch."""
    args = LMTransformerArgs(**case["model"], productkey_args=ProductKeyArgs(**case["productkey_args"]))
    model, reducer = build(args, **distributed)
    load_model(Path(initial), model)
    optimizer, scheduler = build_optimizer(model, OptimArgs(**case["optim"]), case["n_steps"])
    number, n_parts = data_rank(distributed_args(**distributed), here())
    with np.load(GOLDEN / case["file"]) as file:
        tokens = torch.from_numpy(file["tokens"]).chunk(n_parts, dim=1)[number]

    done = {"losses": [], "grad_norms": [], "value_grad_norms": [], "grad0": {}}
    for step, batch in enumerate(tokens):
        reducer.begin(last=True)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        reducer.finish()
        if step == 0:
            done["grad0"] = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        norms = clip_gradients(model, case["optim"]["clip"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean_loss = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean_loss)
        for name, value in zip(("losses", "grad_norms", "value_grad_norms"), (mean_loss, *norms), strict=True):
            if value is not None:
                done[name].append(value.item())
    return done | {"final": {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, id=f"{case['file']}-{layout}")
        for case in CASES
        for layout, distributed in LAYOUTS[2].items()
        if case["productkey_args"]["is_enabled"] or "memory_parallel_size" not in distributed
    ],
)
def test_golden_training_on_two_ranks(tmp_path, case, layout):
    with np.load(GOLDEN / case["file"]) as arrays:
        file = {key: torch.from_numpy(array) for key, array in arrays.items()}
    initial = {key.removeprefix("init."): tensor for key, tensor in file.items() if key.startswith("init.")}
    torch.save({"model": initial}, tmp_path / "initial.pth")

    for done in run_ranks(2, train, case, str(tmp_path / "initial.pth"), LAYOUTS[2][layout]):
        for name in ("losses", "grad_norms", "value_grad_norms"):
            assert done[name] == pytest.approx(file[name].tolist(), rel=1e-4), name
        for kind in ("grad0", "final"):
            expected = {key.partition(".")[2]: tensor for key, tensor in file.items() if key.startswith(f"{kind}.")}
            assert expected
            for name, tensor in expected.items():
                assert (done[kind][name] - tensor).norm() <= 1e-4 * tensor.norm(), (kind, name)

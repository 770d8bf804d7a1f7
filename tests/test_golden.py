"""The numbers that the published code computes (tests/golden/README.md tells what each case holds)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.data import DataArgs, build_dataloader_from_args, init_dataloader_state_from_args
from lingua.optim import OptimArgs, build_lr_fn, build_optimizer, clip_gradients
from lingua.product_key.memory import HashingMemory, ProductKeyArgs
from lingua.tokenizer import TokenizerArgs

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def cases(kind):
    return [pytest.param(case, id=case.get("file", kind)) for case in MANIFEST if case["kind"] == kind]


def tensors(file, prefix):
    return {key.removeprefix(prefix): torch.from_numpy(file[key]) for key in file if key.startswith(prefix)}


def assert_close(actual, expected, rtol, name=""):
    expected = torch.as_tensor(expected)
    difference = (torch.as_tensor(actual).double() - expected.double()).norm()
    assert difference <= rtol * expected.double().norm(), f"{name}: off by {difference / expected.double().norm():.2e}"


@pytest.mark.parametrize("case", cases("memory_layer"))
def test_memory_layer(case):
    file = np.load(GOLDEN / case["file"])
    layer = HashingMemory(**case["kwargs"])
    layer.load_state_dict(tensors(file, "param."))
    x = torch.from_numpy(file["x"]).requires_grad_()

    scores, slots = layer.get_indices(layer.query_proj(x.flatten(0, 1)), layer.knn)
    assert torch.equal(slots.sort(-1).values, torch.from_numpy(file["indices"]).sort(-1).values)
    assert_close(scores.sort(-1).values, torch.from_numpy(file["scores"]).sort(-1).values, 1e-5)

    y = layer(x)
    y.backward(torch.from_numpy(file["grad_y"]))
    assert_close(y, file["y"], 1e-5, "y")
    assert_close(x.grad, file["grad_x"], 1e-5, "grad_x")
    gradients = tensors(file, "grad.")
    assert set(gradients) == set(dict(layer.named_parameters()))
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-5, name)


@pytest.mark.parametrize("case", cases("train"))
def test_train(case):
    file = np.load(GOLDEN / case["file"])
    args = LMTransformerArgs(**case["model"], productkey_args=ProductKeyArgs(**case["productkey_args"]))
    model = LMTransformer(args)
    model.load_state_dict(tensors(file, "init."))
    optimizer, scheduler = build_optimizer(model, OptimArgs(**case["optim"]), case["n_steps"])
    tokens = torch.from_numpy(file["tokens"])
    assert_close(model(tokens[0, :, :-1]).detach(), file["logits0"], 1e-4, "logits0")

    for step, batch in enumerate(tokens):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(case["lrs"][step], rel=1e-9)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        if step == 0:
            for name, gradient in tensors(file, "grad0.").items():
                assert_close(model.get_parameter(name).grad, gradient, 1e-4, name)
        grad_norm, value_grad_norm = clip_gradients(model, case["optim"]["clip"])
        assert loss.item() == pytest.approx(file["losses"][step], rel=1e-4)
        assert grad_norm.item() == pytest.approx(file["grad_norms"][step], rel=1e-4)
        if args.productkey_args.is_enabled:
            assert value_grad_norm.item() == pytest.approx(file["value_grad_norms"][step], rel=1e-4)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    for name, parameter in tensors(file, "final.").items():
        assert_close(model.get_parameter(name).detach(), parameter, 1e-4, name)


@pytest.mark.parametrize(
    ("optim", "n_steps", "step", "factor"),
    [
        pytest.param(case["optim"], case["n_steps"], step, factor, id=f"{case['optim']['scheduler']}-{step}")
        for group in MANIFEST
        if group["kind"] == "lr"
        for case in group["cases"]
        for step, factor in zip(case["steps"], case["factors"], strict=True)
    ],
)
def test_learning_rate_factor(optim, n_steps, step, factor):
    assert build_lr_fn(OptimArgs(**optim), n_steps)(step) == pytest.approx(factor, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("load_async", [False, True])
@pytest.mark.parametrize("case", cases("data"))
def test_data(case, load_async):
    file = np.load(GOLDEN / case["file"])
    args = DataArgs(
        root_dir=str(GOLDEN / case["root"]),
        sources=case["sources"],
        tokenizer=TokenizerArgs(name=case["tokenizer"]),
        load_async=load_async,
        **case["data"],
    )
    for rank in range(case["world_size"]):
        state = init_dataloader_state_from_args(args, rank, case["world_size"])
        with build_dataloader_from_args(args, state) as loader:
            for expected in file[f"rank{rank}"]:
                batch, _ = next(loader)
                assert np.array_equal(batch, expected)

"""The output layer fused with its loss, against F.linear and F.cross_entropy in fp64."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from apps.bench.layout import Ledger
from lingua import loss as module
from lingua.loss import linear_cross_entropy, tokens_of_chunk
from lingua.transformer import cross_entropy
from tests.helpers.layouts import MODELS, SEQ_LEN, VOCABULARY, build_alone
from tests.helpers.ranks import run_ranks


def plain(h, weight, target):
    logits = F.linear(h, weight)
    if logits.dtype == torch.float64:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())
    return cross_entropy(logits, target)


def draw(shape=(3, 41), dim=24, n_words=37, device="cpu", scale=1.0, seed=0):
    """(h, weight) in fp64 and targets, some of which do not count: a view of a batch, as in training."""
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(*shape, dim, dtype=torch.float64, generator=random)
    weight = scale * torch.randn(n_words, dim, dtype=torch.float64, generator=random)
    target = torch.randint(n_words, shape, generator=random)
    target[0, : shape[1] // 3] = -100
    batch = torch.stack([torch.zeros_like(target), target], dim=-1).to(device)
    return h.to(device), weight.to(device), batch[..., 1]


def run(compute, h, weight, target, dtype=None, grad=0.3):
    """The loss and both gradients in fp64, of inputs in fp32 under autocast to `dtype`, or as they are if None."""
    if dtype is not None:
        h, weight = h.float(), weight.float()
    h, weight = h.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    with torch.autocast(h.device.type, dtype or torch.bfloat16, enabled=dtype not in (None, torch.float32)):
        loss = compute(h, weight, target)
    loss.backward(torch.tensor(grad, dtype=loss.dtype, device=loss.device))
    assert h.grad.dtype == h.dtype
    assert weight.grad.dtype == weight.dtype
    return [tensor.detach().double() for tensor in (loss, h.grad, weight.grad)]


def errors(found, expected):
    return [((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)]


# --- on any device: tests/lingua/interpreted_loss_kernels.py and tests/test_gpu.py run these, too --------------------


def check_fp32(device="cpu", **sizes):
    inputs = draw(device=device, **sizes)
    loss, grad_h, grad_weight = errors(run(linear_cross_entropy, *inputs, torch.float32), run(plain, *inputs))
    assert loss < 1e-6
    assert max(grad_h, grad_weight) < 2e-6


def check_half(device="cpu", dtypes=(torch.bfloat16, torch.float16), tolerance=1.05, **sizes):
    """Errors are no larger than those of the plain operators."""
    inputs = draw(device=device, **sizes)
    exact = run(plain, *inputs)
    for dtype in dtypes:
        ours, theirs = (errors(run(compute, *inputs, dtype), exact) for compute in (linear_cross_entropy, plain))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine <= tolerance * other + 1e-7, (dtype, ours, theirs)


def check_large_logits(device="cpu", **sizes):
    """Probabilities of which most are 0, and losses of hundreds."""
    check_half(device, dtypes=(torch.float32, torch.bfloat16), scale=100.0, tolerance=1.2, **sizes)


def check_no_label_counts(device="cpu", **sizes):
    h, weight, target = draw(device=device, **sizes)
    loss, *_ = run(linear_cross_entropy, h, weight, torch.full_like(target, -100), torch.float32)
    assert loss.isnan()


CHECKS = [check_fp32, check_half, check_large_logits, check_no_label_counts]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ON_CPU", 500)
    monkeypatch.setattr(module, "LEAST_TOKENS", 8)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_a_cpu(check):
    check()


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 13)])
def test_any_number_of_chunks(shape):
    check_fp32(shape=shape)


def test_sizes_of_chunks():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert tokens_of_chunk(32_768, 32_000, gpu) == 8_192
    assert tokens_of_chunk(100, 32_000, gpu) == 100
    assert tokens_of_chunk(91, 37, cpu) == 13  # of at most 500 // 37
    assert tokens_of_chunk(1_000, 10**9, cpu) == 8
    assert tokens_of_chunk(0, 37, cpu) == 0


# --- on a CPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_compiled(dtype):
    inputs = draw()
    compiled = torch.compile(linear_cross_entropy, backend=aot_eager, fullgraph=True)
    for mine, eager in zip(run(compiled, *inputs, dtype), run(linear_cross_entropy, *inputs, dtype), strict=True):
        assert torch.equal(mine, eager)


def test_logits_are_never_whole():
    shape, dim, n_words = (8, 64), 4, 200
    h, weight, target = draw(shape, dim, n_words)
    h, weight = h.float().requires_grad_(), weight.float().requires_grad_()
    whole = h[..., 0].numel() * n_words * 4
    peaks = []
    for compute in (plain, linear_cross_entropy):
        with Ledger([h, weight, target]) as ledger:
            compute(h, weight, target).backward()
        peaks.append(ledger.peak)
    assert peaks[0] >= 2 * whole
    assert peaks[1] < whole / 10


def test_nothing_is_kept_without_gradients():
    h, weight, target = draw()
    weight.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(h, weight, target)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(h, weight, target).item(), rel=1e-12)
    with torch.no_grad(), Ledger([h, weight, target]) as ledger:
        linear_cross_entropy(h, weight, target)
    assert ledger.peak < h.nbytes


def test_gradients_add_up():
    (h, weight, target), (other_h, _, other) = draw(), draw(seed=1)
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    for compute, own in zip((linear_cross_entropy, plain), weights, strict=True):
        for x, labels in ((h, target), (other_h, other)):
            (compute(x, own, labels) / 2).backward()
    assert torch.allclose(weights[0].grad, weights[1].grad, rtol=1e-12, atol=1e-14)


def test_backward_runs_once():
    h, weight, target = draw()
    loss = linear_cross_entropy(h, weight.requires_grad_(), target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("label", [37, -1, -101])
def test_ids_that_are_no_words_are_refused(label):
    h, weight, target = draw()
    target[1, 3] = label
    with pytest.raises(RuntimeError, match=r"target: ids must be in \[0, 37\), or -100 for tokens to ignore"):
        linear_cross_entropy(h, weight, target)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value):
    h, weight, target = draw()
    h[2, 5, 0] = value
    loss, _, grad_weight = run(linear_cross_entropy, h, weight, target)
    assert not loss.isfinite()
    assert not grad_weight.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_by_its_logits(name):
    """Tied and not, with labels that do not count, in bf16 too."""
    batch = torch.randint(VOCABULARY, (4, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    tokens, target = batch[:, :-1], batch[:, 1:].clone()
    target[0, 2:5] = -100
    for half in (False, True):
        results = []
        for whole_logits in (False, True):
            model = build_alone(MODELS[name])
            model.whole_logits = whole_logits
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(tokens, target)
            loss.backward()
            results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for fused, by_logits in zip(*results, strict=True):
            assert (fused - by_logits).norm() <= (2e-2 if half else 1e-5) * by_logits.norm()


# --- the weight's rows split over ranks ------------------------------------------------------------------------------


def check_split_weight():
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    module.CHUNK_ON_CPU, module.LEAST_TOKENS = 500, 8
    mesh = init_device_mesh("cpu", (n_ranks,))
    for dtype, tolerance in ((None, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        h, weight, target = draw((4, 30), n_words=38)
        exact = run(plain, h, weight, target)
        exact[1] = exact[1].chunk(n_ranks)[rank]
        if dtype is not None:
            h, weight = h.float(), weight.float()
        # Between the linears each rank has a part of the tokens.
        part = h.chunk(n_ranks)[rank].clone().requires_grad_()
        weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        whole = DTensor.from_local(part, mesh, [Shard(0)]).redistribute(mesh, [Replicate()])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = linear_cross_entropy(whole, weight, target)
        assert loss.placements == (Replicate(),)
        loss.to_local().backward(torch.tensor(0.3, dtype=loss.dtype))
        assert weight.grad.placements == (Shard(0),)
        found = [loss.to_local(), part.grad, weight.grad.full_tensor()]
        assert max(errors([tensor.detach().double() for tensor in found], exact)) < tolerance, dtype


def test_on_two_ranks():
    run_ranks(2, check_split_weight)

"""The three operations of a lookup against float64, for the CPU, for Triton's interpreter and for GPUs."""

import torch

from lingua.product_key.xformer_embeddingbag import row_sums, slot_products, xformers_embedding_bag

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Twice what one rounding of a result costs at most; sums are to be as good as that.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}


def draw(n, bag, size, dim, dtype, index_dtype=torch.int64, score_dtype=torch.float32, seed=0, device="cpu"):
    """Slots (n, bag) of a table (size, dim), the table, scores (n, bag), and a gradient or vectors (n, dim)."""
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randint(size, (n, bag), generator=rng).to(device, index_dtype),
        torch.randn(size, dim, generator=rng).to(device, dtype),
        torch.rand(n, bag, generator=rng).to(device, score_dtype),
        torch.randn(n, dim, generator=rng).to(device),
    )


def check_sums(indices, weight, scores, grad, tolerance=None):
    """Result and both gradients. Scores are rounded to the table's type, which the reference does too."""
    weight, scores = weight.clone().requires_grad_(), scores.clone().requires_grad_()
    y = xformers_embedding_bag(indices, weight, scores)
    assert y.dtype == weight.dtype
    assert y.shape == (len(indices), weight.shape[1])
    y.backward(grad.to(y.dtype))
    assert (weight.grad.dtype, scores.grad.dtype) == (weight.dtype, scores.dtype)
    assert (weight.grad.shape, scores.grad.shape) == (weight.shape, scores.shape)

    exact_weight = weight.detach().double().requires_grad_()
    exact_scores = scores.detach().to(weight.dtype).double().requires_grad_()
    expected = (exact_weight[indices.long()] * exact_scores[..., None]).sum(1)
    expected.backward(grad.to(y.dtype).double())
    tolerance = tolerance or max(TOLERANCE[weight.dtype], TOLERANCE[scores.dtype])
    for actual, exact in ((y, expected), (weight.grad, exact_weight.grad), (scores.grad, exact_scores.grad)):
        assert (actual.double() - exact).norm() <= tolerance * exact.norm() + 1e-6


def check_products(indices, weight, x, grad):
    """PEER's first half, with its gradients. `x` (n, dim), `grad` (n, bag)."""
    weight, x = weight.clone().requires_grad_(), x.clone().requires_grad_()
    y = slot_products(indices, weight, x)
    y.backward(grad.to(y.dtype))
    exact_weight, exact_x = (tensor.detach().double().requires_grad_() for tensor in (weight, x))
    expected = (exact_weight[indices.long()] * exact_x[:, None]).sum(-1)
    expected.backward(grad.double())
    for actual, exact in ((y, expected), (weight.grad, exact_weight.grad), (x.grad, exact_x.grad)):
        assert (actual.double() - exact).norm() <= TOLERANCE[actual.dtype] * exact.norm() + 1e-6


def check_rows(lookups, n_slots, dim, dtype, index_dtype=torch.int64, seed=0, device="cpu"):
    """The rows that are read, of `lookups` (tokens, bag) together, as sparse updates have them."""
    rng = torch.Generator().manual_seed(seed)
    n_tokens, n_places = sum(n for n, _ in lookups), sum(n * bag for n, bag in lookups)
    bags = torch.tensor([bag for n, bag in lookups for _ in range(n)], dtype=torch.int64)
    tokens = torch.arange(n_tokens, dtype=torch.int32).repeat_interleave(bags).to(device)
    places = torch.randint(n_slots, (n_places,), generator=rng).to(device, index_dtype)
    factors = torch.randn(n_places, generator=rng).to(device, dtype)
    vectors = torch.randn(n_tokens, dim, generator=rng).to(device, dtype)
    slots, rows = row_sums(places, tokens, factors, vectors)
    assert slots.equal(places.unique())
    assert rows.dtype == torch.float32
    exact = torch.zeros(n_slots, dim, dtype=torch.float64, device=device)
    exact.index_add_(0, places.long(), factors.double()[:, None] * vectors.double()[tokens.long()])
    assert (rows - exact[slots.long()]).norm() <= 2e-6 * exact.norm() + 1e-6

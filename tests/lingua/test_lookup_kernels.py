"""The lookup's Triton kernels against float64, in Triton's interpreter, which has to be asked for before Triton is
imported: so the tests below the first run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test starts")


@pytest.mark.skipif(INTERPRETED, reason="is what started this process")
def test_on_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr


if INTERPRETED:
    from test_embeddingbag import DTYPES, TOLERANCE, check, draw

    from lingua.product_key import lookup_kernels
    from lingua.product_key.xformer_embeddingbag import _runs_on_triton, row_sums, slot_products

    @on_the_interpreter
    def test_kernels_are_what_runs():
        assert _runs_on_triton(torch.ones(1))

    @given(
        n=st.integers(0, 5),
        bag=st.one_of(st.integers(1, 20), st.integers(1, 200)),
        size=st.integers(1, 9),
        dim=st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2500)),
        dtype=st.sampled_from(DTYPES),
        index_dtype=st.sampled_from([torch.int32, torch.int64]),
        score_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        long=st.sampled_from([1, 3, 16, 1024]),
        skew=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=9, deadline=None)
    @on_the_interpreter
    def test_any_shape(n, bag, size, dim, dtype, index_dtype, score_dtype, long, skew, seed):
        """Sums and both gradients; slots that are read from more than `long` places are summed in pieces."""
        before, lookup_kernels.LONG = lookup_kernels.LONG, long
        try:
            indices, *others = draw(n, bag, size, dim, dtype, index_dtype, score_dtype, seed)
            check(indices.clamp(max=size // 3) if skew else indices, *others)
        finally:
            lookup_kernels.LONG = before

    @given(
        n=st.integers(0, 5),
        bag=st.integers(1, 20),
        size=st.integers(1, 9),
        dim=st.one_of(st.integers(1, 40), st.integers(1, 1100)),
        dtype=st.sampled_from(DTYPES),
        x_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=7, deadline=None)
    @on_the_interpreter
    def test_products_of_any_shape(n, bag, size, dim, dtype, x_dtype, seed):
        """PEER's first half, with its gradients."""
        indices, weight, grad, x = draw(n, bag, size, dim, dtype, seed=seed)
        weight, x = weight.requires_grad_(), x.to(x_dtype).requires_grad_()
        y = slot_products(indices, weight, x)
        y.backward(grad)
        exact_weight, exact_x = (tensor.detach().double().requires_grad_() for tensor in (weight, x))
        expected = (exact_weight[indices] * exact_x[:, None]).sum(-1)
        expected.backward(grad.double())
        for actual, exact in ((y, expected), (weight.grad, exact_weight.grad), (x.grad, exact_x.grad)):
            tolerance = TOLERANCE[actual.dtype]
            assert (actual.double() - exact).norm() <= tolerance * exact.norm() + 1e-6

    @on_the_interpreter
    @pytest.mark.parametrize("n_slots", [1, 2, 3, 50])
    def test_long_slots_side_by_side(monkeypatch, n_slots):
        """Pieces with the end of one long slot and the start of another, and with short ones between them."""
        monkeypatch.setattr(lookup_kernels, "LONG", 8)
        for seed in range(3):
            check(*draw(40, 5, n_slots, 6, torch.float32, seed=seed))

    @on_the_interpreter
    @pytest.mark.parametrize(("dim", "n_slots"), [(600, 3), (257, 40)])
    def test_narrow_programs(monkeypatch, dim, n_slots):
        """As with more vectors than a cache holds: each number of the gradient is summed in the same order."""
        indices, _, factors, vectors = draw(30, 5, n_slots, dim, torch.float32)
        expected = lookup_kernels.gradient(indices, factors, vectors, n_slots, torch.float32)
        monkeypatch.setattr(lookup_kernels, "CACHED", 1)
        assert lookup_kernels.gradient(indices, factors, vectors, n_slots, torch.float32).equal(expected)

    @given(
        lookups=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=3),
        n_slots=st.sampled_from([1, 2, 3, 20, 1000]),
        dim=st.one_of(st.integers(1, 40), st.integers(500, 1100)),
        dtype=st.sampled_from(DTYPES),
        index_dtype=st.sampled_from([torch.int32, torch.int64]),
        long=st.sampled_from([3, 8, 1024]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=9, deadline=None)
    @on_the_interpreter
    def test_rows_that_are_read(lookups, n_slots, dim, dtype, index_dtype, long, seed):
        """Bags of several sizes together, as sparse updates have them."""
        rng = torch.Generator().manual_seed(seed)
        n_tokens, n_places = sum(n for n, _ in lookups), sum(n * bag for n, bag in lookups)
        bags = torch.tensor([bag for n, bag in lookups for _ in range(n)], dtype=torch.int64)
        tokens = torch.arange(n_tokens, dtype=torch.int32).repeat_interleave(bags)
        places = torch.randint(n_slots, (n_places,), generator=rng).to(index_dtype)
        factors, vectors = torch.randn(n_places, generator=rng).to(dtype), torch.randn(n_tokens, dim).to(dtype)
        before, lookup_kernels.LONG = lookup_kernels.LONG, long
        try:
            slots, rows = row_sums(places, tokens, factors, vectors)
        finally:
            lookup_kernels.LONG = before
        assert slots.equal(places.unique())
        assert rows.dtype == torch.float32
        exact = torch.zeros(n_slots, dim, dtype=torch.float64)
        exact.index_add_(0, places, factors.double()[:, None] * vectors.double()[tokens.long()])
        assert (rows - exact[slots.long()]).norm() <= 2e-6 * exact.norm() + 1e-6

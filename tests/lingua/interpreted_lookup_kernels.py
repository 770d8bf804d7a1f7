"""The lookup's Triton kernels against float64, in Triton's interpreter: `test_interpreter.py` runs these tests.

An interpreted program takes a millisecond for each row that it reads, so the shapes are few, and at the edges of the
kernels' blocks. tests/test_gpu.py draws others.
"""

import pytest
import torch

from lingua.product_key import lookup_kernels
from lingua.product_key.xformer_embeddingbag import runs_on_triton
from tests.helpers.lookups import check_products, check_rows, check_sums, draw

FP32, BF16 = torch.float32, torch.bfloat16


def test_kernels_are_what_runs():
    assert runs_on_triton(torch.ones(1))


# A block has 8 places and 256 columns (sums), 2 places and 1024 columns (products), or 4 places and 512 columns
# (gradient); where there are fewer columns, the next power of two, at least 16.
@pytest.mark.parametrize(
    ("n", "bag", "slots", "dim", "dtype", "index_dtype", "score_dtype", "long"),
    [
        (0, 4, 9, 8, FP32, torch.int64, FP32, 1024),
        (1, 1, 1, 1, FP32, torch.int64, FP32, 1024),
        (1, 8, 5, 16, BF16, torch.int32, BF16, 1024),
        (3, 9, 5, 17, BF16, torch.int32, FP32, 8),
        (2, 3, 6, 256, FP32, torch.int64, BF16, 1024),
        (2, 5, 2, 513, BF16, torch.int64, FP32, 3),
        (1, 4, 9, 1025, FP32, torch.int32, FP32, 1),
        (1, 130, 3, 40, FP32, torch.int64, FP32, 16),
    ],
)
def test_sums(monkeypatch, n, bag, slots, dim, dtype, index_dtype, score_dtype, long):
    """And both gradients; slots that are read from more than `long` places are summed in pieces."""
    monkeypatch.setattr(lookup_kernels, "LONG", long)
    check_sums(*draw(n, bag, slots, dim, dtype, index_dtype, score_dtype))


@pytest.mark.parametrize(
    ("n", "bag", "slots", "dim", "dtype", "x_dtype"),
    [
        (0, 4, 9, 8, FP32, FP32),
        (1, 1, 1, 1, BF16, BF16),
        (3, 2, 5, 16, FP32, BF16),
        (2, 3, 5, 17, BF16, FP32),
        (1, 5, 4, 1024, BF16, BF16),
        (2, 3, 4, 1025, FP32, FP32),
    ],
)
def test_products(n, bag, slots, dim, dtype, x_dtype):
    indices, weight, grad, x = draw(n, bag, slots, dim, dtype)
    check_products(indices, weight, x.to(x_dtype), grad)


@pytest.mark.parametrize(
    "counts",
    [[64], [8, 8, 8], [9, 7, 8], [9, 23, 28], [3, 9, 1, 17, 8, 0, 12, 2]],
    ids=["one slot", "just not long", "one more", "long ones", "long and short ones"],
)
def test_long_slots_side_by_side(monkeypatch, counts):
    """Pieces with the end of one long slot and the start of another, and with short ones between them."""
    monkeypatch.setattr(lookup_kernels, "LONG", 8)
    places = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    indices = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))].view(-1, 4)
    check_sums(indices, *draw(len(indices), 4, len(counts), 6, FP32)[1:])


@pytest.mark.parametrize(("dim", "n_slots"), [(600, 3), (257, 40)])
def test_narrow_programs(monkeypatch, dim, n_slots):
    """As with more vectors than a cache holds: each number of the gradient is summed in the same order."""
    indices, _, factors, vectors = draw(6, 5, n_slots, dim, FP32)
    expected = lookup_kernels.gradient(indices, factors, vectors, n_slots, FP32)
    monkeypatch.setattr(lookup_kernels, "CACHED", 1)
    assert lookup_kernels.gradient(indices, factors, vectors, n_slots, FP32).equal(expected)


@pytest.mark.parametrize(
    ("lookups", "n_slots", "dim", "dtype", "index_dtype", "long"),
    [
        ([(0, 3)], 9, 8, FP32, torch.int64, 1024),
        ([(1, 1)], 1, 1, BF16, torch.int64, 1024),
        ([(3, 4), (0, 5), (1, 9)], 1000, 17, BF16, torch.int32, 1024),
        ([(4, 4), (2, 12)], 2, 40, FP32, torch.int64, 8),
        ([(2, 3), (1, 2)], 20, 513, FP32, torch.int32, 3),
    ],
)
def test_rows_that_are_read(monkeypatch, lookups, n_slots, dim, dtype, index_dtype, long):
    """Bags of several sizes together, as sparse updates have them."""
    monkeypatch.setattr(lookup_kernels, "LONG", long)
    check_rows(lookups, n_slots, dim, dtype, index_dtype)

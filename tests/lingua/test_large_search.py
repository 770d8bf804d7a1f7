"""large_search.py, as far as it needs no kernel: options, parts, the fallback. Kernels: interpreted_large_search.py."""

import re

import pytest
import torch

from lingua.product_key import search as module
from lingua.product_key.search import search

large_search = pytest.importorskip("lingua.product_key.large_search")


def draw(n_tokens, heads, n, dim=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = (n_tokens, heads, 2, dim), (heads, 2, n, dim)
    return tuple(torch.randn(shape, generator=rng).to(dtype) for shape in shapes)


@pytest.mark.parametrize("n", [1, 2, 37, 1024, 5000, 8192, 16384, 46340])
def test_every_size_has_options(n):
    """A row is covered, and no column twice."""
    pytest.importorskip("triton")
    for knn in {1, min(n, 7), min(n, 32), min(n, 256)}:
        options = large_search.search_options(n, knn)
        groups, run, pieces = options["GROUPS"], options["RUN"], options["PIECES"]
        assert groups >= options["KNN"] >= knn
        assert (pieces - 1) * groups * run < n <= pieces * groups * run


def test_parts_fill_the_workspace():
    query = torch.empty(100_000, 4, 2, 8, dtype=torch.bfloat16, device="meta")
    for n in (256, 1024, 8192, 46340):
        parts = large_search.parts(query, n)
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == len(query)
        assert parts[0].start == 0
        assert all(before.stop == after.start for before, after in zip(parts, parts[1:], strict=False))
        assert max(sizes) * 2 * 4 * n * 2 <= large_search.WORKSPACE_BYTES
        assert len(parts) == 1 or max(sizes) * 2 * 4 * n * 2 > 0.8 * large_search.WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("n", "knn", "dtype", "text"),
    [
        (50000, 4, torch.bfloat16, "50000 keys .mem_n_keys. are more than 46340"),
        (600, 300, torch.float32, "300 slots .mem_knn. are more than 256"),
        (90, 9, torch.float64, "there is none for torch.float64"),
    ],
)
def test_the_fallback_on_a_gpu_says_so_once(n, knn, dtype, text, caplog):
    module._warn_once.cache_clear()
    for _ in range(3):
        module._warn_once(module._why_no_kernel(dtype, n, knn))
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(text, message)


def test_the_fallback_searches_in_parts():
    """As on a GPU, with what a GPU lacks: the results are those of all tokens at once."""
    query, keys = draw(20, 2, 30)
    expected = search(query, keys, 8)
    parts = [module._search_by_operators(part, keys, 8) for part in query.split(6)]
    for results, whole in zip(zip(*parts, strict=True), expected, strict=True):
        assert torch.allclose(torch.cat(results).double(), whole.double())

"""The kernels of the search that serve large sizes (large_search.py), in Triton's interpreter.

Triton asks when it is imported whether it is to be interpreted: so the checks run in a process of their own, at small
sizes with pieces, runs and groups of a few columns. What needs no kernel is tested here: parts, limits, the warning.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from lingua.product_key import search as module
from lingua.product_key.search import search

large_search = pytest.importorskip("lingua.product_key.large_search")


def draw(n_tokens, heads, n, dim=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = (n_tokens, heads, 2, dim), (heads, 2, n, dim)
    return tuple(torch.randn(shape, generator=rng).to(dtype) for shape in shapes)


@torch.no_grad()
def all_sums(query, keys):
    scores1, scores2 = large_search.half_scores(query, keys).transpose(1, 2).float()
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(2)


def check_sizes_that_change_the_speed_alone():
    """Groups, runs and pieces, with and without a rest; a row that ends within its first piece."""
    for dtype in (torch.float32, torch.bfloat16):
        query, keys = draw(1, 1, 37, dtype=dtype)
        scores_2HNn = large_search.half_scores(query, keys)
        expected = all_sums(query, keys).topk(3).values
        sizes = [(64, 1), (4, 1), (16, 2), (4, 4), (4, 16), (16, 4)] if dtype == torch.float32 else [(4, 4), (4, 1)]
        for groups, run in sizes:
            scores, slots = torch.empty(1, 1, 3), torch.empty(1, 1, 3, dtype=torch.int64)
            pieces = -(-37 // (groups * run))
            options = {"GROUPS": groups, "RUN": run, "PIECES": pieces, "KNN": 4, "num_warps": 1}
            large_search.launch_search(scores_2HNn, module._kernel_ranks(3, query.device), scores, slots, options)
            assert torch.equal(scores, expected), options
            assert torch.equal(all_sums(query, keys).gather(-1, slots), expected), options


def check_padding_is_never_found():
    """Not even beside scores of minus infinity, in groups, runs or pieces."""
    query = torch.ones(1, 1, 2, 1)
    keys = torch.full((1, 2, 37, 1), -torch.inf)
    keys[0, :, 36] = 1
    for groups, run in ((64, 1), (16, 4), (4, 4)):
        scores, slots = torch.empty(1, 1, 4), torch.empty(1, 1, 4, dtype=torch.int64)
        options = {"GROUPS": groups, "RUN": run, "PIECES": -(-37 // (groups * run)), "KNN": 4, "num_warps": 1}
        ranks = module._kernel_ranks(4, query.device)
        large_search.launch_search(large_search.half_scores(query, keys), ranks, scores, slots, options)
        assert scores[0, 0, 0] == 2
        assert slots[0, 0, 0] == 36 * 37 + 36
        assert slots.max() < 37**2
        assert len(set(slots.flatten().tolist())) == 4


def check_operators_of_any_size():
    """What `search` gives where only these kernels serve, in parts of some tokens; gradients too."""
    module.KERNEL_MAX_KEYS = 0
    for dtype, workspace in ((torch.float32, 2**29), (torch.float32, 2 * 2 * 20 * 4), (torch.bfloat16, 1)):
        large_search.WORKSPACE_BYTES = workspace
        query, keys = (tensor.requires_grad_() for tensor in draw(3, 2, 20, dtype=dtype))
        assert not module._kernel_takes(query, 20, 5)
        assert len(large_search.parts(query, 20)) == (1 if workspace == 2**29 else 3)
        scores, slots = search(query, keys, 5)
        sums = all_sums(query, keys)
        assert torch.allclose(scores, sums.topk(5).values)
        assert torch.allclose(scores, sums.gather(-1, slots))
        grad = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
        scores.backward(grad)
        exact = [tensor.detach().double().requires_grad_() for tensor in (query, keys)]
        halves = [torch.einsum("nhd,hkd->nhk", exact[0][:, :, half], exact[1][:, half]) for half in (0, 1)]
        (halves[0].gather(-1, slots // 20) + halves[1].gather(-1, slots % 20)).backward(grad.double())
        for actual, wanted in zip((query, keys), exact, strict=True):
            assert (actual.grad - wanted.grad).norm() <= 4 * torch.finfo(dtype).eps * wanted.grad.norm()


CHECKS = [
    check_sizes_that_change_the_speed_alone,
    check_padding_is_never_found,
    check_operators_of_any_size,
]


def test_kernels_under_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


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


if __name__ == "__main__":
    import triton

    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    for check in CHECKS:
        print(check.__name__, flush=True)
        check()

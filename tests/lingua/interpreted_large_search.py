"""The search's kernels for large sizes, in Triton's interpreter: `test_interpreter.py` runs these tests.

At small sizes, with pieces, runs and groups of a few columns.
"""

import torch

from lingua.product_key import large_search
from lingua.product_key import search as module
from lingua.product_key.search import search
from tests.lingua.test_large_search import draw


@torch.no_grad()
def all_sums(query, keys):
    scores1, scores2 = large_search.half_scores(query, keys).transpose(1, 2).float()
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(2)


def test_sizes_that_change_the_speed_alone():
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


def test_padding_is_never_found():
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


def test_operators_of_any_size(monkeypatch):
    """What `search` gives where only these kernels serve, in parts of some tokens; gradients too."""
    monkeypatch.setattr(module, "KERNEL_MAX_KEYS", 0)
    for dtype, workspace in ((torch.float32, 2**29), (torch.float32, 2 * 2 * 20 * 4), (torch.bfloat16, 1)):
        monkeypatch.setattr(large_search, "WORKSPACE_BYTES", workspace)
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

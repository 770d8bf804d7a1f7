"""The search's Triton kernels, in Triton's interpreter: `test_interpreter.py` runs these tests.

What is asked of the search on a CPU, in the types that training uses. Not that twice the same input gives the same
bits: the interpreter runs one program after another, so that is for GPUs to show.
"""

import pytest
import torch

from lingua.product_key import search as module
from tests.lingua import test_search


@pytest.mark.parametrize(
    "check",
    [check for check in test_search.CHECKS if check is not test_search.check_determinism],
    ids=lambda check: check.__name__,
)
def test_as_on_a_cpu(check, monkeypatch):
    assert module._kernel_takes(torch.ones(1, 1, 2, 3), 4, 2)
    monkeypatch.setattr(test_search, "DTYPES", [torch.float32, torch.bfloat16])
    # A program takes the interpreter tens of milliseconds. The GPU tests have the other sizes.
    monkeypatch.setattr(test_search, "SIZES", test_search.SIZES[::2])
    monkeypatch.setattr(test_search, "NAN_SIZES", {torch.float32: [(9, 4)], torch.bfloat16: [(64, 4)]})
    check()


def test_any_size_of_programs_finds_the_same():
    scores = [torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(half)) for half in (0, 1)]
    results = [module._launch_search(*scores, 6, group, rows) for group, rows in ((1, 1), (2, 2), (8, 4))]
    assert all(torch.equal(x, y) for other in results for x, y in zip(other, results[0], strict=True))

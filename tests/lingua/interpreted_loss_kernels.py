"""The loss's Triton kernels, in Triton's interpreter: `test_interpreter.py` runs these tests.

Not that errors in bf16 are no larger than those of PyTorch's operators: the interpreter does not round to nearest.
"""

import pytest
import torch

from lingua import loss as module
from lingua import loss_kernels
from lingua.product_key.xformer_embeddingbag import runs_on_triton
from tests.lingua import test_loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ON_CPU", 500)
    monkeypatch.setattr(module, "LEAST_TOKENS", 8)


@pytest.mark.parametrize("check", test_loss.CHECKS, ids=lambda check: check.__name__)
def test_as_on_a_cpu(check, monkeypatch):
    """A row's words in several blocks."""
    assert runs_on_triton(torch.ones(1))
    monkeypatch.setattr(loss_kernels, "WORDS", 16)
    check(shape=(2, 11), **({"tolerance": 1.5} if check is test_loss.check_half else {}))


def test_words_in_one_block():
    test_loss.check_fp32(shape=(1, 10))

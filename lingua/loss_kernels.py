"""What loss.py does between the matrix products as Triton kernels: logits are read twice and written once.

A program has a row of logits, (N, V), whose first word has the number `first`; the label may be another rank's word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Words that a program has under way at once, and in how many warps.
WORDS, WARPS = 8192, 8


def statistics(logits: torch.Tensor, target: torch.Tensor, first: int) -> torch.Tensor:
    """(3, N) in fp32: the largest logit, the sum of exponentials relative to it, the label's logit (0: has none)."""
    found = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if logits.numel():
        _statistics[(len(logits),)](logits, target, *found, first, logits.shape[1], **_options(logits))
    return found


def write_gradient(
    logits: torch.Tensor, target: torch.Tensor, first: int, most: torch.Tensor, total: torch.Tensor, ignored: int
) -> None:
    """Overwrites the logits with the gradient of the losses' sum; with 0 where the label is `ignored`."""
    if logits.numel():
        options = _options(logits)
        grid = (len(logits), triton.cdiv(logits.shape[1], options["WORDS"]))
        _write_gradient[grid](logits, target, most, total, first, logits.shape[1], ignored, **options)


def _options(logits: torch.Tensor) -> dict[str, int]:
    return {"WORDS": min(triton.next_power_of_2(logits.shape[1]), WORDS), "num_warps": WARPS}


@triton.jit
def _statistics(logits, target, most_of, total_of, of_label, first, n_words, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_words
    most, total = -float("inf"), 0.0
    for start in range(0, n_words, WORDS):
        words = start + tl.arange(0, WORDS)
        x = tl.load(logits + words, mask=words < n_words, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), axis=0)
        most = higher
    tl.store(most_of + row, most)
    tl.store(total_of + row, total)
    label = tl.load(target + row) - first
    is_here = (label >= 0) & (label < n_words)
    tl.store(of_label + row, tl.load(logits + label, mask=is_here, other=0.0).to(tl.float32))


@triton.jit
def _write_gradient(logits, target, most_of, total_of, first, n_words, ignored, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    logits += row * n_words
    label = tl.load(target + row)
    x = tl.load(logits + words, mask=words < n_words, other=0.0).to(tl.float32)
    scale = 1.0 / tl.load(total_of + row)
    gradient = tl.exp(x - tl.load(most_of + row)) * scale - tl.where(words == label - first, 1.0, 0.0)
    gradient = tl.where(label == ignored, 0.0, gradient)
    tl.store(logits + words, gradient.to(logits.dtype.element_ty), mask=words < n_words)

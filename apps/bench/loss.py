"""The output layer with its loss, forward and backward, in turns: the three matrix products alone, lingua.loss, and
F.linear with F.cross_entropy, eager and under torch.compile.

    python -m apps.bench.loss                    # a GPU: 32,768 tokens of width 1,024, 32,000 words, bf16
    python -m apps.bench.loss device=cpu         # a CPU: 2,048 tokens of width 256, 32,000 words, fp32
    python -m apps.bench.loss n_words=128256 dtype=fp32 compiled=false out=result.json

Parameters and inputs are in fp32, products in `dtype` by autocast, as in training. `GiB`: memory at most beside the
inputs, gradients included (on a CPU, of operators' results; what the compiler plans is not seen there).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from apps.bench.layout import Ledger
from apps.bench.report import report
from lingua.args import parse_args
from lingua.distributed import DTYPES
from lingua.errors import UserError
from lingua.flops import synchronize
from lingua.launch import run_main
from lingua.loss import linear_cross_entropy
from lingua.transformer import cross_entropy


@dataclass
class BenchArgs:
    """Sizes where null: see above. `compiled`: whether torch.compile takes part."""

    device: str | None = None
    tokens: int | None = None
    dim: int | None = None
    n_words: int = 32_000
    dtype: str | None = None
    compiled: bool = True
    rounds: int = 7
    seed: int = 0
    out: str | None = None


def by_logits(h: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(F.linear(h, weight), target)


def products(h: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    """The logits, and the gradients of `h` and `weight`, into memory that is there."""
    logits = h @ weight.T
    grad_h, grad_weight = torch.empty_like(h), torch.empty_like(weight)

    def compute() -> None:
        torch.mm(h, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_h)
        torch.mm(logits.T, h, out=grad_weight)

    return compute


def measure(args: BenchArgs) -> list[dict[str, object]]:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    n_tokens, dim = args.tokens or (32_768 if on_gpu else 2_048), args.dim or (1_024 if on_gpu else 256)
    args.tokens, args.dim, args.dtype = n_tokens, dim, args.dtype or ("bf16" if on_gpu else "fp32")
    dtype = DTYPES[args.dtype]
    random = torch.Generator(device).manual_seed(args.seed)
    h = torch.randn(n_tokens, dim, device=device, generator=random).requires_grad_()
    weight = torch.randn(args.n_words, dim, device=device, generator=random).mul_(dim**-0.5).requires_grad_()
    target = torch.randint(args.n_words, (n_tokens,), device=device, generator=random)
    losses: dict[str, torch.Tensor] = {}

    def trains(name: str, compute: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = compute(h, weight, target)
            loss.backward()
            losses[name] = loss.detach()

        return step

    contestants = {
        "matrix products": products(h.detach().to(dtype), weight.detach().to(dtype)),
        "lingua.loss": trains("lingua.loss", linear_cross_entropy),
        "by logits": trains("by logits", by_logits),
    }
    if args.compiled:
        contestants["by logits, compiled"] = trains("by logits, compiled", torch.compile(by_logits))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, int] = {}
    for lap in range(args.rounds + 1):
        for name, step in contestants.items():
            h.grad = weight.grad = None
            if on_gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step()
            synchronize(device)
            if lap:
                times[name].append(time.perf_counter() - start)
            if on_gpu:
                peaks[name] = torch.cuda.max_memory_allocated() - before
    if not on_gpu:
        for name in ("lingua.loss", "by logits"):
            h.grad = weight.grad = None
            with Ledger([h, weight, target]) as ledger:
                contestants[name]()
            peaks[name] = ledger.peak
    seconds = {name: statistics.median(laps) for name, laps in times.items()}
    return [
        {
            "": name,
            "ms": seconds[name] * 1e3,
            "of the products": seconds[name] / seconds["matrix products"],
            "GiB": f"{peaks[name] / 2**30:.3f}" if name in losses and name in peaks else "-",
            "loss": f"{losses[name].item():.7g}" if name in losses else "-",
        }
        for name in contestants
    ]


def main() -> None:
    args = parse_args(BenchArgs)
    for name in ("tokens", "dim", "n_words", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{name}: {getattr(args, name)} is too small, it must be 1 or more")
    if args.dtype not in (None, *DTYPES):
        raise UserError(f"dtype: '{args.dtype}' is not one of {', '.join(DTYPES)}")
    rows = measure(args)
    title = f"output layer and loss, {args.tokens:,} tokens x {args.dim:,} x {args.n_words:,} words, {args.dtype}"
    report(title, rows, args.out)


if __name__ == "__main__":
    run_main(main)

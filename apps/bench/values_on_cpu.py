"""A step of a value table that lies in the CPU's memory (`distributed.values_device: cpu`): lookup, backward, update;
beside the same step with the table where all else is.

    python -m apps.bench.values_on_cpu                     # a GPU: 2**20 slots of 1024 in bf16, 4,096 tokens
    python -m apps.bench.values_on_cpu device=cpu          # a CPU: 2**18 slots of 256 in fp32, 1,024 tokens
    python -m apps.bench.values_on_cpu n_keys=4096 beside=false        # what does not fit the GPU

`moved`: bytes of rows that go from the CPU's memory to the GPU, and of their gradients that come back; `of a copy`:
that speed in parts of the one at which pinned memory of the CPU is copied to the GPU. (With device=cpu rows go from one
place in its memory to another.) `error`: relative, against fp64, on some of the tokens or rows.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from apps.bench.memory_layer import CHECKED, relative_error
from apps.bench.report import report
from lingua.args import parse_args
from lingua.distributed import DTYPES
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.product_key.cpu_offload import fetch_rows
from lingua.product_key.value_table import xFormerEmbeddingBag
from lingua.sparse_adamw import SparseAdamW

LR, WEIGHT_DECAY, EPSILON = 1e-3, 0.1, 1e-8


@dataclass
class BenchArgs:
    """Sizes where null: a table's of `pkplus_373m_1024k` on a GPU, a small one's on a CPU. `beside`: also with the
    table on the device.
    """

    device: str | None = None
    n_keys: int | None = None
    dim: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    bag: int = 128
    stochastic: bool = False
    beside: bool = True
    rounds: int = 5
    seed: int = 0
    out: str | None = None


class Contestant:
    """A table in one of two places, with its optimizer."""

    def __init__(self, args: BenchArgs, size: int, dim: int, device: torch.device, on_cpu: bool):
        with torch.device("meta"):
            self.table = xFormerEmbeddingBag(size, dim).to(DTYPES[args.dtype])
        if on_cpu:
            self.table.keep_on_cpu(device)
        self.table.to_empty(device=device)
        torch.manual_seed(args.seed)
        self.table.reset_parameters()
        self.rows = self.table.note_rows()
        self.optimizer = SparseAdamW(
            [{"params": [self.table.weight]}],
            {self.table.weight: self.rows},
            args.stochastic,
            args.seed,
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            eps=EPSILON,
            fused=True,
        )

    def parts(self, slots: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor) -> dict[str, Callable[[], object]]:
        """The parts of a step, in order."""
        result = []

        def look_up() -> None:
            weights.grad = None
            result[:] = [self.table(slots, weights)]

        return {
            "lookup": look_up,
            "backward": lambda: result.pop().backward(grad),
            "rows summed": self.rows.rows,
            "update": self.optimizer.step,
        }


def timed(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_copy(device: torch.device) -> float:
    """Bytes a second, each counted once."""
    source = torch.zeros(2**26, device="cpu", pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    times = [timed(lambda: target.copy_(source, non_blocking=True), device) for _ in range(8)]
    return source.nbytes / statistics.median(times[1:])


def errors(contestant: Contestant, slots: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor) -> dict[str, float]:
    """Of the first step, which it takes: what is looked up, the weights' gradient, and the updated rows."""
    table, some = contestant.table.weight.detach(), slice(0, CHECKED)
    gathered = table[slots[some].to(table.device)].double().to(weights.device)
    y = contestant.table(slots, weights)
    y.backward(grad)
    found = {
        "lookup": relative_error(y[some].detach(), (gathered * weights[some, :, None].detach().double()).sum(1)),
        "backward": relative_error(weights.grad[some], (gathered * grad[some, None].double()).sum(-1)),
    }
    read, rows = contestant.rows.rows()
    where = slots[..., None] == read[some]
    exact = torch.einsum("nks,nk,nd->sd", where.double(), weights.detach().double(), grad.double())
    found["rows summed"] = relative_error(rows[some], exact)
    read, change = read[some].to(table.device), rows[some].double().to(table.device)
    change = change / (change.abs() + EPSILON)
    expected = table[read].double() * (1 - LR * WEIGHT_DECAY) - LR * change
    contestant.optimizer.step()
    contestant.optimizer.zero_grad()
    return found | {"update": relative_error(table[read], expected)}


def measure(args: BenchArgs) -> list[dict[str, object]]:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    size, dim = (args.n_keys or (1024 if on_gpu else 512)) ** 2, args.dim or (1024 if on_gpu else 256)
    n_tokens = args.tokens or (4096 if on_gpu else 1024)
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    dtype = DTYPES[args.dtype]
    random = torch.Generator(device).manual_seed(args.seed)
    slots = torch.randint(size, (n_tokens, args.bag), device=device, generator=random)
    weights = torch.rand(n_tokens, args.bag, device=device, generator=random).to(dtype).requires_grad_()
    grad = torch.randn(n_tokens, dim, device=device, generator=random).to(dtype)
    copy_speed = measure_copy(device)
    contestants = [Contestant(args, size, dim, device, on_cpu=True)]
    if args.beside:
        contestants.append(Contestant(args, size, dim, device, on_cpu=False))
    found = errors(contestants[0], slots, weights, grad)
    times: dict[tuple[str, int], list[float]] = {}
    fetch = functools.partial(fetch_rows, slots, contestants[0].table.weight.detach())
    for _ in range(args.rounds + 1):
        times.setdefault(("fetch alone", 0), []).append(timed(fetch, device))
        for number, contestant in enumerate(contestants):
            for part, action in contestant.parts(slots, weights, grad).items():
                times.setdefault((part, number), []).append(timed(action, device))
            contestant.optimizer.zero_grad()
    seconds = {place: statistics.median(laps[1:]) for place, laps in times.items()}
    for number in range(len(contestants)):
        seconds["step", number] = sum(seconds[part, number] for part in ("lookup", "backward", "rows summed", "update"))
    n_rows = len(slots.unique())
    there, back = n_rows * dim * dtype.itemsize, n_rows * dim * 4
    moved = {"fetch alone": there, "lookup": there, "update": back, "step": there + back}
    rows = []
    for part in ("fetch alone", "lookup", "backward", "rows summed", "update", "step"):
        took, beside = seconds[part, 0], seconds.get((part, 1))
        speed = moved.get(part, 0) / took
        rows.append(
            {
                "part": part,
                "ms": took * 1e3,
                "rows": n_rows,
                "M rows/s": n_rows / took / 1e6,
                "moved": f"{moved[part] / 1e9:.2f} GB" if part in moved else "-",
                "GB/s": speed / 1e9 if part in moved else "-",
                "of a copy": f"{speed / copy_speed:.0%}" if part in moved else "-",
                "error": f"{found[part]:.1e}" if part in found else "-",
                "table on the device, ms": beside * 1e3 if beside else "-",
                "times as long": took / beside if beside else "-",
            }
        )
    return rows


def main() -> None:
    args = parse_args(BenchArgs)
    if args.dtype not in (None, *DTYPES):
        raise UserError(f"dtype: '{args.dtype}' must be one of {', '.join(DTYPES)}")
    if args.rounds < 1:
        raise UserError(f"rounds: {args.rounds} is too small, it must be 1 or more")
    report("value table in the CPU's memory", measure(args), args.out)


if __name__ == "__main__":
    run_main(main)

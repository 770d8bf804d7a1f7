"""The memory layer piece by piece, each beside what PyTorch's own operators take for it, in turns, in the same run.

    python -m apps.bench.memory_layer                                # a GPU: 2**20 slots of 1024 in bf16, 32,768 tokens
    python -m apps.bench.memory_layer device=cpu                     # a CPU: 2**18 slots of 256 in fp32, 1,024 tokens
    python -m apps.bench.memory_layer n_keys=512 dim=768 tokens=8192 dtype=fp32 out=result.json
    python -m apps.bench.memory_layer n_keys=8192                    # where the table does not fit, the search alone

`must move`: bytes of rows that have to be read or written, each place of a bag counted (a cache may save some); `of a
copy`: the speed at which that is done, in parts of the speed at which this device copies. `error`: relative, against
fp64, on some of the tokens or slots: fewer tokens of a large search, whose every pair of keys is compared. `at most`:
memory beside what was there before, on a GPU.
"""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F

from apps.bench.report import report
from lingua.args import parse_args
from lingua.distributed import DTYPES
from lingua.errors import UserError
from lingua.initialize import uniform
from lingua.launch import run_main
from lingua.product_key.memory import HashingMemory
from lingua.product_key.row_gradients import RowGradients
from lingua.product_key.xformer_embeddingbag import slot_products, xformers_embedding_bag

CHECKED = 64  # tokens or slots whose results are compared with fp64
# Sums of two scores that the search is compared with: in all, for fewer tokens of a larger memory, and at once.
SUMS_CHECKED = 2**28
SUMS_AT_ONCE = 2**24
# What is measured holds a table, its gradient, and PyTorch's.
TABLES_HELD = 4


@dataclass
class BenchArgs:
    """Sizes where null: of `pkplus_373m_1024k` on a GPU, of a small layer on a CPU."""

    device: str | None = None
    n_keys: int | None = None
    dim: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    k_dim: int = 512
    heads: int = 4
    knn: int = 32
    rounds: int = 7
    seed: int = 0
    out: str | None = None


logger = logging.getLogger(__name__)

Step = Callable[[], object]


class Bench:
    """Runs contestants in turns, and makes rows of a table."""

    def __init__(self, args: BenchArgs, device: torch.device):
        self.args, self.device = args, device
        self.rows: list[dict[str, object]] = []
        self.copy_speed = self._measure_copy()

    def _measure_copy(self) -> float:
        """Bytes a second, read and written ones counted."""
        source = torch.zeros(2**30 if self.device.type == "cuda" else 2**26, device=self.device)
        target = torch.empty_like(source)
        (seconds,), _ = self._time([lambda: target.copy_(source)])
        return 2 * source.nbytes / seconds

    def _time(self, steps: list[Step], clean: Step = lambda: None) -> tuple[list[float], list[int]]:
        """Medians in seconds, and bytes of memory at most beside what was there before. `clean`: between the laps."""
        laps: list[list[float]] = [[] for _ in steps]
        peaks = [0] * len(steps)
        on_gpu = self.device.type == "cuda"
        for lap in range(self.args.rounds + 1):
            for number, step in enumerate(steps):
                before = 0
                if on_gpu:
                    torch.cuda.synchronize()
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                result = step()
                if on_gpu:
                    torch.cuda.synchronize()
                    peaks[number] = torch.cuda.max_memory_allocated() - before
                if lap:
                    laps[number].append(time.perf_counter() - start)
                del result
                clean()
        return [statistics.median(times) for times in laps], peaks

    def compare(
        self,
        part: str,
        ours: Step,
        theirs: Step,
        moved: float,
        errors: tuple[float, float] | None = None,
        clean: Step = lambda: None,
    ) -> None:
        """Adds a row; `moved`: bytes that must move; `clean`: forgets gradients, which count as memory of their lap."""
        seconds, peaks = self._time([ours, theirs], clean)
        gibibytes = [f"{peak / 2**30:.2f} GiB" if self.device.type == "cuda" else "-" for peak in peaks]
        self.rows.append(
            {
                "part": part,
                "ms": seconds[0] * 1e3,
                "must move": f"{moved / 1e9:.2f} GB" if moved else "-",
                "GB/s": moved / seconds[0] / 1e9 if moved else "-",
                "of a copy": f"{moved / seconds[0] / self.copy_speed:.0%}" if moved else "-",
                "PyTorch ms": seconds[1] * 1e3,
                "times as fast": seconds[1] / seconds[0],
                "error": f"{errors[0]:.1e}" if errors else "-",
                "PyTorch's": f"{errors[1]:.1e}" if errors else "-",
                "at most": gibibytes[0],
                "PyTorch": gibibytes[1],
            }
        )
        gc.collect()


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def with_gradients(result: Callable[..., torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor) -> Step:
    """Forward and backward, into fresh gradients."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        result(*leaves).backward(grad)

    return step


def forgetting(leaves: list[torch.Tensor], rows: RowGradients | None = None) -> Step:
    def clean() -> None:
        for leaf in leaves:
            leaf.grad = None
        if rows is not None:
            rows.clear()

    return clean


def bench_lookup(bench: Bench, slots: torch.Tensor, table: torch.Tensor, grad: torch.Tensor) -> None:
    n, bag = slots.shape
    weights = torch.rand(n, bag, device=table.device).softmax(-1).to(table.dtype)

    def theirs(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")

    def ours(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return xformers_embedding_bag(slots, table, weights)

    some = slice(0, CHECKED)
    exact = (table[slots[some]].double() * weights[some, :, None].double()).sum(1)
    errors = tuple(relative_error(lookup(table, weights)[some], exact) for lookup in (ours, theirs))
    read = slots.numel() * table.shape[1] * table.element_size()
    bench.compare("lookup", lambda: ours(table, weights), lambda: theirs(table, weights), read, errors)

    leaves = [table.requires_grad_(), weights.requires_grad_()]
    their_leaves = leaves
    if table.is_cuda and table.dtype != torch.float32:
        # PyTorch has no gradient of half-precision weights on CUDA: it does without.
        their_leaves = [table, weights.detach()]
    found = []
    for lookup, inputs in ((ours, leaves), (theirs, their_leaves)):
        with_gradients(lookup, inputs, grad)()
        found.append(table.grad[:CHECKED].clone())
        table.grad = None
    where = slots < CHECKED
    exact = torch.zeros(CHECKED, table.shape[1], dtype=torch.float64, device=table.device)
    tokens = torch.arange(n, device=slots.device)[:, None].expand_as(slots)[where]
    exact.index_add_(0, slots[where], weights[where].double()[:, None] * grad[tokens].double())
    errors = tuple(relative_error(gradient, exact) for gradient in found)
    del found
    # Rows for the result, rows for the weights' gradient, vectors for the table's, and that itself.
    moved = 3 * read + table.nbytes
    bench.compare(
        "lookup, backward too",
        with_gradients(ours, leaves, grad),
        with_gradients(theirs, their_leaves, grad),
        moved,
        errors,
        forgetting(leaves),
    )
    bench_by_rows(bench, slots, leaves, their_leaves, grad)
    table.grad = None
    table.requires_grad_(False)


def bench_by_rows(
    bench: Bench, slots: torch.Tensor, leaves: list[torch.Tensor], their_leaves: list[torch.Tensor], grad: torch.Tensor
) -> None:
    """What `optim.value_update: sparse` does, beside F.embedding_bag's `sparse=True`: backward to what an optimizer
    takes, which sums the rows up in its step; then that too.
    """
    table = leaves[0]
    gradient = RowGradients(table)

    def ours(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return xformers_embedding_bag(slots, table, weights, ticket=gradient.ticket)

    def theirs(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum", sparse=True)

    ours_backward, theirs_backward = (
        with_gradients(lookup, inputs, grad) for lookup, inputs in ((ours, leaves), (theirs, their_leaves))
    )

    def ours_summed() -> None:
        ours_backward()
        gradient.rows()

    def theirs_summed() -> None:
        theirs_backward()
        table.grad.coalesce()

    # Rows for the result, rows for the weights' gradient.
    read = 2 * slots.numel() * table.shape[1] * table.element_size()
    clean = forgetting(leaves, gradient)
    bench.compare("lookup, backward by rows", ours_backward, theirs_backward, read, clean=clean)
    if not table.is_cuda:  # where coalesce (torch 2.11) reads beyond a gradient of more than 2**31 elements
        rows = len(slots.unique()) * table.shape[1] * 4
        bench.compare("the same, rows summed", ours_summed, theirs_summed, read + read // 2 + rows, clean=clean)


def bench_peer(bench: Bench, slots: torch.Tensor, table: torch.Tensor, x: torch.Tensor) -> None:
    """Both tables are the same one here."""
    weights = torch.rand(slots.shape, device=table.device)

    def ours(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return xformers_embedding_bag(slots, table, weights * F.gelu(slot_products(slots, table, x)))

    def theirs(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(torch.einsum("nkd,nd->nk", table[slots], x)) * weights.to(table.dtype)
        return torch.einsum("nkd,nk->nd", table[slots], hidden)

    some = slice(0, CHECKED)
    rows = table[slots[some]].double()
    hidden = F.gelu(torch.einsum("nkd,nd->nk", rows, x[some].double())) * weights[some].double()
    exact = torch.einsum("nkd,nk->nd", rows, hidden)
    errors = tuple(relative_error(expert(table, x)[some], exact) for expert in (ours, theirs))
    read = slots.numel() * table.shape[1] * table.element_size()
    bench.compare("PEER", lambda: ours(table, x), lambda: theirs(table, x), 2 * read, errors)
    leaves = [table.requires_grad_(), x.detach().requires_grad_()]
    grad = torch.randn_like(x)
    moved = 6 * read + 2 * table.nbytes
    theirs_backward = with_gradients(theirs, leaves, grad)
    bench.compare(
        "PEER, backward too", with_gradients(ours, leaves, grad), theirs_backward, moved, clean=forgetting(leaves)
    )
    gradient = RowGradients(table)

    def by_rows(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(slot_products(slots, table, x, gradient.ticket))
        return xformers_embedding_bag(slots, table, weights * hidden, ticket=gradient.ticket)

    bench.compare(
        "PEER, backward by rows",
        with_gradients(by_rows, leaves, grad),
        theirs_backward,
        4 * read,
        clean=forgetting(leaves, gradient),
    )
    table.grad = None
    table.requires_grad_(False)


def plain_search(memory: HashingMemory, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the formulas say it: two top-k, all k * k pairs, a third top-k."""
    knn = memory.knn
    halves = query.view(-1, memory.heads, memory.k_dim).chunk(2, dim=-1)
    keys = memory.keys.view(memory.heads, 2, memory.n_keys, memory.k_dim // 2).unbind(1)
    (scores1, index1), (scores2, index2) = (
        torch.einsum("nhd,hkd->nhk", half, key).topk(knn) for half, key in zip(halves, keys, strict=True)
    )
    pairs = (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)
    slots = (index1[..., :, None] * memory.n_keys + index2[..., None, :]).flatten(-2)
    scores, best = pairs.topk(knn)
    return scores, slots.gather(-1, best)


def plain_lookup(memory: HashingMemory, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """By F.embedding_bag, which on CUDA has no gradient of half-precision weights: it does without. PEER as einsums."""
    weight = memory.tables[-1].weight
    weights = weights.to(weight.dtype)
    if memory.peer_variant:
        hidden = F.gelu(torch.einsum("nkd,nd->nk", memory.tables[0].weight[slots], x.to(weight.dtype)))
        return torch.einsum("nkd,nk->nd", weight[slots], weights * hidden)
    if weight.is_cuda and weight.dtype != torch.float32:
        weights = weights.detach()
    return F.embedding_bag(slots, weight, per_sample_weights=weights, mode="sum")


def use_plain_operators(memory: HashingMemory) -> None:
    """From now on it searches and looks up by PyTorch's own operators."""
    memory.get_indices = lambda query, knn: plain_search(memory, query)
    memory.lookup = functools.partial(plain_lookup, memory)


def exact_scores(memory: HashingMemory, query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The best scores out of all n * n sums in fp64, of the first tokens: as many as take a few seconds."""
    n_keys, knn = memory.n_keys, memory.knn
    keys = memory.keys.view(memory.heads, 2, n_keys, -1).to(dtype).double()
    n_checked = min(max(SUMS_CHECKED // (memory.heads * n_keys**2), 1), CHECKED, len(query))
    halves = query[:n_checked].view(n_checked, memory.heads, 2, -1).double()
    scores1, scores2 = torch.einsum("nhcd,hckd->cnhk", halves, keys)
    best = scores1.new_full((n_checked, memory.heads, knn), -torch.inf)
    at_once = max(SUMS_AT_ONCE // (n_checked * memory.heads * n_keys), 1)
    for some in scores1.split(at_once, dim=2):
        sums = (some[..., :, None] + scores2[..., None, :]).flatten(-2)
        best = torch.cat((best, sums.topk(min(knn, sums.shape[-1])).values), dim=-1).topk(knn).values
    return best


def bench_search(bench: Bench, memory: HashingMemory, n_tokens: int, dtype: torch.dtype) -> None:
    device = bench.device
    query = torch.randn(n_tokens, memory.heads * memory.k_dim, device=device, dtype=dtype)
    grad = torch.randn(n_tokens, memory.heads, memory.knn, device=device)

    def search(how: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
        def scores(query: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return how(query)[0].float()

        return scores

    ours = search(lambda query: memory.get_indices(query, memory.knn))
    theirs = search(lambda query: plain_search(memory, query))
    with torch.no_grad():
        exact = exact_scores(memory, query, dtype)
        some = query[: len(exact)]
        errors = (relative_error(ours(some), exact), relative_error(theirs(some), exact))
        moved = 2 * 2 * n_tokens * memory.heads * memory.n_keys * query.element_size()
        bench.compare("search", lambda: ours(query), lambda: theirs(query), moved, errors)
    leaves = [query.requires_grad_()]
    bench.compare("search, backward too", with_gradients(ours, leaves, grad), with_gradients(theirs, leaves, grad), 0)


def bench_layer(bench: Bench, memory: HashingMemory, x: torch.Tensor, dtype: torch.dtype) -> None:
    device = bench.device
    inputs = x[None].detach().requires_grad_()
    grad = torch.randn_like(inputs)

    def run(layer: HashingMemory) -> Callable[..., torch.Tensor]:
        def result(inputs: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return layer(inputs).to(inputs.dtype)

        return result

    ours = run(memory)

    def theirs(inputs: torch.Tensor) -> torch.Tensor:
        use_plain_operators(memory)
        try:
            return run(memory)(inputs)
        finally:
            del memory.get_indices, memory.lookup

    def fresh(step: Step) -> Step:
        def whole() -> None:
            memory.zero_grad()
            step()

        return whole

    bench.compare(
        "layer, backward too",
        fresh(with_gradients(ours, [inputs], grad)),
        fresh(with_gradients(theirs, [inputs], grad)),
        0,
    )


def measure(args: BenchArgs) -> list[dict[str, object]]:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    n_keys, dim, n_tokens = args.n_keys or (1024 if on_gpu else 512), args.dim or (1024 if on_gpu else 256), args.tokens
    n_tokens = n_tokens or (32768 if on_gpu else 1024)
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    torch.manual_seed(args.seed)
    bench = Bench(args, device)
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    table_bytes = n_keys**2 * dim * dtype.itemsize
    with torch.device("meta"):
        memory = HashingMemory(dim, dim, n_keys, args.heads, args.knn, mem_k_dim=args.k_dim)
    if TABLES_HELD * table_bytes > free:
        logger.warning(
            "only the search is measured: a table of %.1f GiB takes %s times that, and %.1f GiB are free (n_keys, dim)",
            table_bytes / 2**30,
            TABLES_HELD,
            free / 2**30,
        )
        memory.values = None
        memory.to_empty(device=device)
        uniform(memory.keys, memory.k_dim**-0.5)
        bench_search(bench, memory, n_tokens, dtype)
        return bench.rows
    memory.to_empty(device=device).reset_parameters()
    table = memory.tables[0].to(dtype).weight.detach()
    with device:
        slots = torch.randint(n_keys**2, (n_tokens, args.heads * args.knn))
        x = torch.randn(n_tokens, dim, dtype=dtype)
    bench_lookup(bench, slots, table, x)
    bench_peer(bench, slots, table, x)
    bench_search(bench, memory, n_tokens, dtype)
    bench_layer(bench, memory, x, dtype)
    return bench.rows


def main() -> None:
    args = parse_args(BenchArgs)
    if args.dtype not in (None, *DTYPES):
        raise UserError(f"dtype: '{args.dtype}' must be one of {', '.join(DTYPES)}")
    if args.rounds < 1:
        raise UserError(f"rounds: {args.rounds} is too small, it must be 1 or more")
    report("memory layer", measure(args), args.out)


if __name__ == "__main__":
    run_main(main)

"""The search of a product-key memory: for each token and head, the best slots among n * n, exactly.

A slot's score is the sum of a score of the query's first half and one of its second, so the best k slots are among the
sums of the best k of either ("Large Memory Layers with Product Keys", Lample et al., 2019, section 3.1). The scores
themselves are a matrix product, PyTorch's. Finding the best is ours, in the same way on a CPU (`_best`) and on a GPU
(`_search_kernel`):

- The best k of n scores lie in the k groups of columns with the largest maxima. So the maxima are searched, then the
  members of those groups: two small sorts in place of one large.
- A score and its column are packed into one integer that sorts as the score does, so that sorting moves one thing.
- Of the k * k sums only those are formed that can be among the best k.

Backward: a score's gradient is the sum over the winners that it is part of. On a GPU it is written out, mostly zeros,
for two matrix products; on a CPU the gradients of queries and keys are weighted sums of few rows each, n / k times less
work.

A GPU has other kernels for more keys or slots than that one takes (large_search.py), and where there are none PyTorch's
operators, for a part of the tokens at a time.

Shape suffixes: N tokens, H heads, K = knn, n keys per half, D = half of the query's size, 2 the halves, R = H * N rows,
L columns.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheels for some systems, such as macOS; those have no CUDA either
    triton = None

logger = logging.getLogger(__name__)

# Up to this number of columns NumPy sorts a row in one network of vector instructions (AVX2, AVX-512); beyond, a column
# costs several times more.
SORTED_AT_ONCE = 256
# Scores of one half that are searched at once, for each thread: what is worked out for them then stays in its cache.
CHUNK_ELEMENTS = 2**20

# The kernel's limits: a row is held in registers, so are knn * log(knn) candidates, and a column is packed in 16 bits.
KERNEL_MAX_KEYS = 4096
KERNEL_MAX_KNN = 128
# Of both halves' scores, bytes that are in GPU memory at once where PyTorch's operators search them.
FALLBACK_BYTES = 2**28
# Rows (of a token and a head) for each program, which is one warp: what a sort exchanges then stays within it.
KERNEL_ROWS = 1


def search(query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor, knn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `knn` best slots of every token and head, and their scores; differentiable in queries and keys.

    Args:
        query_NH2D: (N, H, 2, D) queries, in halves.
        keys_H2nD: (H, 2, n, D) keys of either half, in the queries' type except under autocast, which casts both.
        knn: how many slots, at most n.

    Returns (scores before the softmax, slots), each (N, H, knn), the best first. Scores are sums in fp32 (fp64 for such
    queries) of products in the queries' type; slot `i * n + j` is the one of key i of the first half and key j of the
    second, int64. Among equal scores any may win; a NaN counts as the largest. Twice the same input gives twice the
    same bits, gradients included. Raises ValueError for shapes that do not match and for a `knn` that cannot be.
    """
    if query_NH2D.ndim != 4 or keys_H2nD.ndim != 4:
        raise ValueError(f"wanted queries (N, H, 2, D) and keys (H, 2, n, D), found {_shapes(query_NH2D, keys_H2nD)}")
    if not query_NH2D.shape[2] == keys_H2nD.shape[1] == 2 or (
        query_NH2D.shape[1::2] != (keys_H2nD.shape[0], keys_H2nD.shape[3])
    ):
        raise ValueError(f"queries (N, H, 2, D) and keys (H, 2, n, D) do not match: {_shapes(query_NH2D, keys_H2nD)}")
    if not 1 <= knn <= keys_H2nD.shape[2]:
        raise ValueError(f"knn: {knn} slots cannot be found, the keys allow 1 to {keys_H2nD.shape[2]}")
    # An operator of our own is unknown to autocast, so what a matrix product would be given is worked out here.
    device = query_NH2D.device.type
    if torch.is_autocast_enabled(device) and query_NH2D.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query_NH2D, keys_H2nD = query_NH2D.to(dtype), keys_H2nD.to(dtype)
    return _search(query_NH2D, keys_H2nD, knn)


def _shapes(*tensors: torch.Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)


# --- the operator: one node for torch.compile and for activation checkpointing ------------------------------------


@torch.library.custom_op("lingua::search", mutates_args=())
def _search(query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor, knn: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = keys_H2nD.shape[2]
    if not _kernel_takes(query_NH2D, n, knn):
        if _large_kernel_takes(query_NH2D, n, knn):
            from lingua.product_key import large_search

            return large_search.search(query_NH2D, keys_H2nD, _kernel_ranks(knn, query_NH2D.device), knn)
        if query_NH2D.is_cuda and query_NH2D.numel():
            _warn_once(_why_no_kernel(query_NH2D.dtype, n, knn))
            bytes_each = 2 * keys_H2nD.shape[0] * n * query_NH2D.element_size()
            parts = query_NH2D.split(max(FALLBACK_BYTES // bytes_each, 1))
            found = [_search_by_operators(part, keys_H2nD, knn) for part in parts]
            return tuple(torch.cat(results) for results in zip(*found, strict=True))
    return _search_by_operators(query_NH2D, keys_H2nD, knn)


def _search_by_operators(
    query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor, knn: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # Heads first, which is how the product leaves them in memory.
    scores_HNn = [
        torch.einsum("nhd,hkd->nhk", query_NH2D[:, :, half], keys_H2nD[:, half]).transpose(0, 1).contiguous()
        for half in (0, 1)
    ]
    if _kernel_takes(query_NH2D, keys_H2nD.shape[2], knn):
        return _launch_search(*scores_HNn, knn)
    rows = max(CHUNK_ELEMENTS * torch.get_num_threads() // keys_H2nD.shape[2], 1)
    if query_NH2D.is_cuda:  # which has no such cache
        rows = max(len(query_NH2D) * keys_H2nD.shape[0], 1)
    chunks = [scores.flatten(0, 1).split(rows) for scores in scores_HNn]
    found = [_best_pairs(*halves, knn) for halves in zip(*chunks, strict=True)]
    shape = (keys_H2nD.shape[0], len(query_NH2D), knn)
    return tuple(torch.cat(parts).view(shape).transpose(0, 1).contiguous() for parts in zip(*found, strict=True))


@_search.register_fake
def _(query_NH2D, keys_H2nD, knn):
    shape = (*query_NH2D.shape[:2], knn)
    return (
        query_NH2D.new_empty(shape, dtype=torch.promote_types(query_NH2D.dtype, torch.float32)),
        query_NH2D.new_empty(shape, dtype=torch.int64),
    )


@torch.library.custom_op("lingua::search_backward", mutates_args=())
def _search_backward(
    grad_NHK: torch.Tensor, slots_NHK: torch.Tensor, query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if _kernel_takes(query_NH2D, keys_H2nD.shape[2], slots_NHK.shape[2]):
        return _gradients_by_products(grad_NHK, slots_NHK, query_NH2D, keys_H2nD)
    if _large_kernel_takes(query_NH2D, keys_H2nD.shape[2], slots_NHK.shape[2]):
        from lingua.product_key import large_search

        return large_search.gradients(grad_NHK, slots_NHK, query_NH2D, keys_H2nD)
    return _gradients_by_rows(grad_NHK, slots_NHK, query_NH2D, keys_H2nD)


@_search_backward.register_fake
def _(grad_NHK, slots_NHK, query_NH2D, keys_H2nD):
    return query_NH2D.new_empty(query_NH2D.shape), keys_H2nD.new_empty(keys_H2nD.shape)


def _keep_for_backward(ctx, inputs, output):
    query_NH2D, keys_H2nD, _ = inputs
    ctx.save_for_backward(output[1], query_NH2D, keys_H2nD)


def _backward(ctx, grad_NHK, _):
    return *_search_backward(grad_NHK, *ctx.saved_tensors), None


_search.register_autograd(_backward, setup_context=_keep_for_backward)


# For torch's FlopCounterMode: the scores' matrix products, and those of their gradients, however these are computed.
@register_flop_formula(torch.ops.lingua.search)
def _(query_shape, keys_shape, *_: object, out_shape=None, **__: object) -> int:
    return 2 * query_shape[0] * keys_shape.numel()


@register_flop_formula(torch.ops.lingua.search_backward)
def _(grad_shape, slots_shape, query_shape, keys_shape, *_: object, out_shape=None, **__: object) -> int:
    return 2 * 2 * query_shape[0] * keys_shape.numel()


def _kernel_takes(query_NH2D: torch.Tensor, n: int, knn: int) -> bool:
    """Whether the Triton kernels of this file do it."""
    return (
        triton is not None
        and (query_NH2D.is_cuda or triton.knobs.runtime.interpret)
        and query_NH2D.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and n <= KERNEL_MAX_KEYS
        and knn <= KERNEL_MAX_KNN
        and query_NH2D.numel() > 0
    )


def _large_kernel_takes(query_NH2D: torch.Tensor, n: int, knn: int) -> bool:
    """Whether those of large_search.py do it, where the kernels of this file do not; elsewhere PyTorch does."""
    on_triton = triton is not None and (query_NH2D.is_cuda or triton.knobs.runtime.interpret)
    return on_triton and query_NH2D.numel() > 0 and _why_no_kernel(query_NH2D.dtype, n, knn) is None


def _why_no_kernel(dtype: torch.dtype, n: int, knn: int) -> str | None:
    if triton is None:
        return "Triton is not installed"
    from lingua.product_key.large_search import MAX_KEYS, MAX_KNN

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there is none for {dtype}"
    if n > MAX_KEYS:
        return f"{n} keys (mem_n_keys) are more than {MAX_KEYS}"
    if knn > MAX_KNN:
        return f"{knn} slots (mem_knn) are more than {MAX_KNN}"
    return None


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning(
        "the product-key search has no kernel here and runs on PyTorch's operators, several times slower: %s", problem
    )


# --- in PyTorch ---------------------------------------------------------------------------------------------------


def _best_pairs(scores1_Rn: torch.Tensor, scores2_Rn: torch.Tensor, knn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `knn` sums of each row, and their slots; each (R, knn)."""
    n = scores1_Rn.shape[1]
    dtype = torch.promote_types(scores1_Rn.dtype, torch.float32)
    rank1, rank2 = _candidate_pairs(knn, scores1_Rn.device)
    best1_RK, column1_RK = _best(scores1_Rn, knn)
    best2_RK, column2_RK = _best(scores2_Rn, knn)
    sums = best1_RK.to(dtype).index_select(1, rank1) + best2_RK.to(dtype).index_select(1, rank2)
    scores_RK, winners_RK = _best(sums, knn)
    return scores_RK, column1_RK.gather(1, rank1[winners_RK]) * n + column2_RK.gather(1, rank2[winners_RK])


@functools.lru_cache(maxsize=8)
def _candidate_pairs(knn: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks (i, j) in the two sorted halves whose sum can be among the best `knn`.

    The pair (i, j) is beaten by the (i+1)(j+1) - 1 pairs that are no worse in both halves, so it needs
    (i+1)(j+1) <= knn: 119 pairs instead of 1,024 at knn 32.
    """
    pairs = [(i, j) for i in range(knn) for j in range(knn // (i + 1))]
    # Kept for later calls, so not of inference mode even if this one is in it.
    with torch.inference_mode(False):
        ranks = torch.tensor(pairs, dtype=torch.int64, device=device)
        return ranks[:, 0].contiguous(), ranks[:, 1].contiguous()


def _best(scores_RL: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scores_RL.topk(k)`, several times faster on a CPU: by maxima of groups, and by NumPy's vectorised sort."""
    if scores_RL.device.type != "cpu" or scores_RL.dtype == torch.float64:
        return scores_RL.topk(k)
    length = scores_RL.shape[1]
    size = _group_size(length, k)
    if size == 1:
        columns_RK = _sorted_columns(scores_RL, k)
    else:
        groups = length // size
        # Group g has the columns g, g + groups, ...: their maxima are those of whole vectors, side by side.
        _, best_RK = _best(scores_RL.view(-1, size, groups).amax(1), k)
        members = (best_RK[:, None] + torch.arange(0, length, groups)[:, None]).flatten(1)
        _, winners_RK = _best(scores_RL.gather(1, members), k)
        columns_RK = members.gather(1, winners_RK)
    return scores_RL.gather(1, columns_RK), columns_RK


def _group_size(length: int, k: int) -> int:
    """How many columns to a group, so that the fewest maxima and members are sorted; 1: sort them all."""
    if length <= SORTED_AT_ONCE:
        return 1
    sizes = [g for g in (32, 16, 8, 4, 2) if length % g == 0 and k <= length // g and k * g <= SORTED_AT_ONCE]
    return min(sizes, key=lambda g: length // g + k * g, default=1)


def _sorted_columns(scores_RL: torch.Tensor, k: int) -> torch.Tensor:
    """The columns of the `k` largest of each row on a CPU, the largest first. Scores of at most 32 bits."""
    # The packing below has no room for NaN and infinities, all of which show in the sum.
    if not scores_RL.sum(dtype=torch.float32).isfinite():
        return scores_RL.topk(k).indices
    keys = scores_RL.to(torch.float64, memory_format=torch.contiguous_format)
    # As a float64, a score leaves the last 29 bits free: the column goes there. The sign is turned, since NumPy sorts
    # upwards.
    keys.view(torch.int64).bitwise_xor_(torch.arange(-(2**63), -(2**63) + scores_RL.shape[1]))
    best = keys.numpy()
    if k < best.shape[1] and best.shape[1] > SORTED_AT_ONCE:
        best.partition(k - 1, axis=1)
        best = best[:, :k]
    best.sort(axis=1)
    return keys[:, :k].view(torch.int64) & (2**29 - 1)


def _gradients_by_rows(
    grad_NHK: torch.Tensor, slots_NHK: torch.Tensor, query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of queries and keys as weighted sums of the rows that won, in fp32 or more.

    A query's is the sum of the keys that it won with; a key's that of the queries that won with it, brought together by
    a stable sort, so that they are summed in a fixed order.
    """
    (_, heads, knn), (n, dim) = slots_NHK.shape, keys_H2nD.shape[2:]
    dtype = torch.promote_types(query_NH2D.dtype, torch.float32)
    tables = torch.arange(2 * heads, device=slots_NHK.device).view(heads, 2, 1) * n
    key_rows = (torch.stack((slots_NHK // n, slots_NHK % n), dim=2) + tables).view(-1, knn)
    weights = grad_NHK.to(dtype)[:, :, None].expand(-1, -1, 2, -1).reshape(-1, knn)
    queries, keys = query_NH2D.to(dtype).reshape(-1, dim), keys_H2nD.to(dtype).reshape(-1, dim)
    grad_query = F.embedding_bag(key_rows, keys, per_sample_weights=weights, mode="sum")

    key_rows, places = key_rows.flatten().sort(stable=True)
    starts = torch.searchsorted(key_rows, torch.arange(len(keys), device=key_rows.device))
    weights = weights.flatten()[places]
    grad_keys = F.embedding_bag(places // knn, queries, starts, per_sample_weights=weights, mode="sum")
    return grad_query.view(query_NH2D.shape).to(query_NH2D.dtype), grad_keys.view(keys_H2nD.shape).to(keys_H2nD.dtype)


# --- in Triton ----------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _load_keys(scores_ptr, starts, columns, n):
        """Integers that sort as the scores of `columns` do, NaN above all, with the column in the low 16 bits.

        int32 for scores of 16 bits, int64 for fp32. Columns from n on are below all others.
        """
        scores = tl.load(scores_ptr + starts + columns, mask=columns < n, other=0.0)
        if scores_ptr.dtype.element_ty.primitive_bitwidth == 16:
            bits = scores.to(tl.int16, bitcast=True).to(tl.int32)
            ordered = tl.where(scores.to(tl.float32) == scores.to(tl.float32), bits ^ ((bits >> 31) & 0x7FFF), 0x7FFF)
            ordered = tl.where(columns < n, ordered, -0x8000)
        else:
            ordered = tl.where(columns < n, _order(scores), -0x80000000).to(tl.int64)
        return (ordered << 16) | (0xFFFF - columns)

    @triton.jit
    def _order(x):
        """fp32 as int32 that sort as they do, NaN above all: the bits of negative ones fall, all but the sign turn."""
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)

    @triton.jit
    def _scores_of(keys, dtype: tl.constexpr):
        """The scores, in fp32, that `_load_keys` packed."""
        if dtype.primitive_bitwidth == 16:
            ordered = keys >> 16
            bits = ordered ^ ((ordered >> 31) & 0x7FFF)
            return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        ordered = (keys >> 16).to(tl.int32)
        return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _columns_of(keys):
        return (0xFFFF - (keys & 0xFFFF)).to(tl.int32)

    @triton.jit
    def _best_keys(
        scores_ptr, starts, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KNN: tl.constexpr
    ):
        """The packed scores of the best KNN columns of each row, sorted: (ROWS, KNN)."""
        keys = _load_keys(scores_ptr, starts, tl.arange(0, COLUMNS)[None, :], n)
        if GROUP > 1:
            maxima = tl.max(tl.reshape(keys, [ROWS, COLUMNS // GROUP, GROUP]), axis=2)
            groups = _columns_of(tl.topk(maxima, KNN)) // GROUP
            members = groups[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
            # Loaded once more, from the cache: cheaper than to keep and to index the registers.
            keys = _load_keys(scores_ptr, starts, tl.reshape(members, [ROWS, KNN * GROUP]), n)
        return tl.topk(keys, KNN)

    @triton.jit
    def _search_kernel(
        scores1_ptr,  # (H, N, n)
        scores2_ptr,
        ranks_ptr,  # (2, pairs)
        best_ptr,  # (N, H, knn)
        slots_ptr,
        n_tokens,
        heads,
        n,
        knn,
        n_pairs,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUP: tl.constexpr,
        KNN: tl.constexpr,
        PAIRS: tl.constexpr,
    ):
        """The best pairs of a few rows. Sizes in capitals are the next powers of two.

        At n 1024, knn 32, bf16 a row takes some 4,000 instructions of its warp: for 32,768 tokens of 4 heads 0.6 ms
        where an H200 issues one at every chance, 0.92 ms measured. Reading the scores once takes 0.13 ms.
        """
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        is_row = rows < n_tokens * heads
        starts = tl.where(is_row, rows, 0) * n
        keys1 = _best_keys(scores1_ptr, starts, n, ROWS, COLUMNS, GROUP, KNN)
        keys2 = _best_keys(scores2_ptr, starts, n, ROWS, COLUMNS, GROUP, KNN)

        pairs = tl.arange(0, PAIRS)[None, :]
        is_pair = pairs < n_pairs
        ranks1 = tl.load(ranks_ptr + pairs, mask=is_pair, other=0)
        ranks2 = tl.load(ranks_ptr + n_pairs + pairs, mask=is_pair, other=0)
        keys1 = tl.gather(keys1, tl.broadcast_to(ranks1, [ROWS, PAIRS]), 1)
        keys2 = tl.gather(keys2, tl.broadcast_to(ranks2, [ROWS, PAIRS]), 1)
        dtype: tl.constexpr = scores1_ptr.dtype.element_ty
        sums = _scores_of(keys1, dtype) + _scores_of(keys2, dtype)
        slots = _columns_of(keys1) * n + _columns_of(keys2)
        ordered = tl.where(is_pair, _order(sums), -0x80000000).to(tl.int64)
        winners = tl.topk((ordered << 32) | slots, KNN)

        ordered = (winners >> 32).to(tl.int32)
        scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        ranks = tl.arange(0, KNN)[None, :]
        places = ((rows % n_tokens) * heads + rows // n_tokens) * knn + ranks
        tl.store(best_ptr + places, scores, mask=is_row & (ranks < knn))
        tl.store(slots_ptr + places, winners & 0xFFFFFFFF, mask=is_row & (ranks < knn))

    @triton.jit
    def _score_gradients_kernel(
        grad_ptr,  # (N, H, knn)
        slots_ptr,
        grad1_ptr,  # (H, N, n)
        grad2_ptr,
        n_tokens,
        heads,
        n,
        knn,
        COLUMNS: tl.constexpr,
        KNN: tl.constexpr,
    ):
        """One row of both halves' gradients: zeros, and on top the sums over the winners of each column."""
        row = tl.program_id(0).to(tl.int64)
        place = ((row % n_tokens) * heads + row // n_tokens) * knn
        ranks = tl.arange(0, KNN)
        grad = tl.load(grad_ptr + place + ranks, mask=ranks < knn, other=0.0).to(tl.float32)
        slots = tl.load(slots_ptr + place + ranks, mask=ranks < knn, other=0).to(tl.int32)
        columns1, columns2 = slots // n, slots % n
        zeros = tl.zeros([COLUMNS], dtype=grad1_ptr.dtype.element_ty)
        columns = tl.arange(0, COLUMNS)
        tl.store(grad1_ptr + row * n + columns, zeros, mask=columns < n)
        tl.store(grad2_ptr + row * n + columns, zeros, mask=columns < n)
        # Every winner of a column stores the same sum, so it does not matter who is last; but zeros must come first.
        tl.debug_barrier()
        sums1 = tl.sum(tl.where(columns1[:, None] == columns1[None, :], grad[:, None], 0.0), axis=0)
        sums2 = tl.sum(tl.where(columns2[:, None] == columns2[None, :], grad[:, None], 0.0), axis=0)
        tl.store(grad1_ptr + row * n + columns1, sums1.to(zeros.dtype), mask=ranks < knn)
        tl.store(grad2_ptr + row * n + columns2, sums2.to(zeros.dtype), mask=ranks < knn)


@functools.lru_cache(maxsize=8)
def _kernel_ranks(knn: int, device: torch.device) -> torch.Tensor:
    return torch.stack(_candidate_pairs(knn, device)).to(torch.int32)


def _kernel_group(columns: int, best: int) -> int:
    """How many columns to a group, all in powers of two, so that the fewest maxima and members are sorted."""
    sizes = [g for g in (2, 4, 8, 16, 32) if best <= columns // g and columns // g + best * g < columns]
    return min(sizes, key=lambda g: columns // g + best * g, default=1)


def _launch_search(
    scores1_HNn: torch.Tensor,
    scores2_HNn: torch.Tensor,
    knn: int,
    group: int | None = None,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_search_kernel` over all rows; `group` and `rows`, powers of two, change its speed alone."""
    heads, n_tokens, n = scores1_HNn.shape
    rows = rows or KERNEL_ROWS
    scores = scores1_HNn.new_empty((n_tokens, heads, knn), dtype=torch.float32)
    slots = scores1_HNn.new_empty((n_tokens, heads, knn), dtype=torch.int64)
    ranks = _kernel_ranks(knn, scores1_HNn.device)
    # Triton sorts no fewer than two.
    columns, best, pairs = (max(triton.next_power_of_2(size), 2) for size in (n, knn, ranks.shape[1]))
    with torch.cuda.device_of(scores):
        _search_kernel[(triton.cdiv(n_tokens * heads, rows),)](
            scores1_HNn,
            scores2_HNn,
            ranks,
            scores,
            slots,
            n_tokens,
            heads,
            n,
            knn,
            ranks.shape[1],
            ROWS=rows,
            COLUMNS=columns,
            GROUP=group or _kernel_group(columns, best),
            KNN=best,
            PAIRS=pairs,
            num_warps=1,
        )
    return scores, slots


def _score_gradients(
    grad_NHK: torch.Tensor, slots_NHK: torch.Tensor, n: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both halves' scores, each (H, N, n) of `dtype`, summed in fp32."""
    n_tokens, heads, knn = slots_NHK.shape
    grad1_HNn, grad2_HNn = (grad_NHK.new_empty((heads, n_tokens, n), dtype=dtype) for _ in range(2))
    best = triton.next_power_of_2(knn)
    with torch.cuda.device_of(grad_NHK):
        _score_gradients_kernel[(n_tokens * heads,)](
            grad_NHK.contiguous(),
            slots_NHK.contiguous(),
            grad1_HNn,
            grad2_HNn,
            n_tokens,
            heads,
            n,
            knn,
            COLUMNS=triton.next_power_of_2(n),
            KNN=best,
            num_warps=1 if best <= 32 else 4,
        )
    return grad1_HNn, grad2_HNn


def _gradients_by_products(
    grad_NHK: torch.Tensor, slots_NHK: torch.Tensor, query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of queries and keys as the matrix products' own, from the scores' gradients."""
    scores = _score_gradients(grad_NHK, slots_NHK, keys_H2nD.shape[2], query_NH2D.dtype)
    queries = [torch.einsum("hnk,hkd->nhd", grad, keys_H2nD[:, half]) for half, grad in enumerate(scores)]
    keys = [torch.einsum("hnk,nhd->hkd", grad, query_NH2D[:, :, half]) for half, grad in enumerate(scores)]
    return torch.stack(queries, dim=2), torch.stack(keys, dim=1)

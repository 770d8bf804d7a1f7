"""The search on a GPU where the kernel of search.py ends: more than 4,096 keys of a half, or more than 128 slots.

On an H200 (torch 2.11; 16,384 tokens, 4 heads, k 32, halves of 256, bf16) the search takes 3.1 ms at 8,192 keys, and
4.0 with its backward; the kernel of search.py takes 2.3 and 3.6 ms at 4,096. PyTorch's operators take 14.8 and 17.8 ms
at 8,192 keys.

As in search.py a score and its column are packed into one integer, and groups of columns are searched by their maxima.
A row of scores is read in pieces, with the groups' maxima so far in registers, so it may be of any length; and a group
that is among the best is searched in runs, by their maxima, before the columns of the best runs are.

The scores are made for a part of the tokens at a time, such that they fit WORKSPACE_BYTES.

Backward: the gradients of queries and keys are weighted sums of the rows that won, by the kernels of the lookup. Their
time and memory do not grow with n.

Shape suffixes: N tokens, H heads, K = knn, n keys per half, D = half of the query's size, 2 the halves, T = 2 * H
tables of keys.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lingua.product_key import lookup_kernels

# A slot's number has 31 bits, and the k * log(k) candidates of a row are held in registers.
MAX_KEYS = 46340
MAX_KNN = 256
# Of both halves' scores that are in GPU memory at once.
WORKSPACE_BYTES = 2**29
# Elements of a row that a warp has in its registers at once, at the most.
WARP_ELEMENTS = 1024


def search(
    query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor, ranks: torch.Tensor, knn: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, in fp32, and slots) of the best, each (N, H, knn). `ranks`: (2, pairs), int32, of search.py."""
    n_tokens, heads = query_NH2D.shape[:2]
    scores_NHK = query_NH2D.new_empty((n_tokens, heads, knn), dtype=torch.float32)
    slots_NHK = query_NH2D.new_empty((n_tokens, heads, knn), dtype=torch.int64)
    for part in parts(query_NH2D, keys_H2nD.shape[2]):
        launch_search(half_scores(query_NH2D[part], keys_H2nD), ranks, scores_NHK[part], slots_NHK[part])
    return scores_NHK, slots_NHK


def parts(query_NH2D: torch.Tensor, n: int) -> list[slice]:
    """Tokens whose scores, of both halves, fit WORKSPACE_BYTES; of one token at the least."""
    n_tokens, heads = query_NH2D.shape[:2]
    at_once = WORKSPACE_BYTES // (2 * heads * n * query_NH2D.element_size())
    at_once = max(at_once // 128 * 128, min(at_once, 128), 1)  # whole tiles of the product
    return [slice(first, min(first + at_once, n_tokens)) for first in range(0, n_tokens, at_once)]


def half_scores(query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor) -> torch.Tensor:
    """(2, H, N, n): the products of each half of a query with its keys.

    In memory, rows begin at multiples of 16 elements: so they are read 16 bytes at a time.
    """
    (n_tokens, heads), n = query_NH2D.shape[:2], keys_H2nD.shape[2]
    scores_2HNn = query_NH2D.new_empty((2, heads, n_tokens, -(-n // 16) * 16))[..., :n]
    for half in (0, 1):
        queries_HND, keys_HDn = query_NH2D[:, :, half].transpose(0, 1), keys_H2nD[:, half].transpose(1, 2)
        torch.bmm(queries_HND, keys_HDn, out=scores_2HNn[half])
    return scores_2HNn


@functools.cache
def search_options(n: int, knn: int) -> dict[str, int]:
    """Sizes of `_search_kernel` with which the fewest maxima and members are sorted. They change its speed alone."""
    best = max(triton.next_power_of_2(knn), 2)  # Triton sorts no fewer than two
    num_warps = 1 if best <= 32 else 4
    candidates = []
    for run in (1, 2, 4, 8, 16):
        groups = best
        while groups * run <= max(WARP_ELEMENTS * num_warps, best):
            pieces = triton.cdiv(n, groups * run)
            members = best * triton.next_power_of_2(pieces) if pieces > 1 else 0
            # Of a number of groups that all are among the best, only the order is searched in vain.
            cost = (groups if groups > best else groups // 2) + members + (best * run if run > 1 else 0)
            # What does not fit the registers goes to memory and back.
            excess = max(members * run - 2 * WARP_ELEMENTS * num_warps, 0)
            candidates.append((excess, cost, groups * run, {"GROUPS": groups, "RUN": run, "PIECES": pieces}))
            groups *= 2
    return min(candidates, key=lambda x: x[:3])[3] | {"KNN": best, "num_warps": num_warps}


def launch_search(
    scores_2HNn: torch.Tensor,
    ranks: torch.Tensor,
    scores_NHK: torch.Tensor,
    slots_NHK: torch.Tensor,
    options: dict[str, int] | None = None,
) -> None:
    """Writes the best slots into `slots_NHK` and their scores, of fp32, into `scores_NHK`."""
    n_tokens, heads, knn = slots_NHK.shape
    if slots_NHK.numel() == 0:
        return
    n = scores_2HNn.shape[3]
    with torch.cuda.device_of(scores_2HNn):
        _search_kernel[(n_tokens * heads,)](
            scores_2HNn,
            ranks,
            scores_NHK,
            slots_NHK,
            n_tokens,
            heads,
            n,
            scores_2HNn.stride(2),
            knn,
            ranks.shape[1],
            PAIRS=max(triton.next_power_of_2(ranks.shape[1]), 2),
            **(options or search_options(n, knn)),
        )


def gradients(
    grad_NHK: torch.Tensor, slots_NHK: torch.Tensor, query_NH2D: torch.Tensor, keys_H2nD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of queries and keys, as `_gradients_by_rows` of search.py has them."""
    (n_tokens, heads, knn), (n, dim) = slots_NHK.shape, keys_H2nD.shape[2:]
    slots = slots_NHK.to(torch.int32)
    rows_NTK = torch.stack((slots // n, slots % n), dim=2).flatten(1, 2)
    rows_NTK += torch.arange(2 * heads, dtype=torch.int32, device=slots.device)[:, None] * n
    keys = keys_H2nD.reshape(-1, dim)
    grad_query = query_NH2D.new_empty(query_NH2D.shape)
    columns = min(triton.next_power_of_2(dim), 256)
    with torch.cuda.device_of(grad_NHK):
        _query_gradients_kernel[(n_tokens * 2 * heads, triton.cdiv(dim, columns))](
            rows_NTK, grad_NHK.contiguous(), keys, grad_query, n_tokens, 2 * heads, knn, dim,
            COLUMNS=columns, ROWS=8, num_warps=1,
        )  # fmt: skip
    factors = grad_NHK[:, :, None].expand(-1, -1, 2, -1).reshape(-1, knn)
    queries = query_NH2D.reshape(-1, dim)
    grad_keys = lookup_kernels.gradient(rows_NTK.view(-1, knn), factors, queries, len(keys), keys.dtype)
    return grad_query, grad_keys.view(keys_H2nD.shape)


# --- the kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    """fp32 as int32 that sort as they do, NaN above all: the bits of negative ones fall, all but the sign turn."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _ordered(scores, is_real):
    """int32 that sort as the scores do: of 16 bits for scores of 16 bits. Below all others where not `is_real`."""
    if scores.dtype.primitive_bitwidth == 16:
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32)
        ordered = tl.where(scores.to(tl.float32) == scores.to(tl.float32), bits ^ ((bits >> 31) & 0x7FFF), 0x7FFF)
        ordered = tl.where(is_real, ordered, -0x8000)
    else:
        ordered = tl.where(is_real, _order(scores), -0x80000000)
    return ordered


@triton.jit
def _pack(ordered, ids, dtype: tl.constexpr):
    """Integers that sort as `ordered`, with `ids` in the low 16 bits: int32 for scores of 16 bits, else int64."""
    if dtype.primitive_bitwidth != 16:
        ordered = ordered.to(tl.int64)
    return (ordered << 16) | ids


@triton.jit
def _ids_of(keys):
    return (keys & 0xFFFF).to(tl.int32)


@triton.jit
def _scores_of(keys, dtype: tl.constexpr):
    """The scores, in fp32, that were packed."""
    if dtype.primitive_bitwidth == 16:
        ordered = keys >> 16
        bits = ordered ^ ((ordered >> 31) & 0x7FFF)
        scores = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        ordered = (keys >> 16).to(tl.int32)
        scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return scores


@triton.jit
def _best_keys(
    scores, n, GROUPS: tl.constexpr, RUN: tl.constexpr, PIECES: tl.constexpr, KNN: tl.constexpr
):  # fmt: skip
    """The packed scores of the best KNN of n columns, sorted.

    A row is PIECES pieces of GROUPS runs of RUN columns; group g has the runs g of all pieces. The best groups are
    searched, the best runs of those, and the best columns of those.
    """
    dtype: tl.constexpr = scores.dtype.element_ty
    SPAN: tl.constexpr = GROUPS * RUN
    columns = tl.arange(0, SPAN)
    lowest = float("-inf")
    row = tl.load(scores + columns, mask=columns < n, other=lowest)
    if PIECES > 1:
        maxima = row.to(tl.float32)
        for piece in tl.range(1, PIECES, loop_unroll_factor=2):
            more = tl.load(scores + piece * SPAN + columns, mask=piece * SPAN + columns < n, other=lowest)
            maxima = tl.maximum(maxima, more.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        row = maxima.to(dtype)
    ordered = _ordered(row, columns < n)
    if RUN > 1:
        ordered = tl.max(tl.reshape(ordered, [GROUPS, RUN]), axis=1)
    best = tl.topk(_pack(ordered, tl.arange(0, GROUPS), dtype), KNN)
    # What is loaded once more comes from the cache: cheaper than to keep and to index the registers.
    if PIECES > 1:
        AT_ONCE: tl.constexpr = triton.next_power_of_2(PIECES)
        runs = tl.reshape(_ids_of(best)[:, None] + GROUPS * tl.arange(0, AT_ONCE)[None, :], [KNN * AT_ONCE])
        if RUN > 1:
            columns = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]
            members = tl.load(scores + columns, mask=columns < n, other=lowest)
            ordered = tl.max(_ordered(members, columns < n), axis=1)
        else:
            ordered = _ordered(tl.load(scores + runs, mask=runs < n, other=lowest), runs < n)
        # A run beyond the row may have a number of more than 16 bits; any number beyond the row does.
        best = tl.topk(_pack(ordered, tl.where(runs * RUN < n, runs, 0xFFFF), dtype), KNN)
    if RUN > 1:
        columns = tl.reshape(_ids_of(best)[:, None] * RUN + tl.arange(0, RUN)[None, :], [KNN * RUN])
        is_real = columns < n
        members = tl.load(scores + columns, mask=is_real, other=lowest)
        best = tl.topk(_pack(_ordered(members, is_real), tl.where(is_real, columns, 0), dtype), KNN)
    return best


@triton.jit
def _search_kernel(
    scores_ptr,  # (2, H, N, stride)
    ranks_ptr,  # (2, pairs)
    best_ptr,  # (N, H, knn)
    slots_ptr,
    n_tokens,
    heads,
    n,
    stride,
    knn,
    n_pairs,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    PIECES: tl.constexpr,
    KNN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The best pairs of a token and a head. KNN and PAIRS are the next powers of two."""
    token, head = tl.program_id(0) % n_tokens, tl.program_id(0) // n_tokens
    scores1 = scores_ptr + tl.program_id(0).to(tl.int64) * stride
    scores2 = scores1 + tl.num_programs(0).to(tl.int64) * stride
    keys1 = _best_keys(scores1, n, GROUPS, RUN, PIECES, KNN)
    keys2 = _best_keys(scores2, n, GROUPS, RUN, PIECES, KNN)

    pairs = tl.arange(0, PAIRS)
    is_pair = pairs < n_pairs
    keys1 = tl.gather(keys1, tl.load(ranks_ptr + pairs, mask=is_pair, other=0), 0)
    keys2 = tl.gather(keys2, tl.load(ranks_ptr + n_pairs + pairs, mask=is_pair, other=0), 0)
    dtype: tl.constexpr = scores_ptr.dtype.element_ty
    sums = _scores_of(keys1, dtype) + _scores_of(keys2, dtype)
    slots = _ids_of(keys1) * n + _ids_of(keys2)
    ordered = tl.where(is_pair, _order(sums), -0x80000000).to(tl.int64)
    winners = tl.topk((ordered << 32) | slots, KNN)

    ordered = (winners >> 32).to(tl.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    ranks = tl.arange(0, KNN)
    places = (token.to(tl.int64) * heads + head) * knn + ranks
    tl.store(best_ptr + places, scores, mask=ranks < knn)
    tl.store(slots_ptr + places, winners & 0xFFFFFFFF, mask=ranks < knn)


@triton.jit
def _query_gradients_kernel(
    rows_ptr,  # (N, T, knn), rows of all tables of keys
    grad_ptr,  # (N, H, knn)
    keys_ptr,  # (T * n, dim)
    out_ptr,  # (N, T, dim)
    n_tokens,
    tables,
    knn,
    dim,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of a half query, the sum of the keys that it won with. Programs of the same keys run one after the other."""
    token, table = (tl.program_id(0) % n_tokens).to(tl.int64), tl.program_id(0) // n_tokens
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows_ptr += (token * tables + table) * knn
    grad_ptr += (token * (tables // 2) + table // 2) * knn
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, knn, ROWS):
        for i in tl.static_range(ROWS):
            is_real = first + i < knn
            row = tl.load(rows_ptr + first + i, mask=is_real, other=0).to(tl.int64)
            grad = tl.load(grad_ptr + first + i, mask=is_real, other=0.0).to(tl.float32)
            key = tl.load(keys_ptr + row * dim + columns, mask=is_real & (columns < dim), other=0.0)
            total += grad * key.to(tl.float32)
    out_ptr += (token * tables + table) * dim
    tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty), mask=columns < dim)

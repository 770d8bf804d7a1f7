"""The lookup's three operations as Triton kernels, for any dim, bag, number of slots and floating type but fp64.

All that they move is rows: what is read is read once, what is written is written once, sums are in fp32 registers,
and nothing is added to by two programs at a time, so results are the same in every run. What they read and write:

    sums        a row of the table for every slot of every token; a row of the result for every token
    products    the same rows; a token's vector; a number for every slot of every token
    gradient    a token's vector for every place that reads a slot; every row of the gradient

The gradient sorts the places by slot first, and then a program sums a slot's ("Memory Layers at Scale", section 3.3).
Slots that are read from more than LONG places are summed in pieces of LONG places, so that no program works for long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Places that one program sums one after the other.
LONG = 1024

# How many columns a program has at most, how many rows it has under way at once, and in how many warps. Tried on an
# H200 with rows of 1,024 bf16 in bags of 128, 4.2 M places, 1 M slots: sums and products at the speed of a copy
# (4.2 TB/s), the gradient above it, since tokens' vectors stay in the cache.
SUMS = {"COLUMNS": 256, "ROWS": 8, "num_warps": 1}
PRODUCTS = {"COLUMNS": 1024, "ROWS": 2, "num_warps": 4}
GRADIENT = {"COLUMNS": 512, "ROWS": 4, "num_warps": 1}

# Bytes of the tokens' vectors that stay in a GPU's cache. Programs of the same columns run at the same time, so with
# many tokens, such as those of several layers, a program has fewer columns, and more slots instead.
CACHED = 40 * 2**20
LEAST_COLUMNS = 256


def _fit(options: dict[str, int], dim: int) -> dict[str, int]:
    """No more columns than there are."""
    return options | {"COLUMNS": min(max(triton.next_power_of_2(dim), 16), options["COLUMNS"])}


def sums(indices: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, D): each token's rows times its factors. `indices`, `factors`: (N, K); `weight`: (S, D)."""
    (n, bag), dim = indices.shape, weight.shape[1]
    out = torch.empty(n, dim, dtype=dtype, device=weight.device)
    if bag == 0:
        return out.zero_()
    if out.numel():
        options = _fit(SUMS, dim)
        _sums[(n, triton.cdiv(dim, options["COLUMNS"]))](
            out, indices.contiguous(), factors.contiguous(), weight.contiguous(), bag, dim, **options
        )
    return out


def products(indices: torch.Tensor, weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """(N, K) in fp32: each token's vector times its rows. `indices`: (N, K); `weight`: (S, D); `vectors`: (N, D)."""
    (n, bag), dim = indices.shape, weight.shape[1]
    out = torch.empty(n, bag, dtype=torch.float32, device=weight.device)
    if out.numel():
        _products[(n,)](
            out, indices.contiguous(), vectors.contiguous(), weight.contiguous(), bag, dim, **_fit(PRODUCTS, dim)
        )
    return out


def gradient(
    indices: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor, n_slots: int, dtype: torch.dtype
) -> torch.Tensor:
    """(S, D): row s sums `factor * vector` over all places that read slot s; zero for slots that none reads."""
    bag, dim = indices.shape[1], vectors.shape[1]
    out = torch.empty(n_slots, dim, dtype=dtype, device=vectors.device)
    if indices.numel() == 0:
        return out.zero_()
    if n_slots < 2**31 - 1:
        indices = indices.to(torch.int32)  # half as much to sort
    slots, places = torch.sort(indices.flatten(), stable=True)
    ends = torch.searchsorted(slots, torch.arange(n_slots + 1, device=slots.device, dtype=slots.dtype))
    tokens, factors = torch.div(places, bag, rounding_mode="floor").to(torch.int32), factors.flatten()[places]
    return _sum_sorted(out, slots, ends, tokens, factors, vectors)


def sum_sorted(
    positions: torch.Tensor,
    ends: torch.Tensor,
    tokens: torch.Tensor,
    factors: torch.Tensor,
    vectors: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(U, D): row u sums `factors[p] * vectors[tokens[p]]` over places `ends[u] <= p < ends[u + 1]`, which are sorted.

    `positions`: (P,), the u of every place; `ends`: (U + 1,).
    """
    out = torch.empty(len(ends) - 1, vectors.shape[1], dtype=dtype, device=vectors.device)
    return _sum_sorted(out, positions, ends, tokens, factors, vectors) if out.numel() else out


def _sum_sorted(
    out: torch.Tensor,
    slots: torch.Tensor,
    ends: torch.Tensor,
    tokens: torch.Tensor,
    factors: torch.Tensor,
    vectors: torch.Tensor,
) -> torch.Tensor:
    n_slots, dim = out.shape
    vectors = vectors.contiguous()
    options = _fit(GRADIENT, dim)
    most, bytes_of_column = options["COLUMNS"], len(vectors) * vectors.element_size()
    while options["COLUMNS"] > LEAST_COLUMNS and bytes_of_column * options["COLUMNS"] > CACHED:
        options["COLUMNS"] //= 2
    n_columns, n_pieces = triton.cdiv(dim, options["COLUMNS"]), triton.cdiv(len(slots), LONG)
    # A piece may have the end of one long slot and the start of another.
    pieces = torch.empty(n_pieces, 2, dim, dtype=torch.float32, device=vectors.device)
    places_of = (ends, tokens, factors, vectors)
    _sum_pieces[(n_pieces, n_columns)](pieces, slots, *places_of, len(slots), dim, LONG=LONG, **options)
    # Where few slots are read at all, programs would be started for hardly more than zeros each.
    several = 4 if len(slots) < n_slots else 2 * most // options["COLUMNS"]
    grid = (triton.cdiv(n_slots, several), n_columns)
    _sum_slots[grid](out, pieces, *places_of, n_slots, dim, SLOTS=several, LONG=LONG, **options)
    return out


@triton.jit
def _sum_rows(rows, factors, table, begin, end, dim, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of `factor * table[row]` over the numbers `begin` .. `end` - 1 of `rows` and `factors`."""
    inside = columns < dim
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(begin, end, ROWS):
        for i in tl.static_range(ROWS):
            there = first + i < end
            row = tl.load(rows + first + i, mask=there, other=0).to(tl.int64)
            factor = tl.load(factors + first + i, mask=there, other=0).to(tl.float32)
            values = tl.load(table + row * dim + columns, mask=inside & there, other=0)
            total += factor * values.to(tl.float32)
    return total


@triton.jit
def _sums(out, slots, factors, table, bag, dim, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = _sum_rows(slots + token * bag, factors + token * bag, table, 0, bag, dim, columns, ROWS, COLUMNS)
    tl.store(out + token * dim + columns, total.to(out.dtype.element_ty), mask=columns < dim)


@triton.jit
def _products(out, slots, vectors, table, bag, dim, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slots += token * bag
    out += token * bag
    vectors += token * dim
    for first in range(0, bag, ROWS):
        members = first + tl.arange(0, ROWS)
        there = members < bag
        rows = tl.load(slots + members, mask=there, other=0).to(tl.int64) * dim
        total = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, dim, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < dim
            vector = tl.load(vectors + columns, mask=inside, other=0).to(tl.float32)
            values = tl.load(
                table + rows[:, None] + columns[None, :], mask=there[:, None] & inside[None, :], other=0
            ).to(tl.float32)
            total += tl.sum(values * vector[None, :], axis=1)
        tl.store(out + members, total, mask=there)


@triton.jit
def _sum_pieces(
    pieces, slots, ends, tokens, factors, vectors, n_places, dim,
    LONG: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a piece of LONG places, the sums of its first and its last slot, where these are long."""
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, last = piece * LONG, tl.minimum((piece + 1) * LONG, n_places) - 1
    slot = tl.load(slots + first).to(tl.int64)
    begin, end = tl.load(ends + slot), tl.load(ends + slot + 1)
    if end - begin > LONG:
        total = _sum_rows(tokens, factors, vectors, first, tl.minimum(end, last + 1), dim, columns, ROWS, COLUMNS)
        tl.store(pieces + piece * 2 * dim + columns, total, mask=columns < dim)
    other = tl.load(slots + last).to(tl.int64)
    begin, end = tl.load(ends + other), tl.load(ends + other + 1)
    if (other != slot) & (end - begin > LONG):
        total = _sum_rows(tokens, factors, vectors, begin, last + 1, dim, columns, ROWS, COLUMNS)
        tl.store(pieces + (piece * 2 + 1) * dim + columns, total, mask=columns < dim)


@triton.jit
def _sum_slots(
    out, pieces, ends, tokens, factors, vectors, n_slots, dim,
    SLOTS: tl.constexpr, LONG: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * SLOTS
    end = tl.load(ends + first)
    for i in range(SLOTS):
        slot = first + i
        if slot < n_slots:
            begin = end
            end = tl.load(ends + slot + 1)
            if end - begin <= LONG:
                total = _sum_rows(tokens, factors, vectors, begin, end, dim, columns, ROWS, COLUMNS)
            else:
                total = tl.zeros([COLUMNS], dtype=tl.float32)
                for piece in range(begin // LONG, (end - 1) // LONG + 1):
                    # It is the piece's second slot where another one's places come before it.
                    which = tl.where(piece * LONG >= begin, 0, 1)
                    total += tl.load(pieces + (piece * 2 + which) * dim + columns, mask=columns < dim, other=0)
            tl.store(out + slot * dim + columns, total.to(out.dtype.element_ty), mask=columns < dim)

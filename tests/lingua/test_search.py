"""The search against a top-k over all n * n sums, and its gradients against autograd's of the plain formula.

The checks named `check_*` run twice: here, on the CPU path, and on the kernels in `interpreted_search_kernels.py`.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lingua.product_key import search as module
from lingua.product_key.search import search

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Tokens, heads, keys of each half, knn. Few and small: the interpreter takes half a second for a row of a thousand.
# Where tokens are as many as heads, a kernel may take one for the other.
SIZES = [(1, 1, 1, 1), (3, 2, 5, 5), (1, 1, 40, 7), (1, 1, 64, 4), (1, 1, 66, 33)]


# Keys, and how many slots are found, where scores are no numbers.
NAN_SIZES = {torch.float32: [(9, 4), (64, 4), (512, 3)], torch.bfloat16: [(9, 4), (64, 4)]}


def draw(n_tokens, heads, n, dim=3, dtype=torch.float32, seed=0, levels=None):
    """Queries and keys; with `levels`, of so few whole numbers that most scores are equal."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (n_tokens, heads, 2, dim), (heads, 2, n, dim)
    if levels:
        return tuple(torch.randint(levels, shape, generator=rng).to(dtype) for shape in shapes)
    return tuple(torch.randn(shape, generator=rng).to(dtype) for shape in shapes)


def half_scores(query, keys):
    return [torch.einsum("nhd,hkd->nhk", query[:, :, half], keys[:, half]) for half in (0, 1)]


def all_sums(query, keys):
    """(N, H, n * n): the scores of all slots."""
    scores1, scores2 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in half_scores(query, keys))
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(2)


def check_result(query, keys, knn):
    scores, slots = search(query, keys, knn)
    sums = all_sums(query, keys)
    assert scores.dtype == sums.dtype
    assert slots.dtype == torch.int64
    assert scores.shape == slots.shape == (*query.shape[:2], knn)
    assert torch.equal(scores, sums.topk(knn).values)
    assert torch.equal(scores, sums.gather(-1, slots))
    assert all(len(set(row)) == knn for row in slots.flatten(0, 1).tolist())
    return scores, slots


def check_gradients(query, keys, knn, tolerance):
    query, keys = query.clone().requires_grad_(), keys.clone().requires_grad_()
    scores, slots = search(query, keys, knn)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).to(scores.dtype)
    scores.backward(grad)
    exact_query, exact_keys = (x.detach().double().requires_grad_() for x in (query, keys))
    all_sums(exact_query, exact_keys).gather(-1, slots).backward(grad.double())
    for actual, exact in ((query.grad, exact_query.grad), (keys.grad, exact_keys.grad)):
        assert (actual.double() - exact).norm() <= tolerance * exact.norm()
    return query.grad, keys.grad


def tolerance(dtype):
    # The gradient of a score is rounded to its type, then that of a query or key.
    return 4 * torch.finfo(dtype).eps


def check_sizes():
    for dtype in DTYPES:
        for n_tokens, heads, n, knn in SIZES:
            query, keys = draw(n_tokens, heads, n, dtype=dtype)
            check_result(query, keys, knn)
            check_gradients(query, keys, knn, tolerance(dtype))


def check_large_sizes():
    for dtype in (torch.float32, torch.bfloat16):
        check_result(*draw(1, 1, 1024, 16, dtype), knn=32)
    check_result(*draw(1, 1, 130, dtype=torch.bfloat16), knn=128)


def check_ties():
    for levels in (1, 3):
        for dtype in (torch.float32, torch.bfloat16):
            for n_tokens, heads, n, knn in SIZES[1:4]:
                query, keys = draw(n_tokens, heads, n, dtype=dtype, levels=levels)
                check_result(query, keys, knn)
                check_gradients(query, keys, knn, tolerance(dtype))


def check_signs_and_extremes():
    """Scores of one sign, of both zeros, the largest and the smallest: an order of bits must be one of numbers."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        numbers = torch.tensor(
            [
                0.0,
                -0.0,
                1,
                -1,
                info.max,
                info.min,
                info.tiny,
                -info.tiny,
                info.smallest_normal / 2,
                info.eps,
                -info.eps,
            ],
            dtype=dtype,
        )
        for chosen in (numbers, numbers[numbers > 0], numbers[numbers < 0]):
            keys = chosen.repeat(7)[None, None, :, None].expand(1, 2, -1, 1)
            check_result(torch.tensor([1.0, 0.0], dtype=dtype).view(1, 1, 2, 1), keys, 6)


def check_what_is_no_number():
    """NaN and infinities: slots stay in range and distinct, and NaN is not lost."""
    for dtype, sizes in NAN_SIZES.items():
        for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
            for n, knn in sizes:
                query, keys = draw(3, 1, n, dtype=dtype)
                query[..., 0] = query[..., 0].abs()
                keys[0, 0, 2, 0] = bad
                query[1] = bad
                scores, slots = search(query.requires_grad_(), keys, knn)
                assert slots.min() >= 0
                assert slots.max() < n * n
                assert all(len(set(row)) == knn for row in slots[::2].flatten(0, 1).tolist())
                if bad != bad:
                    assert scores[:, :, 0].isnan().all()
                    assert (slots[::2, :, 0] // n == 2).all()
                elif bad > 0:
                    assert (scores[::2] == bad).all()
                else:
                    assert scores[::2].isfinite().all()
                scores.sum().backward()


def check_determinism():
    for dtype in (torch.float32, torch.bfloat16):
        query, keys = draw(4, 2, 16, dtype=dtype)
        first, second = (check_gradients(query, keys, 9, tolerance(dtype)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


CHECKS = [
    check_sizes,
    check_large_sizes,
    check_ties,
    check_signs_and_extremes,
    check_what_is_no_number,
    check_determinism,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_a_cpu(check):
    check()


@given(
    n_tokens=st.integers(0, 4),
    heads=st.integers(1, 3),
    n=st.integers(1, 70),
    share=st.floats(0, 1),
    dim=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([None, None, 2, 5]),
    seed=st.integers(0, 1000),
)
def test_any_shape(n_tokens, heads, n, share, dim, dtype, levels, seed):
    knn = 1 + int(share * (n - 1))
    query, keys = draw(n_tokens, heads, n, dim, dtype, seed, levels)
    check_result(query, keys, knn)
    check_gradients(query, keys, knn, tolerance(dtype))


@given(
    length=st.sampled_from([256, 257, 300, 512, 520, 1000, 1024, 2048, 4096]),
    k=st.integers(1, 256),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([None, 3]),
    seed=st.integers(0, 1000),
)
def test_the_best_of_long_rows(length, k, dtype, levels, seed):
    """Groups, groups of groups, and rows that cannot be cut into groups."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, length), generator=rng) if levels else torch.randn(3, length, generator=rng)
    scores = scores.to(dtype)
    best, columns = module._best(scores, k)
    assert torch.equal(best, scores.topk(k).values)
    assert torch.equal(best, scores.gather(1, columns))
    assert all(len(set(row)) == k for row in columns.tolist())


def test_many_rows_are_searched_in_parts(monkeypatch):
    query, keys = draw(20, 2, 30)
    expected = check_result(query, keys, 8)
    for elements in (1, 30 * 7, 30 * 39):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        assert all(map(torch.equal, search(query, keys, 8), expected))


def test_gradients_against_finite_differences():
    query, keys = (x.requires_grad_() for x in draw(3, 2, 9, 2, torch.float64))
    assert torch.autograd.gradcheck(lambda q, k: search(q, k, 4)[0], (query, keys))


@pytest.mark.parametrize("knn", [1, 30, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_many_tokens(dtype, knn):
    """Each key is read by many tokens, whose small terms must not be lost."""
    check_gradients(*draw(300, 2, 128, 8, dtype), knn, tolerance(dtype))


def test_either_gradient_alone():
    query, keys = draw(5, 2, 9)
    for leaf in (query, keys):
        leaf.requires_grad_()
        search(query, keys, 3)[0].sum().backward()
        assert leaf.grad.any()
        leaf.requires_grad_(False)
    scores, slots = search(query.requires_grad_(), keys, 3)
    assert scores.requires_grad
    assert not slots.requires_grad


def test_layouts():
    """Halves of one query, keys that are not contiguous, the gradient of `sum()`, which has strides of 0."""
    query, keys = draw(5, 2, 9, 4)
    expected = check_result(query, keys, 6)
    views = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (query, keys)]
    assert not any(x.is_contiguous() for x in views)
    scores, slots = search(*views, 6)
    assert torch.allclose(scores, expected[0], rtol=1e-5)
    assert torch.equal(slots, expected[1])
    check_gradients(*views, 6, tolerance(torch.float32))
    gradients = []
    for make in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones_like(y))):
        leaf = query.clone().requires_grad_()
        make(search(leaf, keys, 6)[0])
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_as_a_matrix_product_does(dtype):
    query, keys = (x.requires_grad_() for x in draw(6, 2, 20, 8))
    with torch.autocast("cpu", dtype=dtype):
        scores, slots = search(query, keys, 5)
        expected = all_sums(query, keys)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected.topk(5).values)
    assert torch.equal(scores, expected.gather(-1, slots))
    scores.sum().backward()
    assert query.grad.dtype == keys.grad.dtype == torch.float32
    rounded = [x.detach().to(dtype).requires_grad_() for x in (query, keys)]
    search(*rounded, 5)[0].sum().backward()
    assert torch.equal(query.grad, rounded[0].grad.float())
    assert torch.equal(keys.grad, rounded[1].grad.float())


def test_autocast_leaves_float64_alone():
    query, keys = draw(6, 2, 20, 8, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = search(query, keys, 5)
    assert torch.equal(scores, search(query, keys, 5)[0])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiler_sees_one_operator(backend, autocast):
    def loss(query, keys):
        scores, slots = search(query, keys, 5)
        return (scores.softmax(-1) * slots).mean()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for n_tokens in (6, 9):
        gradients = []
        for function in (loss, compiled):
            leaves = [x.requires_grad_() for x in draw(n_tokens, 2, 20, 8)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                function(*leaves).backward()
            gradients.append([leaf.grad for leaf in leaves])
        for plain, compiled_gradient in zip(*gradients, strict=True):
            assert torch.allclose(plain, compiled_gradient, rtol=2e-2 if autocast else 1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_operator_keeps_the_rules(dtype):
    """That it writes to no input, that fake tensors tell the true shapes and types, that autograd finds it."""
    query, keys = (x.requires_grad_() for x in draw(4, 2, 9, dtype=dtype))
    torch.library.opcheck(torch.ops.lingua.search.default, (query, keys, 3))
    torch.library.opcheck(torch.ops.lingua.search.default, (query[:0], keys, 3))


def test_inference_mode_comes_first():
    """What is kept for later calls must serve training too. No other test uses this knn."""
    query, keys = draw(4, 1, 31)
    with torch.inference_mode():
        search(query, keys, 29)
    search(query.requires_grad_(), keys, 29)[0].sum().backward()
    assert query.grad.any()


@pytest.mark.parametrize("knn", [0, -1, 10])
def test_knn_out_of_range_is_refused(knn):
    with pytest.raises(ValueError, match=f"^knn: {knn} slots cannot be found, the keys allow 1 to 9"):
        search(*draw(2, 2, 9), knn)


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ((2, 3, 4), (3, 2, 9, 4)),
        ((2, 3, 2, 4), (6, 9, 4)),
        ((2, 3, 2, 4), (4, 2, 9, 4)),
        ((2, 3, 2, 4), (3, 2, 9, 5)),
        ((2, 3, 2, 4), (3, 3, 9, 4)),
        ((2, 3, 1, 4), (3, 1, 9, 4)),
    ],
)
def test_shapes_that_do_not_match_are_refused(query, keys):
    with pytest.raises(ValueError, match=r"queries \(N, H, 2, D\) and keys \(H, 2, n, D\)"):
        search(torch.zeros(query), torch.zeros(keys), 3)

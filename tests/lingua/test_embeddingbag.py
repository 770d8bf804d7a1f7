"""The weighted lookup against plain indexing in float64."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lingua.product_key import xformer_embeddingbag
from lingua.product_key.cpu_offload import fetched_embedding_bag, fetched_slot_products
from lingua.product_key.value_table import xFormerEmbeddingBag
from lingua.product_key.xformer_embeddingbag import slot_products, xformers_embedding_bag
from tests.helpers.lookups import DTYPES, TOLERANCE, check_sums, draw


@given(
    n=st.integers(0, 7),
    bag=st.integers(1, 6),
    size=st.integers(1, 9),
    dim=st.integers(1, 9),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    score_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, bag, size, dim, dtype, index_dtype, score_dtype, seed):
    check_sums(*draw(n, bag, size, dim, dtype, index_dtype, score_dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize("chunk_elements", [12 * 16 * 32, 12 * 16 * 256, 2**24])
def test_many_tokens(monkeypatch, chunk_elements, size, dtype):
    """With 3 slots each gradient row sums thousands of terms, which must not be lost to rounding."""
    monkeypatch.setattr(xformer_embeddingbag, "CHUNK_ELEMENTS", chunk_elements)
    for n in (255, 256, 769):
        check_sums(*draw(n, 12, size, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms_that_differ_in_size_all_count(dtype):
    """One large gradient, then thousands that would each vanish beside it."""
    n = 4096
    weight = torch.ones(2, 4, dtype=dtype).requires_grad_()
    grad = torch.full((n, 4), 2.0**-9)
    grad[0] = 1.0
    y = xformers_embedding_bag(torch.zeros(n, 1, dtype=torch.int64), weight, torch.ones(n, 1))
    y.backward(grad.to(dtype))
    assert torch.allclose(weight.grad[0].float(), torch.full((4,), 1 + (n - 1) * 2.0**-9), rtol=2**-7)
    assert not weight.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_long_bag_is_summed_precisely(dtype):
    """Many small terms behind a large one."""
    scores = torch.full((1, 4097), 2.0**-9)
    scores[0, 0] = 1.0
    y = xformers_embedding_bag(torch.zeros(1, 4097, dtype=torch.int64), torch.ones(1, 8, dtype=dtype), scores)
    assert torch.allclose(y.float(), torch.full((1, 8), 9.0), rtol=2**-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_slots_of_one_bag_count_each(dtype):
    indices = torch.tensor([[1, 1, 1, 0], [2, 0, 2, 2]])
    check_sums(indices, *draw(2, 4, 3, 5, dtype)[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    """Transposed inputs, and the gradient of `sum()`, which has strides of 0."""
    indices, weight, scores, grad = draw(6, 4, 10, 8, dtype)
    expected = xformers_embedding_bag(indices, weight, scores)
    transposed = [x.t().contiguous().t() for x in (indices, weight, scores)]
    assert torch.allclose(xformers_embedding_bag(*transposed), expected, rtol=2 * TOLERANCE[dtype], atol=1e-6)
    check_sums(*transposed, grad)
    results = []
    for make in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones_like(y))):
        leaf = weight.clone().requires_grad_()
        make(xformers_embedding_bag(indices, leaf, scores))
        results.append(leaf.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_either_gradient_alone(dtype):
    indices, weight, scores, _ = draw(6, 4, 10, 8, dtype)
    for leaf in (weight, scores):
        leaf.requires_grad_()
        xformers_embedding_bag(indices, weight, scores).float().square().sum().backward()
        assert leaf.grad.any()
        leaf.requires_grad_(False)
    assert not xformers_embedding_bag(indices, weight, scores).requires_grad


def test_gradients_against_finite_differences():
    indices, weight, scores, _ = draw(3, 4, 5, 2, torch.float64, score_dtype=torch.float64)
    weight.requires_grad_()
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, s: xformers_embedding_bag(indices, w, s), (weight, scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_look_up(dtype):
    indices, weight, scores, grad = draw(0, 4, 10, 8, dtype)
    check_sums(indices, weight, scores, grad)


@pytest.mark.parametrize("mode", ["mean", "max", ""])
def test_other_modes_are_refused(mode):
    indices, weight, scores, _ = draw(2, 3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match=f"^mode: '{mode}' is not supported"):
        xformers_embedding_bag(indices, weight, scores, mode=mode)


@pytest.mark.parametrize(
    ("indices_shape", "scores_shape"), [((6,), (6,)), ((2, 3), (3, 2)), ((2, 3), (2, 3, 1)), ((2, 3, 1), (2, 3, 1))]
)
def test_shapes_that_do_not_match_are_refused(indices_shape, scores_shape):
    with pytest.raises(ValueError, match="indices .* and per_sample_weights .* must be"):
        xformers_embedding_bag(torch.zeros(indices_shape, dtype=torch.long), torch.ones(4, 5), torch.ones(scores_shape))


def test_the_module_is_a_table_and_its_lookup():
    torch.manual_seed(0)
    table = xFormerEmbeddingBag(400, 25)
    assert list(table.state_dict()) == ["weight"]
    assert table.weight.shape == (400, 25)
    assert table.weight.std().item() == pytest.approx(0.2, rel=0.03)
    indices, _, scores, _ = draw(6, 4, 400, 25, torch.float32)
    assert torch.equal(table(indices, scores), xformers_embedding_bag(indices, table.weight, scores))


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_what_the_compiler_is_told(dtype):
    """Shapes, types and gradients of the operators, as torch.library checks them."""
    indices, weight, scores, grad = draw(5, 4, 10, 8, dtype)
    weight, scores = weight.requires_grad_(), scores.to(dtype).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(xformer_embeddingbag.bag_sums, (indices, weight, scores, dtype), test_utils=tests)
    torch.library.opcheck(xformer_embeddingbag.bag_products, (indices, weight, grad.requires_grad_()), test_utils=tests)


def test_compiled_without_a_break():
    indices, weight, scores, _ = draw(6, 4, 10, 8, torch.float32)

    def loss(weight, scores):
        return xformers_embedding_bag(indices, weight, scores * 2).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (weight, scores)]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for expected, actual in zip(*results, strict=True):
        assert torch.allclose(expected, actual, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_used_again_when_nobody_holds_it(monkeypatch, dtype):
    """A gradient that is kept stays as it is; the next one after it is let go may lie where it lay."""
    monkeypatch.setattr(xformer_embeddingbag, "LARGE", 1)
    xformer_embeddingbag._storages.clear()
    indices, weight, scores, grad = draw(6, 4, 10, 8, dtype)
    weight.requires_grad_()

    def backward(factor):
        weight.grad = None
        xformers_embedding_bag(indices, weight, scores).backward(factor * grad.to(dtype))
        return weight.grad

    kept = backward(1)
    as_it_was, where = kept.clone(), kept.data_ptr()
    other = backward(2)
    assert torch.equal(kept, as_it_was)
    assert torch.allclose(other, 2 * kept)
    del kept, other
    again = backward(1)
    assert torch.equal(again, as_it_was)
    assert again.data_ptr() == where or dtype != torch.float32
    view = again[1:2]
    weight.grad = None
    del again
    before = view.clone()
    backward(3)
    assert torch.equal(view, before)


@pytest.mark.parametrize("where", ["table", "one column", "in the CPU's memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", [5, -1, 2**40])
def test_slots_out_of_range_are_refused(slot, dtype, where):
    """By every operator that reads, before anything beyond the table is read."""
    indices, weight, weights, x = draw(3, 2, 5, 4, dtype)
    indices[1, 1] = slot
    if where == "one column":
        weight, x = weight[:, :1], x[:, :1]
    sums, products = xformers_embedding_bag, slot_products
    if where == "in the CPU's memory":
        sums, products = (functools.partial(f, ticket=None) for f in (fetched_embedding_bag, fetched_slot_products))
    message = "^indices: slots -?[0-9]+ to [0-9]+ are read, but the table has slots 0 to 4$"
    for lookup in (lambda: sums(indices, weight, weights), lambda: products(indices, weight, x)):
        with pytest.raises(IndexError, match=message):
            lookup()
    with pytest.raises(IndexError, match=message):
        xformer_embeddingbag.table_gradient(indices, weights, x, 5, dtype)


def test_only_in_debug_mode_a_gpu_is_asked_for_its_slots():
    class OnGpu:
        is_cuda = True

        def numel(self):
            return 1

        def aminmax(self):
            return torch.tensor([0]), torch.tensor([5])

    xformer_embeddingbag.check_slots(OnGpu(), 5)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match="slots 0 to 5 are read"):
        xformer_embeddingbag.check_slots(OnGpu(), 5)

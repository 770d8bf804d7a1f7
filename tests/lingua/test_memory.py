"""The memory layer against a search that forms all n * n sums, in float64; shared tables; sizes; distributions."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apps.main.transformer import LMTransformer, LMTransformerArgs, count_parameters, validate_model_args
from lingua.product_key.memory import HashingMemory, ProductKeyArgs, memory_layers
from lingua.product_key.search import _candidate_pairs

KEY = "model.productkey_args."

# In the order of the arguments of `sizes`.
SIZES = [(1, 1, 1, 2), (5, 5, 2, 4), (7, 3, 3, 6), (4, 1, 1, 8), (8, 8, 3, 2), (13, 10, 2, 6)]
VARIANTS = [
    {"swilu_projection": swilu, "mem_gated": gated, **values}
    for swilu, gated, values in itertools.product(
        [True, False], [True, False], [{}, {"mem_v_dim": 5}, {"peer_variant": True}]
    )
]


def name_variant(variant: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in variant.items() if value) or "plain"


def sizes(n_keys: int, knn: int, heads: int, k_dim: int) -> dict[str, int]:
    return {"mem_n_keys": n_keys, "mem_knn": knn, "mem_heads": heads, "mem_k_dim": k_dim}


def build(size, seed: int = 0, **variant) -> HashingMemory:
    """A memory of 7 dimensions to 6 (PEER: 7), with all its parameters random, biases too."""
    torch.manual_seed(seed)
    memory = HashingMemory(7, 7 if variant.get("peer_variant") else 6, **sizes(*size), **variant)
    for name, parameter in memory.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        memory.keys *= 3
    return memory


def exact_parameters(memory: HashingMemory) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in memory.named_parameters()}


def all_sums(memory: HashingMemory, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """(N, H, n * n): the scores of all slots."""
    query = F.linear(x, p["query_proj.query_mlps.0.weight"], p["query_proj.query_mlps.0.bias"])
    query1, query2 = query.view(len(x), memory.heads, memory.k_dim).chunk(2, dim=-1)
    keys = p["keys"].view(memory.heads, 2, memory.n_keys, memory.k_dim // 2)
    scores1 = (query1[:, :, None] * keys[:, 0]).sum(-1)
    scores2 = (query2[:, :, None] * keys[:, 1]).sum(-1)
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(2)


def reference(memory: HashingMemory, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Section 3 of the interface, one token and one head after the other. `x` is (N, C)."""
    sums = all_sums(memory, p, x)
    outputs = []
    for token in range(len(x)):
        y = 0
        for head in range(memory.heads):
            scores, slots = sums[token, head].topk(memory.knn)
            for weight, slot in zip(scores.softmax(0), slots, strict=True):
                if memory.peer_variant:
                    y = y + weight * F.gelu(x[token] @ p["values_u.weight"][slot]) * p["values_v.weight"][slot]
                else:
                    y = y + weight * p["values.weight"][slot]
        outputs.append(y)
    y = torch.stack(outputs)
    if "swilu_projection.weight" in p:
        y = y * F.silu(F.linear(x, p["swilu_projection.weight"], p["swilu_projection.bias"]))
    if "value_proj.weight" in p:
        y = F.linear(y, p["value_proj.weight"], p["value_proj.bias"])
    if "gating.weight" in p:
        y = y * torch.sigmoid(F.linear(x, p["gating.weight"], p["gating.bias"]))
    return y


def draw_tokens(memory: HashingMemory, n: int = 6, margin: float = 1e-3) -> torch.Tensor:
    """Inputs for which rounding cannot change the winners: they lead by a margin."""
    x = torch.randn(40 * n, 7, generator=torch.Generator().manual_seed(1))
    sums = all_sums(memory, exact_parameters(memory), x.double()).sort(-1, descending=True).values
    if memory.knn < memory.size:
        lead = (sums[..., memory.knn - 1] - sums[..., memory.knn]).amin(-1)
        x = x[lead > margin]
    assert len(x) >= n
    return x[:n].clone()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# --- one layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_variant)
def test_a_memory_is_its_formulas(variant, size):
    memory = build(size, **variant)
    x = draw_tokens(memory).requires_grad_()
    p = exact_parameters(memory)
    exact_x = x.detach().double().requires_grad_()
    expected = reference(memory, p, exact_x)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(grad.double())

    y = memory(x.view(2, 3, 7))
    assert y.shape == (2, 3, memory.output_dim)
    y.backward(grad.view(y.shape))
    assert relative_error(y.flatten(0, 1), expected) < 1e-5
    assert relative_error(x.grad, exact_x.grad) < 1e-4
    for name, parameter in memory.named_parameters():
        if p[name].grad.norm() > 1e-12:
            assert relative_error(parameter.grad, p[name].grad) < 1e-4, name
        else:  # with one winner the softmax is 1 whatever the score
            assert parameter.grad.norm() < 1e-6, name


@pytest.mark.parametrize("size", [*SIZES, (20, 19, 1, 2), (40, 32, 2, 4)], ids=str)
def test_the_best_slots_are_found(size):
    memory = build(size)
    x = torch.randn(50, 7)
    sums = all_sums(memory, exact_parameters(memory), x.double())
    scores, slots = memory.get_indices(memory.query_proj(x), memory.knn)
    assert scores.shape == slots.shape == (50, memory.heads, memory.knn)
    assert torch.equal(scores, scores.sort(dim=-1, descending=True).values)
    assert torch.allclose(scores.double(), sums.topk(memory.knn).values, atol=1e-4)
    assert torch.allclose(scores.double(), sums.gather(-1, slots), atol=1e-4)
    assert all(len(set(row)) == memory.knn for row in slots.flatten(0, 1).tolist())


def test_fewer_slots_than_knn_can_be_asked_for():
    memory = build((9, 8, 2, 4))
    query = memory.query_proj(torch.randn(5, 7))
    scores, slots = memory.get_indices(query, memory.knn)
    for knn in (1, 3):
        fewer_scores, fewer_slots = memory.get_indices(query, knn)
        assert torch.equal(fewer_scores, scores[..., :knn])
        assert torch.equal(fewer_slots, slots[..., :knn])


def test_queries_can_come_head_by_head():
    memory = build((9, 8, 2, 4))
    query = memory.query_proj(torch.randn(5, 7))
    for ours, theirs in zip(memory.get_indices(query, 4), memory.get_indices(query.view(10, 4), 4), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("knn", [1, 2, 3, 7, 16, 32, 33, 64])
def test_candidate_pairs_are_those_that_can_win(knn):
    pairs = list(zip(*(ranks.tolist() for ranks in _candidate_pairs(knn, torch.device("cpu"))), strict=True))
    assert sorted(pairs) == [(i, j) for i in range(knn) for j in range(knn) if (i + 1) * (j + 1) <= knn]
    if knn == 32:
        assert len(pairs) == 119


@pytest.mark.parametrize("variant", [{}, {"mem_v_dim": 5}, {"peer_variant": True}], ids=name_variant)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tables(variant, dtype):
    memory = build((7, 3, 3, 6), **variant)
    for table in memory.tables:
        table.to(dtype)
    x = draw_tokens(memory).requires_grad_()
    p, exact_x = exact_parameters(memory), x.detach().double().requires_grad_()
    expected = reference(memory, p, exact_x)
    expected.sum().backward()
    y = memory(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert relative_error(y, expected) < 1e-2
    assert relative_error(x.grad, exact_x.grad) < 2e-2
    for name, parameter in memory.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert relative_error(parameter.grad, p[name].grad) < 2e-2, name


@pytest.mark.parametrize("variant", [{}, {"peer_variant": True}], ids=name_variant)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_slots_that_many_tokens_read(variant, dtype):
    """All tokens read all 4 slots; the terms are small beside their sum."""
    memory = build((2, 2, 1, 2), **variant)
    for table in memory.tables:
        table.to(dtype)
    exact = copy.deepcopy(memory)
    for table in exact.tables:
        table.to(torch.float32)
    x = torch.randn(3000, 7).abs()
    for layer in (memory, exact):
        layer(x).sum().backward()
    for half, full in zip(memory.tables, exact.tables, strict=True):
        assert relative_error(half.weight.grad, full.weight.grad.double()) < 1e-2


@pytest.mark.parametrize("variant", [{}, {"mem_gated": True}, {"peer_variant": True}], ids=name_variant)
def test_autocast(variant):
    memory = build((7, 3, 3, 6), seed=7, **variant)  # one with enough tokens whose winners lead by so much
    for table in memory.tables:
        table.to(torch.bfloat16)
    x = draw_tokens(memory, margin=0.2)
    expected = memory(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = memory(x)
    y.float().sum().backward()
    assert relative_error(y, expected.detach().double()) < 5e-2
    assert all(parameter.grad.isfinite().all() for parameter in memory.parameters())


def test_normalized_queries_and_keys():
    """RMSNorm of each half of the query and each key, with a weight each, then all n * n sums."""
    memory = build((7, 4, 3, 6), mem_qk_norm=True)
    half = memory.k_dim // 2
    with torch.no_grad():
        assert torch.equal(memory.query_norm.weight, torch.ones(half))
        assert torch.equal(memory.key_norm.weight, torch.full((half,), half**-0.5))
        for norm in (memory.query_norm, memory.key_norm):
            norm.weight.mul_(torch.rand(half) + 0.5)
    query = torch.randn(5 * memory.heads, memory.k_dim)

    def normalize(x, norm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()

    queries = normalize(query.double().view(5, memory.heads, 2, half), memory.query_norm)
    keys = normalize(memory.keys.double().view(memory.heads, 2, memory.n_keys, half), memory.key_norm)
    row, column = torch.einsum("nhsd,hskd->snhk", queries, keys)
    best, slots = (row[..., :, None] + column[..., None, :]).flatten(-2).topk(memory.knn)
    scores, found = memory.get_indices(query, memory.knn)
    torch.testing.assert_close(scores.double(), best, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, slots)
    scores.sum().backward()
    assert all(norm.weight.grad.abs().sum() > 0 for norm in (memory.query_norm, memory.key_norm))
    # The lengths of queries and keys do not matter.
    with torch.no_grad():
        memory.keys.mul_(30)
    torch.testing.assert_close(memory.get_indices(100 * query, memory.knn)[0], scores, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_variant)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(variant, dtype):
    memory = build((5, 4, 2, 4), **variant)
    for table in memory.tables:
        table.to(dtype)
    for shape in ((0, 3, 7), (2, 0, 7), (0, 7)):
        x = torch.empty(shape, requires_grad=True)
        y = memory(x)
        assert y.shape == (*shape[:-1], memory.output_dim)
        y.sum().backward()
        assert x.grad.shape == shape
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in memory.parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=name_variant)
def test_any_layout_of_the_input(variant):
    memory = build((5, 4, 2, 4), **variant)
    x = draw_tokens(memory)
    expected = memory(x).detach()
    transposed = x.t().contiguous().t().requires_grad_()
    swapped = x.view(2, 3, 7).transpose(0, 1)
    for layout, wanted in (
        (x.view(1, 2, 3, 7), expected.view(1, 2, 3, -1)),
        (transposed, expected),
        (swapped, expected.view(2, 3, -1).transpose(0, 1)),
        (x[:1].expand(4, 7), expected[:1].expand(4, -1)),
        (x.repeat(1, 2)[:, 7:], expected),
    ):
        y = memory(layout)
        assert y.shape == wanted.shape
        assert torch.allclose(y, wanted, atol=1e-5)
    memory(transposed).sum().backward()
    assert transposed.grad.shape == x.shape


@pytest.mark.parametrize("variant", [{}, {"peer_variant": True}], ids=name_variant)
def test_a_memory_used_in_inference_mode_trains_afterwards(variant):
    _candidate_pairs.cache_clear()
    memory = build((5, 4, 2, 4), **variant)
    with torch.inference_mode():
        memory(torch.randn(6, 7))
    try:
        memory(torch.randn(6, 7)).sum().backward()
    finally:
        _candidate_pairs.cache_clear()


# --- names, distributions, sizes -----------------------------------------------------------------------------------


BASE_NAMES = {"keys", "query_proj.query_mlps.0.weight", "query_proj.query_mlps.0.bias"}


def variant_names(variant: dict) -> set[str]:
    names = set(BASE_NAMES)
    if variant["swilu_projection"]:
        names |= {"swilu_projection.weight", "swilu_projection.bias"}
    if variant["swilu_projection"] or "mem_v_dim" in variant:
        names |= {"value_proj.weight", "value_proj.bias"}
    if variant["mem_gated"]:
        names |= {"gating.weight", "gating.bias"}
    return names


def table_names(variant: dict) -> set[str]:
    return {"values_u.weight", "values_v.weight"} if variant.get("peer_variant") else {"values.weight"}


@pytest.mark.parametrize("variant", VARIANTS, ids=name_variant)
def test_names_and_shapes(variant):
    memory = build((5, 3, 2, 8), **variant)
    assert set(memory.state_dict()) == variant_names(variant) | table_names(variant)
    v_dim = variant.get("mem_v_dim", memory.output_dim)
    shapes = {
        "keys": (2 * 2 * 5, 4),
        "query_proj.query_mlps.0.weight": (16, 7),
        "values.weight": (25, v_dim),
        "values_u.weight": (25, 7),
        "values_v.weight": (25, 7),
        "swilu_projection.weight": (v_dim, 7),
        "value_proj.weight": (memory.output_dim, v_dim),
        "gating.weight": (1, 7),
    }
    assert {name: shapes[name] for name in memory.state_dict() if name in shapes} == {
        name: tuple(weight.shape) for name, weight in memory.state_dict().items() if name in shapes
    }


def check_normal(weight: torch.Tensor, std: float) -> None:
    assert weight.std().item() == pytest.approx(std, rel=0.06)
    assert abs(weight.mean().item()) < 0.06 * std
    assert weight.abs().max() > 2.5 * std  # not cut, not uniform


def check_uniform(weight: torch.Tensor, bound: float) -> None:
    assert weight.abs().max() <= bound * 1.0001
    assert weight.min() < -0.97 * bound
    assert weight.max() > 0.97 * bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)


@pytest.mark.parametrize("values", [{}, {"mem_v_dim": 24}, {"peer_variant": True}], ids=name_variant)
def test_initial_distributions(values):
    torch.manual_seed(3)
    memory = HashingMemory(96, 96, **sizes(24, 4, 3, 40), mem_gated=True, **values)
    for parameter in memory.parameters():
        nn.init.constant_(parameter, 7.0)
    memory.reset_parameters()
    check_uniform(memory.keys, 40**-0.5)
    check_uniform(memory.query_proj.query_mlps[0].weight, (6 / (96 + 120)) ** 0.5)
    for table in memory.tables:
        check_normal(table.weight, values.get("mem_v_dim", 96) ** -0.5)
    check_normal(memory.swilu_projection.weight, 96**-0.5)
    assert memory.gating.weight.std().item() == pytest.approx(96**-0.5, rel=0.3)
    for name, parameter in memory.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("v_dim", [96, 24, 384])
def test_the_value_projection_starts_with_the_models_dim(v_dim):
    """Section 3: "projections normal, std dim**-0.5", whatever mem_v_dim is."""
    torch.manual_seed(3)
    memory = HashingMemory(96, 96, **sizes(8, 4, 1, 4), mem_v_dim=v_dim)
    check_normal(memory.value_proj.weight, 96**-0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mem_n_keys": 0}, "mem_n_keys: 0 "),
        ({"mem_heads": 0}, "mem_heads: 0 "),
        ({"mem_knn": 0}, "mem_knn: 0 "),
        ({"mem_knn": -3}, "mem_knn: -3 "),
        ({"mem_knn": 9}, "mem_knn: 9 is more than mem_n_keys=8"),
        ({"mem_k_dim": 0}, "mem_k_dim: 0 "),
        ({"mem_k_dim": 7}, "mem_k_dim: 7 is odd"),
        ({"mem_v_dim": 0}, "mem_v_dim: 0 "),
        ({"mem_v_dim": -2}, "mem_v_dim: -2 "),
        ({"mem_v_dim": 8, "peer_variant": True}, "mem_v_dim: 8, but with peer_variant"),
    ],
    ids=str,
)
def test_bad_sizes_name_their_key(changes, message):
    options = {**sizes(8, 4, 2, 4), **changes}
    with pytest.raises(ValueError, match=".") as caught:
        HashingMemory(8, 8, **options)
    assert str(caught.value).startswith(KEY + message)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=".") as of_the_model:
        validate_model_args(make_args(**changes))
    assert str(of_the_model.value) == str(caught.value)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_a_bad_value_fixed_lr_names_its_key(lr):
    with pytest.raises(ValueError, match=KEY + "value_fixed_lr: "):
        validate_model_args(make_args(value_fixed_lr=lr))


def test_peer_needs_an_output_as_wide_as_the_input():
    with pytest.raises(ValueError, match=KEY + "peer_variant: "):
        HashingMemory(8, 9, **sizes(8, 4, 2, 4), peer_variant=True)


def test_which_blocks_have_a_memory():
    assert memory_layers(ProductKeyArgs(is_enabled=True, layers="4,12,20"), 24) == [4, 12, 20]
    assert memory_layers(ProductKeyArgs(is_enabled=True, layers=" 3, 0"), 4) == [0, 3]
    assert memory_layers(ProductKeyArgs(is_enabled=False, layers="nonsense"), 4) == []


@pytest.mark.parametrize("layers", ["", "a", "1,", ",1", "1;2", "1.5", "4", "-1", "0,4", "1,1", "1, 2, 1"])
def test_a_bad_list_of_blocks_names_its_key(layers):
    with pytest.raises(ValueError, match=KEY + "layers: ") as caught:
        memory_layers(ProductKeyArgs(is_enabled=True, layers=layers), 4)
    assert "\n" not in str(caught.value)


# --- memories of one model -----------------------------------------------------------------------------------------


def make_args(**productkey_args) -> LMTransformerArgs:
    options = {**sizes(8, 4, 2, 4), "layers": "1,2", **productkey_args}
    return LMTransformerArgs(
        dim=8,
        n_layers=4,
        n_heads=2,
        max_seqlen=8,
        vocab_size=11,
        multiple_of=4,
        productkey_args=ProductKeyArgs(is_enabled=True, **options),
    )


def build_model(**productkey_args) -> LMTransformer:
    return LMTransformer(make_args(**productkey_args))


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(4))
    return tokens[:, :-1], tokens[:, 1:]


def table_of(model: LMTransformer, block: int) -> nn.Parameter:
    return model.layers[block].feed_forward.tables[0].weight


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_variant)
def test_state_dict_names(variant, share):
    model = build_model(mem_share_values=share, layers="2,0", **variant)
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for block in range(4):
        prefix = f"layers.{block}."
        expected |= {f"{prefix}attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
        expected |= {f"{prefix}attention_norm.weight", f"{prefix}ffn_norm.weight"}
        if block in (0, 2):
            names = variant_names(variant) | (table_names(variant) if block == 0 or not share else set())
        else:
            names = {"w1.weight", "w2.weight", "w3.weight"}
        expected |= {f"{prefix}feed_forward.{name}" for name in names}
    assert set(model.state_dict()) == expected
    assert {name for name, _ in model.named_parameters()} == expected


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_parameters_are_counted_once(share, peer):
    model = build_model(mem_share_values=share, peer_variant=peer, mem_gated=True)
    tables = (1 if share else 2) * (2 if peer else 1) * 64 * 8
    attention = 4 * 4 * 8 * 8
    feed_forward = 2 * 3 * 8 * 24  # int(8 * 8 / 3) = 21, up to a multiple of 4
    memory = 2 * (2 * 2 * 8 * 2 + 8 * 8 + 8 + 2 * (8 * 8 + 8) + 8 + 1)
    norms = 9 * 8
    assert count_parameters(model) == (attention + feed_forward + memory + norms + 2 * 11 * 8, tables)


@pytest.mark.parametrize("peer", [False, True])
def test_gradients_of_all_readers_add_up(peer):
    shared = build_model(peer_variant=peer)
    separate = build_model(peer_variant=peer, mem_share_values=False)
    separate.load_state_dict(repeated_tables(shared))
    for model in (shared, separate):
        loss = model(*some_tokens())
        loss.backward()
    for one, mine, other in zip(
        *(model.layers[block].feed_forward.tables for model, block in ((shared, 1), (separate, 1), (separate, 2))),
        strict=True,
    ):
        assert mine.weight.grad.any()
        assert other.weight.grad.any()
        assert torch.allclose(one.weight.grad, mine.weight.grad + other.weight.grad, atol=1e-8)


def test_a_copy_shares_inside_itself():
    model = build_model()
    copied = copy.deepcopy(model)
    assert table_of(copied, 1) is table_of(copied, 2)
    assert table_of(copied, 1) is not table_of(model, 1)
    expected = model(some_tokens()[0])
    assert torch.equal(copied(some_tokens()[0]), expected)
    with torch.no_grad():
        table_of(copied, 2).zero_()
    assert not table_of(copied, 1).any()
    assert torch.equal(model(some_tokens()[0]), expected)


def test_two_models_do_not_touch_each_others_values():
    first = build_model()
    tokens = some_tokens()
    expected = first(tokens[0])
    second = build_model()
    separate = build_model(mem_share_values=False)
    assert len({id(table_of(model, 1)) for model in (first, second, separate)}) == 3
    for model in (second, separate):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(*tokens).backward()
        optimizer.step()
        with torch.no_grad():
            for block in (1, 2):
                table_of(model, block).normal_()
    assert table_of(first, 1).grad is None
    assert torch.equal(first(tokens[0]), expected)


def test_both_readers_see_a_moved_table():
    model = build_model()
    expected = model(some_tokens()[0])
    model.double().float()
    assert table_of(model, 1) is table_of(model, 2)
    assert torch.equal(model(some_tokens()[0]), expected)
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    assert table_of(model, 1) is table_of(model, 2)
    assert torch.equal(model(some_tokens()[0]), expected)


def repeated_tables(model: LMTransformer) -> dict[str, torch.Tensor]:
    """A checkpoint as the published code writes it: the shared table under every memory."""
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in [name for name in state if ".values" in name]:
        for block in model.memories():
            table = name.partition("feed_forward.")[2]
            state[f"layers.{block}.feed_forward.{table}"] = state[name].clone()
    return state


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("form", ["once", "repeated", "under the last"])
def test_a_table_loads_once_or_repeated(form, peer):
    source = build_model(peer_variant=peer, layers="0,1,3")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    state = source.state_dict() if form == "once" else repeated_tables(source)
    if form == "under the last":
        state = {
            name: weight for name, weight in state.items() if ".values" not in name or name.startswith("layers.3.")
        }
    as_given = dict(state)
    model = build_model(peer_variant=peer, layers="0,1,3")
    model.load_state_dict(state)
    for name, weight in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert list(state) == list(as_given)
    assert torch.equal(model(some_tokens()[0]), source(some_tokens()[0]))

    wrapped = nn.ModuleDict({"inner": build_model(peer_variant=peer, layers="0,1,3")})
    wrapped.load_state_dict({f"inner.{name}": weight for name, weight in state.items()})
    assert torch.equal(wrapped["inner"](some_tokens()[0]), source(some_tokens()[0]))


def test_a_repeated_table_loads_into_separate_ones():
    source = build_model()
    model = build_model(mem_share_values=False)
    model.load_state_dict(repeated_tables(source))
    assert table_of(model, 1) is not table_of(model, 2)
    assert torch.equal(model(some_tokens()[0]), source(some_tokens()[0]))


@pytest.mark.parametrize("peer", [False, True])
def test_tables_that_differ_are_refused(peer):
    source = build_model(peer_variant=peer, mem_share_values=False)
    model = build_model(peer_variant=peer)
    with pytest.raises(ValueError, match="mem_share_values=false") as caught:
        model.load_state_dict(source.state_dict())
    name = "values_u" if peer else "values"
    assert str(caught.value).startswith(
        f"layers.2.feed_forward.{name}.weight: differs from layers.1.feed_forward.{name}.weight"
    )
    assert "\n" not in str(caught.value)


def test_tables_of_different_shapes_are_refused():
    model = build_model()
    state = repeated_tables(model)
    state["layers.2.feed_forward.values.weight"] = torch.zeros(64, 9)
    with pytest.raises(ValueError, match=r"layers\.2\.feed_forward\.values\.weight: differs"):
        model.load_state_dict(state)


def test_a_missing_or_unknown_table_is_still_noticed():
    model = build_model()
    state = model.state_dict()
    del state["layers.1.feed_forward.values.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.feed_forward\.values\.weight"):
        model.load_state_dict(state)
    state = {**model.state_dict(), "layers.0.feed_forward.values.weight": torch.zeros(64, 8)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.feed_forward\.values\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(share):
    model = build_model(mem_share_values=share, mem_gated=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(*some_tokens())
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5

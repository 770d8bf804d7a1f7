"""Blocks against plain references: attention, rotary positions, norms, sizes, initial weights, tying, meta devices."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apps.main.transformer import LMTransformer, LMTransformerArgs, count_parameters, validate_model_args
from lingua.product_key.memory import ProductKeyArgs
from lingua.transformer import (
    INIT_STD_FACTORS,
    Attention,
    FeedForward,
    RMSNorm,
    RotaryEmbedding,
    apply_rotary,
    attend,
    create_causal_mask,
    cross_entropy,
)

MEMORY = {"layers": "1", "mem_n_keys": 8, "mem_heads": 2, "mem_knn": 4, "mem_k_dim": 4}


def make_args(memory: dict | None = None, **changes) -> LMTransformerArgs:
    options = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 23, "max_seqlen": 16, "multiple_of": 8, **changes}
    productkey_args = ProductKeyArgs(is_enabled=memory is not None, **(memory or {}))
    return LMTransformerArgs(**options, productkey_args=productkey_args)


def build_model(**changes) -> LMTransformer:
    return LMTransformer(make_args(**changes))


def some_tokens(t: int = 9) -> torch.Tensor:
    return torch.randint(23, (3, t), generator=torch.Generator().manual_seed(1))


def run_flex(run):
    """Uncompiled flex_attention warns that it is slow."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        return run()


def plain_attention(q, k, v, window=None):
    """Softmax attention with loops, in float64. (B, T, H, D), and G heads for keys and values."""
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros_like(q)
    n_tokens, n_heads, dim = q.shape[1:]
    for head in range(n_heads):
        group = head // (n_heads // k.shape[2])
        for t in range(n_tokens):
            first = 0 if window is None else max(0, t - window + 1)
            scores = (k[:, first : t + 1, group] @ q[:, t, head, :, None])[..., 0] / math.sqrt(dim)
            y[:, t, head] = (scores.softmax(-1)[..., None] * v[:, first : t + 1, group]).sum(1)
    return y


def turn(x: torch.Tensor, theta: float, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding with complex numbers. `x` is (B, T, H, D), `positions` (T,) or (B, T)."""
    dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors = torch.polar(torch.ones(dim // 2, dtype=torch.float64), positions.double()[..., None] * frequencies)
    numbers = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(numbers * factors[..., None, :]).flatten(-2)


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 3, 10, 11, 50])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("attn_impl", ["sdpa", "flex_attention"])
def test_attention_is_softmax_attention(attn_impl, heads, window):
    torch.manual_seed(0)
    q = torch.randn(2, 11, heads[0], 6)
    k, v = torch.randn(2, 2, 11, heads[1], 6)
    mask = create_causal_mask(11, attn_impl, window)
    y = run_flex(lambda: attend(q, k, v, mask, attn_impl))
    assert y.shape == q.shape
    assert torch.allclose(y.double(), plain_attention(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_gradients_of_attention(n_kv_heads, window):
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 6, requires_grad=True)
    k, v = (torch.randn(2, 9, n_kv_heads, 6, requires_grad=True) for _ in range(2))
    grad = torch.randn(q.shape)
    attend(q, k, v, create_causal_mask(9, "sdpa", window), "sdpa").backward(grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain_attention(*exact, window).backward(grad.double())
    for ours, reference in zip((q, k, v), exact, strict=True):
        assert torch.allclose(ours.grad.double(), reference.grad, atol=1e-5)


def test_sdpa_takes_masks_of_ones_own():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 2, 4)
    expected = attend(q, k, v, "causal", "sdpa")
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.allclose(attend(q, k, v, sees, "sdpa"), expected, atol=1e-6)
    assert torch.allclose(attend(q, k, v, sees.expand(2, 1, 6, 6), "sdpa"), expected, atol=1e-6)
    additive = torch.zeros(6, 6).masked_fill(~sees, float("-inf"))
    assert torch.allclose(attend(q, k, v, additive, "sdpa"), expected, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_the_attention_layer(heads):
    """Projections, rotary positions of query and key, attention, output."""
    torch.manual_seed(0)
    attention = Attention(12, 6, *heads)
    assert attention.wo.weight.shape == (12, 24)
    x = torch.randn(2, 7, 12)
    y = attention(x, RotaryEmbedding(100.0, 6, 16)(7), "causal")
    q, k, v = (F.linear(x, w.weight).unflatten(-1, (-1, 6)) for w in (attention.wq, attention.wk, attention.wv))
    positions = torch.arange(7)
    attended = plain_attention(turn(q, 100.0, positions), turn(k, 100.0, positions), v)
    expected = F.linear(attended.flatten(-2), attention.wo.weight.double())
    assert torch.allclose(y.double(), expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_kv_heads": 2}, {"sliding_window": 3}], ids=str)
def test_implementations_agree_in_a_model(changes):
    model = build_model(memory=MEMORY, **changes)
    tokens = some_tokens()
    expected = model(tokens)
    assert torch.allclose(run_flex(lambda: model(tokens, attn_impl="flex_attention")), expected, atol=1e-4)


@pytest.mark.parametrize(("window", "n_layers", "reach"), [(None, 1, 16), (1, 3, 1), (3, 1, 3), (3, 2, 5), (4, 3, 10)])
def test_how_far_a_token_sees(window, n_layers, reach):
    model = build_model(n_layers=n_layers, sliding_window=window)
    tokens = some_tokens(16)[:1]
    before = model(tokens)
    tokens[0, 2] += 1
    changed = (model(tokens) != before).any(-1)[0]
    assert changed.tolist() == [2 <= t < 2 + reach for t in range(16)]


def test_fmha_without_a_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="^attn_impl: fmha ") as caught:
        build_model()(some_tokens(), attn_impl="fmha")
    assert "\n" not in str(caught.value)


def test_unknown_implementations_and_wrong_masks_are_refused():
    with pytest.raises(ValueError, match="^attn_impl: 'flash' must be one of sdpa, flex_attention, fmha$"):
        build_model()(some_tokens(), attn_impl="flash")
    with pytest.raises(ValueError, match="^attn_impl: 'flash' must be one of"):
        build_model()(some_tokens(), attn_impl="flash", mask="causal")
    with pytest.raises(ValueError, match="^mask: flex_attention wants a BlockMask"):
        build_model()(some_tokens(), attn_impl="flex_attention", mask="causal")


# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rotary_embedding_turns_complex_numbers(head_dim, theta):
    torch.manual_seed(0)
    x = torch.randn(2, 300, 3, head_dim)
    rope = RotaryEmbedding(theta, head_dim, 400)
    turned = apply_rotary(x, rope(seqlen=300))
    assert turned.dtype == x.dtype
    assert torch.allclose(turned.double(), turn(x, theta, torch.arange(300)), atol=2e-4)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(turned[:, 0], x[:, 0])

    positions = torch.randint(400, (2, 300))
    for chosen in (positions[0], positions):
        turned = apply_rotary(x, rope(tok_idx=chosen))
        assert torch.allclose(turned.double(), turn(x, theta, chosen), atol=2e-4)


def test_rotary_embedding_of_half_precision_is_computed_in_fp32():
    x = torch.randn(1, 200, 2, 8).bfloat16()
    rope = RotaryEmbedding(10000.0, 8, 200)
    turned = apply_rotary(x, rope(seqlen=200))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rotary(x.float(), rope(seqlen=200)).bfloat16())


def test_given_positions():
    model = build_model()
    tokens = some_tokens()
    expected = model(tokens)
    positions = torch.arange(9)
    assert torch.equal(model(tokens, tok_idx=positions), expected)
    assert torch.equal(model(tokens, tok_idx=positions.expand(3, 9)), expected)
    # Only distances matter.
    assert torch.allclose(model(tokens, tok_idx=positions + 7), expected, atol=1e-5)
    assert not torch.allclose(model(tokens, tok_idx=positions.flip(0)), expected, atol=1e-3)
    rows = torch.stack([positions, positions.flip(0), 2 * positions - positions.minimum(torch.tensor(7))])
    together = model(tokens, tok_idx=rows)
    for row in range(3):
        assert torch.allclose(model(tokens[row : row + 1], tok_idx=rows[row])[0], together[row], atol=1e-5)


def test_too_many_tokens_are_refused():
    model = build_model()
    assert model(some_tokens(16)).shape == (3, 16, 23)
    with pytest.raises(ValueError, match="^17 tokens are more than the model's max_seqlen=16$"):
        model(some_tokens(17))


# --- norm, feed-forward, loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(12, eps=1e-2)
    nn.init.normal_(norm.weight)
    x = (0.1 * torch.randn(4, 5, 12)).to(dtype)
    exact = x.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight.double()
    y = norm(x)
    assert y.dtype == dtype
    # Rounded once, at the end.
    assert torch.allclose(y.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    assert torch.equal(y, norm(x.float()).to(dtype))
    assert torch.equal(copy.deepcopy(norm).to(torch.bfloat16)(x).float().isfinite(), torch.ones(4, 5, 12).bool())


@pytest.mark.parametrize("multiplier", [None, 1.0, 1.3, 0.5, 2.7])
@pytest.mark.parametrize(("dim", "multiple_of"), [(512, 256), (16, 8), (100, 1), (7, 3), (96, 256), (1024, 256)])
def test_hidden_size(dim, multiple_of, multiplier):
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    hidden = multiple_of * math.ceil(hidden / multiple_of)
    with torch.device("meta"):
        layer = FeedForward(dim, multiple_of, multiplier)
    assert layer.w1.weight.shape == layer.w3.weight.shape == (hidden, dim)
    assert layer.w2.weight.shape == (dim, hidden)


def test_feed_forward_is_swiglu():
    torch.manual_seed(0)
    layer = FeedForward(6, 4, None)
    x = torch.randn(2, 3, 6)
    up = x @ layer.w1.weight.T
    expected = (up * torch.sigmoid(up) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_is_the_mean_in_fp32(dtype):
    torch.manual_seed(0)
    logits = (5 * torch.randn(2, 7, 11)).to(dtype)
    target = torch.randint(11, (2, 7))
    chosen = logits.double().log_softmax(-1).gather(-1, target[..., None])
    loss = cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-6)
    each = cross_entropy(logits, target, reduction="none")
    assert torch.allclose(each.double(), -chosen.flatten(), atol=1e-5)


def test_the_model_gives_logits_or_the_loss():
    model = build_model(memory=MEMORY)
    tokens = some_tokens()
    logits = model(tokens)
    assert logits.shape == (3, 9, 23)
    target = tokens.roll(-1, 1)
    assert model(tokens, target).item() == pytest.approx(cross_entropy(logits, target).item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(logits, target).item(), rel=0.05)


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"n_heads": 4}, (4, 4, 4)),
        ({"head_dim": 4}, (4, 4, 4)),
        ({"head_dim": 4, "n_heads": 4}, (4, 4, 4)),
        ({"head_dim": 6, "n_heads": 4}, (6, 4, 4)),
        ({"head_dim": 32, "n_heads": 3}, (32, 3, 3)),
        ({"n_heads": 4, "n_kv_heads": 2}, (4, 4, 2)),
        ({"n_heads": 4, "n_kv_heads": 1}, (4, 4, 1)),
        ({"head_dim": 2, "n_kv_heads": 4}, (2, 8, 4)),
        ({"head_dim": 6, "n_heads": 5, "n_kv_heads": 5}, (6, 5, 5)),
    ],
    ids=str,
)
def test_head_sizes(changes, sizes):
    model = build_model(**{"n_heads": None, **changes})
    head_dim, n_heads, n_kv_heads = sizes
    attention = model.layers[0].attention
    assert attention.wq.weight.shape == (n_heads * head_dim, 16)
    assert attention.wk.weight.shape == attention.wv.weight.shape == (n_kv_heads * head_dim, 16)
    assert attention.wo.weight.shape == (16, n_heads * head_dim)
    model(some_tokens(), some_tokens()).backward()
    expected = model(some_tokens())
    assert torch.allclose(run_flex(lambda: model(some_tokens(), attn_impl="flex_attention")), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": None}, "model.n_heads: not set; "),
        ({"n_heads": 3}, "model.n_heads: 3 does not divide model.dim=16"),
        ({"n_heads": None, "head_dim": 6}, "model.head_dim: 6 does not divide model.dim=16"),
        ({"n_heads": None, "head_dim": 32}, "model.head_dim: 32 does not divide model.dim=16"),
        ({"n_heads": 4, "n_kv_heads": 3}, "model.n_kv_heads: 3 does not divide the 4 "),
        ({"n_heads": 2, "n_kv_heads": 4}, "model.n_kv_heads: 4 does not divide the 2 "),
        ({"n_heads": 16}, "model.head_dim: 1 is odd"),
        ({"n_heads": 2, "head_dim": 3}, "model.head_dim: 3 is odd"),
        ({"n_heads": 0}, "model.n_heads: 0 "),
        ({"n_heads": None, "head_dim": 0}, "model.head_dim: 0 "),
        ({"head_dim": -2}, "model.head_dim: -2 "),
        ({"n_kv_heads": 0}, "model.n_kv_heads: 0 "),
        ({"dim": 0}, "model.dim: 0 "),
        ({"n_layers": 0}, "model.n_layers: 0 "),
        ({"multiple_of": 0}, "model.multiple_of: 0 "),
        ({"max_seqlen": 0}, "model.max_seqlen: 0 "),
        ({"norm_eps": 0.0}, "model.norm_eps: 0.0 "),
        ({"norm_eps": float("inf")}, "model.norm_eps: inf "),
        ({"rope_theta": -1.0}, "model.rope_theta: -1.0 "),
        ({"rope_theta": float("inf")}, "model.rope_theta: inf "),
        ({"init_base_std": 0.0}, "model.init_base_std: 0.0 "),
        ({"init_base_std": float("nan")}, "model.init_base_std: nan "),
        ({"init_base_std": float("inf")}, "model.init_base_std: inf "),
        ({"ffn_dim_multiplier": -1.0}, "model.ffn_dim_multiplier: -1.0 "),
        ({"ffn_dim_multiplier": 1e-9}, "model.ffn_dim_multiplier: 1e-09 "),
        ({"ffn_dim_multiplier": float("inf")}, "model.ffn_dim_multiplier: inf "),
        ({"init_std_factor": "depth"}, "model.init_std_factor: 'depth' must be one of disabled, "),
        ({"seed": -1}, "model.seed: -1 "),
        ({"sliding_window": 0}, "model.sliding_window: 0 "),
        ({"memory": {**MEMORY, "layers": "2"}}, "model.productkey_args.layers: "),
    ],
    ids=str,
)
def test_bad_sizes_name_their_key(changes, message):
    for build in (validate_model_args, LMTransformer):
        with pytest.raises(ValueError, match=".") as caught:
            build(make_args(**changes))
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_a_vocabulary_is_needed():
    with pytest.raises(ValueError, match="^model.vocab_size: -1 "):
        build_model(vocab_size=-1)


# --- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, 0.05])
@pytest.mark.parametrize("factor", INIT_STD_FACTORS)
def test_initial_standard_deviations(factor, base):
    dim, n_layers, hidden = 64, 3, 176
    model = build_model(
        dim=dim,
        n_layers=n_layers,
        head_dim=24,
        n_heads=2,
        vocab_size=97,
        init_std_factor=factor,
        init_base_std=base,
        memory=None,
    )
    std = base or dim**-0.5
    expected = {"tok_embeddings.weight": std, "output.weight": std}
    for depth in range(n_layers):
        divisor = {
            "disabled": 1,
            "global_depth": math.sqrt(2 * (n_layers + 1)),
            "current_depth": math.sqrt(2 * (depth + 1)),
            "dim_ratio": dim / 4096,
        }[factor]
        prefix = f"layers.{depth}."
        expected |= {f"{prefix}attention.{name}.weight": std / divisor for name in ("wq", "wk", "wv", "wo")}
        expected |= {f"{prefix}feed_forward.{name}.weight": std / divisor for name in ("w1", "w3")}
        expected[f"{prefix}feed_forward.w2.weight"] = (base or hidden**-0.5) / divisor
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones(dim))
        else:
            assert weight.abs().max() <= 3 * expected[name] * 1.0001, name
            assert weight.abs().max() >= 2.5 * expected[name], name
            # Cutting at 3 standard deviations takes 1.3 % off.
            assert weight.std().item() == pytest.approx(0.9866 * expected[name], rel=0.05), name
            del expected[name]
    assert not expected


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["dense", "memory"])
def test_weights_follow_from_the_seed_alone(memory):
    states = []
    for state, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(state)
        states.append(build_model(memory=memory, seed=seed).state_dict())
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name
        if weight.std() > 0:
            assert not torch.equal(weight, states[2][name]), name
    assert len({weight.flatten()[0].item() for weight in states[0].values() if weight.std() > 0}) > 10


def test_drawing_weights_leaves_the_random_numbers_of_others_alone():
    model = build_model(memory=MEMORY)
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    model.init_weights()
    assert torch.equal(torch.rand(4), expected)


def test_building_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    build_model(memory=MEMORY)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_built_without_memory_behind_it_becomes_the_same(tied, peer):
    args = make_args(memory={**MEMORY, "layers": "0,1", "peer_variant": peer}, weight_tying=tied)
    expected = LMTransformer(args)
    with torch.device("meta"):
        model = LMTransformer(args)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    assert list(model.state_dict()) == list(expected.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    assert torch.equal(model(some_tokens()), expected(some_tokens()))


def test_drawing_again_gives_the_same():
    model = build_model(memory=MEMORY)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.init_weights()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# --- weight tying ------------------------------------------------------------------------------------------------


def test_a_tied_model_has_no_output_of_its_own():
    tied, untied = build_model(weight_tying=True), build_model()
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"output.weight"}
    assert count_parameters(untied)[0] - count_parameters(tied)[0] == 23 * 16
    untied.load_state_dict({**tied.state_dict(), "output.weight": tied.tok_embeddings.weight})
    assert torch.equal(tied(some_tokens()), untied(some_tokens()))


def test_a_tied_weight_trains_by_both_uses():
    tied, untied = build_model(weight_tying=True), build_model()
    untied.load_state_dict({**tied.state_dict(), "output.weight": tied.tok_embeddings.weight})
    tokens, target = some_tokens(), some_tokens().roll(-1, 1)
    for model in (tied, untied):
        model(tokens, target).backward()
    assert torch.allclose(
        tied.tok_embeddings.weight.grad, untied.tok_embeddings.weight.grad + untied.output.weight.grad, atol=1e-6
    )
    optimizer = torch.optim.Adam(tied.parameters(), lr=1e-2)
    before = tied(tokens, target).item()
    for _ in range(10):
        optimizer.zero_grad()
        tied(tokens, target).backward()
        optimizer.step()
    assert tied(tokens, target).item() < before - 0.5


def test_a_checkpoint_with_the_tied_weight_twice_loads():
    source = build_model(weight_tying=True, seed=1)
    state = {**source.state_dict(), "output.weight": source.tok_embeddings.weight.detach().clone()}
    names = list(state)
    model = build_model(weight_tying=True, seed=2)
    model.load_state_dict(state)
    assert torch.equal(model(some_tokens()), source(some_tokens()))
    assert list(state) == names
    wrapped = nn.ModuleDict({"inner": build_model(weight_tying=True, seed=2)})
    wrapped.load_state_dict({f"inner.{name}": weight for name, weight in state.items()})
    assert torch.equal(wrapped["inner"](some_tokens()), source(some_tokens()))


@pytest.mark.parametrize("rows", [23, 22])
def test_a_checkpoint_that_is_not_tied_is_refused(rows):
    state = build_model().state_dict()
    state["output.weight"] = state["output.weight"][:rows]
    with pytest.raises(ValueError, match=r"^output\.weight: differs from tok_embeddings\.weight.*weight_tying=false$"):
        build_model(weight_tying=True).load_state_dict(state)


def test_an_untied_model_needs_the_output():
    with pytest.raises(RuntimeError, match=r"Missing key.*output\.weight"):
        build_model().load_state_dict(build_model(weight_tying=True).state_dict())

"""FLOPs as they are counted by arithmetic beside those that torch counts while a model computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apps.main.transformer import LMTransformer, LMTransformerArgs, count_flops_per_token
from lingua.optim import OptimArgs, build_optimizer
from lingua.product_key.memory import ProductKeyArgs

T, B, DIM, LAYERS = 16, 2, 16, 3
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def model(memory=None, **changes):
    sizes = {"layers": "0,2", "mem_n_keys": 8, "mem_heads": 3, "mem_knn": 4, "mem_k_dim": 6, **(memory or {})}
    options = {"dim": DIM, "n_layers": LAYERS, "n_heads": 4, "multiple_of": 8, **changes}
    productkey_args = ProductKeyArgs(is_enabled=memory is not None, **sizes)
    return LMTransformer(LMTransformerArgs(**options, vocab_size=50, max_seqlen=T, productkey_args=productkey_args))


def products_of_a_step(built):
    """FLOPs of forward and backward for each token, without attention's, which has no formula for a CPU."""
    tokens = torch.randint(50, (B, T + 1))
    with FlopCounterMode(display=False) as counter:
        built(tokens[:, :-1], tokens[:, 1:]).backward()
    assert ATTENTION not in counter.get_flop_counts()["Global"]
    return counter.get_total_flops() / (B * T)


def attention(width=DIM, seen=T / 2):
    return 12 * LAYERS * width * seen


@pytest.mark.parametrize(
    ("built", "of_attention"),
    [
        (model(), attention()),
        (model(n_heads=2, head_dim=12), attention(width=24)),
        (model(n_kv_heads=2), attention()),
        (model(weight_tying=True), attention()),
        # Of the first 4 tokens one sees 1 to 4, of the others 4: on average 4 - 4 * 4 / (2 * 16), less the diagonal.
        (model(sliding_window=4), attention(seen=3.5)),
        (model({}), attention()),
        (model({"swilu_projection": False}), attention()),
        (model({"mem_share_values": False, "mem_gated": True}), attention()),
        (model({"mem_v_dim": 8}), attention()),
        (model({"mem_v_dim": 8, "swilu_projection": False}), attention()),
        (model({"peer_variant": True}, weight_tying=True), attention()),
    ],
    ids=["dense", "wide", "GQA", "tied", "window", "memory", "no swilu", "separate, gated", "v_dim", "bare", "PEER"],
)
def test_arithmetic_is_what_torch_counts(built, of_attention):
    # Norms and biases are weights that stand in no product.
    beside = 6 * sum(p.numel() for p in built.parameters() if p.ndim == 1)
    assert count_flops_per_token(built, T) == products_of_a_step(built) + of_attention + beside


def test_sparse_updates_count_the_same():
    built = model({"peer_variant": True})
    dense = products_of_a_step(built)
    build_optimizer(built, OptimArgs(value_update="sparse"), 10)
    assert products_of_a_step(built) == dense


def test_recomputed_operators_are_counted_by_torch_alone():
    built = model({})
    once = products_of_a_step(built)
    for block in built.layers:
        forward = block.forward
        block.forward = lambda *args, forward=forward: torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False
        )
    assert products_of_a_step(built) > once

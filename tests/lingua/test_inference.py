"""The fast copy of a model against the model."""

import pytest
import torch

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.inference import PACKED_FROM, PackedLinear, can_speed_up, fast_linear, speed_up
from lingua.product_key.memory import ProductKeyArgs

SIZES = {"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 70, "max_seqlen": 40}


def build(**changes):
    memory = {"is_enabled": True, "layers": "0,2", "mem_n_keys": 8, "mem_knn": 4, "mem_k_dim": 8, "mem_heads": 2}
    memory = ProductKeyArgs(**(memory | changes.pop("memory", {})))
    return LMTransformer(LMTransformerArgs(**(SIZES | changes), productkey_args=memory)).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "head_dim": 24},
        {"weight_tying": True},
        {"memory": {"mem_gated": True, "mem_share_values": False}},
        {"memory": {"peer_variant": True}},
        {"dim": 512},  # whose weights are packed
    ],
)
@torch.no_grad()
def test_the_copy_computes_the_same(changes):
    model = build(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = speed_up(model)
    tokens = torch.randint(70, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fast(tokens), model(tokens), atol=2e-5)
    assert any(isinstance(module, PackedLinear) for module in fast.modules()) == ("dim" in changes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_tables_lie_in_memory_once():
    model = build()
    fast = speed_up(model)
    table = model.memories()[0].values.weight
    for memory in fast.memories().values():
        assert memory.tables[0].weight.data_ptr() == table.data_ptr()
    assert fast.tok_embeddings.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize("n_tokens", [1, 2, 16, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears(n_tokens, bias):
    linear = torch.nn.Linear(256, PACKED_FROM // 256, bias=bias)
    packed = fast_linear(linear.weight, linear.bias)
    assert isinstance(packed, PackedLinear)
    x = torch.randn(1, n_tokens, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert packed(x).shape == (1, n_tokens, PACKED_FROM // 256)
        assert torch.allclose(packed(x), linear(x), atol=1e-5)
        assert torch.allclose(packed(x[0]), linear(x[0]), atol=1e-5)


def test_only_models_in_fp32_are_sped_up():
    model = build()
    assert can_speed_up(model)
    model.layers[0].feed_forward.values.to(torch.bfloat16)
    assert not can_speed_up(model)

"""The arguments of a product-key memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ProductKeyArgs:
    """Which blocks carry a memory in place of their feed-forward, and its sizes (config `model.productkey_args`)."""

    is_enabled: bool = False
    layers: str = ""  # such as "4,12,20", counted from 0
    mem_n_keys: int = 1024  # the memory has mem_n_keys ** 2 slots
    mem_heads: int = 4
    mem_knn: int = 32
    mem_share_values: bool = True
    mem_k_dim: int = 512
    mem_v_dim: int = -1  # -1: the model's dim
    swilu_projection: bool = True
    value_fixed_lr: float | None = 0.001  # null: the model's lr
    mem_gated: bool = False
    peer_variant: bool = False
    mem_qk_norm: bool = False  # RMSNorm of each query half and each key before their product

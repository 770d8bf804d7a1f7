"""A decoder with product-key memory layers, for transformers (4.57 and newer).

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Exported checkpoints bring this file along, so it needs torch and transformers alone. It is transformers' Mistral
(without a sliding window: Llama) in which some blocks have a memory in place of their feed-forward ("Memory Layers at
Scale", Berges et al., 2024, arXiv 2412.09764).

Shape suffixes: N tokens, C hidden size, H heads, K = mem_knn, n = mem_n_keys, D = mem_k_dim / 2, V value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MistralConfig, MistralForCausalLM


class MemoryLinguaConfig(MistralConfig):
    """MistralConfig, and the memories: `memory_layers` counts blocks from 0, a memory has `mem_n_keys ** 2` slots."""

    model_type = "memory_lingua"

    def __init__(
        self,
        memory_layers: list[int] | None = None,
        mem_n_keys: int = 1024,
        mem_heads: int = 4,
        mem_knn: int = 32,
        mem_share_values: bool = True,
        mem_k_dim: int = 512,
        mem_v_dim: int = -1,
        swilu_projection: bool = True,
        mem_gated: bool = False,
        peer_variant: bool = False,
        mem_qk_norm: bool = False,
        **kwargs: object,
    ):
        self.memory_layers = sorted(memory_layers or [])
        self.mem_n_keys, self.mem_heads, self.mem_knn = mem_n_keys, mem_heads, mem_knn
        self.mem_share_values = mem_share_values
        self.mem_k_dim, self.mem_v_dim = mem_k_dim, mem_v_dim
        self.swilu_projection, self.mem_gated, self.peer_variant = swilu_projection, mem_gated, peer_variant
        self.mem_qk_norm = mem_qk_norm
        super().__init__(**kwargs)


class ProductKeyMemory(nn.Module):
    """A product-key memory, (..., C) -> (..., C).

    Args:
        owner: a memory whose value tables this one reads too. They stay the owner's alone, so they are stored once.
    """

    def __init__(self, config: MemoryLinguaConfig, owner: ProductKeyMemory | None = None):
        super().__init__()
        self.n_keys, self.heads, self.knn = config.mem_n_keys, config.mem_heads, config.mem_knn
        self.half = config.mem_k_dim // 2
        self.peer_variant = config.peer_variant
        dim = config.hidden_size
        v_dim = config.mem_v_dim if config.mem_v_dim > 0 else dim
        # Of two sorted halves, the sum (i, j) is beaten by (i+1)(j+1) - 1 others: only these can be among the best.
        self.pairs = [(i, j) for i in range(self.knn) for j in range(self.knn // (i + 1))]

        self.query_proj = nn.Linear(dim, self.heads * config.mem_k_dim)
        self.keys = nn.Parameter(torch.empty(2 * self.heads * self.n_keys, self.half))
        # Here, since transformers initialises linears and embeddings but knows nothing of this parameter.
        nn.init.uniform_(self.keys, -(config.mem_k_dim**-0.5), config.mem_k_dim**-0.5)
        self.query_norm = nn.RMSNorm(self.half, eps=1e-5) if config.mem_qk_norm else None
        self.key_norm = nn.RMSNorm(self.half, eps=1e-5) if config.mem_qk_norm else None
        # In a tuple, which nn.Module does not look into.
        self._owner = (owner,) if owner is not None else ()
        if owner is None and self.peer_variant:
            self.values_u = nn.Embedding(self.n_keys**2, v_dim)
            self.values_v = nn.Embedding(self.n_keys**2, v_dim)
        elif owner is None:
            self.values = nn.Embedding(self.n_keys**2, v_dim)
        self.swilu_projection = nn.Linear(dim, v_dim) if config.swilu_projection else None
        self.value_proj = nn.Linear(v_dim, dim) if config.swilu_projection or config.mem_v_dim > 0 else None
        self.gating = nn.Linear(dim, 1) if config.mem_gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NC = x.reshape(-1, x.shape[-1])
        slots_NHK, weights_NHK = self.search(x_NC)
        y = self.lookup(x_NC, slots_NHK, weights_NHK)
        if self.swilu_projection is not None:
            y = y * F.silu(self.swilu_projection(x_NC))
        if self.value_proj is not None:
            y = self.value_proj(y)
        if self.gating is not None:
            y = y * torch.sigmoid(self.gating(x_NC))
        return y.view_as(x)

    def search(self, x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best slots of every token and head, and their softmax weights in fp32, both (N, H, K)."""
        query_NH2D = self.query_proj(x_NC).view(-1, self.heads, 2, self.half)
        keys_H2nD = self.keys.view(self.heads, 2, self.n_keys, self.half)
        if self.query_norm is not None:
            query_NH2D = F.rms_norm(query_NH2D.float(), (self.half,), self.query_norm.weight.float(), 1e-5).to(
                x_NC.dtype
            )
            keys_H2nD = F.rms_norm(keys_H2nD.float(), (self.half,), self.key_norm.weight.float(), 1e-5).to(x_NC.dtype)
        best, index = torch.einsum("nhsd,hskd->nhsk", query_NH2D, keys_H2nD).topk(self.knn, dim=-1)
        (best1, best2), (index1, index2) = best.float().unbind(2), index.unbind(2)
        rank1, rank2 = torch.tensor(self.pairs, device=x_NC.device).unbind(1)
        scores, winners = (best1[..., rank1] + best2[..., rank2]).topk(self.knn, dim=-1)
        slots = index1.gather(-1, rank1[winners]) * self.n_keys + index2.gather(-1, rank2[winners])
        return slots, F.softmax(scores, dim=-1)

    def lookup(self, x_NC: torch.Tensor, slots_NHK: torch.Tensor, weights_NHK: torch.Tensor) -> torch.Tensor:
        """The rows of `slots`, weighted and summed over all heads: (N, V). PEER: `gelu(<x, u_slot>) * v_slot`."""
        holder = self._owner[0] if self._owner else self
        table = (holder.values_v if self.peer_variant else holder.values).weight
        # Where the model is spread over devices, a shared table may be on another one than this block.
        slots, weights = slots_NHK.to(table.device), weights_NHK.to(table.device)
        if self.peer_variant:
            x = x_NC.to(table.device).float()
            # A head at a time: the rows of all heads at once would be the largest thing in memory.
            products = [
                torch.einsum("nkc,nc->nk", F.embedding(slots_NK, holder.values_u.weight).float(), x)
                for slots_NK in slots.unbind(1)
            ]
            weights = weights * F.gelu(torch.stack(products, dim=1))
        weights = weights.to(table.dtype)
        if torch.is_grad_enabled() and table.dtype != torch.float32:
            # On CUDA embedding_bag has no gradient of half-precision weights.
            y = torch.zeros(len(slots), table.shape[1], dtype=table.dtype, device=table.device)
            for slots_NK, weights_NK in zip(slots.unbind(1), weights.unbind(1), strict=True):
                y = y + torch.einsum("nk,nkv->nv", weights_NK, F.embedding(slots_NK, table))
        else:
            y = F.embedding_bag(slots.flatten(1), table, per_sample_weights=weights.flatten(1), mode="sum")
        return y.to(x_NC.device, x_NC.dtype)


class MemoryLinguaForCausalLM(MistralForCausalLM):
    """The language model. The first memory owns the value tables that all read, unless `mem_share_values` is off."""

    config_class = MemoryLinguaConfig

    def __init__(self, config: MemoryLinguaConfig):
        super().__init__(config)
        owner = None
        for number in config.memory_layers:
            memory = ProductKeyMemory(config, owner)
            self.model.layers[number].mlp = memory
            if config.mem_share_values and owner is None:
                owner = memory
        self.post_init()

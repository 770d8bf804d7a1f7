"""Product-key memory, the layer of "Memory Layers at Scale" (Berges et al., 2024, arXiv 2412.09764).

A token's query is split in halves; each half is compared with its own n keys, and the n * n sums of a score of the
first and one of the second are the scores of n * n slots, of which the best k are found without forming them all
("Large Memory Layers with Product Keys", Lample et al., 2019, section 3.1). The values of those slots, weighted by a
softmax over their scores, are the memory's answer.

Shape suffixes: N tokens, C model dim, H heads, K = knn, n keys per half, D = half of the query's size, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from lingua.errors import UserError
from lingua.initialize import normal, uniform, xavier_uniform
from lingua.memory_layer import MemoryLayer, Part, Sizes, Tables, parse_blocks
from lingua.product_key import cost
from lingua.product_key.args import ProductKeyArgs
from lingua.product_key.search import search
from lingua.product_key.value_table import SlotProducts, xFormerEmbeddingBag

NORM_EPS = 1e-5
KEY = "model.productkey_args."


def memory_layers(args: ProductKeyArgs, n_layers: int) -> list[int]:
    """The blocks that carry a memory, in order. Raises UserError for a list that does not fit `n_layers` blocks."""
    return parse_blocks(args.layers, n_layers, f"{KEY}layers") if args.is_enabled else []


def memory_kwargs(args: ProductKeyArgs) -> dict[str, object]:
    """The arguments of one `HashingMemory`, without those that concern the whole model."""
    return {name: value for name, value in asdict(args).items() if name not in ("is_enabled", "layers")}


class QueryProjection(nn.Module):
    """One linear layer, C -> H * 2D. In a list, since published checkpoints name it so."""

    def __init__(self, input_dim: int, output_dim: int):
        super().__init__()
        self.query_mlps = nn.ModuleList([nn.Linear(input_dim, output_dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query_mlps[0](x)


class HashingMemory(MemoryLayer):
    """A product-key memory in place of a feed-forward: (B, T, input_dim) -> (B, T, output_dim).

    Raises UserError for sizes that cannot work, named by their config key.

    Args:
        owner: a memory whose value tables this one reads too. They stay the owner's alone: this layer does not register
            them, so they are stored, counted and initialised once. `mem_share_values` itself is for whoever builds a
            model of several memories; one memory by itself has its own table.
    """

    read_keys = (f"{KEY}mem_heads", f"{KEY}mem_knn")

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        mem_n_keys: int = 1024,
        mem_heads: int = 4,
        mem_knn: int = 32,
        mem_share_values: bool = True,
        mem_k_dim: int = 512,
        mem_v_dim: int = -1,
        swilu_projection: bool = True,
        value_fixed_lr: float | None = 0.001,
        mem_gated: bool = False,
        peer_variant: bool = False,
        mem_qk_norm: bool = False,
        owner: HashingMemory | None = None,
    ):
        super().__init__(owner)
        check_sizes(
            input_dim, output_dim, mem_n_keys, mem_heads, mem_knn, mem_k_dim, mem_v_dim, peer_variant, value_fixed_lr
        )
        self.input_dim, self.output_dim = input_dim, output_dim
        self.n_keys, self.heads, self.knn, self.k_dim = mem_n_keys, mem_heads, mem_knn, mem_k_dim
        self.size, self.reads = mem_n_keys**2, mem_heads * mem_knn
        self.v_dim = mem_v_dim if mem_v_dim > 0 else output_dim
        self.peer_variant = peer_variant
        self.value_fixed_lr = value_fixed_lr
        self.table_names = ("values_u", "values_v") if peer_variant else ("values",)

        self.query_proj = QueryProjection(input_dim, mem_heads * mem_k_dim)
        self.keys = nn.Parameter(torch.empty(2 * mem_heads * mem_n_keys, mem_k_dim // 2))
        self.query_norm = nn.RMSNorm(mem_k_dim // 2, eps=NORM_EPS) if mem_qk_norm else None
        self.key_norm = nn.RMSNorm(mem_k_dim // 2, eps=NORM_EPS) if mem_qk_norm else None
        if owner is None:
            if peer_variant:
                self.values_u = SlotProducts(self.size, self.v_dim)
                self.values_v = xFormerEmbeddingBag(self.size, self.v_dim)
            else:
                self.values = xFormerEmbeddingBag(self.size, self.v_dim)
        self.swilu_projection = nn.Linear(input_dim, self.v_dim) if swilu_projection else None
        self.value_proj = nn.Linear(self.v_dim, output_dim) if swilu_projection or mem_v_dim > 0 else None
        self.gating = nn.Linear(input_dim, 1) if mem_gated else None
        self.reset_parameters()

    def extra_repr(self) -> str:
        shared = ", table of an earlier memory" if self.owner is not self else ""
        return f"{self.size:,} slots, {self.heads} heads of {self.knn}, keys of {self.k_dim}{shared}"

    @classmethod
    def build(cls, args: ProductKeyArgs, dim: int, owner: MemoryLayer | None) -> HashingMemory:
        return cls(dim, dim, **memory_kwargs(args), owner=owner)

    @classmethod
    def check(cls, args: ProductKeyArgs, dim: int) -> None:
        check_sizes(
            dim,
            dim,
            args.mem_n_keys,
            args.mem_heads,
            args.mem_knn,
            args.mem_k_dim,
            args.mem_v_dim,
            args.peer_variant,
            args.value_fixed_lr,
        )

    @classmethod
    def tables_of(cls, args: ProductKeyArgs, dim: int) -> Tables:
        columns = args.mem_v_dim if args.mem_v_dim > 0 else dim
        keys = (f"{KEY}mem_n_keys", f"{KEY}mem_v_dim", "model.dim")
        return Tables(2 if args.peer_variant else 1, args.mem_n_keys**2, columns, keys, keys[1:])

    @classmethod
    def parts_of(cls, args: ProductKeyArgs, dim: int) -> list[Part]:
        columns = cls.tables_of(args, dim).columns
        query = (dim + 1) * args.mem_heads * args.mem_k_dim
        if args.mem_qk_norm:
            query += 2 * (args.mem_k_dim // 2)
        keys = 2 * args.mem_heads * args.mem_n_keys * (args.mem_k_dim // 2)
        projections = (dim + 1) * columns if args.swilu_projection else 0
        if args.swilu_projection or args.mem_v_dim > 0:
            projections += (columns + 1) * dim
        if args.mem_gated:
            projections += dim + 1
        searched = (f"{KEY}mem_heads", f"{KEY}mem_k_dim", f"{KEY}mem_n_keys", "model.dim")
        return [
            Part("memories' queries and keys", searched, query + keys),
            Part("memories' projections", (f"{KEY}mem_v_dim", "model.dim"), projections),
        ]

    @classmethod
    def reads_of(cls, args: ProductKeyArgs) -> int:
        return args.mem_heads * args.mem_knn

    @classmethod
    def is_shared(cls, args: ProductKeyArgs) -> bool:
        return args.mem_share_values

    @property
    def query_linear(self) -> nn.Linear:
        return self.query_proj.query_mlps[0]

    def best_scores(self, query: torch.Tensor) -> torch.Tensor:
        return self.get_indices(query, self.knn)[0]

    def kept_bytes(self, sizes: Sizes, cheap_again: bool) -> int:
        return cost.kept_bytes(self, sizes, cheap_again)

    def sent(self, sizes: Sizes, is_recomputed: bool) -> Iterator[tuple[str, int]]:
        yield from super().sent(sizes, is_recomputed)
        if self.peer_variant:
            yield from cost.sent_for_hidden_units(self, sizes, is_recomputed)

    def reads_result(self) -> bool:
        return any(part is not None for part in (self.swilu_projection, self.value_proj, self.gating))

    def reset_parameters(self) -> None:
        """Keys uniform in +-1/sqrt(k_dim), query Xavier, projections and tables normal with std dim**-0.5, biases 0.

        Norms: 1 for queries, 1/sqrt(k_dim / 2) for keys.
        """
        uniform(self.keys, self.k_dim**-0.5)
        query = self.query_proj.query_mlps[0]
        xavier_uniform(query.weight)
        nn.init.zeros_(query.bias)
        if self.query_norm is not None:
            nn.init.ones_(self.query_norm.weight)
            # Products of two normalized halves then have a variance of 1, as attention's scores do.
            nn.init.constant_(self.key_norm.weight, (self.k_dim // 2) ** -0.5)
        for projection in (self.swilu_projection, self.value_proj, self.gating):
            if projection is not None:
                normal(projection.weight, std=self.input_dim**-0.5)
                nn.init.zeros_(projection.bias)
        for table in self.own_tables:
            table.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NC = x.reshape(-1, self.input_dim)
        scores_NHK, slots_NHK = self.get_indices(self.query_proj(x_NC), self.knn)
        weights_NHK = F.softmax(scores_NHK.float(), dim=-1)
        if self.slot_use is not None:
            weights_NHK = self.slot_use.watch(slots_NHK, weights_NHK)
        y = self.lookup(x_NC, slots_NHK.flatten(1), weights_NHK.flatten(1)).to(x.dtype)
        if self.swilu_projection is not None:
            y = _Gate.apply(y, self.swilu_projection(x_NC))
        if self.value_proj is not None:
            y = self.value_proj(y)
        if self.gating is not None:
            y = y * torch.sigmoid(self.gating(x_NC))
        return y.view(*x.shape[:-1], self.output_dim)

    def get_indices(self, query: torch.Tensor, knn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `knn` best slots of every token and head.

        Args:
            query: N * H queries of size k_dim, in any shape that `view(N, H, k_dim)` takes.
            knn: how many, at most mem_n_keys.

        Returns (scores before the softmax, slots), each (N, H, knn), the best first.
        """
        query_NH2D = query.view(-1, self.heads, 2, self.k_dim // 2)
        keys_H2nD = self.keys.view(self.heads, 2, self.n_keys, self.k_dim // 2)
        if self.query_norm is not None:
            query_NH2D = self.query_norm(query_NH2D.float()).to(query_NH2D.dtype)
            keys_H2nD = self.key_norm(keys_H2nD.float()).to(keys_H2nD.dtype)
        return search(query_NH2D, keys_H2nD, knn)

    def lookup(self, x_NC: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The values of `slots` (N, H * K) weighted by `weights`, summed over all heads: (N, V).

        PEER ("Mixture of A Million Experts", He, 2024): a slot is an expert of one hidden unit,
        `gelu(<x, u_slot>) * v_slot`.
        """
        if not self.peer_variant:
            return self.tables[0](slots, weights)
        down, up = self.tables
        return up(slots, weights * F.gelu(down(slots, x_NC)))


class _Gate(torch.autograd.Function):
    """`y * silu(gate)`. Autograd by itself would keep silu(gate) too, which is cheap to compute again."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y, gate)
        return y * F.silu(gate)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, gate = ctx.saved_tensors
        grad_y = (grad * F.silu(gate)).to(y.dtype)
        grad_silu = grad * y
        return grad_y, torch.ops.aten.silu_backward(grad_silu, gate.to(grad_silu.dtype)).to(gate.dtype)


def check_sizes(
    input_dim: int,
    output_dim: int,
    n_keys: int,
    heads: int,
    knn: int,
    k_dim: int,
    v_dim: int,
    peer_variant: bool,
    value_fixed_lr: float | None,
) -> None:
    """Raises UserError, one line that names the key, for sizes that cannot work."""
    key = KEY
    for name, value in (("mem_n_keys", n_keys), ("mem_heads", heads), ("mem_knn", knn), ("mem_k_dim", k_dim)):
        if value < 1:
            raise UserError(f"{key}{name}: {value} is too small, it must be 1 or more")
    if value_fixed_lr is not None and not 0 <= value_fixed_lr < float("inf"):
        raise UserError(
            f"{key}value_fixed_lr: {value_fixed_lr} must be a number of 0 or more, or null for the model's lr"
        )
    if k_dim % 2:
        raise UserError(f"{key}mem_k_dim: {k_dim} is odd; the query is split in halves, so it must be even")
    if knn > n_keys:
        raise UserError(f"{key}mem_knn: {knn} is more than mem_n_keys={n_keys}; it can be that many at most")
    if v_dim < 1 and v_dim != -1:
        raise UserError(f"{key}mem_v_dim: {v_dim} is no size; wanted 1 or more, or -1 for the model's dim")
    if peer_variant and v_dim != -1:
        raise UserError(f"{key}mem_v_dim: {v_dim}, but with peer_variant values have the model's dim; leave it at -1")
    if peer_variant and input_dim != output_dim:
        raise UserError(f"{key}peer_variant: needs an input as wide as the output, found {input_dim} and {output_dim}")

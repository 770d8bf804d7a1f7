"""The value table as a module: a parameter of (slots, dim) and its weighted lookup."""

import torch
from torch import nn

from lingua.product_key.xformer_embeddingbag import xformers_embedding_bag


class xFormerEmbeddingBag(nn.Module):
    """A table of `size` rows of `dim`; `(indices (N, bag), scores (N, bag)) -> (N, dim)`, their weighted sums."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, indices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return xformers_embedding_bag(indices, self.weight, scores)

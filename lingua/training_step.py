"""One optimizer step: batches -> forward -> backward -> averaged over ranks -> clipped -> update.

The training loop, benchmarks and tests take their steps here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import AdamW

from lingua.distributed import DTYPES
from lingua.nonfinite import initial_grad
from lingua.optim import clip_gradients
from lingua.parallelize import GradientReducer


class TrainingStep:
    """`backward`, then `clip`, then `update`; all ranks call each of them together.

    Args:
        model: laid out by `parallelize`, which returned `reducer`.
        model_dtype: of what is computed under autocast, "fp32", "bf16" or "fp16".
    """

    def __init__(
        self,
        model: nn.Module,
        reducer: GradientReducer,
        optimizer: AdamW,
        model_dtype: str,
        device: torch.device,
    ):
        self.model, self.reducer, self.optimizer = model, reducer, optimizer
        self.dtype, self.device = DTYPES[model_dtype], device

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch, (B, T, views): view 0 is the input, view 1 the target."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(tokens[..., 0], tokens[..., 1])

    def backward(
        self,
        batches: Iterable[torch.Tensor],
        n_batches: int,
        after_batch: Callable[[int, torch.Tensor], None] = lambda number, loss_sum: None,
    ) -> torch.Tensor:
        """Leaves the gradient of the mean loss of all batches, averaged over ranks; returns this rank's mean loss.

        `after_batch` gets the number of batches done, and the sum of their losses.
        """
        loss_sum = torch.zeros((), device=self.device)
        for number, tokens in enumerate(batches, start=1):
            self.reducer.begin(last=number == n_batches)
            loss = self.loss(tokens)
            (loss / n_batches).backward(initial_grad(loss))
            loss_sum += loss.detach()
            after_batch(number, loss_sum)
        self.reducer.finish()
        return loss_sum / n_batches

    def clip(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As lingua.optim.clip_gradients."""
        return clip_gradients(self.model, max_norm)

    def update(self, skip: torch.Tensor | None = None) -> None:
        """Moves the parameters, and forgets the gradients. Where `skip` is 1, no parameter moves."""
        self.optimizer.found_inf = skip
        self.optimizer.step()
        self.optimizer.zero_grad()

"""One language model: token embedding, the blocks of lingua.transformer, norm, output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lingua.config import LMTransformerArgs
from lingua.errors import UserError
from lingua.initialize import truncated_normal
from lingua.loss import linear_cross_entropy
from lingua.transformer import (
    BaseTransformer,
    Mask,
    RMSNorm,
    create_causal_mask,
    cross_entropy,
    validate_transformer_args,
)


def validate_model_args(args: LMTransformerArgs) -> None:
    """Raises UserError, one line that names the key, for a model that cannot be built."""
    validate_transformer_args(args)
    if args.seed < 0:
        raise UserError(f"model.seed: {args.seed} is negative, it must be 0 or more")
    if args.sliding_window is not None and args.sliding_window < 1:
        raise UserError(f"model.sliding_window: {args.sliding_window} is too small, it must be 1 or more")


class Output(nn.Linear):
    """(..., C) -> logits (..., vocab); with `target=`, ids (...), the mean loss, for which logits are never whole."""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__(dim, vocab_size, bias=False)

    def forward(self, h: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(h) if target is None else linear_cross_entropy(h, self.weight, target)


class TiedOutput(nn.Module):
    """The same by the embedding's weight, which stays the embedding's alone."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, which nn.Module does not look into

    @property
    def weight(self) -> torch.Tensor:
        return self._embedding[0].weight

    def forward(self, h: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(h, self.weight) if target is None else linear_cross_entropy(h, self.weight, target)


class LMTransformer(BaseTransformer):
    """`model(tokens) -> logits (B, T, vocab)`; `model(tokens, target) -> mean loss`. Tokens are (B, T) ids.

    The weights follow from `args.seed` alone, whatever random numbers were drawn before. Built on the meta device it
    holds none: `to_empty`, then `init_weights`.

    `whole_logits`: whether the loss is computed from logits that `output` has given, as the probe needs them.
    """

    whole_logits = False

    def __init__(self, args: LMTransformerArgs):
        validate_model_args(args)
        if args.vocab_size < 1:
            raise UserError(f"model.vocab_size: {args.vocab_size} is no size; take the tokenizer's n_words")
        # What the parts draw when they are made is drawn anew below, and is nobody else's random numbers.
        with torch.random.fork_rng(devices=[]):
            super().__init__(args)
            self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
            self.norm = RMSNorm(args.dim, args.norm_eps)
            if args.weight_tying:
                self.output = TiedOutput(self.tok_embeddings)
            else:
                self.output = Output(args.dim, args.vocab_size)
        self.seed = args.seed
        self.sliding_window = args.sliding_window
        if not self.tok_embeddings.weight.is_meta:
            self.init_weights()

    def canonicalize(self, state_dict: dict[str, torch.Tensor], prefix: str = "") -> None:
        """As for the blocks, and drops a tied output stored beside the embedding; ValueError where they differ."""
        super().canonicalize(state_dict, prefix)
        if not isinstance(self.output, TiedOutput):
            return
        output = state_dict.pop(f"{prefix}output.weight", None)
        embedding = state_dict.get(f"{prefix}tok_embeddings.weight")
        if output is not None and embedding is not None and not output.is_meta and not torch.equal(output, embedding):
            raise UserError(
                f"{prefix}output.weight: differs from {prefix}tok_embeddings.weight, so this checkpoint is not tied; "
                "set model.weight_tying=false"
            )

    def init_weights(self) -> None:
        """Draws all parameters anew from the model's seed (section 3 of the interface names the distributions)."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the generators of all GPUs, too.
            torch.default_generator.manual_seed(self.seed)
            super().init_weights()
            std = self.init_base_std or self.dim**-0.5
            truncated_normal(self.tok_embeddings.weight, std)
            self.norm.reset_parameters()
            if isinstance(self.output, nn.Linear):
                truncated_normal(self.output.weight, std)

    def forward(
        self,
        token_values: torch.Tensor,
        target: torch.Tensor | None = None,
        tok_idx: torch.Tensor | None = None,
        mask: Mask | list[Mask] | None = None,
        attn_impl: str = "sdpa",
    ) -> torch.Tensor:
        h = self.hidden_states(token_values, tok_idx, mask, attn_impl)
        # Within the output's own forward, whose hooks gather its weight (FSDP) and the sequence (tensor parallelism).
        if target is not None and not self.whole_logits:
            return self.output(h, target=target)
        logits = self.output(h)
        return logits if target is None else cross_entropy(logits, target)

    def hidden_states(
        self,
        token_values: torch.Tensor,
        tok_idx: torch.Tensor | None = None,
        mask: Mask | list[Mask] | None = None,
        attn_impl: str = "sdpa",
    ) -> torch.Tensor:
        """What `output` makes logits of, (B, T, C)."""
        if mask is None:
            mask = create_causal_mask(token_values.shape[1], attn_impl, self.sliding_window, token_values.device)
        h = self.tok_embeddings(token_values)
        h = super().forward(
            h, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl, seqlen=token_values.shape[1], tokens=token_values
        )
        return self.norm(h)


def count_parameters(model: LMTransformer) -> tuple[int, int]:
    """(dense, memory): the numbers of all parameters but the value tables, and of the value tables."""
    tables = {table.weight for memory in model.memories().values() for table in memory.tables}
    memory = sum(weight.numel() for weight in tables)
    return sum(parameter.numel() for parameter in model.parameters()) - memory, memory


def count_flops_per_token(model: LMTransformer, seq_len: int) -> int:
    """Floating-point operations per trained token, forward and backward, as the paper on PaLM counts them (appendix B).

    6 for each weight (those of norms and biases too), but none for a look-up of an embedding; for attention 12 * width
    for each token that a token sees, which causally is half of them on average. Of a memory the search's keys take part
    like any other weight, of its tables only the rows that are read. What is computed again in the backward pass
    (checkpointing) counts once.
    """
    dense, _ = count_parameters(model)
    if isinstance(model.output, nn.Linear):
        dense -= model.tok_embeddings.weight.numel()  # a look-up, no product
    width = model.layers[0].attention.wq.out_features
    window = min(model.sliding_window or seq_len, seq_len)
    seen = window - window**2 / (2 * seq_len)
    lookups = sum(memory.lookup_flops() for memory in model.memories().values())
    return 6 * dense + int(12 * len(model.layers) * width * seen) + lookups

"""Text from a checkpoint.

    python -m apps.main.generate ckpt=dumps/debug/checkpoints/0000000600 max_gen_len=200 temperature=0.8
    python -m apps.main.generate ckpt=... prompt="def main"
    python -m apps.main.generate ckpt=... prompts='["one", "two"]' out=answers.jsonl
    python -m apps.main.generate ckpt=... prompt_file=questions.jsonl out=answers.jsonl max_tokens=16384

Without prompts it reads them from the terminal, a line each. In Python:

    generator = PackedCausalTransformerGenerator(GeneratorArgs(max_gen_len=100), model, tokenizer)
    texts, prompt_log_likelihoods, prompt_greedy = generator.generate(["def main", "import os"])
    for continuation in generator.continuations(["def main", "import os"]):
        print(continuation.text, continuation.finish_reason, sum(continuation.log_likelihoods))

Prompts are read packed, all of a batch in one row without padding, and continued together a token at a time out of a
cache of keys and values (lingua.kv_cache).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from apps.main.config import GenerateArgs, GeneratorArgs, without_prompts
from lingua.launch import check_command_line

if __name__ == "__main__":
    check_command_line(GenerateArgs, without_prompts(sys.argv[1:]))

import torch
from torch import nn

from apps.main.transformer import LMTransformer, LMTransformerArgs, TiedOutput
from lingua.args import from_dict, parse_args, to_dict
from lingua.checkpoint import (
    CONFIG_FILE,
    CONSOLIDATED_FOLDER,
    find_consolidated,
    load_model,
    read_json,
    refuse_damaged,
)
from lingua.data import DataArgs
from lingua.distributed import DTYPES, find_world, raise_on_all_ranks
from lingua.errors import UserError
from lingua.inference import can_speed_up, fast_linear, speed_up
from lingua.kv_cache import KVCache, Packing, read_without_cache
from lingua.launch import oom_as_user_error, run_main
from lingua.logger import init_logger
from lingua.memory_layer import MemoryLayer
from lingua.metrics import format_duration
from lingua.product_key.value_table import xFormerEmbeddingBag
from lingua.tokenizer import Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)

# Logits that are held at once where all tokens of a batch need some: 256 MiB in fp32.
LOGITS_AT_ONCE = 2**26


def validate_generator_args(args: GeneratorArgs, prefix: str = "") -> None:
    """Raises UserError, one line that names the key."""
    for name in ("max_gen_len", "max_tokens", "max_prompt_len", "top_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{prefix}{name}: {value} is too small, it must be 1 or more")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"{prefix}temperature: {args.temperature} must be a number of 0 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"{prefix}top_p: {args.top_p} must be above 0 and at most 1")
    if args.seed < 0:
        raise UserError(f"{prefix}seed: {args.seed} is negative, it must be 0 or more")
    if "" in args.until:
        raise UserError(f"{prefix}until: holds an empty string, which would end every text before it begins")
    if args.dtype not in DTYPES:
        raise UserError(f"{prefix}dtype: '{args.dtype}' must be one of {', '.join(DTYPES)}")
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"{prefix}device: '{args.device}' is neither cuda nor cpu")
    if args.values_device not in (None, "cpu"):
        raise UserError(f"{prefix}values_device: '{args.values_device}' is neither null nor cpu")
    if args.values_device == "cpu" and args.reduce_generation_overhead:
        raise UserError(
            f"{prefix}reduce_generation_overhead: true cannot be combined with values_device=cpu, since no CUDA graph "
            "fetches rows from CPU RAM; set one of them back"
        )


def pick_device(name: str) -> torch.device:
    """The device asked for (this process's GPU under torchrun), or the CPU where there is no CUDA device."""
    return find_world().device if name == "cuda" else torch.device("cpu")


# --- loading ---------------------------------------------------------------------------------------------------------


def load_consolidated_model_and_tokenizer(
    path: str | Path, device: torch.device | None = None, dtype: str = "fp32", values_device: str | None = None
) -> tuple[LMTransformer, Tokenizer, dict[str, Any]]:
    """Model (ready to be evaluated), tokenizer, and the config of the run that trained it.

    Where there are several ranks, all of them call it and get the whole model each.

    Args:
        path: a checkpoint folder, distributed or consolidated.
        dtype: of the matrices and value tables, which autocast would round to it at each use; the rest is fp32.
        values_device: "cpu" for value tables that stay in the CPU's memory.

    Raises UserError where there is no such checkpoint, or not a whole one.
    """
    path = Path(path)
    with raise_on_all_ranks():
        config_file = _find_config(path)
    refuse_damaged(path)
    with raise_on_all_ranks():
        config = read_json(config_file, ("data", "model"))
        data_args = from_dict(DataArgs, config["data"], f"data in {config_file}")
        config["data"], tokenizer_args = to_dict(data_args), data_args.tokenizer
        tokenizer = build_tokenizer(tokenizer_args.name, tokenizer_args.path)
        model_args = from_dict(LMTransformerArgs, config["model"], f"model in {config_file}")
        config["model"] = to_dict(model_args)
        if model_args.vocab_size == -1:
            model_args.vocab_size = tokenizer.n_words
        if model_args.vocab_size < tokenizer.n_words:
            raise UserError(
                f"data.tokenizer in {config_file}: has {tokenizer.n_words} words, and the model's vocabulary "
                f"{model_args.vocab_size}; it is not the tokenizer that this model was trained with"
            )
        with torch.device("meta"):
            model = LMTransformer(model_args)
        _set_dtype(model, DTYPES[dtype])
        device = device or torch.device("cpu")
        if values_device == "cpu":
            model.keep_values_on_cpu(device)
        with oom_as_user_error("generator.dtype: the whole model does not fit this GPU's memory, beside what is there"):
            model.to_empty(device=device)
        model.rope_embeddings.reset_parameters()
    load_model(path, model, compared=True)
    if isinstance(model.output, TiedOutput) and dtype != "fp32":
        embedding = model.tok_embeddings.weight
        model.output = nn.Linear(*reversed(embedding.shape), bias=False, device="meta")
        model.output.weight = nn.Parameter(embedding.detach().to(DTYPES[dtype]))
    return model.eval().requires_grad_(False), tokenizer, config


def _find_config(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"ckpt: no folder '{path}'; name a checkpoint, such as dumps/debug/checkpoints/0000000600")
    configs = [folder / CONFIG_FILE for folder in (path, path / CONSOLIDATED_FOLDER, path.parent)]
    config_file = next((file for file in configs if file.is_file()), None)
    if config_file is None or not ((path / ".metadata").is_file() or find_consolidated(path)):
        raise UserError(f"ckpt: '{path}' is no checkpoint: it lacks {CONFIG_FILE}, or a model beside it")
    return config_file


def _set_dtype(model: LMTransformer, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | xFormerEmbeddingBag):
            module.to(dtype)
        elif isinstance(module, MemoryLayer):
            for parameter in module.parameters(recurse=False):  # such as a product-key memory's keys
                parameter.data = parameter.data.to(dtype)


# --- choosing tokens -------------------------------------------------------------------------------------------------


def sample(logits: torch.Tensor, args: GeneratorArgs, random: torch.Generator) -> torch.Tensor:
    """A token id, (B,), from each row of logits (B, vocab). The likeliest always stays in the choice."""
    if args.temperature == 0:
        return logits.argmax(-1)
    # From the largest down, so that a temperature next to 0 makes no infinities that cancel.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / args.temperature
    tokens = None
    if args.top_k is not None and args.top_k < logits.shape[-1]:
        logits, tokens = logits.topk(args.top_k, dim=-1)
    elif args.top_p is not None:
        logits, tokens = logits.sort(dim=-1, descending=True)
    probabilities = torch.softmax(logits, dim=-1)
    if args.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= args.top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=random)
    return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)


def log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability, (N,) in fp32, of each of N tokens under logits (N, vocab)."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


class Continuation:
    """What follows one prompt, token by token, and where it ends.

    `tokens` are all that were generated but EOS, also those that a stop string cut off from `text`. `log_likelihoods`,
    where they were asked for: of each of `tokens` its log-probability under the model, given prompt and tokens before
    it, whatever `temperature`, `top_k` and `top_p` made of it.
    """

    def __init__(self, tokenizer: Tokenizer, args: GeneratorArgs, prompt: Sequence[int] = ()):
        self.tokenizer, self.args, self.prompt = tokenizer, args, prompt
        self.tokens: list[int] = []
        self.log_likelihoods: list[float] = []
        self.finish_reason: str | None = None  # "stop", "eos" or "length"
        self._cut: int | None = None
        # A stop string of n bytes that ends with the newest token is within this number of last tokens.
        self._reach = max((len(stop.encode()) for stop in args.until), default=0) + 8

    @property
    def text(self) -> str:
        """Up to the stop string, where one was met."""
        return self._decode(self.tokens)[: self._cut]

    def add(self, token: int, log_likelihood: float | None = None) -> bool:
        """Takes one more token; whether it was the last one."""
        if token == self.tokenizer.eos_id:
            self.finish_reason = "eos"
            return True
        self.tokens.append(token)
        if log_likelihood is not None:
            self.log_likelihoods.append(log_likelihood)
        if self.args.until:
            recent = self._decode(self.tokens[-self._reach :])
            if any(stop in recent for stop in self.args.until):
                text = self._decode(self.tokens)
                begins = [text.index(stop) for stop in self.args.until if stop in text]
                if begins:
                    self.finish_reason, self._cut = "stop", min(begins)
                    return True
        if len(self.tokens) == self.args.max_gen_len:
            self.finish_reason = "length"
            return True
        return False

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, before=self.prompt)

    def settled_text(self) -> str:
        """As much of the text as no later token can change or take back."""
        text = self.text
        if self.finish_reason is not None:
            return text
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character, perhaps
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        held_back = max(
            (n for stop in self.args.until for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        return text[: len(text) - held_back]


# --- the generator ---------------------------------------------------------------------------------------------------


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Numbers of sequences, the longest first, in batches of at most `max_tokens` with their padding, or of one.

    Within a batch lengths are close, so that what each sequence is filled up with for attention is small.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


class PackedCausalTransformerGenerator:
    """Continues prompts, and scores token sequences, many at a time.

    In fp32 on a CPU it computes with a faster copy of the model (lingua.inference), as that is when it is made.

    Args:
        add_bos: whether a prompt begins with BOS, where the tokenizer has one: as the model has seen documents begin.
    """

    def __init__(self, args: GeneratorArgs, model: LMTransformer, tokenizer: Tokenizer, add_bos: bool = True):
        validate_generator_args(args)
        self.args, self.tokenizer = args, tokenizer
        # The compiler has its own way of making it fast.
        speeds_up = args.dtype == "fp32" and not args.compile_prefilling and can_speed_up(model)
        self.model = _faster(model) if speeds_up else model
        self.add_bos = add_bos and tokenizer.bos_id >= 0
        self.device = next(model.parameters()).device
        self.dtype = DTYPES[args.dtype]
        self._read = self.model.hidden_states
        if args.compile_prefilling:
            self._read = torch.compile(self._read, dynamic=True)
        self._n_batches = 0

    def encode(self, prompt: str) -> list[int]:
        """Raises UserError for an empty prompt where there is no BOS to begin with."""
        tokens = self.tokenizer.encode(prompt, add_bos=self.add_bos, add_eos=False)
        if not tokens:
            raise UserError("prompt: empty, and the tokenizer has no BOS to begin with")
        return tokens

    def generate(
        self, prompts: Sequence[str] | Sequence[list[int]]
    ) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor]]:
        """Continues each prompt, a text or its token ids, and scores the prompts.

        Returns, for each prompt: the generated text; the log-likelihood of each token of the *prompt* but the first,
        (n_prompt_tokens - 1,), fp32 on the CPU; and whether that token is the likeliest one, (n_prompt_tokens - 1,) of
        bool. The log-likelihoods of the generated text are in what `continuations` returns.
        """
        tokens = self._encode_all(prompts)
        texts: dict[int, str] = {}
        scores: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for batch, run in self.runs(tokens, score="prompts"):
            texts.update(zip(batch, (continuation.text for continuation in run.continuations), strict=True))
            scores.update(zip(batch, run.scores, strict=True))
        order = range(len(tokens))
        # Copies, since what is made in inference mode cannot be worked on in place outside of it.
        likelihoods, greedy = ([scores[i][kind].clone() for i in order] for kind in (0, 1))
        return [texts[i] for i in order], likelihoods, greedy

    def continuations(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[Continuation]:
        """Continues each prompt, a text or its token ids: its text, tokens, their log-likelihoods, why it ended."""
        tokens = self._encode_all(prompts)
        found: dict[int, Continuation] = {}
        for batch, run in self.runs(tokens, score="texts"):
            found.update(zip(batch, run.continuations, strict=True))
        return [found[number] for number in range(len(tokens))]

    def _encode_all(self, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        return [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]

    def runs(
        self, prompts: list[list[int]], score: Literal["prompts", "texts"] | None = None
    ) -> Iterator[tuple[list[int], BatchRun]]:
        """Continues all prompts, batch by batch: (which ones, their finished run). Logs how far it is."""
        prompts = cut_prompts(prompts, self.args, self.model.max_seqlen)
        progress = Progress(len(prompts), "prompts continued", self.args.show_progress)
        for batch in batches_for_generation(prompts, self.args):
            run = BatchRun(self, [prompts[number] for number in batch], self.args, self._next_seed(), score)
            run.finish(progress)
            yield batch, run
            progress.add(len(batch))

    def continue_batch(
        self, prompts: list[list[int]], args: GeneratorArgs, seed: int, progress: Progress | None = None
    ) -> list[Continuation]:
        """Continues one batch of prompts, which are short enough, as `args` say in place of the generator's own."""
        run = BatchRun(self, prompts, args, seed)
        run.finish(progress)
        return run.continuations

    def run_one(self, prompt: str) -> BatchRun:
        """The continuation of one prompt, to be looked at after each of its `steps()`."""
        prompts = cut_prompts([self.encode(prompt)], self.args, self.model.max_seqlen)
        return BatchRun(self, prompts, self.args, self._next_seed(), score="texts")

    @torch.inference_mode()
    def score_batch(self, sequences: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each sequence of 2 to max_seqlen + 1 tokens, for all but its first one: (log-likelihoods, greedy).

        Both (n_tokens - 1,), on the CPU, as `generate` gives them.
        """
        packing = Packing([len(sequence) - 1 for sequence in sequences], self.device)
        inputs = self._row([token for sequence in sequences for token in sequence[:-1]])
        targets = self._row([token for sequence in sequences for token in sequence[1:]])
        with self.computing():
            mask = read_without_cache(packing, self.model.sliding_window)
            h = self._read(inputs, packing.positions, mask)
            scores = self.score(h[0], targets[0])
        return [(ll, greedy) for ll, greedy in zip(*(x.split(packing.lengths) for x in scores), strict=True)]

    def score(self, h_NC: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-likelihoods, whether the likeliest), each (N,) on the CPU, without all logits at once."""
        parts = []
        for h, target in zip(*(x.split(self._chunk()) for x in (h_NC, targets_N)), strict=True):
            logits = self.model.output(h)
            parts.append((log_likelihood(logits, target), logits.argmax(-1) == target))
        likelihoods, greedy = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return likelihoods, greedy

    def computing(self) -> contextlib.AbstractContextManager:
        """Of half precision: where matrices are multiplied, as in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def _row(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self.device)

    def _chunk(self) -> int:
        return max(LOGITS_AT_ONCE // self.model.tok_embeddings.num_embeddings, 1)

    def _next_seed(self) -> int:
        """Of its own for each batch: the same prompt twice is sampled twice, and all of it again from the start."""
        self._n_batches += 1
        return sampling_seed(self.args.seed, self._n_batches)


def _faster(model: LMTransformer) -> LMTransformer:
    fast = speed_up(model)
    if isinstance(fast.output, TiedOutput):
        fast.output = fast_linear(fast.tok_embeddings.weight)
    return fast


def sampling_seed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63


def cut_prompts(prompts: list[list[int]], args: GeneratorArgs, max_seqlen: int) -> list[list[int]]:
    """Prompts that are too long lose tokens on the left, with a warning.

    Raises UserError where max_gen_len leaves no room for a prompt.
    """
    if args.max_gen_len >= max_seqlen:
        raise UserError(
            f"max_gen_len: {args.max_gen_len} tokens leave no room for a prompt in the model's "
            f"max_seqlen={max_seqlen}; set it to {max_seqlen - 1} or less"
        )
    limit = max_seqlen - args.max_gen_len
    if args.max_prompt_len is not None:
        limit = min(limit, args.max_prompt_len)
    too_long = [len(prompt) for prompt in prompts if len(prompt) > limit]
    if too_long:
        logger.warning(
            "%s of %s prompts are cut on the left to %s tokens, the longest from %s (max_prompt_len, or "
            "max_seqlen=%s less max_gen_len=%s)",
            len(too_long),
            len(prompts),
            limit,
            max(too_long),
            max_seqlen,
            args.max_gen_len,
        )
    return [prompt[-limit:] for prompt in prompts]


def batches_for_generation(prompts: list[list[int]], args: GeneratorArgs) -> list[list[int]]:
    return batches_by_length([len(prompt) + args.max_gen_len for prompt in prompts], args.max_tokens)


class BatchRun:
    """Prompts being continued together: read at once, then a token each at every step of `steps()`.

    `score`: "prompts" fills `scores`, "texts" the continuations' `log_likelihoods`.
    """

    def __init__(
        self,
        generator: PackedCausalTransformerGenerator,
        prompts: list[list[int]],
        args: GeneratorArgs,
        seed: int,
        score: Literal["prompts", "texts"] | None = None,
    ):
        self.generator, self.prompts, self.args, self.score = generator, prompts, args, score
        self.random = torch.Generator(generator.device).manual_seed(seed)
        self.continuations = [Continuation(generator.tokenizer, args, prompt) for prompt in prompts]
        self.scores: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.n_steps = 0

    def finish(self, progress: Progress | None = None) -> None:
        """Takes all steps, telling `progress` of each."""
        for _ in self.steps():
            if progress is not None:
                progress.show(f"at token {self.n_steps} of the next {len(self.prompts)}")

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Yields after each token, until all texts have ended."""
        model, args = self.generator.model, self.args
        n_words = self.generator.tokenizer.n_words
        cache = KVCache(
            model,
            n_rows=len(self.prompts),
            length=max(map(len, self.prompts)) + args.max_gen_len - 1,
            sliding_window=model.sliding_window,
            dtype=self.generator.dtype,
            device=self.generator.device,
        )
        graph = None
        if args.reduce_generation_overhead and self.generator.device.type == "cuda" and args.max_gen_len > 1:
            graph = _GraphedStep(self.generator, cache, len(self.prompts))
        logits = self._read_prompts(cache)
        rows = list(range(len(self.prompts)))  # of the cache: which prompt each one belongs to
        positions = [len(prompt) for prompt in self.prompts]  # of the next token
        ended: set[int] = set()
        while True:
            # A vocabulary may be padded beyond the tokenizer's words.
            chosen = sample(logits[:, :n_words], args, self.random)
            likelihoods = log_likelihood(logits, chosen).tolist() if self.score == "texts" else [None] * len(rows)
            for number, token, likelihood in zip(rows, chosen.tolist(), likelihoods, strict=True):
                if number not in ended and self.continuations[number].add(token, likelihood):
                    ended.add(number)
            self.n_steps += 1
            yield
            going = [place for place, number in enumerate(rows) if number not in ended]
            if not going:
                return
            if graph is None and len(going) <= len(rows) // 2:
                cache.keep(going)
                rows, positions = [rows[place] for place in going], [positions[place] for place in going]
                chosen = chosen[going]
            logits = graph(chosen, positions) if graph is not None else self._step(cache, chosen, positions)
            positions = [position + 1 for position in positions]

    def _read_prompts(self, cache: KVCache) -> torch.Tensor:
        """Logits (B, vocab) of what follows each prompt."""
        generator = self.generator
        packing = Packing([len(prompt) for prompt in self.prompts], generator.device)
        tokens = generator._row([token for prompt in self.prompts for token in prompt])
        with generator.computing():
            h = generator._read(tokens, packing.positions, cache.read(packing))[0]
            if self.score == "prompts":
                # The last token of each prompt has none after it: what it is scored with here is left out again.
                likelihoods, greedy = generator.score(h, tokens[0].roll(-1))
                parts = zip(likelihoods.split(packing.lengths), greedy.split(packing.lengths), strict=True)
                self.scores = [(likelihood[:-1], is_likeliest[:-1]) for likelihood, is_likeliest in parts]
            return generator.model.output(h[packing.last])

    def _step(self, cache: KVCache, tokens: torch.Tensor, positions: list[int]) -> torch.Tensor:
        generator, last = self.generator, max(positions)
        tok_idx = torch.tensor(positions, device=tokens.device)
        with generator.computing():
            states = cache.step(tok_idx, last + 1, all_alike=min(positions) == last)
            return generator.model.output(generator.model.hidden_states(tokens[None], tok_idx, states)[0])


class _GraphedStep:
    """A token of every sequence as one CUDA graph, which the host starts with a single call."""

    def __init__(self, generator: PackedCausalTransformerGenerator, cache: KVCache, n_rows: int):
        self.tokens = torch.zeros(1, n_rows, dtype=torch.int64, device=generator.device)
        self.positions = torch.zeros(n_rows, dtype=torch.int64, device=generator.device)

        def step() -> torch.Tensor:
            states = cache.step(self.positions, cache.length)
            return generator.model.output(generator.model.hidden_states(self.tokens, self.positions, states)[0])

        with generator.computing():
            # What is set up at a first call must not be part of the graph. The places it writes to, prompts overwrite.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = step()

    def __call__(self, tokens: torch.Tensor, positions: list[int]) -> torch.Tensor:
        self.tokens.copy_(tokens[None])
        self.positions.copy_(torch.tensor(positions))
        self.graph.replay()
        return self.logits


class Progress:
    """Log lines while something of `total` parts is done: how many, and how long the rest takes."""

    def __init__(self, total: int, what: str, often: bool = False):
        self.total, self.what, self.period = total, what, 1.0 if often else 10.0
        self.done = 0
        self._start = self._shown = time.monotonic()

    def add(self, number: int) -> None:
        self.done += number
        self.show()

    def show(self, more: str = "") -> None:
        now = time.monotonic()
        if now - self._shown < self.period:
            return
        self._shown = now
        left = (now - self._start) / self.done * (self.total - self.done) if self.done else None
        duration = f", left: {format_duration(left)}" if left is not None else ""
        logger.info("%s of %s %s%s%s", self.done, self.total, self.what, f", {more}" if more else "", duration)


# --- the command -----------------------------------------------------------------------------------------------------


def validate_generate_args(args: GenerateArgs) -> None:
    """Raises UserError, one line that names the key."""
    if not args.ckpt:
        raise UserError("ckpt: not set; name a checkpoint, such as dumps/debug/checkpoints/0000000600")
    validate_generator_args(args)
    given = [name for name in ("prompt", "prompts", "prompt_file") if getattr(args, name) not in (None, [])]
    if len(given) > 1:
        raise UserError(f"{given[1]}: given together with {given[0]}; leave one of them out")
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"out: no folder '{Path(args.out).parent}' for the file '{args.out}'")
    if args.out is not None and Path(args.out).is_dir():
        raise UserError(f"out: '{args.out}' is a folder; name a file")


def read_prompts(file: Path) -> list[str]:
    """A prompt a line; in a .jsonl file the "prompt" or "text" of an object. Raises UserError with file and line."""
    if not file.is_file():
        raise UserError(f"prompt_file: no file '{file}'")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file: {file} is not UTF-8 text ({error})") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            prompts.append(line.removesuffix("\r"))
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from None
        prompt = found.get("prompt", found.get("text")) if isinstance(found, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f'{file}:{number}: wanted an object with "prompt" (or "text"), a string')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompt_file: {file} holds no prompt")
    return prompts


Answer = dict[str, Any]  # a line of `out`


def describe(prompt: str, run: BatchRun, place: int = 0) -> Answer:
    continuation = run.continuations[place]
    return {
        "prompt": prompt,
        "text": continuation.text,
        "finish_reason": continuation.finish_reason,
        "n_prompt_tokens": len(run.prompts[place]),
        "n_tokens": len(continuation.tokens),
        "log_likelihoods": [round(likelihood, 6) for likelihood in continuation.log_likelihoods],
    }


@contextlib.contextmanager
def saving(out: str | None) -> Iterator[Callable[[Answer], None]]:
    """Gives a function that saves an answer beside the file `out`, in OUT.part, at once and in any order.

    The caller writes `out` itself when all is done. Where something ends it before, what was saved stays.
    """
    if out is None:
        yield lambda answer: None
        return
    part = Path(f"{out}.part")
    with open(part, "w", encoding="utf-8") as file:

        def save(answer: Answer) -> None:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()

        try:
            yield save
        except BaseException:
            if file.tell() == 0:
                part.unlink()
            else:
                logger.warning("not all prompts are done; the texts so far are in %s", part)
            raise
    part.unlink()


def write_answers(out: str, answers: list[Answer]) -> None:
    beside = Path(f"{out}.tmp")
    beside.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")
    beside.rename(out)


def answer_all(
    generator: PackedCausalTransformerGenerator, prompts: list[str], save: Callable[[Answer], None]
) -> list[Answer]:
    """All prompts, in batches; prints each with its text when all are done."""
    answers: dict[int, Answer] = {}
    start = time.monotonic()
    for batch, run in generator.runs([generator.encode(prompt) for prompt in prompts], score="texts"):
        for place, number in enumerate(batch):
            answers[number] = describe(prompts[number], run, place)
            save(answers[number])
    passed = time.monotonic() - start
    n_tokens = sum(answer["n_tokens"] for answer in answers.values())
    logger.info("%s prompts, %s tokens in %.1f s (%.0f a second)", len(prompts), n_tokens, passed, n_tokens / passed)
    ordered = [answers[number] for number in range(len(prompts))]
    for answer in ordered:
        print(answer["prompt"] + answer["text"])  # noqa: T201
    return ordered


def answer_one(generator: PackedCausalTransformerGenerator, prompt: str, save: Callable[[Answer], None]) -> Answer:
    """Prints the prompt, and its text as it comes."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    shown = 0
    run = generator.run_one(prompt)
    for _ in run.steps():
        text = run.continuations[0].settled_text()
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = max(shown, len(text))
    sys.stdout.write("\n")
    answer = describe(prompt, run)
    save(answer)
    return answer


def read_terminal() -> Iterator[str]:
    """The lines of stdin. Raises UserError where one is not UTF-8."""
    try:
        for line in sys.stdin:
            yield _as_utf8(line.rstrip("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"prompts on stdin: not UTF-8 text ({error})") from None


def _as_utf8(prompt: str) -> str:
    """As the tokenizer reads it. Half of a surrogate pair could be neither printed nor written."""
    return prompt.encode(errors="replace").decode()


def main() -> None:
    verbatim = [argument.partition("=")[2] for argument in sys.argv[1:] if argument.startswith("prompt=")]
    args = parse_args(GenerateArgs, without_prompts(sys.argv[1:]))
    args.prompt = verbatim[-1] if verbatim else args.prompt
    if find_world().size > 1:
        raise UserError("generate runs as one process; start it without torchrun")
    init_logger(stream=sys.stderr)
    validate_generate_args(args)
    prompts = read_prompts(Path(args.prompt_file)) if args.prompt_file is not None else args.prompts
    prompts = [_as_utf8(prompt) for prompt in prompts]
    args.prompt = None if args.prompt is None else _as_utf8(args.prompt)
    model, tokenizer, config = load_consolidated_model_and_tokenizer(
        args.ckpt, pick_device(args.device), args.dtype, args.values_device
    )
    generator = PackedCausalTransformerGenerator(args, model, tokenizer, config["data"]["add_bos"])
    cut_prompts([], args, model.max_seqlen)
    too_large = f"max_tokens: {args.max_tokens} tokens at once do not fit the GPU's memory; lower it"
    with saving(args.out) as save, oom_as_user_error(too_large):
        if prompts:
            answers = answer_all(generator, prompts, save)
        elif args.prompt is not None:
            answers = [answer_one(generator, args.prompt, save)]
        else:
            if sys.stdin.isatty():
                print("prompts, a line each; end with Ctrl-D")  # noqa: T201
            answers = [answer_one(generator, line, save) for line in read_terminal()]
        if args.out is not None:
            write_answers(args.out, answers)


if __name__ == "__main__":
    run_main(main)

"""Text from a checkpoint.

    python -m apps.main.generate ckpt=dumps/debug/checkpoints/0000000400 max_gen_len=200 temperature=0.8
    python -m apps.main.generate ckpt=... prompt="def main"

Without `prompt` it reads prompts from the terminal, a line each. Every new token runs the whole sequence again; a cache
of keys and values is still to come.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import from_dict, parse_args, to_dict
from lingua.checkpoint import CONFIG_FILE, CONSOLIDATED_FOLDER, find_consolidated, load_model, read_json
from lingua.data import DataArgs
from lingua.distributed import DTYPES, run_main
from lingua.tokenizer import Tokenizer, build_tokenizer


@dataclass
class GeneratorArgs:
    """How to sample. `temperature` 0 takes the likeliest token; `top_p`, `top_k` cut the rest of the choice off."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_gen_len: int = 512
    max_tokens: int = 1024
    max_prompt_len: int | None = None
    until: list[str] = field(default_factory=list)
    compile_prefilling: bool = False
    reduce_generation_overhead: bool = False
    show_progress: bool = False
    dtype: str = "bf16"
    device: str = "cuda"


@dataclass
class GenerateArgs(GeneratorArgs):
    """`ckpt`: a checkpoint folder, distributed or consolidated; `out`: a file for the text, beside the terminal."""

    ckpt: str = ""
    prompt: str | None = None
    seed: int = 42
    out: str | None = None


def validate_generator_args(args: GeneratorArgs, prefix: str = "") -> None:
    """Raises ValueError, one line that names the key."""
    for name in ("max_gen_len", "max_tokens", "max_prompt_len", "top_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{prefix}{name}: {value} is too small, it must be 1 or more")
    if not args.temperature >= 0:
        raise ValueError(f"{prefix}temperature: {args.temperature} must be 0 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"{prefix}top_p: {args.top_p} must be above 0 and at most 1")
    if args.dtype not in DTYPES:
        raise ValueError(f"{prefix}dtype: '{args.dtype}' is none of {', '.join(DTYPES)}")
    if args.device not in ("cuda", "cpu"):
        raise ValueError(f"{prefix}device: '{args.device}' is neither cuda nor cpu")
    for name in ("compile_prefilling", "reduce_generation_overhead"):
        if getattr(args, name):
            raise ValueError(f"{prefix}{name}: not available yet; set it to false")


def pick_device(name: str) -> torch.device:
    """The device asked for, or the CPU where there is no CUDA device."""
    return torch.device(name if torch.cuda.is_available() else "cpu")


def load_consolidated_model_and_tokenizer(
    path: str | Path, device: torch.device | None = None
) -> tuple[LMTransformer, Tokenizer, dict[str, Any]]:
    """Model (fp32, ready to be evaluated), tokenizer, and the config of the run that trained it.

    `path`: a checkpoint folder, distributed or consolidated. Raises ValueError where it is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"ckpt: no folder '{path}'; name a checkpoint, such as dumps/debug/checkpoints/0000000400")
    configs = [folder / CONFIG_FILE for folder in (path, path / CONSOLIDATED_FOLDER, path.parent)]
    config_file = next((file for file in configs if file.is_file()), None)
    if config_file is None or not ((path / ".metadata").is_file() or find_consolidated(path)):
        raise ValueError(f"ckpt: '{path}' is no checkpoint: it lacks {CONFIG_FILE}, or a model beside it")
    config = read_json(config_file, ("data", "model"))
    data_args = from_dict(DataArgs, config["data"], f"data in {config_file}")
    config["data"], tokenizer_args = to_dict(data_args), data_args.tokenizer
    tokenizer = build_tokenizer(tokenizer_args.name, tokenizer_args.path)
    model_args = from_dict(LMTransformerArgs, config["model"], f"model in {config_file}")
    config["model"] = to_dict(model_args)
    if model_args.vocab_size == -1:
        model_args.vocab_size = tokenizer.n_words
    with torch.device("meta"):
        model = LMTransformer(model_args)
    model.to_empty(device=device or torch.device("cpu"))
    model.rope_embeddings.reset_parameters()
    load_model(path, model)
    return model.eval(), tokenizer, config


def sample(logits: torch.Tensor, args: GeneratorArgs, random: torch.Generator) -> int:
    """One token id from logits (vocab,). The likeliest always stays in the choice."""
    if args.temperature == 0:
        return int(logits.argmax())
    logits = logits.float() - logits.max()  # a temperature next to 0 then makes no infinities that cancel
    probabilities, tokens = torch.softmax(logits / args.temperature, dim=-1).sort(descending=True)
    if args.top_p is not None:
        probabilities[probabilities.cumsum(-1) - probabilities >= args.top_p] = 0
    if args.top_k is not None:
        probabilities[args.top_k :] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=random)])


@torch.no_grad()
def continue_text(
    model: LMTransformer, tokenizer: Tokenizer, prompt: str, args: GeneratorArgs, random: torch.Generator
) -> Iterator[str]:
    """What follows the prompt, in pieces as they come, up to `max_gen_len` tokens, EOS, or a string of `until`.

    The model sees the last max_seqlen tokens.
    """
    device = next(model.parameters()).device
    tokens = tokenizer.encode(prompt, add_bos=tokenizer.bos_id >= 0, add_eos=False)
    if not tokens:
        raise ValueError("prompt: empty, and the tokenizer has no BOS to begin with")
    if args.max_prompt_len is not None:
        tokens = tokens[-args.max_prompt_len :]
    generated: list[int] = []
    text = ""
    for _ in range(args.max_gen_len):
        seen = torch.tensor([tokens[-model.max_seqlen :]], device=device)
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
            # A vocabulary may be padded beyond the tokenizer's words.
            token = sample(model(seen)[0, -1, : tokenizer.n_words], args, random)
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
        generated.append(token)
        now = tokenizer.decode(generated)
        ends = [now.index(stop) for stop in args.until if stop in now]
        if ends:
            yield now[len(text) : min(ends)]
            return
        # A piece is held back while its last character may still be incomplete, or the start of a stop string.
        if not now.endswith("\N{REPLACEMENT CHARACTER}") and not _may_be_ending(now, args.until):
            yield now[len(text) :]
            text = now
    yield tokenizer.decode(generated)[len(text) :]


def _may_be_ending(text: str, until: list[str]) -> bool:
    return any(text.endswith(stop[:size]) for stop in until for size in range(1, len(stop)))


def main() -> None:
    args = parse_args(GenerateArgs)
    validate_generator_args(args)
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(args.ckpt, pick_device(args.device))
    random = torch.Generator(device=next(model.parameters()).device).manual_seed(args.seed)
    if args.prompt is None and sys.stdin.isatty():
        print("prompts, a line each; end with Ctrl-D")  # noqa: T201
    texts = []
    for prompt in [args.prompt] if args.prompt is not None else (line.rstrip("\n") for line in sys.stdin):
        sys.stdout.write(prompt)
        texts.append(prompt)
        for piece in continue_text(model, tokenizer, prompt, args, random):
            sys.stdout.write(piece)
            sys.stdout.flush()
            texts.append(piece)
        sys.stdout.write("\n")
        texts.append("\n")
    if args.out is not None:
        Path(args.out).write_text("".join(texts), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)

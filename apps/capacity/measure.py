"""How many bits about people a model has learned ("Physics of Language Models: Part 3.3", arXiv 2404.05405, section 3).

    python -m apps.capacity.measure ckpt=dumps/x/checkpoints/0000001000 people=20000 people_seed=0

One biography of each person, in a wording that is drawn for this measurement, is scored. With p1 the mean over people
of the summed negative log-likelihood (nats) of the name's tokens at a document's start, and p2 that of the values'
tokens summed over the attributes:

    bits = N log2(N0 / e^p1) + N log2(S0 / e^p2)

N0 names and S0 tuples of values are possible. A model that knows everything has p1 = ln N (any of the people may come
next) and p2 = 0; one that knows only the lists has p1 = ln N0, p2 = ln S0, and 0 bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.capacity.people import ATTRIBUTES, N_NAMES, Biography, People
from apps.main.generate import (
    GeneratorArgs,
    PackedCausalTransformerGenerator,
    Progress,
    load_consolidated_model_and_tokenizer,
    pick_device,
    validate_generator_args,
)
from apps.main.transformer import LMTransformer, LMTransformerArgs, count_flops_per_token, count_parameters
from lingua.args import from_dict, parse_args, write_whole
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.logger import init_logger
from lingua.tokenizer import Tokenizer

# Token sequences -> for each, of all its tokens but the first: (log-likelihoods in nats, whether the likeliest token).
Score = Callable[[list[list[int]]], list[tuple[torch.Tensor, torch.Tensor]]]

BIOGRAPHIES_AT_ONCE = 512


@dataclass
class MeasureArgs:
    """`people`, `people_seed`: those that the model was trained on. `out`: a JSON file for what is found."""

    ckpt: str = ""
    people: int = 0
    people_seed: int = 0
    dtype: str = "bf16"
    device: str = "cuda"
    out: str | None = None


def measure(
    score: Score, tokenizer: Tokenizer, people: People, show: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Bits learned about `people`, in all and of each kind, and the share of values recalled exactly.

    Args:
        score: the model, on sequences that begin with BOS where the tokenizer has one.
        show: called with the number of people in each batch that is done.

    Returns a dictionary, ready for JSON: `bits`, `possible_bits`, `name_bits`, `value_bits` of each attribute,
    `exact_match` of each attribute and their mean `exact_match_mean`. A value is recalled exactly if each of its tokens
    is the likeliest one after the text before it, as greedy generation would find it.
    """
    nll = dict.fromkeys(("name", *ATTRIBUTES), 0.0)
    exact = dict.fromkeys(ATTRIBUTES, 0)
    biographies = people.for_measurement
    for first in range(0, people.n, BIOGRAPHIES_AT_ONCE):
        batch = biographies[first : first + BIOGRAPHIES_AT_ONCE]
        sequences, places = zip(*(_locate(tokenizer, biography) for biography in batch), strict=True)
        for (likelihood, greedy), spans in zip(score(list(sequences)), places, strict=True):
            for name, tokens in spans.items():
                nll[name] -= likelihood[tokens].double().sum().item()
                if name != "name":
                    exact[name] += bool(greedy[tokens].all())
        if show is not None:
            show(len(batch))
    n = people.n
    name_bits = n * math.log2(N_NAMES) - nll["name"] / math.log(2)
    value_bits = {name: n * math.log2(size) - nll[name] / math.log(2) for name, size in ATTRIBUTES.items()}
    exact_match = {name: count / n for name, count in exact.items()}
    return {
        "people": n,
        "bits": name_bits + sum(value_bits.values()),
        "possible_bits": people.bits,
        "name_bits": name_bits,
        "value_bits": value_bits,
        "exact_match": exact_match,
        "exact_match_mean": sum(exact_match.values()) / len(exact_match),
    }


def _locate(tokenizer: Tokenizer, biography: Biography) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of a biography, BOS first, and which scores of them belong to the name and to each value.

    Score i is that of token i + 1. A token that reaches over a value's border belongs to the value.
    """
    tokens = tokenizer.encode(biography.text, add_bos=True)
    pieces, begins = tokenizer.get_token_offsets(biography.text, tokens)
    places: dict[str, list[int]] = {}
    for name, (begin, end) in biography.spans.items():
        if name == "name" or name in ATTRIBUTES:
            places[name] = [
                number - 1
                for number, (piece, start) in enumerate(zip(pieces, begins, strict=True))
                if number > 0 and start < end and start + len(piece) > begin
            ]
    return tokens, places


def measure_checkpoint(args: MeasureArgs) -> dict[str, Any]:
    """`measure` of a checkpoint, with `parameters`, `memory_parameters`, `flops_per_token`, `bits_per_parameter`."""
    generator_args = GeneratorArgs(dtype=args.dtype, device=args.device)
    validate_generator_args(generator_args)
    device = pick_device(args.device)
    people = People(args.people, args.people_seed)
    model, tokenizer, config = load_consolidated_model_and_tokenizer(args.ckpt, device, args.dtype)
    generator = PackedCausalTransformerGenerator(generator_args, model, tokenizer)
    progress = Progress(people.n, "people measured")
    result = measure(generator.score_batch, tokenizer, people, progress.add)
    sizes = sizes_of(args.ckpt, config)
    return {**result, **sizes, "bits_per_parameter": result["bits"] / sizes["parameters"]}


def sizes_of(ckpt: str, config: dict[str, Any]) -> dict[str, int]:
    """`parameters`, `memory_parameters` (of them, in tables) and `flops_per_token` of a checkpoint's config.

    Counted as it was trained: for evaluation in half precision a tied output is a copy of the embedding.
    """
    with torch.device("meta"):
        trained = LMTransformer(from_dict(LMTransformerArgs, config["model"], f"{ckpt}: model"))
    dense, memory = count_parameters(trained)
    flops = count_flops_per_token(trained, config["data"]["seq_len"])
    return {"parameters": dense + memory, "memory_parameters": memory, "flops_per_token": flops}


def main() -> None:
    init_logger()
    args = parse_args(MeasureArgs)
    if not args.ckpt:
        raise UserError("ckpt: not set; name a checkpoint folder, such as dumps/x/checkpoints/0000001000")
    result = measure_checkpoint(args)
    text = json.dumps(result, indent=2) + "\n"
    if args.out is not None:
        write_whole(Path(args.out), text)
    print(text, end="")  # noqa: T201


if __name__ == "__main__":
    run_main(main)

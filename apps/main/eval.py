"""Loss on held-out text, from a checkpoint.

    python -m apps.main.eval config=apps/main/configs/eval.yaml ckpt_dir=dumps/debug/checkpoints/0000000400 dump_dir=...

Writes `dump_dir/validation.json`, and a line of `metric_log_dir/metrics.validation.jsonl` where that is set. Tasks of
lm-eval (`harness`), several ranks and evaluation during training are still to come.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apps.main.generate import (
    GeneratorArgs,
    load_consolidated_model_and_tokenizer,
    pick_device,
    validate_generator_args,
)
from apps.main.transformer import LMTransformer
from lingua.args import parse_args
from lingua.data import VALIDATION_FILES, find_files, read_documents
from lingua.distributed import DTYPES, find_world, run_main
from lingua.logger import init_logger
from lingua.metrics import MetricsLogger, format_duration
from lingua.tokenizer import Tokenizer
from lingua.transformer import cross_entropy

logger = logging.getLogger(__name__)

IGNORED = -100  # the target where a row is filled up, which cross_entropy leaves out


@dataclass
class ValidationArgs:
    """`max_steps`: batches of each source, all where null. Sources: folders with *.val.jsonl under `root_dir`."""

    max_steps: int | None = None
    use_val_from_train_src: bool = True
    root_dir: str = ""
    sources: list[str] = field(default_factory=list)


@dataclass
class EvalArgs:
    name: str = "evals"
    dump_dir: str | None = None
    metric_log_dir: str | None = None
    ckpt_dir: str = ""
    generator: GeneratorArgs = field(default_factory=GeneratorArgs)
    harness: Any | None = None
    validation: ValidationArgs | None = field(default_factory=ValidationArgs)
    wandb: Any | None = None
    global_step: int | None = None


def validate_eval_args(args: EvalArgs) -> None:
    """Raises ValueError, one line that names the key."""
    for name in ("ckpt_dir", "dump_dir"):
        if not getattr(args, name):
            raise ValueError(f"{name}: not set")
    for name in ("harness", "wandb"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: not available yet; leave it out")
    if args.validation is None:
        raise ValueError("validation: null, so there is nothing to evaluate")
    if args.validation.max_steps is not None and args.validation.max_steps < 1:
        raise ValueError(
            f"validation.max_steps: {args.validation.max_steps} is too small, it must be 1 or more, or null"
        )
    if args.validation.sources and not args.validation.root_dir:
        raise ValueError("validation.root_dir: not set; name the folder that holds validation.sources")
    validate_generator_args(args.generator, "generator.")


def validation_folders(args: ValidationArgs, train_data: dict[str, Any]) -> list[tuple[str, str]]:
    """(root, source) of each source to validate on: the training run's that have *.val.jsonl, and those named."""
    folders = []
    if args.use_val_from_train_src:
        for source in train_data["sources"]:
            if any(Path(train_data["root_dir"], source).glob(VALIDATION_FILES)):
                folders.append((train_data["root_dir"], source))
            else:
                logger.warning("no %s in %s/%s; not validated on", VALIDATION_FILES, train_data["root_dir"], source)
    folders += [(args.root_dir, source) for source in args.sources]
    if not folders:
        raise ValueError(
            f"validation.sources: nothing to validate on, and no training source has {VALIDATION_FILES}; name a source"
        )
    return folders


def rows_of(tokens: list[int], seq_len: int) -> Iterator[tuple[list[int], list[int]]]:
    """(input, target) rows of at most seq_len in which every token but the first is a target once."""
    for start in range(0, len(tokens) - 1, seq_len):
        piece = tokens[start : start + seq_len + 1]
        yield piece[:-1], piece[1:]


@torch.no_grad()
def validate_source(
    model: LMTransformer,
    tokenizer: Tokenizer,
    files: list[Path],
    train_data: dict[str, Any],
    max_steps: int | None,
    dtype: str,
) -> dict[str, float]:
    """Mean loss a token, and bits a byte of text, over the documents of `files`, each from its own start.

    `max_steps`: the document during which so many batches are reached is the last.
    """
    device = next(model.parameters()).device
    totals = {"n_documents": 0, "n_tokens": 0, "n_bytes": 0}
    nll = 0.0
    rows: list[tuple[list[int], list[int]]] = []
    steps, start, reported = 0, time.monotonic(), time.monotonic()

    def flush() -> float:
        width = max(len(inputs) for inputs, _ in rows)
        inputs = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=device)
        targets = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in rows], device=device)
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            return cross_entropy(model(inputs), targets, ignore_index=IGNORED, reduction="sum").item()

    for text in itertools.chain.from_iterable(map(read_documents, files)):
        if max_steps is not None and steps >= max_steps:
            break
        tokens = tokenizer.encode(text, train_data["add_bos"], train_data["add_eos"])
        totals["n_documents"] += 1
        totals["n_tokens"] += max(len(tokens) - 1, 0)
        totals["n_bytes"] += len(text.encode(errors="replace"))
        for row in rows_of(tokens, model.max_seqlen):
            rows.append(row)
            if len(rows) == train_data["batch_size"]:
                nll += flush()
                rows.clear()
                steps += 1
        if time.monotonic() - reported > 3:
            reported = time.monotonic()
            size = sum(path.stat().st_size for path in files)
            left = (reported - start) * max(size / max(totals["n_bytes"], 1) - 1, 0)
            logger.info("%s documents, left: %s at most", totals["n_documents"], format_duration(left))
    if rows:
        nll += flush()
    if totals["n_tokens"] == 0:
        raise ValueError(f"{files[0].parent}: no tokens in its validation files")
    return {"loss": nll / totals["n_tokens"], "bits_per_byte": nll / math.log(2) / totals["n_bytes"], **totals}


@contextlib.contextmanager
def record_slots(model: LMTransformer) -> Iterator[dict[int, torch.Tensor]]:
    """Block number -> which slots its memory reads while the context lasts, a bool for each slot."""
    used = {}
    for number, memory in model.memories().items():
        used[number] = torch.zeros(memory.size, dtype=torch.bool, device=memory.keys.device)

        def recording(query: torch.Tensor, knn: int, get_indices=memory.get_indices, mine=used[number]):
            scores, slots = get_indices(query, knn)
            mine[slots.flatten()] = True
            return scores, slots

        memory.get_indices = recording
    try:
        yield used
    finally:
        for memory in model.memories().values():
            del memory.get_indices


def launch_eval(args: EvalArgs) -> dict[str, Any]:
    """Evaluates as `args` say and returns what validation.json holds: per source loss and bits_per_byte, slots used.

    Raises ValueError for arguments, checkpoints and data that cannot work.
    """
    validate_eval_args(args)
    model, tokenizer, config = load_consolidated_model_and_tokenizer(args.ckpt_dir, pick_device(args.generator.device))
    folders = validation_folders(args.validation, config["data"])
    files: dict[str, list[Path]] = {}
    for root, source in folders:
        files[source if source not in files else str(Path(root, source))] = find_files(root, source, VALIDATION_FILES)
    results: dict[str, Any] = {}
    with record_slots(model) as used:
        for source, paths in files.items():
            max_steps = args.validation.max_steps
            results[source] = validate_source(model, tokenizer, paths, config["data"], max_steps, args.generator.dtype)
            logger.info(
                "%s: loss %.4f, %.4f bits per byte", source, results[source]["loss"], results[source]["bits_per_byte"]
            )
    if used:
        together = (
            torch.stack(list(used.values())).any(0) if config["model"]["productkey_args"]["mem_share_values"] else None
        )
        results["memory_slots"] = {
            "total": next(iter(used.values())).numel(),
            **{f"read_by_layer_{number}": int(slots.sum()) for number, slots in used.items()},
            **({} if together is None else {"read": int(together.sum())}),
        }
    write_results(args, results)
    return results


def write_results(args: EvalArgs, results: dict[str, Any]) -> None:
    folder = Path(args.dump_dir)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "validation.json.tmp"
    beside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    beside.rename(folder / "validation.json")
    if args.metric_log_dir is not None:
        Path(args.metric_log_dir).mkdir(parents=True, exist_ok=True)
        metrics = MetricsLogger(Path(args.metric_log_dir) / "metrics.validation.jsonl")
        metrics.log({"global_step": args.global_step, "acc_step": 0, **results})
        metrics.close()


def main() -> None:
    args = parse_args(EvalArgs)
    if find_world().size > 1:
        raise ValueError("eval under torchrun is not available yet; start one process")
    init_logger()
    launch_eval(args)


if __name__ == "__main__":
    run_main(main)

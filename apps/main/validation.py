"""Loss on held-out text: each document once, from its own start, whatever the number of ranks."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from apps.main.generate import PackedCausalTransformerGenerator, Progress, batches_by_length, explaining_memory
from apps.main.transformer import LMTransformer
from lingua.distributed import any_rank, gather_objects, rank_and_size, together
from lingua.sources import VALIDATION_FILES, Faults, encode_document, find_files, matching_files, read_documents

logger = logging.getLogger(__name__)

# Documents that are cut into rows and scored before the next ones are read. The same for any number of ranks, so that
# they compute the same batches.
DOCUMENTS_AT_ONCE = 512


class EvaluationStopped(Exception):
    """Raised on all ranks where a `should_stop` of one of them has answered yes."""


def check_stop(should_stop: Callable[[], bool] | None) -> None:
    """All ranks call it together."""
    if any_rank(should_stop is not None and should_stop())[0]:
        raise EvaluationStopped


@dataclass
class ValidationArgs:
    """`max_steps`: batches of the training's size for each source, all where null; the document with which so many are
    reached is the last. Sources: folders with *.val.jsonl under `root_dir`. `slot_reads`: of so many tokens of each
    source which slots they read is written down (apps/main/slot_reads.py).
    """

    max_steps: int | None = None
    use_val_from_train_src: bool = True
    root_dir: str = ""
    sources: list[str] = field(default_factory=list)
    slot_reads: int | None = None


def validate_validation_args(args: ValidationArgs, prefix: str = "") -> None:
    """Raises ValueError, one line that names the key."""
    for name in ("max_steps", "slot_reads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{prefix}validation.{name}: {value} is too small, it must be 1 or more, or null")
    if args.sources and not args.root_dir:
        raise ValueError(f"{prefix}validation.root_dir: not set; name the folder that holds validation.sources")


def validation_files(args: ValidationArgs, train_data: dict[str, Any]) -> dict[str, list[Path]]:
    """Source -> its files: the training run's sources that have *.val.jsonl, and those named.

    Raises ValueError where a named source is missing. May be empty.
    """
    folders = []
    if args.use_val_from_train_src and train_data["root_dir"] is not None:
        for source in train_data["sources"]:
            if matching_files(Path(train_data["root_dir"], source), VALIDATION_FILES):
                folders.append((train_data["root_dir"], source))
            else:
                logger.warning("no %s in %s/%s; not validated on", VALIDATION_FILES, train_data["root_dir"], source)
    folders += [(args.root_dir, source) for source in args.sources]
    files: dict[str, list[Path]] = {}
    for root, source in folders:
        files[source if source not in files else str(Path(root, source))] = find_files(root, source, VALIDATION_FILES)
    return files


def rows_of(tokens: list[int], seq_len: int) -> list[list[int]]:
    """Pieces of at most seq_len + 1 tokens in which every token but the document's first is predicted once."""
    return [tokens[start : start + seq_len + 1] for start in range(0, len(tokens) - 1, seq_len)]


def validate_source(
    generator: PackedCausalTransformerGenerator,
    files: list[Path],
    train_data: dict[str, Any],
    max_steps: int | None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Mean loss a token, and bits a byte of text, over the documents of `files`. All ranks call it together.

    Documents at fault end it, or are skipped and counted (`n_skipped`), as `data.on_error` says. Raises ValueError for
    those and for files without a token, and EvaluationStopped on all ranks where `should_stop` says so on any.
    """
    rank, n_ranks = rank_and_size()
    max_rows = None if max_steps is None else max_steps * train_data["batch_size"]
    at_once = max(generator.args.max_tokens, train_data["batch_size"] * generator.model.max_seqlen)
    framing = train_data["add_bos"], train_data["add_eos"]
    totals = {"n_documents": 0, "n_tokens": 0, "n_bytes": 0}
    faults = Faults(train_data.get("on_error", "stop"), is_told=rank == 0)  # older runs have no such key
    losses: list[float] = []  # of this rank's rows
    n_rows = 0
    # How many rows there are is known where max_steps says it; else files are a little larger than their text.
    size, of_what = (sum(path.stat().st_size for path in files), "bytes") if max_rows is None else (max_rows, "rows")
    progress = Progress(size, f"{of_what} of {files[0].parent.name} scored", generator.args.show_progress)
    documents = itertools.chain.from_iterable(read_documents(file, faults) for file in files)
    while max_rows is None or n_rows < max_rows:
        check_stop(should_stop)
        with together():
            at_hand = list(itertools.islice(documents, DOCUMENTS_AT_ONCE))
            # Each rank encodes some of them, and tells the others.
            encoded: list[list[int] | str] = []
            for text, place in at_hand[rank::n_ranks]:
                try:
                    encoded.append(encode_document(generator.tokenizer, text, *framing))
                except ValueError as error:
                    if not faults.are_skipped:
                        raise ValueError(place.tell(str(error))) from None
                    encoded.append(str(error))
        if not at_hand:
            break
        tokens_of = list(itertools.chain.from_iterable(itertools.zip_longest(*gather_objects(encoded), fillvalue=None)))
        rows: list[list[int]] = []
        for (text, place), tokens in zip(at_hand, tokens_of, strict=False):
            if max_rows is not None and n_rows + len(rows) >= max_rows:
                break
            if isinstance(tokens, str):
                faults.skip(place.tell(tokens))
                continue
            rows += rows_of(tokens, generator.model.max_seqlen)
            totals["n_documents"] += 1
            totals["n_tokens"] += max(len(tokens) - 1, 0)
            totals["n_bytes"] += len(text.encode(errors="replace"))
        done, n_rows = progress.done, n_rows + len(rows)
        doing = (totals["n_bytes"] if max_rows is None else min(n_rows, max_rows)) - done
        batches = batches_by_length([len(row) - 1 for row in rows], at_once)
        too_large = f"generator.max_tokens, or data.batch_size: {at_once} tokens at once do not fit the GPU's memory"
        with together(), explaining_memory(too_large):
            for number, batch in enumerate(batches[rank::n_ranks], start=1):
                losses += [-ll.double().sum().item() for ll, _ in generator.score_batch([rows[i] for i in batch])]
                progress.done = done + doing * number * n_ranks // (len(batches) + n_ranks)
                if rank == 0:
                    progress.show()
        progress.done = done + doing
    if totals["n_tokens"] == 0 or totals["n_bytes"] == 0:
        raise ValueError(f"{files[0].parent}: no text in its validation files")
    if faults.are_skipped:
        totals["n_skipped"] = faults.n_skipped
    # Summed exactly, so that it does not matter which rank found what.
    nll = math.fsum(itertools.chain.from_iterable(gather_objects(losses)))
    return {"loss": nll / totals["n_tokens"], "bits_per_byte": nll / math.log(2) / totals["n_bytes"], **totals}


@contextlib.contextmanager
def watch_searches(model: LMTransformer, look: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Calls `look(block number, scores, slots)` of each search of a memory while the context lasts."""
    for number, memory in model.memories().items():

        def watched(query: torch.Tensor, knn: int, get_indices=memory.get_indices, number=number):
            scores, slots = get_indices(query, knn)
            look(number, scores, slots)
            return scores, slots

        memory.get_indices = watched
    try:
        yield
    finally:
        for memory in model.memories().values():
            del memory.get_indices


@contextlib.contextmanager
def record_slots(model: LMTransformer) -> Iterator[dict[int, torch.Tensor]]:
    """Block number -> which slots its memory reads while the context lasts, a bool for each slot."""
    used = {
        number: torch.zeros(memory.size, dtype=torch.bool, device=memory.keys.device)
        for number, memory in model.memories().items()
    }

    def record(number: int, _scores: torch.Tensor, slots: torch.Tensor) -> None:
        used[number][slots.flatten()] = True

    with watch_searches(model, record):
        yield used


def count_slots(used: dict[int, torch.Tensor], shared: bool) -> dict[str, int]:
    """How many slots were read on any rank: by each memory, and where they share a table by all of them together."""
    by_layer = {number: slots.cpu().to(torch.uint8) for number, slots in used.items()}
    if dist.is_initialized():
        for slots in by_layer.values():
            dist.all_reduce(slots, op=dist.ReduceOp.MAX)
    counts = {"total": next(iter(by_layer.values())).numel()}
    counts.update({f"read_by_layer_{number}": int(slots.sum()) for number, slots in by_layer.items()})
    if shared:
        counts["read"] = int(torch.stack(list(by_layer.values())).amax(0).sum())
    return counts


def run_validation(
    args: ValidationArgs,
    files: dict[str, list[Path]],
    generator: PackedCausalTransformerGenerator,
    config: dict[str, Any],
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """What validation.json holds: for each source loss and bits_per_byte, and the memory slots read.

    All ranks call it together and get the same. Raises as `validate_source`.
    """
    results: dict[str, Any] = {}
    with record_slots(generator.model) as used:
        for source, paths in files.items():
            found = results[source] = validate_source(generator, paths, config["data"], args.max_steps, should_stop)
            logger.info("%s: loss %.4f, %.4f bits per byte", source, found["loss"], found["bits_per_byte"])
    if used:
        results["memory_slots"] = count_slots(used, config["model"]["productkey_args"]["mem_share_values"])
    return results

"""Loss on held-out text: each document once, from its own start, whatever the number of ranks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from apps.main.config import ValidationArgs
from apps.main.generate import PackedCausalTransformerGenerator, Progress, batches_by_length
from apps.main.transformer import LMTransformer
from lingua.distributed import any_rank, broadcast_object, gather_objects, raise_on_all_ranks, rank_and_size
from lingua.errors import UserError
from lingua.launch import oom_as_user_error
from lingua.sources import (
    VALIDATION_FILES,
    Faults,
    Place,
    encode_document,
    find_files,
    matching_files,
    read_document,
    read_documents,
    read_line,
)
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Documents that are cut into rows and scored before the next ones are read. The same for any number of ranks, so that
# they compute the same batches.
DOCUMENTS_AT_ONCE = 512

# What the results hold beside sources, whose names these cannot be.
MEMORY_SLOTS, SETTINGS = "memory_slots", "settings"

# 2**64 divided by the golden ratio, to the nearest odd number.
GOLDEN_STEP = 0x9E3779B97F4A7C15


class EvaluationStopped(Exception):
    """Raised on all ranks where a `should_stop` of one of them has answered yes."""


def check_stop(should_stop: Callable[[], bool] | None) -> None:
    """All ranks call it together."""
    if any_rank(should_stop is not None and should_stop())[0]:
        raise EvaluationStopped


def validate_validation_args(args: ValidationArgs, prefix: str = "") -> None:
    """Raises UserError, one line that names the key."""
    for name in ("max_steps", "slot_reads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{prefix}validation.{name}: {value} is too small, it must be 1 or more, or null")
    if args.sources and not args.root_dir:
        raise UserError(f"{prefix}validation.root_dir: not set; name the folder that holds validation.sources")


def validation_files(args: ValidationArgs, train_data: dict[str, Any]) -> dict[str, list[Path]]:
    """Source -> its files: the training run's sources that have *.val.jsonl, and those named.

    Raises UserError where a named source is missing. May be empty.
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
        taken = source in files or source in (MEMORY_SLOTS, SETTINGS)
        files[str(Path(root, source)) if taken else source] = find_files(root, source, VALIDATION_FILES)
    return files


def rows_of(tokens: list[int], seq_len: int) -> list[list[int]]:
    """Pieces of at most seq_len + 1 tokens in which every token but the document's first is predicted once."""
    return [tokens[start : start + seq_len + 1] for start in range(0, len(tokens) - 1, seq_len)]


def n_rows_of(n_tokens: int, seq_len: int) -> int:
    """How many `rows_of` returns."""
    return -(-max(n_tokens - 1, 0) // seq_len)


# --- documents -------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A document as `tokens`, int32; `n_bytes` of its text belong to tokens that are scored, all but the first."""

    place: Place
    tokens: np.ndarray
    n_bytes: int


Encode = Callable[[str, Place], "Encoded | str"]


def encode(tokenizer: Tokenizer, data: dict[str, Any], text: str, place: Place) -> Encoded | str:
    """A document's tokens, framed as section `data` of the training config says; or, where the tokenizer fails, a line
    that names file and line.
    """
    try:
        tokens = encode_document(tokenizer, text, data["add_bos"], data["add_eos"])
    except ValueError as error:
        return place.tell(str(error))
    n_bytes = len(text.encode(errors="replace")) - tokenizer.count_first_bytes(text, tokens)
    return Encoded(place, np.array(tokens, dtype=np.int32), n_bytes)


class Chunk(NamedTuple):
    """Documents to be scored; with them `done` of `total` is done, in `unit`. The same on all ranks."""

    documents: list[Encoded]
    done: int
    total: int
    unit: str


def _refuse_faults(found: list[Encoded | str], faults: Faults) -> None:
    """Raises UserError for the first document at fault where those are not skipped."""
    if not faults.are_skipped:
        for problem in found:
            if isinstance(problem, str):
                faults.skip(problem)


def _leave_out(found: Iterable[Encoded | str], faults: Faults) -> list[Encoded]:
    """Those without a fault; the others are counted."""
    kept = []
    for document in found:
        if isinstance(document, str):
            faults.skip(document)
        else:
            kept.append(document)
    return kept


def all_documents(files: list[Path], encode: Encode, faults: Faults) -> Iterator[Chunk]:
    """All documents of `files`. All ranks iterate together; each encodes some, and sends them to the others."""
    rank, n_ranks = rank_and_size()
    sizes = [path.stat().st_size for path in files]
    begins = dict(zip(files, itertools.accumulate(sizes, initial=0), strict=False))
    documents = itertools.chain.from_iterable(read_documents(file, faults) for file in files)
    while True:
        with raise_on_all_ranks():
            at_hand = list(itertools.islice(documents, DOCUMENTS_AT_ONCE))
            mine = [encode(text, place) for text, place in at_hand[rank::n_ranks]]
            _refuse_faults(mine, faults)
        if not at_hand:
            return
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*gather_objects(mine)))
        last = at_hand[-1][1]
        done = begins[last.path] + last.offset if len(at_hand) == DOCUMENTS_AT_ONCE else sum(sizes)
        yield Chunk(_leave_out(itertools.islice(in_turn, len(at_hand)), faults), done, sum(sizes), "bytes")


def spread_evenly(n: int) -> np.ndarray:
    """0..n-1 in an order of which every beginning is spread evenly over them, whatever period their kinds have.

    The k-th is the number with the k-th smallest fractional part of its product with the golden ratio (Fibonacci
    hashing; the gaps between the first k have three lengths at most: Slater, 1967).
    """
    return np.argsort(np.arange(n, dtype=np.uint64) * np.uint64(GOLDEN_STEP), kind="stable")


def find_documents(files: list[Path]) -> np.ndarray:
    """(file, line from 1, first byte) of each line that is not blank, int64 of shape (N, 3)."""
    found = array("q")
    for file_number, path in enumerate(files):
        number = offset = 0
        with open(path, "rb") as file:
            while True:
                line, size = read_line(file)
                if not line:
                    break
                number += 1
                if not line.isspace():
                    found.extend((file_number, number, offset))
                offset += size
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def read_at(files: list[Path], places: np.ndarray, encode: Encode) -> Iterator[Encoded | str]:
    """The documents at `places`, rows of what `find_documents` returns."""
    with contextlib.ExitStack() as stack:
        opened: dict[int, BinaryIO] = {}
        for file_number, number, offset in places.tolist():
            if file_number not in opened:
                opened[file_number] = stack.enter_context(open(files[file_number], "rb"))
            opened[file_number].seek(offset)
            place = Place(files[file_number], number, offset)
            try:
                text = read_document(*read_line(opened[file_number]), place)
            except ValueError as error:
                yield str(error)
            else:
                yield encode(text, place)


def sampled_documents(
    files: list[Path], encode: Encode, faults: Faults, max_rows: int, seq_len: int, check: Callable[[], None]
) -> Iterator[Chunk]:
    """Documents spread evenly over `files`, until they make `max_rows` rows of `seq_len`; then all of them, in the
    order of the files. All ranks iterate together; each reads and encodes some, and keeps them until they are due.
    """
    rank, n_ranks = rank_and_size()
    with raise_on_all_ranks():
        places = find_documents(files) if rank == 0 else None
    places = broadcast_object(places)
    order = spread_evenly(len(places))
    mine: dict[int, Encoded] = {}
    chosen: list[int] = []
    n_rows = n_seen = 0
    while n_rows < max_rows and n_seen < len(order):
        check()
        # A document makes a row or more, with few exceptions.
        numbers = order[n_seen : n_seen + min(DOCUMENTS_AT_ONCE, max_rows - n_rows)]
        n_seen += len(numbers)
        with raise_on_all_ranks():
            found = list(read_at(files, places[numbers[rank::n_ranks]], encode))
            _refuse_faults(found, faults)
        mine.update(
            (number, document)
            for number, document in zip(numbers[rank::n_ranks].tolist(), found, strict=True)
            if not isinstance(document, str)
        )
        rows_or_fault = [
            document if isinstance(document, str) else n_rows_of(len(document.tokens), seq_len) for document in found
        ]
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*gather_objects(rows_or_fault)))
        for number, rows in zip(numbers.tolist(), in_turn, strict=False):
            if n_rows >= max_rows:
                mine.pop(number, None)
            elif isinstance(rows, str):
                faults.skip(rows)
            else:
                chosen.append(number)
                n_rows += rows
    chosen.sort()
    done = 0
    for start in range(0, len(chosen), DOCUMENTS_AT_ONCE):
        numbers = chosen[start : start + DOCUMENTS_AT_ONCE]
        parts = gather_objects({number: mine.pop(number) for number in numbers if number in mine})
        by_number = {number: document for part in parts for number, document in part.items()}
        documents = [by_number[number] for number in numbers]
        done += sum(n_rows_of(len(document.tokens), seq_len) for document in documents)
        yield Chunk(documents, done, n_rows, "rows")


# --- loss ------------------------------------------------------------------------------------------------------------


def validate_source(
    generator: PackedCausalTransformerGenerator,
    files: list[Path],
    train_data: dict[str, Any],
    max_steps: int | None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Mean loss a token, and bits a byte of text, over the documents of `files`. All ranks call it together.

    Each token but a document's first is scored (so all of its text where it begins with BOS), EOS too; `n_tokens` and
    `n_bytes` are those of the scored tokens. Documents at fault end it, or are skipped and counted (`n_skipped`), as
    `data.on_error` says. Raises UserError for those and for files without a token, and EvaluationStopped on all ranks
    where `should_stop` says so on any.
    """
    rank, n_ranks = rank_and_size()
    seq_len = generator.model.max_seqlen
    at_once = max(generator.args.max_tokens, train_data["batch_size"] * seq_len)
    totals = {"n_documents": 0, "n_tokens": 0, "n_bytes": 0}
    faults = Faults(train_data.get("on_error", "stop"), is_told=rank == 0)  # older runs have no such key
    encode_one = functools.partial(encode, generator.tokenizer, train_data)
    if max_steps is None:
        chunks = all_documents(files, encode_one, faults)
    else:
        max_rows = max_steps * train_data["batch_size"]
        chunks = sampled_documents(files, encode_one, faults, max_rows, seq_len, lambda: check_stop(should_stop))
    losses: list[float] = []  # of this rank's rows
    progress = None
    for chunk in chunks:
        check_stop(should_stop)
        if progress is None:
            what = f"{chunk.unit} of {files[0].parent.name} scored"
            progress = Progress(chunk.total, what, generator.args.show_progress)
        rows: list[list[int]] = []
        for _, tokens, n_bytes in chunk.documents:
            rows += rows_of(tokens.tolist(), seq_len)
            totals["n_documents"] += 1
            totals["n_tokens"] += max(len(tokens) - 1, 0)
            totals["n_bytes"] += n_bytes
        done = progress.done
        batches = batches_by_length([len(row) - 1 for row in rows], at_once)
        too_large = f"generator.max_tokens, or data.batch_size: {at_once} tokens at once do not fit the GPU's memory"
        with raise_on_all_ranks(), oom_as_user_error(too_large):
            for number, batch in enumerate(batches[rank::n_ranks], start=1):
                losses += [-ll.double().sum().item() for ll, _ in generator.score_batch([rows[i] for i in batch])]
                progress.done = done + (chunk.done - done) * number * n_ranks // (len(batches) + n_ranks)
                if rank == 0:
                    progress.show()
        progress.done = chunk.done
    if totals["n_tokens"] == 0 or totals["n_bytes"] == 0:
        raise UserError(f"{files[0].parent}: no text in its validation files that can be scored")
    if faults.are_skipped:
        totals["n_skipped"] = faults.n_skipped
    # Summed exactly, so that it does not matter which rank found what.
    nll = math.fsum(itertools.chain.from_iterable(gather_objects(losses)))
    return {"loss": nll / totals["n_tokens"], "bits_per_byte": nll / math.log(2) / totals["n_bytes"], **totals}


@contextlib.contextmanager
def watch_searches(model: LMTransformer, look: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Calls `look(block number, scores, slots)` of each search of a memory while the context lasts."""
    searching = {i: memory for i, memory in model.memories().items() if memory.query_linear is not None}
    for number, memory in searching.items():

        def watched(query: torch.Tensor, knn: int, get_indices=memory.get_indices, number=number):
            scores, slots = get_indices(query, knn)
            look(number, scores, slots)
            return scores, slots

        memory.get_indices = watched
    try:
        yield
    finally:
        for memory in searching.values():
            del memory.get_indices


@contextlib.contextmanager
def record_slots(model: LMTransformer) -> Iterator[dict[int, torch.Tensor]]:
    """Block number -> which slots its memory reads while the context lasts, a bool for each slot."""
    used = {
        number: torch.zeros(memory.size, dtype=torch.bool, device=memory.device)
        for number, memory in model.memories().items()
    }

    reader = 0  # the memory that is running: tables can be shared

    def enter(number: int, _memory: nn.Module, _inputs: tuple) -> None:
        nonlocal reader
        reader = number

    def record(_table: nn.Module, inputs: tuple) -> None:
        used[reader][inputs[0].flatten().long()] = True

    with contextlib.ExitStack() as stack:
        for number, memory in model.memories().items():
            stack.callback(memory.register_forward_pre_hook(functools.partial(enter, number)).remove)
            for table in memory.own_tables[:1]:  # PEER reads the same slots of its second table
                stack.callback(table.register_forward_pre_hook(record).remove)
        yield used


def count_slots(used: dict[int, torch.Tensor], shared: bool) -> dict[str, int]:
    """How many slots were read on any rank: by each memory, and where all share a table by all of them together."""
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
        owners = {memory.owner for memory in generator.model.memories().values()}
        results[MEMORY_SLOTS] = count_slots(used, len(owners) == 1)
    return results

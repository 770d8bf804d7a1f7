"""Which token reads which slots of the memories, as a table that a notebook opens (`validation.slot_reads`).

A row for each slot that a token reads in a head of a memory, the slot with the largest weight first:

    source, document   the source's name; the number of the document among those that can be read
    position           the token's place in the document
    token, text        its id; its part of the document's text, of which BOS and EOS have none
    layer, head        the block that the memory is in, and the head
    slot, weight       the slot, as a row of the value table, and its softmax weight

Only tokens that something is predicted from read: all of a document but the last.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from apps.main.generate import PackedCausalTransformerGenerator
from apps.main.validation import check_stop, rows_of, watch_searches
from lingua.distributed import raise_on_all_ranks, rank_and_size
from lingua.sources import Faults, encode_document, read_documents
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A piece of a document that is read at once; one token more in `tokens` than in `texts`."""

    document: int
    start: int
    tokens: list[int]
    texts: list[str]


def write_slot_reads(
    file: Path,
    generator: PackedCausalTransformerGenerator,
    files: dict[str, list[Path]],
    train_data: dict[str, Any],
    n_tokens: int,
    should_stop: Callable[[], bool] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Of the first `n_tokens` tokens of each source, into `file`, which is whole or not there. `metadata`: of the file.

    All ranks call it together; the first one does it. Raises UserError for documents that cannot be read, OSError
    where the file cannot be written, and EvaluationStopped on all ranks where `should_stop` says so on any.
    """
    with raise_on_all_ranks():
        if rank_and_size()[0] == 0:
            _write(file, generator, files, train_data, n_tokens, should_stop or (lambda: False), metadata)
    check_stop(should_stop)


def _write(
    file: Path,
    generator: PackedCausalTransformerGenerator,
    files: dict[str, list[Path]],
    train_data: dict[str, Any],
    n_tokens: int,
    should_stop: Callable[[], bool],
    metadata: dict[str, str] | None,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.tmp")
    try:
        with contextlib.ExitStack() as stack:
            writer = None
            for source, paths in files.items():
                rows = _first_rows(paths, generator.tokenizer, train_data, generator.model.max_seqlen, n_tokens)
                for batch in _batches(rows, generator.args.max_tokens):
                    if should_stop():
                        return
                    table = _reads_of(batch, source, generator)
                    if writer is None:
                        schema = table.schema.with_metadata(metadata)
                        writer = stack.enter_context(pq.ParquetWriter(beside, schema, compression="zstd"))
                    writer.write_table(table)
        os.replace(beside, file)
        logger.info("which tokens read which slots: %s", file)
    finally:
        beside.unlink(missing_ok=True)


def _first_rows(
    paths: list[Path], tokenizer: Tokenizer, train_data: dict[str, Any], seq_len: int, n_tokens: int
) -> Iterator[Row]:
    """The rows that validation scores, in the order of the documents, until `n_tokens` tokens are read."""
    left, document = n_tokens, -1
    faults = Faults(train_data.get("on_error", "stop"), is_told=False)  # validation has reported them
    for text, place in itertools.chain.from_iterable(read_documents(path, faults) for path in paths):
        try:
            tokens = encode_document(tokenizer, text, train_data["add_bos"], train_data["add_eos"])
        except ValueError as error:
            faults.skip(place.tell(str(error)))
            continue
        document += 1
        texts, _ = tokenizer.get_token_offsets(text, tokens)
        start = 0
        for row in rows_of(tokens, seq_len):
            row = row[: left + 1]
            n_read = len(row) - 1
            yield Row(document, start, row, texts[start : start + n_read])
            start, left = start + n_read, left - n_read
            if left == 0:
                return


def _batches(rows: Iterable[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Rows that follow each other, of at most `max_tokens` with their padding, or one."""
    batch: list[Row] = []
    for row in rows:
        longest = max(len(each.texts) for each in (*batch, row))
        if batch and (len(batch) + 1) * longest > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _reads_of(rows: list[Row], source: str, generator: PackedCausalTransformerGenerator) -> pa.Table:
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int, scores_NHK: torch.Tensor, slots_NHK: torch.Tensor) -> None:
        found[layer] = slots_NHK, scores_NHK.float().softmax(-1)

    with watch_searches(generator.model, keep):
        generator.score_batch([row.tokens for row in rows])
    lengths = [len(row.texts) for row in rows]
    document = np.repeat([row.document for row in rows], lengths).astype(np.int32)
    position = np.concatenate([row.start + np.arange(len(row.texts), dtype=np.int32) for row in rows])
    token = np.concatenate([np.asarray(row.tokens[:-1], dtype=np.int32) for row in rows])
    text = pa.array([text for row in rows for text in row.texts], type=pa.string()).dictionary_encode()
    parts = []
    for layer, (slots_NHK, weights_NHK) in found.items():
        n, heads, knn = slots_NHK.shape
        reader = np.arange(n).repeat(heads * knn)
        slot_type = np.int32 if generator.model.memories()[layer].size <= 2**31 else np.int64
        parts.append(
            pa.table(
                {
                    "source": pa.repeat(source, len(reader)).dictionary_encode(),
                    "document": document[reader],
                    "position": position[reader],
                    "token": token[reader],
                    "text": text.take(reader),
                    "layer": np.full(len(reader), layer, dtype=np.int16),
                    "head": np.tile(np.arange(heads, dtype=np.int16).repeat(knn), n),
                    "slot": slots_NHK.flatten().cpu().numpy().astype(slot_type),
                    "weight": weights_NHK.flatten().cpu().numpy(),
                }
            )
        )
    return pa.concat_tables(parts)

"""Text to batches: documents (lingua/sources.py) -> tokens -> packed rows -> shuffled batches.

Every stage is an iterator whose place can be written down as plain JSON and taken up again exactly:

    SourceReader   one share of the lines of one folder, pass after pass
    Mixture        draws a source by weight for each document
    TokenReader    reads ahead and tokenizes in threads
    RowPacker      concatenates, cuts into rows
    BatchShuffler  a buffer of rows, shuffled, read in batches, refilled as it is read
    RowStream      the rows of those batches, of which any number can be taken at a time
    BatchReader    one rank's batches, from the streams that it reads

A run has as many streams as it had data-parallel ranks at its start, each with a share of the lines, and they never
change. On that number of ranks each reads the stream with its own number. A checkpoint can go on with another batch
size and on another number of ranks (`redistribute_state`): fewer of them read several streams each, more of them
share one and take turns. No row is skipped or read twice by that.

A stream whose share of a source has no document reads all of that source, as other streams may: `shared_sources` in its
state.

With `load_async` the whole chain runs in its own program (`serve_batches`), which imports neither torch nor the
training code: it starts in a fraction of a second and cannot hold up the training loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lingua.errors import UserError
from lingua.sources import (
    ON_ERROR,
    TRAIN_FILES,
    Place,
    SourceReader,
    count_cores,
    encode_documents,
    find_files,
    has_document,
    look_at,
    no_documents,
    share_all,
    share_files,
)
from lingua.tokenizer import Tokenizer, TokenizerArgs, build_tokenizer

logger = logging.getLogger(__name__)

State = dict[str, Any]

# Batches that wait in the training process. The shuffle buffer is in the worker, so a few are enough
# to bridge a slow document.
QUEUED_BATCHES = 4

# A thread tokenizes a chunk of documents at a time: one that has this number of documents or of characters. It reads no
# further ahead than this number of chunks a thread, or of characters in all.
CHUNK_DOCUMENTS = 64
CHUNK_CHARS = 2**16
CHUNKS_AHEAD = 4
CHARS_AHEAD = 2**22

# More threads do not help: what is left to the one thread that reads and packs takes about a tenth of the tokenizer's
# time.
MAX_THREADS = 16

# So many documents in a row without a single token, or on which the tokenizer fails, mean that there is nothing to
# train on.
MAX_EMPTY_DOCUMENTS = 100_000


@dataclass
class DataArgs:
    """What to read and how to cut it (config section `data`). `on_error`: `stop` at a fault of the data, or `skip` and
    count it (lingua/sources.py).
    """

    root_dir: str | None = None
    sources: dict[str, float] = field(default_factory=dict)
    batch_size: int = 2
    seq_len: int = 2048
    n_views: int = 2
    seed: int = 42
    add_bos: bool = True
    add_eos: bool = True
    load_async: bool = True
    prefetch_size: int = 64
    on_error: str = "stop"
    tokenizer: TokenizerArgs = field(default_factory=TokenizerArgs)


def validate_data_args(args: DataArgs) -> None:
    """Raises UserError, one line that names the key, for what would fail later. Reads folder listings only."""
    for key in ("batch_size", "seq_len", "n_views", "prefetch_size"):
        if getattr(args, key) < 1:
            raise UserError(f"data.{key}: {getattr(args, key)} is too small, it must be 1 or more")
    if args.seed < 0:
        raise UserError(f"data.seed: {args.seed} is negative, it must be 0 or more")
    if args.on_error not in ON_ERROR:
        raise UserError(f"data.on_error: '{args.on_error}' is neither {' nor '.join(ON_ERROR)}")
    if not args.sources:
        raise UserError(
            "data.sources: empty; name at least one folder of data.root_dir and its weight, as in {wiki: 1.0}"
        )
    for source, weight in args.sources.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"data.sources.{source}: weight {weight} must be a number of 0 or more")
    if not 0 < sum(args.sources.values()) < math.inf:
        total = "0" if sum(args.sources.values()) == 0 else "too large to add up"
        raise UserError(f"data.sources: all weights are {total}; give at least one source a weight above 0")
    if args.root_dir is None:
        raise UserError("data.root_dir: not set; name the folder that holds the sources")
    if not Path(args.root_dir).is_dir():
        raise UserError(f"data.root_dir: no folder '{args.root_dir}' (from {os.getcwd()})")
    for source, weight in list(args.sources.items()):
        if weight == 0 and not (Path(args.root_dir) / source).is_dir():
            del args.sources[source]  # one of the config's that the command line leaves out
    for source in args.sources:
        find_files(args.root_dir, source, TRAIN_FILES)


def count_threads() -> int:
    """That tokenize: one for each core of this process, which it shares with the other ranks of its node."""
    return min(max(count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1), MAX_THREADS)


class Mark(NamedTuple):
    """A place in a mixture, cheap to make for each document; `Mixture.state` makes JSON of it."""

    n_draws: int  # since the mixture's start or `restore`
    sources: tuple[tuple[int, ...], ...]  # the readers' states, without faults of the tokenizer


class Document(NamedTuple):
    text: str
    place: Place
    source: int
    mark: Mark  # the place after the document


class Mixture:
    """Draws the source of each document by weight, independently."""

    def __init__(self, readers: list[SourceReader], weights: list[float], seed: tuple[int, int, int]):
        self.readers = readers
        self.rng = np.random.default_rng(seed)
        # What `rng.choice(len(readers), p=weights)` does at each call, worked out once: 10 times faster.
        cumulative = (np.array(weights, dtype=np.float64) / np.sum(weights)).cumsum()
        self._cumulative = (cumulative / cumulative[-1]).tolist()
        self._start()

    def _start(self) -> None:
        self._rng_start = self.rng.bit_generator.state
        self.mark = Mark(0, tuple(reader.state() for reader in self.readers))
        self.n_rejected = (0,) * len(self.readers)  # of each source, since the start or `restore`

    def state(self, mark: Mark, n_rejected: tuple[int, ...]) -> State:
        rng = np.random.PCG64()
        rng.state = self._rng_start
        rng.advance(mark.n_draws)
        sources = [(*place, n + more) for (*place, n), more in zip(mark.sources, n_rejected, strict=True)]
        return {"rng": rng.state, "sources": sources}

    def restore(self, state: State) -> None:
        self.rng.bit_generator.state = state["rng"]
        for reader, source in zip(self.readers, state["sources"], strict=True):
            reader.restore(tuple(source))
        self._start()

    def next_document(self) -> Document:
        number = bisect_right(self._cumulative, self.rng.random())
        text, place = self.readers[number].next_document()
        *source, n_skipped = self.readers[number].state()
        sources = list(self.mark.sources)
        sources[number] = (*source, n_skipped - self.n_rejected[number])
        self.mark = Mark(self.mark.n_draws + 1, tuple(sources))
        return Document(text, place, number, self.mark)

    def reject(self, document: Document, problem: str) -> None:
        """The tokenizer fails on this document, which need not be the last one that was given."""
        n_rejected = list(self.n_rejected)
        n_rejected[document.source] += 1
        self.n_rejected = tuple(n_rejected)
        self.readers[document.source].reject(document.place, problem)


class TokenReader:
    """The documents of a mixture as tokens, which the threads of `pool` make ahead.

    State, errors and counts are those of a reader that has read no further than the last document given. Only the
    warnings of faults that are skipped come earlier.
    """

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, args: DataArgs, pool: Executor, n_ahead: int):
        self.mixture = mixture
        self._n_ahead = n_ahead
        self._submit = partial(pool.submit, encode_documents, tokenizer, args.add_bos, args.add_eos)
        self._start()

    def _start(self) -> None:
        self.place = self.mixture.mark, self.mixture.n_rejected  # after the last document given
        self._given: Iterator[tuple[Document, np.ndarray | UserError]] = iter(())
        self._ahead: deque[tuple[list[Document], Future]] = deque()
        self._n_chars = 0  # in `_ahead`
        self._error: Exception | None = None  # with which the reading ended

    def state(self, place: tuple[Mark, tuple[int, ...]]) -> State:
        return self.mixture.state(*place)

    def restore(self, state: State) -> None:
        self.mixture.restore(state)
        self._start()

    def n_skipped(self) -> int:
        """Faults so far, each time that they were met."""
        mark, n_rejected = self.place
        return sum(source[-1] for source in mark.sources) + sum(n_rejected)

    def next_tokens(self) -> np.ndarray:
        """Of the next document, int32; none where the tokenizer fails and that is skipped."""
        item = next(self._given, None)
        if item is None:
            self._begin_chunk()
            item = next(self._given)
        document, tokens = item
        if isinstance(tokens, UserError):
            self.mixture.reject(document, str(tokens))
            tokens = np.empty(0, dtype=np.int32)
        self.place = document.mark, self.mixture.n_rejected
        return tokens

    def _begin_chunk(self) -> None:
        while len(self._ahead) < self._n_ahead and self._n_chars < CHARS_AHEAD and self._error is None:
            self._read_chunk()
        if not self._ahead:
            raise self._error
        documents, encoded = self._ahead.popleft()
        self._n_chars -= sum(len(document.text) for document in documents)
        self._given = zip(documents, encoded.result(), strict=True)

    def _read_chunk(self) -> None:
        documents, n_chars = [], 0
        try:
            while len(documents) < CHUNK_DOCUMENTS and n_chars < CHUNK_CHARS:
                documents.append(self.mixture.next_document())
                n_chars += len(documents[-1].text)
        except Exception as error:
            self._error = error
        if documents:
            self._n_chars += n_chars
            self._ahead.append((documents, self._submit([document.text for document in documents])))


# --- rows and batches --------------------------------------------------------------------------------------------


class RowPacker:
    """Concatenates documents' tokens, cuts rows of `seq_len + n_views - 1` tokens, `n_views - 1` of them shared."""

    def __init__(self, documents: TokenReader, args: DataArgs):
        self.documents = documents
        self.on_error = args.on_error
        self.step = args.seq_len
        self.row_len = args.seq_len + args.n_views - 1
        # Documents not yet used up, each with the place before it: that and the number of tokens used of the first one
        # are the place to resume from.
        self._pending: deque[tuple[Any, np.ndarray]] = deque()
        self._n_pending = 0
        self._used = 0

    def state(self) -> State:
        place = self._pending[0][0] if self._pending else self.documents.place
        return {"documents": self.documents.state(place), "tokens_used": self._used}

    def restore(self, state: State) -> None:
        self.documents.restore(state["documents"])
        self._pending.clear()
        self._n_pending = self._used = 0
        if state["tokens_used"]:
            self._read_document()
            if self._n_pending <= state["tokens_used"]:
                problem = "data: the document at the checkpoint's place is shorter than it was; the data changed"
                if self.on_error == "stop":
                    raise UserError(problem)
                logger.warning("%s", problem)
                return
            self._used = state["tokens_used"]
            self._n_pending -= self._used

    def fill(self, rows: np.ndarray) -> None:
        """Writes the next rows into `rows`, of shape (n, row_len)."""
        for row in rows:
            self._fill_row(row)

    def _read_document(self) -> None:
        for _ in range(MAX_EMPTY_DOCUMENTS):
            place = self.documents.place
            tokens = self.documents.next_tokens()
            if len(tokens):
                self._pending.append((place, tokens))
                self._n_pending += len(tokens)
                return
        raise UserError(
            f"data.sources: {MAX_EMPTY_DOCUMENTS} documents in a row are empty, or fail in the tokenizer; there is "
            "nothing to train on"
        )

    def _fill_row(self, row: np.ndarray) -> None:
        while self._n_pending < self.row_len:
            self._read_document()
        filled, used = 0, self._used
        for _, tokens in self._pending:
            part = tokens[used : used + self.row_len - filled]
            row[filled : filled + len(part)] = part
            filled, used = filled + len(part), 0
            if filled == self.row_len:
                break
        self._used += self.step
        self._n_pending -= self.step
        while self._pending and self._used >= len(self._pending[0][1]):
            self._used -= len(self._pending.popleft()[1])


class BatchShuffler:
    """Batches of rows, from a shuffled buffer of `prefetch_size * batch_size` of them. Endless."""

    def __init__(self, packer: RowPacker, args: DataArgs, seed: tuple[int, int, int]):
        self.packer = packer
        self.rng = np.random.default_rng(seed)
        self.batch_size, self.n_batches = args.batch_size, args.prefetch_size
        self._buffer = np.empty((self.n_batches * self.batch_size, packer.row_len), dtype=np.int32)
        # The current batch of the pass, and what it takes to make this pass's buffer again: the packer's state before
        # its rows were read, the generator's before they were shuffled.
        self._batch = self.n_batches
        self._pass_start: State = {}
        self._next_rows: State | None = None

    def state(self) -> State | None:
        """The place before the current batch; None as long as nothing was read."""
        return {**self._pass_start, "batch": self._batch} if self._pass_start else None

    def restore(self, state: State) -> None:
        self.packer.restore(state["rows"])
        self.rng.bit_generator.state = state["rng"]
        self._next_rows = None
        self._begin_pass()
        while self._batch < state["batch"]:
            self.advance()

    def current(self) -> np.ndarray:
        """The rows of the current batch, int32 of shape (batch_size, row_len): the buffer's own, until `advance`."""
        if self._batch == self.n_batches:
            self._begin_pass()
        return self._buffer[self._batch * self.batch_size :][: self.batch_size]

    def advance(self) -> None:
        """Puts new rows in the place of the current batch and goes to the next one."""
        self.packer.fill(self._buffer[self._batch * self.batch_size :][: self.batch_size])
        self._batch += 1

    def _begin_pass(self) -> None:
        rows_state = self._next_rows
        if rows_state is None:
            rows_state = self.packer.state()
            self.packer.fill(self._buffer)
        self._pass_start = {"rows": rows_state, "rng": self.rng.bit_generator.state}
        self._next_rows = self.packer.state()
        self.rng.shuffle(self._buffer, axis=0)
        self._batch = 0


class RowStream:
    """The rows of a shuffler's batches as one endless sequence, from the place of `state`; any number can be taken.

    Rows of the shuffler's current batch that are not taken yet stay in its buffer for the next time.
    """

    def __init__(self, shuffler: BatchShuffler, state: State):
        self.shuffler = shuffler
        self.number, self.rows_given, self._rows_used = state["stream"], state["rows_given"], state["rows_used"]
        self._shared_sources = state.get("shared_sources", [])
        if state["place"] is not None:
            shuffler.restore(state["place"])

    def state(self) -> State:
        place, n_skipped = self.shuffler.state(), self.shuffler.packer.documents.n_skipped()
        state = _stream_state(self.number, self._shared_sources)
        return state | {
            "rows_given": self.rows_given,
            "rows_used": self._rows_used,
            "place": place,
            "n_skipped": n_skipped,
        }

    def fill(self, rows: np.ndarray) -> None:
        """Writes the next rows into `rows`, of shape (n, row_len)."""
        while len(rows):
            part = self.shuffler.current()[self._rows_used :][: len(rows)]
            rows[: len(part)] = part
            self._use(len(part))
            rows = rows[len(part) :]

    def skip(self, n_rows: int) -> None:
        """Leaves out the next rows, which other ranks take."""
        while n_rows:
            n = len(self.shuffler.current()[self._rows_used :][:n_rows])
            self._use(n)
            n_rows -= n

    def _use(self, n_rows: int) -> None:
        self.rows_given += n_rows
        self._rows_used += n_rows
        if self._rows_used == self.shuffler.batch_size:
            self.shuffler.advance()
            self._rows_used = 0


class BatchReader:
    """The rows of a rank's batches, from streams of its own, or from one that it reads in turn with others. Endless.

    `turn` is (j, n): of each n batches of rows the rank takes the j-th (from 0) and leaves the others to the others.
    """

    def __init__(self, streams: list[RowStream], args: DataArgs, turn: tuple[int, int]):
        self.streams = streams
        self.shape = args.batch_size, args.seq_len + args.n_views - 1
        self.turn, self.n_turns = turn
        # A batch is made of parts, each from the stream that is behind. It is one part where its size divides the
        # start's. Larger batches in one part would take the streams out of step: with half the ranks and batches twice
        # as large, one step would read the one stream, and the next step the other.
        self.part = math.gcd(args.batch_size, streams[0].shuffler.batch_size)

    def state(self) -> list[State]:
        """The streams' places after the last batch; those that share a stream are at the end of their round."""
        return [stream.state() for stream in self.streams]

    def next_rows(self) -> np.ndarray:
        """Those of the next batch, int32 of shape (batch_size, seq_len + n_views - 1)."""
        rows = np.empty(self.shape, dtype=np.int32)
        shared = self.streams[0]  # and the only one, where there are turns
        shared.skip(self.turn * len(rows))
        for start in range(0, len(rows), self.part):
            behind = min(self.streams, key=lambda stream: stream.rows_given)  # the first of several
            behind.fill(rows[start : start + self.part])
        shared.skip((self.n_turns - 1 - self.turn) * len(rows))
        return rows


def make_views(rows: np.ndarray, seq_len: int) -> np.ndarray:
    """The batch of these rows, int64 of shape (n, seq_len, n_views): view v is the rows from token v on."""
    batch = np.empty((len(rows), seq_len, rows.shape[1] - seq_len + 1), dtype=np.int64)
    for view in range(batch.shape[-1]):
        batch[:, :, view] = rows[:, view : view + seq_len]
    return batch


# --- the loader's state ------------------------------------------------------------------------------------------
#
#     made_with  what the streams depend on: arguments, files, and how many streams there are
#     streams    the place in each stream that the rank reads (`_stream_state`)
#     turn       [j, n]: the rank is the j-th (from 0) of the n that share its stream; [0, 1] where none is shared

_STATE_KEYS = {"made_with", "streams", "turn"}
_STREAM_KEYS = {"stream", "rows_given", "rows_used", "place"}

# What the streams depend on. A state fits only the arguments that it was made with, but for the batch size: the streams
# keep that of the start.
_GEOMETRY = ("seed", "batch_size", "seq_len", "n_views", "prefetch_size", "add_bos", "add_eos")


def _stream_state(number: int, shared_sources: list[str]) -> State:
    """That of a stream of which nothing was read.

    rows_given: rows since the start; rows_used: of the batch at `place`, 0 to batch_size - 1; place: the shuffler's,
    None as long as nothing was read; n_skipped: faults met in all that was read by now, the rows that wait in the
    shuffler included; shared_sources: those that the stream reads all of, where there are any.
    """
    state = {"stream": number, "rows_given": 0, "rows_used": 0, "place": None, "n_skipped": 0}
    return state | ({"shared_sources": shared_sources} if shared_sources else {})


def count_skipped(state: State) -> int:
    """Faults that the rank of this state has skipped since the run began. Of a stream that ranks share, one counts."""
    turn, _ = state["turn"]
    return 0 if turn else sum(stream.get("n_skipped", 0) for stream in state["streams"])


def shared_sources(state: State) -> list[tuple[str, int]]:
    """(source, stream) for each source that a stream of this rank reads all of, since its share has no document."""
    return [(name, stream["stream"]) for stream in state["streams"] for name in stream.get("shared_sources", [])]


def describe_shared_sources(pairs: list[tuple[str, int]], n_streams: int) -> list[str]:
    """A line for each source in the `shared_sources` of all ranks."""
    ranks: dict[str, set[int]] = {}
    for name, number in sorted(pairs):
        ranks.setdefault(name, set()).add(number)
    return [
        f"data.sources.{name}: not every one of {n_streams} ranks has a document in its share, so all of the source is "
        f"read by rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))} too"
        for name, numbers in ranks.items()
    ]


def _describe_args(args: DataArgs) -> State:
    description = {f"data.{key}": getattr(args, key) for key in _GEOMETRY}
    return description | {
        "data.sources": [list(item) for item in args.sources.items()],
        "data.tokenizer.name": args.tokenizer.name,
    }


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise UserError(f"data: rank {rank} must be below the {world_size} data-parallel ranks")


def init_dataloader_state_from_args(args: DataArgs, rank: int, world_size: int) -> State:
    """The state, plain JSON, of a loader that has read nothing, for one data-parallel rank.

    Looks for a document in the rank's share of every source; where there is none, the rank reads all of that source
    (`shared_sources`). Raises UserError for bad arguments, naming the key (see `validate_data_args`), and for a source
    without a document.
    """
    validate_data_args(args)
    _check_rank(rank, world_size)
    files = {name: find_files(args.root_dir, name, TRAIN_FILES) for name in args.sources}
    made_with = _describe_args(args) | {
        "files": {name: [path.name for path in paths] for name, paths in files.items()},
        "bytes": {name: [path.stat().st_size for path in paths] for name, paths in files.items()},
        "streams": world_size,
    }
    shared = []
    for name, paths in files.items():
        if args.sources[name] == 0 or has_document(share_files(paths, rank, world_size), args.on_error):
            continue
        if not has_document(share_all(paths), args.on_error):
            raise no_documents(name, paths)
        shared.append(name)
    return {"made_with": made_with, "streams": [_stream_state(rank, shared)], "turn": [0, 1]}


def _has_keys(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and keys <= value.keys()


def _check_is_state(state: Any) -> None:
    if not (
        _has_keys(state, _STATE_KEYS)
        and _has_keys(state["made_with"], {"data.batch_size", "streams"})
        and isinstance(state["streams"], list)
        and state["streams"]
        and all(_has_keys(stream, _STREAM_KEYS) for stream in state["streams"])
    ):
        raise UserError(
            "data: the checkpoint's loader state is not one of this code; start a new run from its weights with "
            "checkpoint.init_ckpt_path"
        )


def _args_at_start(args: DataArgs, state: State) -> DataArgs:
    return replace(args, batch_size=state["made_with"]["data.batch_size"])


def check_state_fits(args: DataArgs, state: State) -> None:
    """Raises UserError, naming the first difference, if `state` was made with other data or arguments.

    `batch_size` may be another one than then.
    """
    _check_is_state(state)
    made_with = state["made_with"]
    for key, now in _describe_args(_args_at_start(args, state)).items():
        if made_with.get(key) != now:
            raise _lost_place(key, now, made_with.get(key))
    if args.on_error == "skip":
        return  # the reader tells what it comes across
    for source, names in made_with["files"].items():
        folder = Path(args.root_dir, source)
        looks = {name: look_at(folder / name) for name in names}
        gone = [name for name, look in looks.items() if look is None]
        if gone:
            n_now = f"{len(names) - len(gone)} files"
            raise _lost_place(f"data.sources.{source}", n_now, f"{len(names)} files (among what differs: {gone[0]})")
        # States of before sizes were kept have none.
        for name, size in zip(names, made_with["bytes"][source] if "bytes" in made_with else [], strict=False):
            if looks[name].size != size:
                raise UserError(
                    f"{folder / name}: {looks[name].size:,} bytes now, but {size:,} when the run began, so its place "
                    "in the data is lost; set it back, start a new run from the weights with "
                    "checkpoint.init_ckpt_path, or go on inexactly with data.on_error=skip"
                )


def _lost_place(key: str, now: Any, then: Any) -> UserError:
    return UserError(
        f"{key}: {now} now, but {then} when the checkpoint was written, so its place in the data is lost; set it back, "
        "or start a new run from the weights with checkpoint.init_ckpt_path"
    )


def _warn_of_new_files(args: DataArgs, state: State) -> None:
    """They are left out: they would change who reads what. The rank that reads the first stream says it."""
    if state["streams"][0]["stream"] > 0 or state["turn"][0] > 0:
        return
    for source, names in state["made_with"]["files"].items():
        new = [path.name for path in find_files(args.root_dir, source, TRAIN_FILES) if path.name not in names]
        if new:
            logger.warning(
                "data.sources.%s: left out of this run, which began without %s: %s%s",
                *(source, "it" if len(new) == 1 else "them", ", ".join(new[:3]), ", ..." if len(new) > 3 else ""),
            )


def redistribute_state(states: list[State], rank: int, world_size: int) -> State:
    """The state of one of `world_size` data-parallel ranks that go on where others stopped.

    `states` are those of all ranks that wrote a checkpoint, in order of rank. Of W streams, rank r of R reads
    r * W // R up to (r + 1) * W // R, without the last; where R > W, it shares r * W // R with all ranks of which that
    is the stream. For as many ranks as before the states stay as they are. Where R divides W or W divides R, and all
    ranks together read as many rows a step as before, they are the same rows.

    Raises UserError where the states are none of this code, are not of one checkpoint, or lack a stream.
    """
    _check_rank(rank, world_size)
    _check_same_run(states)
    streams = _collect_streams(states)
    if len(states) == world_size:
        return states[rank]
    owners = [other * len(streams) // world_size for other in range(world_size)]
    first, turn = owners[rank], [rank - owners.index(owners[rank]), owners.count(owners[rank])]
    behind = max(first + 1, (rank + 1) * len(streams) // world_size)
    return {"made_with": states[0]["made_with"], "streams": streams[first:behind], "turn": turn}


def _check_same_run(states: list[State]) -> None:
    if not states:
        raise UserError("data: there is no loader state to go on from; resume from another checkpoint")
    for rank, state in enumerate(states):
        _check_is_state(state)
        first, other = states[0]["made_with"], state["made_with"]
        for key in [*first, *other]:
            if first.get(key) != other.get(key):
                raise UserError(
                    f"data: the loader states of ranks 0 and {rank} are not of one run, {key} differs; resume from "
                    "another checkpoint"
                )


def _collect_streams(states: list[State]) -> list[State]:
    """The states of all streams, by number."""
    found: dict[int, tuple[int, State]] = {}
    for rank, state in enumerate(states):
        for stream in state["streams"]:
            other, known = found.setdefault(stream["stream"], (rank, stream))
            if known != stream:
                raise UserError(
                    f"data: the loader states of ranks {other} and {rank} have stream {stream['stream']} at different "
                    "places; resume from another checkpoint"
                )
    numbers = range(states[0]["made_with"]["streams"])
    missing = [str(number) for number in numbers if number not in found]
    if missing:
        raise UserError(
            f"data: the loader states lack stream {', '.join(missing)} of {len(numbers)} (from 0); resume from another "
            "checkpoint"
        )
    return [found[number][1] for number in numbers]


# --- the loader --------------------------------------------------------------------------------------------------


def _build_streams(
    args: DataArgs, state: State, show: Callable[[Path], None], pool: Executor, n_ahead: int
) -> list[RowStream]:
    """The streams that the state's rank reads, at their places. `args` are those of the run's start."""
    made_with = state["made_with"]
    n_streams = made_with["streams"]
    files = {name: [Path(args.root_dir, name, file) for file in made_with["files"][name]] for name in args.sources}
    tokenizer = build_tokenizer(args.tokenizer.name, args.tokenizer.path)
    tokenizer.encode("", args.add_bos, args.add_eos)  # what fails here is no document's fault
    streams = []
    for stream in state["streams"]:
        number = stream["stream"]
        shares = {
            name: share_all(paths)
            if name in stream.get("shared_sources", [])
            else share_files(paths, number, n_streams)
            for name, paths in files.items()
        }
        readers = [SourceReader(name, shares[name], args.on_error, show) for name in files]
        mixture = Mixture(readers, list(args.sources.values()), (args.seed, number, n_streams))
        packer = RowPacker(TokenReader(mixture, tokenizer, args, pool, n_ahead), args)
        shuffler = BatchShuffler(packer, args, (args.seed + 1, number, n_streams))
        streams.append(RowStream(shuffler, stream))
    return streams


def _iterate(
    args: DataArgs, state: State, show: Callable[[Path], None] = lambda path: None
) -> Iterator[tuple[np.ndarray, State]]:
    """The rows of each batch, and the state after it."""
    check_state_fits(args, state)
    _warn_of_new_files(args, state)
    n_threads = count_threads()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="tokenizer")
    try:
        streams = _build_streams(_args_at_start(args, state), state, show, pool, CHUNKS_AHEAD * n_threads)
        reader = BatchReader(streams, args, state["turn"])
        while True:
            rows = reader.next_rows()
            yield rows, {**state, "streams": reader.state()}
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def build_dataloader_from_args(
    args: DataArgs, state: State, timeout: float | None = None
) -> Iterator[Iterator[tuple[np.ndarray, State]]]:
    """An endless iterator of `(batch, state)`; `state` resumes after that batch.

    A batch is int64 of shape (batch_size, seq_len, n_views); view 0 is the input, view 1 the target. Errors of the
    data (UserError with file and line, OSError) come out of `next()`, from the worker process too. So does
    TimeoutError, where that process neither gives a batch nor reads a document for `timeout` seconds.
    """
    if args.load_async:
        worker = _Worker(args, state, timeout)
        try:
            yield iter(worker)
        finally:
            worker.close()
    else:
        with contextlib.closing(_iterate(args, state)) as batches:
            yield ((make_views(rows, args.seq_len), state) for rows, state in batches)


# --- the worker process ------------------------------------------------------------------------------------------
#
# Frames on the pipe: length of the header, header (JSON), raw bytes of a batch's rows where the header tells a shape.
# What the worker logs comes in frames, too.


# Signals to the job are the trainer's to answer; the worker goes when its pipe does.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class _Place:
    """Memory in which a process says what file it is at, to be read by another one even while the first one hangs.

    The number of times that it was said (8 bytes), the length of the file's name (2), the name.
    """

    SIZE = 2**13

    def __init__(self, descriptor: int | None = None):
        if descriptor is None:
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("data-loader")
            else:
                with tempfile.TemporaryFile() as file:
                    descriptor = os.dup(file.fileno())
            os.truncate(descriptor, self.SIZE)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, self.SIZE)
        self._path: Path | None = None
        self._times = 0

    def show(self, path: Path) -> None:
        if path is not self._path:
            self._path = path
            name = os.fsencode(path)[: self.SIZE - 10]
            struct.pack_into(f"<H{len(name)}s", self._memory, 8, len(name), name)
        self._times += 1
        struct.pack_into("<Q", self._memory, 0, self._times)

    def read(self) -> tuple[int, str]:
        """How often something was said, and the file's name, which is empty as long as nothing was."""
        times, length = struct.unpack_from("<QH", self._memory)
        return times, os.fsdecode(self._memory[10 : 10 + length])

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)


class _Worker:
    """Runs `serve_batches` in its own process and hands its batches on; ends with the process that made it."""

    def __init__(self, args: DataArgs, state: State, timeout: float | None = None):
        self.timeout = timeout
        self._place = _Place()
        package_root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        # The worker inherits these signals blocked, so that none ends it before it has said that it ignores them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from lingua.data import serve_batches; serve_batches({self._place.descriptor})",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._place.descriptor],
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with contextlib.suppress(BrokenPipeError):  # it died at once: `_next` tells how
            self._process.stdin.write(json.dumps({"args": asdict(args), "state": state}).encode())
            self._process.stdin.close()
        self._start, self._seq_len = state, args.seq_len
        self._queue: queue.Queue[tuple[np.ndarray, State] | BaseException] = queue.Queue(maxsize=QUEUED_BATCHES)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="data-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[np.ndarray, State]]:
        while True:
            item = self._get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _get(self) -> tuple[np.ndarray, State] | BaseException:
        if self.timeout is None:
            return self._queue.get()
        times, since = self._place.read()[0], time.monotonic()
        while True:
            try:
                return self._queue.get(timeout=self.timeout / 20)
            except queue.Empty:
                before, (times, path) = times, self._place.read()
            if times != before:
                since = time.monotonic()
            elif time.monotonic() - since > self.timeout:
                return TimeoutError(self._describe_silence(path))

    def _describe_silence(self, path: str) -> str:
        import psutil

        status = "gone"
        with contextlib.suppress(psutil.Error):
            status = psutil.Process(self._process.pid).status()
        at = f"at {path}" if path else "that has not opened a file yet"
        return (
            f"data: the loader (process {self._process.pid}, {status}) {at} has read no document for "
            f"{self.timeout:.0f} s; see whether that disk answers, or raise distributed.timeout"
        )

    def close(self) -> None:
        # Nothing of worth lies in the worker: whoever trains holds the state of the last batch that it used.
        self._closing.set()
        self._process.kill()
        self._process.wait()
        while self._thread.is_alive() or not self._queue.empty():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.01)
        self._process.stdout.close()
        self._place.close()
        self._queue.put(RuntimeError("data: the loader is closed"))

    def _receive(self) -> None:
        try:
            while not self._closing.is_set():
                self._queue.put(self._receive_one(self._process.stdout))
        except BaseException as error:
            self._queue.put(error)

    def _receive_one(self, pipe: BinaryIO) -> tuple[np.ndarray, State]:
        header = self._read_header(pipe)
        while "warning" in header:
            logger.warning("%s", header["warning"])
            header = self._read_header(pipe)
        if "error" in header:
            kind = {"UserError": UserError, "OSError": OSError}.get(header["error"], RuntimeError)
            raise kind(header["message"])
        shape = header["shape"]
        rows = np.frombuffer(self._read(pipe, 4 * math.prod(shape)), dtype=np.int32).reshape(shape)
        return make_views(rows, self._seq_len), {**self._start, "streams": header["streams"]}

    def _read_header(self, pipe: BinaryIO) -> State:
        return json.loads(self._read(pipe, struct.unpack("<Q", self._read(pipe, 8))[0]))

    def _read(self, pipe: BinaryIO, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            n = pipe.readinto(view)
            if not n:
                code = self._process.wait()
                if code >= 0:
                    raise ChildProcessError(
                        f"data: the loader's process ended with exit code {code}; see its message above"
                    )
                name = signal.Signals(-code).name if -code in iter(signal.Signals) else f"signal {-code}"
                raise ChildProcessError(f"data: the loader's process was killed by {name}; out of memory?")
            view = view[n:]
        return data


class _SendingHandler(logging.Handler):
    """Sends what is logged to where the log is."""

    def __init__(self, send: Callable[[State], None]):
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send({"warning": record.getMessage()})


def serve_batches(place: int) -> None:
    """The worker's main program: arguments and state as JSON on stdin, batches on stdout until the pipe closes.

    `place`: the descriptor of the memory in which it says what file it is at.
    """
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    # A library that prints would break the frames, so the pipe moves and stdout becomes stderr.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(header: State, payload: bytes | memoryview = b"") -> None:
        encoded = json.dumps(header).encode()
        pipe.write(struct.pack("<Q", len(encoded)) + encoded)
        pipe.write(payload)
        pipe.flush()

    logging.getLogger().addHandler(_SendingHandler(send))
    try:
        request = json.loads(sys.stdin.buffer.read())
        fields = request["args"]
        args = DataArgs(**{**fields, "tokenizer": TokenizerArgs(**fields["tokenizer"])})
        for rows, state in _iterate(args, request["state"], _Place(place).show):
            send({"shape": rows.shape, "streams": state["streams"]}, memoryview(rows).cast("B"))
    except BrokenPipeError:
        os._exit(0)  # the trainer is gone; closing the pipe in the ordinary way would only fail again
    except (UserError, OSError) as error:
        kind = "UserError" if isinstance(error, UserError) else "OSError"
        send({"error": kind, "message": str(error)})
    except Exception:
        send({"error": "RuntimeError", "message": f"data: the loader failed\n{traceback.format_exc()}"})

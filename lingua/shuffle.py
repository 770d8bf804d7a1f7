"""A global shuffle of any number of documents in a given memory: the same output for the same seed, whatever happens.

Each document has a key, 64 random-looking bits worked out from the seed, its file's number and its place in the file.
The output is all documents in the order of their keys, cut into chunk files of equal counts. Memory, workers and being
killed change how the work is divided, never the keys, so they cannot change the output. Two passes do it:

    scatter   A unit, a few files or a part of a large one, is read in batches that fit memory. Each batch is sorted by
              key and written as a run: its documents, their keys, and where each ends. A unit's runs are one file.
    gather    A chunk is a range of keys, which in each run is one stretch. So many stretches are read as fit memory,
              and their documents written in order: each byte is read once.

Tasks (units, then chunks) leave a file that is whole or not there, so a run that was killed goes on with those that are
missing. They are worked on in this process, in several, or in a SLURM job array (`lingua.shuffle_jobs`).

Equal keys are told apart by the order of the documents: within a file no two have the same key, and runs are taken in
the order of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lingua.documents import (
    DOCUMENT_COPIES,
    SKIPPED_TOLD,
    USUAL_EXPANSION,
    InputFile,
    Part,
    Piece,
    Skipped,
    filesystem,
    is_remote,
    join,
    read_part,
)
from lingua.errors import UserError

FORMAT = 1  # of the work folder and the manifest; another one is another order or layout
MAGIC = b"lingua.1"

# A unit is large enough to be worth a file and small enough to be lost. The largest data have units in proportion, so
# that there are not too many files to gather from.
UNIT_BYTES, MAX_UNITS = 128_000_000, 4096
MIN_SHARE = 16_000_000  # of memory for a worker's data, however little it was given
MIN_DOCUMENT_BYTES = 64  # on average: a batch of shorter ones is cut earlier, as its index is not small beside it
WRITE_BYTES = 1 << 19  # gathered at a time
INDEX_BYTES = 96  # in work for each document whose place is looked up

DEFAULT_VALIDATION = 10_000

Report = Callable[[float, int], None]  # how much of a task is done, from 0 to 1, and its documents so far


# --- what is to be done ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All that the output depends on, and where it is made.

    `n_validation`: documents for validation; None: one in a hundred, up to 10,000. `out`: folder or URL of the output;
    `work`: local folder for runs; `stage`: folder for finished chunks. `unit_bytes` cuts the work, not the output.
    `on_error`: `skip` leaves out what is no document, and counts it. `columns`: what is kept of each; None: all.
    """

    name: str
    out: str
    work: str
    stage: str
    files: tuple[InputFile, ...]
    seed: int = 42
    nchunks: int = 32
    n_validation: int | None = None
    unit_bytes: int = UNIT_BYTES
    on_error: str = "stop"
    columns: tuple[str, ...] | None = None

    def chunk_name(self, chunk: int) -> str:
        return f"{self.name}.chunk.{chunk:0{max(2, len(str(self.nchunks - 1)))}d}.jsonl"

    def units(self) -> list[list[Part]]:
        return cut_units(self.files, self.unit_bytes)

    @property
    def validation_name(self) -> str:
        return f"{self.name}.val.jsonl"

    @property
    def is_published_at_once(self) -> bool:
        """Whether chunks wait in `stage` until all are whole. To a URL they go as they are made."""
        return not is_remote(self.out)

    def facts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _mark(self) -> str:
        return hashlib.blake2b(json.dumps(self.facts()).encode(), digest_size=4).hexdigest()

    # Folders of this very plan: a job of another one that was given up may still be writing into its own.

    @functools.cached_property
    def units_folder(self) -> Path:
        return Path(self.work, f"units-{self._mark}")

    @functools.cached_property
    def chunks_folder(self) -> Path:
        return Path(self.stage, f"chunks-{self._mark}")

    def unit_file(self, unit: int) -> Path:
        return self.units_folder / f"{unit:06d}.runs"

    def skipped_file(self, unit: int) -> Path:
        """What was left out of a unit, if anything was: {"count": n, "first": [why, ...]}."""
        return self.units_folder / f"{unit:06d}.skipped"

    def staged(self, chunk: int, suffix: str) -> Path:
        return self.chunks_folder / f"{chunk:06d}.{suffix}"

    def save(self) -> None:
        description = {"format": FORMAT, **self.facts()}
        write_whole(Path(self.work, "plan.json"), json.dumps(description, indent=1).encode())

    @classmethod
    def load(cls, work: str) -> Plan | None:
        """The one that was saved in a folder; None where there is no plan of this format."""
        try:
            description = json.loads(Path(work, "plan.json").read_bytes())
        except (OSError, ValueError):
            return None
        if description.pop("format", None) != FORMAT:
            return None
        description["files"] = tuple(InputFile(*file) for file in description["files"])
        if description.get("columns") is not None:
            description["columns"] = tuple(description["columns"])
        return cls(**description)


def cut_units(files: tuple[InputFile, ...], at_least: int) -> list[list[Part]]:
    """The files' parts, in order, in groups of about `at_least` bytes, or more where that makes too many of them."""
    weights = [file.size * USUAL_EXPANSION[file.suffix] for file in files]
    unit_bytes = max(at_least, sum(weights) / MAX_UNITS)
    units: list[list[Part]] = []
    filled = unit_bytes
    for file, weight in zip(files, weights, strict=True):
        count = max(1, round(weight / unit_bytes)) if file.is_plain or file.is_parquet else 1
        for number in range(count if file.size else 0):
            if filled >= unit_bytes:
                units.append([])
                filled = 0
            units[-1].append(Part(file, number, count))
            filled += weight / count
    return units


def keys_of(seed: int, file_number: int, places: np.ndarray) -> np.ndarray:
    """uint64, one for each of the places (uint64) in a file. Different places of a file have different keys."""
    digest = hashlib.blake2b(f"{seed}:{file_number}".encode(), digest_size=16).digest()
    first, second = np.frombuffer(digest, "<u8")
    return _mix(_mix(places ^ first) ^ second)


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which each bit of the input turns half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# --- files that are whole or not there ---------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that is at `path` after the block, or not at all. Several may write it at once, if they write the same."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise UserError(
                f"{path.parent}: cannot write: {error.strerror or error}; started again it goes on from here"
            ) from None
        raise


def write_whole(path: Path, content: bytes) -> None:
    with writing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def uploading(url: str) -> Iterator[IO[bytes]]:
    """A file behind a URL. What was written to it before an error is dropped where the filesystem can."""
    system, inner = filesystem(url)
    try:
        stream = system.open(inner, "wb")
        try:
            yield stream
        except BaseException:
            with contextlib.suppress(Exception):
                stream.discard()
                stream.closed = True
            with contextlib.suppress(Exception):
                system.rm(inner)
            raise
        stream.close()
    except OSError as error:
        raise UserError(f"{url}: cannot write: {error}; started again it goes on from here") from None


def _write_in_order(
    stream: IO[bytes], data: memoryview, starts: np.ndarray, stops: np.ndarray, on_written: Callable[[bytes], None]
) -> None:
    """Writes `data[starts[i] : stops[i]]` for all i, gathered to pieces of WRITE_BYTES, or a document where longer."""
    ends = np.cumsum(stops - starts)
    begin = 0
    while begin < len(ends):
        written = ends[begin - 1] if begin else 0
        end = min(int(np.searchsorted(ends, written + WRITE_BYTES, side="right")), begin + 4096)
        end = max(end, begin + 1)
        # Slices of a memoryview copy nothing; the join copies each document once.
        pairs = zip(starts[begin:end].tolist(), stops[begin:end].tolist(), strict=True)
        piece = b"".join([data[start:stop] for start, stop in pairs])
        stream.write(piece)
        on_written(piece)
        begin = end


# --- pass 1 ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A sorted batch in a unit's file: `bytes` of documents from `start` on, then their keys, then their ends.

    Keys are uint64; ends too, counted from `start`.
    """

    unit: int
    documents: int
    bytes: int
    start: int


class Scatter:
    """Pass 1, unit by unit, with the same buffers. `memory`: bytes for all data in work."""

    def __init__(self, plan: Plan, memory: int):
        self.plan = plan
        self.units = plan.units()
        self.file_numbers = {file: number for number, file in enumerate(plan.files)}
        # Sorting takes a part of the rest, or a long document all of it: what reading takes is small beside it.
        self._buffer = np.empty(memory * 6 // 10, dtype=np.uint8)
        self.max_document = (memory - len(self._buffer)) // DOCUMENT_COPIES
        self._max_documents = len(self._buffer) // MIN_DOCUMENT_BYTES

    @staticmethod
    def n_tasks(plan: Plan) -> int:
        return len(plan.units())

    @staticmethod
    def result(plan: Plan, unit: int) -> Path:
        """The file that is there when the unit is done."""
        return plan.unit_file(unit)

    @staticmethod
    def n_documents(plan: Plan, unit: int) -> int:
        """Of a unit that is done."""
        return sum(run.documents for run in read_runs(plan.unit_file(unit), unit))

    def run(self, unit: int, report: Report) -> int:
        """Reads a unit and writes its runs; the number of documents."""
        runs: list[Run] = []
        parts = self.units[unit]
        skipped = Skipped(self.plan.on_error)
        with writing(self.plan.unit_file(unit)) as stream:
            batch = _Batch(self._buffer)
            n_documents = 0
            for number, part in enumerate(parts):
                file_number = self.file_numbers[part.file]
                for piece in read_part(part, self.max_document, self.plan.columns, skipped):
                    keys = keys_of(self.plan.seed, file_number, piece.places)
                    if not batch.has_room(piece, self._max_documents):
                        runs += batch.flush(stream, unit)
                    if not batch.has_room(piece, self._max_documents):
                        # One long document, mostly: the piece is its own batch.
                        runs.append(_write_run(stream, unit, piece.data, keys, piece.starts, piece.stops))
                    else:
                        batch.add(piece, keys)
                    n_documents += len(keys)
                    report((number + piece.done) / len(parts), n_documents)
            runs += batch.flush(stream, unit)
            if skipped.count:
                facts = {"count": skipped.count, "first": skipped.first}
                write_whole(self.plan.skipped_file(unit), json.dumps(facts).encode())
            footer = json.dumps([run[1:] for run in runs]).encode()
            stream.write(footer + struct.pack("<Q8s", len(footer), MAGIC))
        return n_documents


class _Batch:
    """Documents of several pieces, copied together."""

    def __init__(self, buffer: np.ndarray):
        self._buffer = buffer
        self._filled = self._n_documents = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def has_room(self, piece: Piece, max_documents: int) -> bool:
        size = int(piece.stops[-1] - piece.starts[0])
        return self._filled + size <= len(self._buffer) and self._n_documents + len(piece.starts) <= max_documents

    def add(self, piece: Piece, keys: np.ndarray) -> None:
        begin, end = int(piece.starts[0]), int(piece.stops[-1])
        self._buffer[self._filled : self._filled + end - begin] = np.frombuffer(piece.data, np.uint8)[begin:end]
        shift = self._filled - begin
        self._parts.append((keys, piece.starts + shift, piece.stops + shift))
        self._filled += end - begin
        self._n_documents += len(keys)

    def flush(self, stream: IO[bytes], unit: int) -> list[Run]:
        """Writes what there is as one run."""
        if not self._parts:
            return []
        keys, starts, stops = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        self._parts.clear()
        self._filled = self._n_documents = 0
        return [_write_run(stream, unit, memoryview(self._buffer), keys, starts, stops)]


def _write_run(
    stream: IO[bytes], unit: int, data: memoryview, keys: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> Run:
    start = stream.tell()
    order = np.argsort(keys, kind="stable")
    starts, stops = starts[order], stops[order]
    _write_in_order(stream, data, starts, stops, lambda piece: None)
    ends = np.cumsum(stops - starts)
    stream.write(keys[order].astype("<u8", copy=False).data)
    stream.write(ends.astype("<u8", copy=False).data)
    return Run(unit, len(keys), int(ends[-1]), start)


def read_runs(file: Path, unit: int) -> list[Run]:
    """Those of a unit's file. Raises UserError where it is not whole."""
    with open(file, "rb") as stream:
        stream.seek(-min(16, file.stat().st_size), os.SEEK_END)
        tail = stream.read()
        length, magic = struct.unpack("<Q8s", tail) if len(tail) == 16 else (0, b"")
        if magic != MAGIC:
            raise UserError(f"{file}: damaged; remove it and start again")
        stream.seek(-16 - length, os.SEEK_END)
        return [Run(unit, *run) for run in json.loads(stream.read(length))]


# --- the index of all runs ---------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """Documents of a range of keys, run after run, by key within a run. Arrays of one length.

    `runs`: the number of each one's run; `starts`: of its first byte in the unit's file; `lengths` in bytes.
    """

    keys: np.ndarray
    runs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Index:
    """Looks keys up in runs, which it reads only where it must: keys are spread evenly, so it knows about where."""

    def __init__(self, plan: Plan, runs: list[Run]):
        self.plan = plan
        self.runs = runs
        self._unit, self._fd = -1, -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._unit = self._fd = -1

    def read_into(self, view: memoryview, unit: int, start: int) -> None:
        """Fills `view` with a unit's file from `start` on."""
        file = self.plan.unit_file(unit)
        try:
            if unit != self._unit:
                self.close()
                self._fd, self._unit = os.open(file, os.O_RDONLY), unit
            while len(view):
                n = os.preadv(self._fd, [view], start)
                if not n:
                    raise UserError(f"{file}: cut off; remove {self.plan.work} and start again")
                view, start = view[n:], start + n
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None

    def _array(self, run: Run, start: int, n: int) -> np.ndarray:
        values = np.empty(n, dtype="<u8")
        self.read_into(memoryview(values).cast("B"), run.unit, start)
        return values

    def _keys(self, run: Run, begin: int, end: int) -> np.ndarray:
        return self._array(run, run.start + run.bytes + 8 * begin, end - begin)

    def rank(self, run: Run, key: int) -> int:
        """How many of the run's documents have smaller keys; `key` is from 0 to 2**64."""
        n = run.documents
        if key >= 1 << 64:
            return n
        middle, margin = n * key >> 64, 16 + 4 * int(n**0.5)
        while True:
            begin, end = max(middle - margin, 0), min(middle + margin, n)
            found = begin + int(np.searchsorted(self._keys(run, begin, end), np.uint64(key)))
            if (begin < found or begin == 0) and (found < end or end == n):
                return found
            margin *= 8

    def count_below(self, key: int) -> int:
        return sum(self.rank(run, key) for run in self.runs)

    def load(self, low: int, high: int) -> Entries:
        """The documents with low <= key < high; from 0 to 2**64."""
        columns: list[tuple[np.ndarray, ...]] = []
        for number, run in enumerate(self.runs):
            begin, end = self.rank(run, low), self.rank(run, high)
            if begin == end:
                continue
            # The end of the document before is the start of the first.
            first = max(begin - 1, 0)
            at = run.start + run.bytes + 8 * (run.documents + first)
            ends = self._array(run, at, end - first).astype(np.int64)
            starts = np.concatenate([[0], ends[:-1]]) if first == begin else ends[:-1]
            ends = ends[begin - first :]
            runs = np.full(end - begin, number, dtype=np.int32)
            columns.append((self._keys(run, begin, end), runs, starts + run.start, ends - starts))
        if not columns:
            empty = np.empty(0, dtype=np.int64)
            return Entries(empty.astype(np.uint64), empty.astype(np.int32), empty, empty)
        return Entries(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def key_at(self, rank: int, n_documents: int) -> tuple[int, int]:
        """The key of the document that has `rank` others before it, and how many of these have the same key."""
        middle, margin = (rank << 64) // n_documents, (64 + 8 * int(n_documents**0.5) << 64) // n_documents
        while True:
            low, high = max(middle - margin, 0), min(middle + margin, 1 << 64)
            below = self.count_below(low)
            if below <= rank < below + (inside := self.count_below(high) - below):
                keys = np.sort(self.load(low, high).keys)
                assert len(keys) == inside
                key = keys[rank - below]
                return int(key), rank - below - int(np.searchsorted(keys, key))
            margin *= 8


# --- between the passes ------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A chunk: `documents` from the one on that has key `low` and `skip` others of this key before it.

    The first `validation` of them go to the validation file. No key in it is above `high`.
    """

    low: int
    skip: int
    high: int
    documents: int
    validation: int


class Totals(NamedTuple):
    """What pass 1 found: documents, their bytes with line feeds, and what was left out."""

    documents: int
    bytes: int
    skipped: int = 0


def choose_n_validation(wanted: int | None, n_documents: int, nchunks: int) -> int:
    """Raises UserError where that leaves a chunk empty."""
    n_validation = wanted if wanted is not None else min(DEFAULT_VALIDATION, max(1, n_documents // 100))
    if n_documents - n_validation < nchunks:
        enough = n_documents - n_validation
        instead = f"use --nchunks {enough}" if enough > 0 else "get more text"
        raise UserError(
            f"{n_documents} documents are too few for {nchunks} chunks and {n_validation} documents for validation; "
            f"{instead}"
        )
    return n_validation


def cut_chunks(plan: Plan, runs: list[Run], totals: Totals) -> list[Cut]:
    """Chunks of equal counts, but for one document."""
    n_validation = choose_n_validation(plan.n_validation, totals.documents, plan.nchunks)
    n_training = totals.documents - n_validation
    index = Index(plan, runs)
    edges = []
    rank = 0
    shares = []
    for chunk in range(plan.nchunks):
        validation, training = (
            total * (chunk + 1) // plan.nchunks - total * chunk // plan.nchunks for total in (n_validation, n_training)
        )
        shares.append((validation + training, validation))
        edges.append(index.key_at(rank, totals.documents))
        rank += validation + training
    index.close()
    highs = [low for low, _ in edges[1:]] + [(1 << 64) - 1]
    return [Cut(*edge, high, *share) for edge, high, share in zip(edges, highs, shares, strict=True)]


class Cuts(NamedTuple):
    """All that pass 2 needs to know; when it is there, pass 1 is done."""

    runs: list[Run]
    chunks: list[Cut]
    totals: Totals


def read_skipped(plan: Plan) -> Skipped:
    """What was left out of all units, once they are done."""
    skipped = Skipped("skip")
    for unit in range(len(plan.units())):
        with contextlib.suppress(FileNotFoundError):
            facts = json.loads(plan.skipped_file(unit).read_bytes())
            skipped.count += facts["count"]
            skipped.first += facts["first"][: SKIPPED_TOLD - len(skipped.first)]
    return skipped


def save_cuts(plan: Plan) -> None:
    """After pass 1. Raises UserError where there are too few documents."""
    runs = [run for unit in range(len(plan.units())) for run in read_runs(plan.unit_file(unit), unit)]
    skipped = read_skipped(plan)
    totals = Totals(sum(run.documents for run in runs), sum(run.bytes for run in runs), skipped.count)
    if not totals.documents and skipped.count:
        raise UserError(f"{plan.name}: nothing is left: all {skipped.count} documents are skipped: {skipped.first[0]}")
    cuts = Cuts(runs, cut_chunks(plan, runs, totals), totals)
    write_whole(Path(plan.work, "cuts.json"), json.dumps(cuts._asdict()).encode())


def load_cuts(plan: Plan) -> Cuts | None:
    """None as long as pass 1 is not done."""
    try:
        saved = json.loads(Path(plan.work, "cuts.json").read_bytes())
    except FileNotFoundError:
        return None
    runs, chunks = ([kind(*row) for row in saved[key]] for kind, key in ((Run, "runs"), (Cut, "chunks")))
    return Cuts(runs, chunks, Totals(*saved["totals"]))


# --- pass 2 ------------------------------------------------------------------------------------------------------


class Gather:
    """Pass 2, chunk by chunk. `memory`: bytes for all data in work."""

    def __init__(self, plan: Plan, memory: int):
        self.plan = plan
        cuts = load_cuts(plan)
        assert cuts is not None
        self.cuts = cuts.chunks
        self.index = Index(plan, cuts.runs)
        self._buffer = np.empty(memory * 6 // 10, dtype=np.uint8)
        self._max_entries = max(memory // 4 // INDEX_BYTES, 1)

    @staticmethod
    def n_tasks(plan: Plan) -> int:
        return plan.nchunks

    @staticmethod
    def result(plan: Plan, chunk: int) -> Path:
        """The file that is there when the chunk is done."""
        return plan.staged(chunk, "json")

    @staticmethod
    def n_documents(plan: Plan, chunk: int) -> int:
        """Of a chunk that is done."""
        counts = json.loads(plan.staged(chunk, "json").read_bytes())
        return counts["training"][0] + counts["validation"][0]

    def run(self, chunk: int, report: Report) -> int:
        """Writes a chunk, its documents for validation, and the counts of both; the number of documents."""
        plan, cut = self.plan, self.cuts[chunk]
        if plan.is_published_at_once:
            target = writing(plan.staged(chunk, "jsonl"))
        else:
            target = uploading(join(plan.out, plan.chunk_name(chunk)))
        with writing(plan.staged(chunk, "val")) as stream:
            validation = _Sink(stream)
            with target as stream:
                training = _Sink(stream)
                n_done = 0
                for entries, order in self._in_order(cut):
                    n_validation = min(max(cut.validation - n_done, 0), len(order))
                    for sink, wanted in ((validation, order[:n_validation]), (training, order[n_validation:])):
                        for bucket in self._buckets(entries, wanted):
                            self._write_bucket(sink, entries, bucket)
                            n_done += len(bucket)
                            report(n_done / cut.documents, n_done)
        self.index.close()
        for sink, expected in ((validation, cut.validation), (training, cut.documents - cut.validation)):
            if sink.lines != expected:
                raise UserError(f"{plan.work}: {sink.lines} lines where {expected} belong; remove it and start again")
        counts = {"training": [training.lines, training.bytes], "validation": [validation.lines, validation.bytes]}
        write_whole(plan.staged(chunk, "json"), json.dumps(counts).encode())
        return cut.documents

    def _in_order(self, cut: Cut) -> Iterator[tuple[Entries, np.ndarray]]:
        """The chunk's documents in parts whose index fits memory, and the numbers of their entries in order."""
        n_parts = -(-cut.documents // self._max_entries)
        width = -(-(cut.high + 1 - cut.low) // n_parts)
        skip, left = cut.skip, cut.documents
        for low in range(cut.low, cut.high + 1, width):
            entries = self.index.load(low, min(low + width, cut.high + 1))
            order = np.argsort(entries.keys, kind="stable")[skip:][:left]
            skip, left = 0, left - len(order)
            yield entries, order

    def _buckets(self, entries: Entries, order: np.ndarray) -> Iterator[np.ndarray]:
        """Cuts `order` where the documents fill the buffer."""
        ends = np.cumsum(entries.lengths[order])
        begin = 0
        while begin < len(order):
            before = ends[begin - 1] if begin else 0
            end = max(int(np.searchsorted(ends, before + len(self._buffer), side="right")), begin + 1)
            yield order[begin:end]
            begin = end

    def _write_bucket(self, sink: _Sink, entries: Entries, bucket: np.ndarray) -> None:
        """Reads the documents with the numbers `bucket`, which are one stretch of each run, and writes them so."""
        by_place = np.argsort(bucket)
        numbers = bucket[by_place]
        ends = np.cumsum(entries.lengths[numbers])
        if ends[-1] > len(self._buffer):
            self._buffer = np.empty(int(ends[-1]), dtype=np.uint8)  # a single document
        data = memoryview(self._buffer)
        firsts = np.flatnonzero(np.diff(entries.runs[numbers], prepend=-1))
        lasts = np.append(firsts[1:], len(numbers)) - 1
        offset = 0
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            unit = self.index.runs[entries.runs[numbers[first]]].unit
            end = int(ends[last])
            self.index.read_into(data[offset:end], unit, int(entries.starts[numbers[first]]))
            offset = end
        stops = np.empty_like(ends)
        stops[by_place] = ends
        _write_in_order(sink.stream, data, stops - entries.lengths[bucket], stops, sink.count)


class _Sink:
    """Counts what is really in the bytes that are written: lines, which are documents."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.lines = self.bytes = 0

    def count(self, piece: bytes) -> None:
        self.lines += piece.count(b"\n")
        self.bytes += len(piece)


# --- both passes -----------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Scatter] | type[Gather]] = {"scatter": Scatter, "gather": Gather}


def pending_tasks(kind: str, plan: Plan) -> list[int]:
    """The numbers of those that are not done."""
    return [task for task in range(KINDS[kind].n_tasks(plan)) if not KINDS[kind].result(plan, task).exists()]

"""Lines of files -> documents: who reads which line, and what becomes of data that is at fault.

A fault (a line that is no document, a tokenizer that fails, a file that is gone or has another size) is reported in one
line with file, line and the byte at which it begins. It ends the run, or, with `data.on_error=skip`, it is left out: a
document by itself; of a file that cannot be read all that is left of it, in this pass. Each is counted when it is met.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import orjson

from lingua.errors import UserError
from lingua.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TRAIN_FILES = "*.chunk.*.jsonl"
VALIDATION_FILES = "*.val.jsonl"

ON_ERROR = ("stop", "skip")

# A longer line is a fault: parsed and tokenized it would take 15 to 50 times its size of memory.
MAX_LINE_BYTES = 2**25

# Seconds between two looks at whether the file that is being read is still as it was.
LOOK_EVERY = 10.0

# Bytes of a file that are read at once. Each read gives Python's lock away, which the tokenizer's threads then hold.
READ_BYTES = 2**18

# So many faults of a source are told one by one, and after them each tenth, hundredth, ...
FAULTS_TOLD = 5


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Sorted by name. Names that begin with a dot are no data: sync tools and file managers write them beside it."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def find_files(root_dir: str, source: str, pattern: str) -> list[Path]:
    """The files of one source, sorted by name. Raises UserError where the folder or the files are missing."""
    folder = Path(root_dir) / source
    if not folder.is_dir():
        raise UserError(f"data.sources.{source}: no folder '{folder}' (data.sources.{source}=0 leaves it out)")
    files = matching_files(folder, pattern)
    if not files:
        raise UserError(f"data.sources.{source}: no files named {pattern} in '{folder}'")
    return files


# --- lines -------------------------------------------------------------------------------------------------------


def parse_document(line: bytes, path: Path, number: int) -> str:
    """The text of one JSONL line (`number` counts from 1): its "text", or its "content" where that is missing or null.

    Raises UserError that names file and line.
    """
    try:
        document = orjson.loads(line)  # six times as fast
    except orjson.JSONDecodeError:  # stricter than `json`, which takes NaN, lone surrogates and a byte order mark
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets nested too deep
            raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
    if type(document) is dict and type(text := document.get("text")) is str:
        return text
    where = f"{path}:{number}"
    if not isinstance(document, dict):
        raise UserError(f'{where}: a JSON {type(document).__name__}; wanted an object with "text" or "content"')
    keys = [key for key in ("text", "content") if key in document]
    for key in [key for key in keys if document[key] is not None] or keys:
        if not isinstance(document[key], str):
            raise UserError(f'{where}: "{key}" is of type {type(document[key]).__name__}; wanted a string')
        return document[key]
    raise UserError(f'{where}: neither "text" nor "content" among its keys {str(sorted(document))[:200]}')


class Place(NamedTuple):
    """Of a document: its line, counted from 1, and the byte of the file at which that begins."""

    path: Path
    number: int
    offset: int

    def tell(self, problem: str) -> str:
        return f"{self.path}:{self.number}: {problem}; the line begins at byte {self.offset}"


class Faults:
    """Ends the run with a UserError at the first of them, or counts them and tells the first few.

    `is_told`: not where another rank meets the same ones.
    """

    def __init__(self, on_error: str, is_told: bool = True):
        self.are_skipped = on_error == "skip"
        self.n_skipped = 0
        self._is_told = is_told
        self._n_met = 0

    def tell(self, problem: str) -> None:
        """Of what costs no document by itself."""
        if not self.are_skipped:
            raise UserError(problem)
        logger.warning("%s", problem)

    def skip(self, problem: str) -> None:
        if not self.are_skipped:
            raise UserError(f"{problem} (data.on_error=skip leaves it out)")
        self.n_skipped += 1
        self._n_met += 1
        if self._is_told and (self._n_met <= FAULTS_TOLD or math.log10(self._n_met).is_integer()):
            rest = "; of more, the 10th, 100th, ... are told" if self._n_met == FAULTS_TOLD else ""
            logger.warning("skipped, number %s: %s%s", self.n_skipped, problem, rest)


def read_line(file: BinaryIO) -> tuple[bytes, int]:
    """The next line (b"" at the end) and its size. Of one longer than MAX_LINE_BYTES only the beginning is kept."""
    line = file.readline(MAX_LINE_BYTES)
    size = len(line)
    if size == MAX_LINE_BYTES and not line.endswith(b"\n"):
        while part := file.readline(2**20):
            size += len(part)
            if part.endswith(b"\n"):
                break
    return line, size


def read_document(line: bytes, size: int, place: Place) -> str:
    """The text of what `read_line` gave. Raises UserError that names file, line and byte."""
    if size > len(line):
        raise UserError(place.tell(f"a line of {size:,} bytes, more than the {MAX_LINE_BYTES:,} that can be read"))
    try:
        return parse_document(line, place.path, place.number)
    except ValueError as error:
        raise UserError(f"{error}; the line begins at byte {place.offset}") from None


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_document(tokenizer: Tokenizer, text: str, add_bos: bool, add_eos: bool) -> list[int]:
    """Its tokens. Raises UserError, one line without the place, for whatever goes wrong in the tokenizer."""
    try:
        return tokenizer.encode(text, add_bos, add_eos)
    except BaseException as error:  # where code in Rust panics it is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        problem = f"{kind}{' '.join(str(error).split())[:200]}"
        raise UserError(f"the tokenizer fails on this document ({problem})") from None


def encode_documents(
    tokenizer: Tokenizer, add_bos: bool, add_eos: bool, texts: list[str]
) -> list[np.ndarray | UserError]:
    """Of each text its tokens, int32, or in place of them what `encode_document` raises."""
    try:
        return tokenizer.encode_batch(texts, add_bos, add_eos)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if len(texts) > 1:
            return [one for text in texts for one in encode_documents(tokenizer, add_bos, add_eos, [text])]
        try:
            return [np.array(encode_document(tokenizer, texts[0], add_bos, add_eos), dtype=np.int32)]
        except UserError as problem:
            return [problem]


def read_documents(path: Path, faults: Faults | None = None) -> Iterator[tuple[str, Place]]:
    """All texts of one JSONL file, and where they stand. What is no document goes to `faults`, or raises UserError."""
    faults = faults or Faults("stop")
    number = offset = 0
    with open(path, "rb") as file:
        while True:
            line, size = read_line(file)
            if not line:
                return
            number, place = number + 1, Place(path, number + 1, offset)
            offset += size
            if line.isspace():
                continue
            try:
                text = read_document(line, size, place)
            except ValueError as error:
                faults.skip(str(error))
            else:
                yield text, place


# --- the lines of one rank ---------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Lines of one file for one stream: line i belongs to it where `first <= i % modulus < last`."""

    path: Path
    first: int
    last: int
    modulus: int


def share_files(files: list[Path], rank: int, world_size: int) -> list[Share]:
    """Splits c files over the W ranks of a run's start: every line has exactly one reader, all read alike much.

    Lay the files end to end on a ruler of c * W units, W for each; rank w reads from w * c to (w + 1) * c. Where c
    divides W this is the published rule (file j for W/c consecutive ranks, lines r, r + W/c, ...), where W divides c
    every rank reads whole files, and otherwise some files are split.
    """
    common = math.gcd(len(files), world_size)
    modulus, per_rank = world_size // common, len(files) // common
    begin, end = rank * per_rank, (rank + 1) * per_rank
    shares = []
    for number in range(begin // modulus, (end - 1) // modulus + 1):
        start = number * modulus
        shares.append(Share(files[number], max(begin - start, 0), min(end - start, modulus), modulus))
    return shares


def share_all(files: list[Path]) -> list[Share]:
    """All lines of the files, for a stream that has no document in its share."""
    return [Share(path, 0, 1, 1) for path in files]


def no_documents(source: str, files: list[Path]) -> UserError:
    names = ", ".join(map(str, files))
    return UserError(
        f"data.sources.{source}: no documents for this rank in {names}; give it text, or leave it out with "
        f"data.sources.{source}=0"
    )


def has_document(shares: list[Share], on_error: str) -> bool:
    """Whether there is a document in the shares, or with on_error=stop a fault, which ends the run when it is read.

    Reads up to the first, so it takes long only where there is none.
    """
    for path, first, last, modulus in shares:
        try:
            with open(path, "rb") as file:
                for number in itertools.count():
                    line, size = read_line(file)
                    if not line:
                        break
                    if not first <= number % modulus < last or line.isspace():
                        continue
                    if on_error == "skip":
                        try:
                            read_document(line, size, Place(path, number + 1, 0))
                        except ValueError:
                            continue
                    return True
        except OSError:
            if on_error == "stop":
                return True
    return False


class Look(NamedTuple):
    """What tells whether a file is still the same. (Not its inode, which some network filesystems make up anew.)"""

    size: int
    changed_at: int  # nanoseconds


def look_at(path: Path) -> Look | None:
    """None where there is no such file, or none that can be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Look(status.st_size, status.st_mtime_ns)


class SourceReader:
    """Endless texts of one source for one stream. A pass goes through its shares in the order of the files.

    Each file is compared with what it was at the start: when it is opened, at its end, every LOOK_EVERY seconds, and
    where a line is no document. What is open stays readable though its name is gone; the next pass cannot open it. A
    file of another time and the same size, which `touch` and rsync leave, is read on after a warning, once a file.

    `show`: called with each file before it is touched, so that a file that blocks can be named. `is_told`: whether
    faults that are skipped are logged.
    """

    def __init__(
        self,
        name: str,
        shares: list[Share],
        on_error: str = "stop",
        show: Callable[[Path], None] = lambda path: None,
        is_told: bool = True,
    ):
        self.name = name
        self.shares = shares
        self.show = show
        self.faults = Faults(on_error, is_told)
        # The next line to read: share, line number (from 0), byte offset, and the pass; `found` tells whether this
        # pass has given a document yet.
        self.share, self.line, self.offset, self.n_pass, self.found = 0, 0, 0, 0, False
        self._file: BinaryIO | None = None
        self._looks = [look_at(share.path) for share in shares]
        self._touched: set[Path] = set()
        self._next_look = 0.0

    def state(self) -> tuple[int, int, int, int, bool, int]:
        return self.share, self.line, self.offset, self.n_pass, self.found, self.faults.n_skipped

    def restore(self, state: tuple[int, ...]) -> None:
        self.close()
        self.share, self.line, self.offset, self.n_pass, self.found = state[:5]
        self.faults.n_skipped = state[5] if len(state) > 5 else 0  # a state of before faults were counted
        path = self.shares[self.share].path
        self.show(path)
        found = look_at(path)
        if found is not None and found.size < self.offset:
            self.faults.tell(f"{path}: {found.size} bytes, but the checkpoint had read {self.offset}; it was cut")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def next_document(self) -> tuple[str, Place]:
        self.show(self.shares[self.share].path)
        while True:
            path, first, last, modulus = self.shares[self.share]
            try:
                if self._file is None:
                    self._file = open(path, "rb", buffering=READ_BYTES)
                    self._file.seek(self.offset)
                    self._look()
                elif time.monotonic() > self._next_look:
                    self._look()
                line, size = read_line(self._file)
            except OSError as error:
                self._look()  # the reason, perhaps
                where = f"{path}: cannot be read from line {self.line + 1}, byte {self.offset}, on"
                self.faults.skip(f"{where} ({error.strerror or error})")
                self._next_share()
                continue
            if not line:
                self._look()
                self._next_share()
                continue
            number, offset = self.line, self.offset
            self.line += 1
            self.offset += size
            if not first <= number % modulus < last or line.isspace():
                continue
            place = Place(path, number + 1, offset)
            try:
                text = read_document(line, size, place)
            except ValueError as error:
                self._look()  # the reason, perhaps
                self.faults.skip(str(error))
                continue
            self.found = True
            return text, place

    def reject(self, place: Place, problem: str) -> None:
        """The document of this place is of no use."""
        self.faults.skip(place.tell(problem))

    def _look(self) -> None:
        self._next_look = time.monotonic() + LOOK_EVERY
        path, before = self.shares[self.share].path, self._looks[self.share]
        now = look_at(path)
        if now == before:
            return
        self._looks[self.share] = now
        read = f"since the run began (read to line {self.line}, byte {self.offset})"
        if now is not None and before is not None and now.size == before.size:
            if path not in self._touched:
                self._touched.add(path)
                logger.warning("%s: has changed %s, but not its size; read on as if it were the same", path, read)
            return
        what = "is gone" if now is None else "is back" if before is None else "has changed"
        if now is not None and before is not None:
            what += f" from {before.size:,} to {now.size:,} bytes"
        self.faults.tell(
            f"{path}: {what} {read}, so it cannot be resumed exactly; leave data alone while it is trained on, or set "
            "data.on_error=skip"
        )

    def _next_share(self) -> None:
        self.close()
        self.line = self.offset = 0
        self.share += 1
        if self.share == len(self.shares):
            if not self.found:
                raise no_documents(self.name, [share.path for share in self.shares])
            self.share, self.found = 0, False
            self.n_pass += 1
        self.show(self.shares[self.share].path)

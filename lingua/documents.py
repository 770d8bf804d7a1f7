"""Documents of a dataset: its files, the parts they are cut into, and the lines of a part as pieces of a few MB.

Files are JSON lines (plain, gzip, zstd) or parquet, local or behind any URL that fsspec knows. A plain file is cut into
byte ranges, a parquet file into ranges of row groups, a compressed one is one part. A document's place is the offset of
its line's first byte in the decompressed file, or its row's number, so it does not depend on how the file was cut.

Nothing here needs torch; pyarrow and fsspec are imported where a file asks for them.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import stat
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from lingua.errors import UserError
from lingua.sources import MAX_LINE_BYTES, parse_document

if TYPE_CHECKING:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

PARQUET = (".parquet",)
LINES = (".jsonl", ".json", ".ndjson")
GZIP, ZSTD = tuple(f"{kind}.gz" for kind in LINES), tuple(f"{kind}.zst" for kind in LINES)
SUFFIXES = PARQUET + LINES + GZIP + ZSTD
CODECS = dict.fromkeys(GZIP, "gzip") | dict.fromkeys(ZSTD, "zstd")
TEXT_COLUMNS = ("text", "content")
# What the library `datasets` writes beside documents.
METADATA = ("dataset_infos.json", "dataset_info.json")

BLOCK_BYTES = 1 << 20  # read at a time; what fits the processor's cache is split and checked fastest
BATCH_ROWS = 64  # of parquet read at a time, at most: all may be long
SKIPPED_TOLD = 3  # of a part of the data, documents whose reason for being left out is kept
# A document in work: its bytes, in a buffer that grows by doubling, and as a string of up to 4 bytes a character.
DOCUMENT_COPIES = 6


class Skipped:
    """Counts documents that are left out and keeps what was wrong with the first; or raises UserError at the first."""

    def __init__(self, on_error: str = "stop"):
        self.on_error = on_error
        self.count = 0
        self.first: list[str] = []

    def add(self, describe: Callable[[], str]) -> None:
        """`describe`: is called for the first few only, since counting lines takes reading the file."""
        if self.on_error == "stop":
            raise UserError(f"{describe()} (--on_error skip leaves it out)")
        self.count += 1
        if self.count <= SKIPPED_TOLD:
            self.first.append(describe())


class InputFile(NamedTuple):
    """`name`: path relative to the dataset; `size` in bytes; `stamp` changes when the file does."""

    path: str
    name: str
    size: int
    stamp: str

    @property
    def suffix(self) -> str:
        return suffix_of(self.path)

    @property
    def is_parquet(self) -> bool:
        return self.suffix in PARQUET

    @property
    def is_plain(self) -> bool:
        return self.suffix in LINES


class Reading(NamedTuple):
    """How documents are read: bytes of the longest one, what is kept of each (None: all), and where bad ones go."""

    max_document: int
    columns: tuple[str, ...] | None
    skipped: Skipped

    def keeps(self, name: str) -> bool:
        return self.columns is None or name in self.columns


class Part(NamedTuple):
    """The `number`-th (from 0) of `count` about equal parts of a file."""

    file: InputFile
    number: int
    count: int


class Piece(NamedTuple):
    """Documents in one buffer, which is good until the next piece: document i is `data[starts[i] : stops[i]]`.

    Each is a line with its line feed. `places`: uint64, the documents' places in the file; `done`: how much of the part
    is read with it, from 0 to 1.
    """

    data: memoryview
    starts: np.ndarray
    stops: np.ndarray
    places: np.ndarray
    done: float


# --- paths and URLs ----------------------------------------------------------------------------------------------


def suffix_of(path: str) -> str:
    """The one of SUFFIXES that `path` ends in, or an empty string."""
    return next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")


def holds_documents(name: str) -> bool:
    """Whether a file of this name, found in a folder, is taken for one of documents."""
    return bool(suffix_of(name)) and not name.startswith(".") and name not in METADATA


def is_remote(path: str) -> bool:
    return "://" in path


def local_form(path: str) -> str:
    """`file://` URLs as paths; the rest as it is."""
    return path.removeprefix("file://") if path.startswith("file://") else path


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path in it. Raises UserError where there is none, or its package is missing."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
        known = f"pip install {package[protocol]}" if protocol in package else str(error)
        raise UserError(f"{url}: no package for '{protocol}://' is installed; {known}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def open_input(path: str) -> IO[bytes]:
    if not is_remote(path):
        return open(path, "rb", buffering=0)
    system, inner = filesystem(path)
    return system.open(inner, "rb")


def find_files(patterns: list[str], exclude: str | None = None) -> list[InputFile]:
    """The files of folders (all that are JSON lines or parquet, hidden ones left out), globs and paths, sorted.

    What lies in the folder `exclude` is left out. Raises UserError where a pattern finds nothing, or something whose
    name has none of SUFFIXES.
    """
    found: dict[str, tuple[int, str]] = {}
    for pattern in map(local_form, patterns):
        here = _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)
        if exclude is not None:
            here = {path: facts for path, facts in here.items() if not path.startswith(join(exclude, ""))}
        if not here:
            raise UserError(f"{pattern}: no such files; wanted names that end in {', '.join(SUFFIXES)}")
        found |= here
    paths = sorted(found, key=lambda path: path.split("/"))
    folders = [path.split("/")[:-1] for path in paths]
    # In sorted order what the first and the last share, all share.
    n_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(folders[0], folders[-1], strict=False)))
    return [InputFile(path, "/".join(path.split("/")[n_shared:]), *found[path]) for path in paths]


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed: {error.strerror}")


def _find_local(pattern: str) -> dict[str, tuple[int, str]]:
    """Sizes and stamps by absolute path."""
    pattern = os.path.abspath(os.path.expanduser(pattern))
    paths = []
    for match in [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True):
        paths += _files_below(match) if os.path.isdir(match) else _with_known_suffix([match])
    facts = {}
    for path in paths:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: no regular file")
        facts[path] = status.st_size, str(status.st_mtime_ns)
    return facts


def _files_below(folder: str) -> list[str]:
    """Links are followed, but to no folder that `folder` or another link led to already: cycles would repeat it."""
    paths, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_list):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(here, name) for name in names if holds_documents(name)]
    return paths


def _find_remote(pattern: str) -> dict[str, tuple[int, str]]:
    system, inner = filesystem(pattern)
    try:
        matches = system.glob(inner, detail=True) if glob.has_magic(inner) else {inner: system.info(inner)}
        if inner not in matches:  # of a glob, which finds hidden files too, unlike a local one
            matches = {path: info for path, info in matches.items() if not os.path.basename(path).startswith(".")}
        listed = {path: info for path, info in matches.items() if info["type"] == "file"}
        kept = _with_known_suffix(list(listed))
        for folder in matches.keys() - listed.keys():
            inside = system.find(folder, detail=True)
            listed |= inside
            kept += [
                path
                for path in inside
                if holds_documents(os.path.basename(path)) and "/." not in path.removeprefix(folder)
            ]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{pattern}: cannot be listed: {error}") from None
    stamps = ("ETag", "etag", "LastModified", "mtime", "updated", "created")
    return {
        system.unstrip_protocol(path): (
            listed[path]["size"],
            next((str(listed[path][key]) for key in stamps if key in listed[path]), ""),
        )
        for path in kept
    }


def _with_known_suffix(paths: list[str]) -> list[str]:
    for path in paths:
        if not suffix_of(path):
            raise UserError(f"{path}: not a name of JSON lines or parquet; they end in {', '.join(SUFFIXES)}")
    return paths


# --- reading -----------------------------------------------------------------------------------------------------


def read_part(
    part: Part, max_document: int, columns: tuple[str, ...] | None = None, skipped: Skipped | None = None
) -> Iterator[Piece]:
    """The documents of a part, in order, each checked to be what the loader reads.

    `max_document`: bytes of the longest line that memory allows; none longer than the loader's MAX_LINE_BYTES is read
    either. `columns`: those that are kept of each document. What is no document goes to `skipped`, or raises
    UserError that names the file and the line or row, as a damaged file and too little memory do in any case.
    """
    reading = Reading(min(max_document, MAX_LINE_BYTES), columns, skipped or Skipped())
    try:
        if part.file.is_parquet:
            yield from _read_parquet(part, reading)
        elif part.file.is_plain:
            first, last = (part.file.size * number // part.count for number in (part.number, part.number + 1))
            with open_input(part.file.path) as source:
                yield from read_lines(source, part.file, first, last, reading.max_document, reading=reading)
        else:
            yield from _read_compressed(part.file, reading)
    except OSError as error:
        raise UserError(f"{part.file.path}: cannot be read: {error.strerror or error}") from None


def _open_compressed(file: InputFile, source: IO[bytes]) -> IO[bytes]:
    import pyarrow as pa

    return pa.CompressedInputStream(source, CODECS[file.suffix])


def _read_compressed(file: InputFile, reading: Reading) -> Iterator[Piece]:
    with open_input(file.path) as source, _open_compressed(file, source) as stream:
        try:
            for piece in read_lines(stream, file, 0, None, reading.max_document, reading=reading):
                yield piece._replace(done=min(source.tell() / file.size, 1.0))
        except OSError as error:
            codec = CODECS[file.suffix]
            if "too much memory" in str(error):
                raise UserError(
                    f"{file.path}: compressed with a window of more than 128 MB (zstd --long); compress it without"
                ) from None
            raise UserError(f"{file.path}: cut off or no {codec} file ({error}); get it again") from None


def read_lines(
    source: IO[bytes],
    file: InputFile,
    first: int,
    last: int | None,
    max_document: int,
    block: int = BLOCK_BYTES,
    reading: Reading | None = None,
) -> Iterator[Piece]:
    """The documents whose lines begin in bytes `first` up to `last` (None: to the end) of the file.

    So each belongs to one range, wherever a file is cut. Lines of white space only are left out, carriage returns
    before line feeds too, and a last line without a line feed gets one.
    """
    reading = reading or Reading(max_document, None, Skipped())
    buffer = bytearray(block)
    # `buffer[:filled]` is the file from `offset` on. A range begins in the middle of a line that is not its own, unless
    # the byte before it is a line feed.
    offset, filled, in_foreign_line = max(first - 1, 0), 0, first > 0
    if offset:
        source.seek(offset)
    ended = False
    while not ended and (last is None or offset < last):
        if filled == len(buffer):
            if filled > reading.max_document:
                _skip_long_line(file, offset, reading)
                # The rest of it is passed over as a line that belongs to another range is.
                offset, filled, in_foreign_line = offset + filled, 0, True
                continue
            longer = bytearray(2 * len(buffer))
            longer[:filled] = buffer
            buffer = longer
        n = source.readinto(memoryview(buffer)[filled:])
        ended = not n
        if ended and filled:
            buffer[filled] = ord("\n")  # there is room: only a buffer that was not full is read into
            n = 1
        cut = buffer.rfind(b"\n", filled, filled + n) + 1
        filled += n
        if in_foreign_line:
            begin = buffer.find(b"\n", 0, filled) + 1
            in_foreign_line = begin == 0
            if in_foreign_line:
                offset, filled = offset + filled, 0
                continue
        else:
            begin = 0
        if cut:
            yield from _lines_in(buffer, begin, cut, file, offset, first, last, reading)
            rest = filled - cut
            tail = buffer[cut:filled]
            if len(buffer) > block and rest <= block:
                buffer = bytearray(block)
            buffer[:rest] = tail
            offset, filled = offset + cut, rest


def _lines_in(
    buffer: bytearray,
    begin: int,
    end: int,
    file: InputFile,
    offset: int,
    first: int,
    last: int | None,
    reading: Reading,
) -> Iterator[Piece]:
    """The documents of the whole lines in `buffer[begin:end]`, which is the file from `offset` + `begin` on."""
    array = np.frombuffer(buffer, np.uint8)
    stops = np.flatnonzero(array[begin:end] == ord("\n")) + (begin + 1)
    starts = np.empty_like(stops)
    starts[:1], starts[1:] = begin, stops[:-1]
    if last is not None:
        n_ours = np.searchsorted(starts, last - offset)
        starts, stops = starts[:n_ours], stops[:n_ours]
    places = (starts + offset).astype(np.uint64)
    if end - begin > reading.max_document and (too_long := np.flatnonzero(stops - starts > reading.max_document)).size:
        for number in too_long.tolist():
            _skip_long_line(file, int(places[number]), reading)
        starts, stops, places = (np.delete(values, too_long) for values in (starts, stops, places))
    if len(starts) and places[0] == 0 and buffer.startswith(b"\xef\xbb\xbf"):
        starts[0] = 3  # the mark of UTF-8 that some programs write
    returns = array[np.maximum(stops - 2, starts)] == ord("\r")
    if returns.any():
        stops = stops - returns
        array[stops[returns] - 1] = ord("\n")
    not_empty = stops - starts > 1
    if not not_empty.all():
        starts, stops, places = starts[not_empty], stops[not_empty], places[not_empty]
    data = memoryview(buffer)
    left_out, lines = _check_lines(data, starts, stops, file, offset, reading)
    if left_out:
        starts, stops, places = (np.delete(values, left_out) for values in (starts, stops, places))
    if reading.columns is not None:
        data, starts, stops = _join(lines)
    done = 1.0 if last is None else (offset + end - first) / max(last - first, 1)
    if len(starts):
        yield Piece(data, starts, stops, places, min(done, 1.0))


def _check_lines(
    data: memoryview, starts: np.ndarray, stops: np.ndarray, file: InputFile, offset: int, reading: Reading
) -> tuple[list[int], list[bytes]]:
    """Numbers of the lines that are left out, since they are white space only or no documents; and the others anew,
    where only some of their columns are kept.
    """
    loads, columns, left_out, lines = orjson.loads, reading.columns, [], []
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        try:
            document = loads(data[start:stop])
            if type(document) is dict:
                if columns is not None:
                    document = {name: value for name, value in document.items() if name in columns}
                text = document.get("text")
                if type(document.get("content") if text is None else text) is str:
                    if columns is not None:
                        lines.append(_dump(document))
                    continue
        except orjson.JSONDecodeError:
            pass
        line = bytes(data[start:stop])
        kept = None if line.isspace() else _check_slowly(line, file, offset + start, reading)
        if kept is None:
            left_out.append(number)
        elif columns is not None:
            lines.append(kept)
    return left_out, lines


def _check_slowly(line: bytes, file: InputFile, place: int, reading: Reading) -> bytes | None:
    """As the loader does, which takes NaN, too, for example, or brackets nested deeper. None for no document."""
    try:
        line.decode()
        if reading.columns is not None:
            document = json.loads(line)
            if isinstance(document, dict):
                kept = {name: value for name, value in document.items() if reading.keeps(name)}
                line = json.dumps(kept).encode() + b"\n"
        parse_document(line, Path("file"), 0)
        return line
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start + 1} of the line is no UTF-8 ({error.reason})"
    except (ValueError, RecursionError) as error:
        wrong = str(error).removeprefix("file:0: ")
    reading.skipped.add(lambda: f"{file.path}:{line_number(file, place)}: {wrong}")
    return None


def _join(lines: list[bytes]) -> tuple[memoryview, np.ndarray, np.ndarray]:
    """The data, starts and stops of a piece."""
    stops = np.cumsum([len(line) for line in lines], dtype=np.int64)
    return memoryview(b"".join(lines)), stops - np.diff(stops, prepend=0), stops


def line_number(file: InputFile, place: int) -> int:
    """That of the line (from 1) whose first byte is byte `place` of the decompressed file."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_input(file.path))
        if not file.is_plain:
            source = stack.enter_context(_open_compressed(file, source))
        return line_at(source, place)


def line_at(source: IO[bytes], place: int) -> int:
    """The number of the line (from 1) that byte `place` is in. It takes reading all that stands before."""
    number, block = 1, bytearray(BLOCK_BYTES)
    while place > 0:
        n = min(source.readinto(block), place)
        number += block.count(b"\n", 0, n)
        place = place - n if n else 0
    return number


def _skip_long_line(file: InputFile, place: int, reading: Reading) -> None:
    """Reads the line to its end, to tell what it takes."""
    length, block = 0, bytearray(BLOCK_BYTES)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_input(file.path))
        if not file.is_plain:
            source = stack.enter_context(_open_compressed(file, source))
        position, end = 0, -1
        if file.is_plain:
            source.seek(place)
            position = place
        while end < 0 and (n := source.readinto(block)):
            end = block.find(b"\n", min(max(place - position, 0), n), n)
            position += n
            length = (position - n + end if end >= 0 else position) - place + 1
    _skip_long(length, reading, lambda: f"{file.path}:{line_number(file, place)}: a line")


def _skip_long(length: int, reading: Reading, where: Callable[[], str]) -> None:
    """A document of `length` bytes. Raises UserError where another machine's memory would do: what is left out must not
    depend on that.
    """
    if length > MAX_LINE_BYTES:
        limit = f"{length / 1e6:,.1f} MB, more than the {MAX_LINE_BYTES / 1e6:,.1f} MB that training reads"
        reading.skipped.add(lambda: f"{where()} of {limit}; cut it up")
        return
    allowed = reading.max_document
    raise UserError(
        f"{where()} of {length / 1e6:,.1f} MB, more than a worker's share of memory allows ({allowed / 1e6:,.1f} MB); "
        f"give {length / allowed + 0.1:.1f} times the memory, or use fewer workers"
    )


# --- parquet -----------------------------------------------------------------------------------------------------


def _open_parquet(file: InputFile, source: IO[bytes]) -> pq.ParquetFile:
    # Arrow's other allocators keep what was freed.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A buffer makes it read pages as they are needed instead of whole columns of a row group.
        return pq.ParquetFile(source, buffer_size=BLOCK_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: not a parquet file, or cut off ({_short(error)}); get it again") from None


def _read_parquet(part: Part, reading: Reading) -> Iterator[Piece]:
    file = part.file
    with open_input(file.path) as source, _open_parquet(file, source) as table:
        names = _column_order(file, table.schema_arrow, reading)
        n_groups = table.num_row_groups
        first, last = (n_groups * number // part.count for number in (part.number, part.number + 1))
        rows = [table.metadata.row_group(group).num_rows for group in range(last)]
        row, n_rows = sum(rows[:first]), sum(rows[first:last])
        if not n_rows:
            return
        size = sum(_group_bytes(table.metadata.row_group(group), reading) for group in range(first, last))
        batch_rows = max(1, min(BATCH_ROWS, BLOCK_BYTES * n_rows // max(size, 1)))
        begin = row
        batches = table.iter_batches(batch_rows, row_groups=list(range(first, last)), columns=names, use_threads=False)
        for batch in _in_small_ones(_guarded(batches, file)):
            places, lines = _rows_as_lines(batch.select(names), file, row, reading)
            row += batch.num_rows
            if lines:
                yield Piece(*_join(lines), np.array(places, dtype=np.uint64), (row - begin) / n_rows)


def _group_bytes(group: pq.RowGroupMetaData, reading: Reading) -> int:
    """Bytes of the columns that are kept, uncompressed."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(one.total_uncompressed_size for one in columns if reading.keeps(one.path_in_schema.partition(".")[0]))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _guarded(batches: Iterator[pa.RecordBatch], file: InputFile) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path}: a damaged parquet file ({_short(error)}); get it again") from None


def _in_small_ones(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Halves those of more than BLOCK_BYTES: as Python's objects and as JSON their rows take several times as much.

    A dictionary, which would count as part of each half, is no more in what they hold.
    """
    import pyarrow as pa

    for batch in batches:
        for number, kind in enumerate(batch.schema.types):
            if pa.types.is_dictionary(kind):
                name = batch.schema.names[number]
                batch = batch.set_column(number, name, batch.column(number).dictionary_decode())
        waiting = [batch]
        while waiting:
            first = waiting.pop()
            if first.num_rows > 1 and first.nbytes > BLOCK_BYTES:
                half = first.num_rows // 2
                waiting += [first.slice(half), first.slice(0, half)]
            else:
                yield first


def _column_order(file: InputFile, schema: pa.Schema, reading: Reading) -> list[str]:
    """The columns that are kept, the text first. Raises UserError where no column has strings."""
    import pyarrow as pa

    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{file.path}: two columns of one name among {sorted(schema.names)}")
    missing = [name for name in reading.columns or () if name not in (*schema.names, *TEXT_COLUMNS)]
    if missing:
        raise UserError(f"{file.path}: --columns: no '{missing[0]}' among its columns {sorted(schema.names)}")
    key = next((key for key in TEXT_COLUMNS if key in schema.names and reading.keeps(key)), None)
    if key is None:
        raise UserError(f'{file.path}: neither "text" nor "content" among its columns {sorted(schema.names)}')
    kind = schema.field(key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(f'{file.path}: column "{key}" is of type {kind}; wanted strings (--columns takes others)')
    return [key, *(name for name in schema.names if name != key and reading.keeps(name))]


def _rows_as_lines(
    batch: pa.RecordBatch, file: InputFile, row: int, reading: Reading
) -> tuple[range | list[int], list[bytes]]:
    """Rows that are documents, as their numbers and their lines. `row`: the number of the batch's first one."""
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
        if batch.column(0).null_count == 0:
            lines = [_dump(dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
            if max(map(len, lines)) <= reading.max_document:
                return range(row, row + len(lines)), lines
    except _errors_of_values():
        pass
    kept = {row + number: _row_as_line(batch, number, file, row + number, reading) for number in range(batch.num_rows)}
    kept = {place: line for place, line in kept.items() if line is not None}
    return list(kept), list(kept.values())


def _row_as_line(batch: pa.RecordBatch, number: int, file: InputFile, row: int, reading: Reading) -> bytes | None:
    """The row `number` of a batch, which is row `row` of its file; None where it is no document."""
    where = f"{file.path}: row {row} (from 0)"
    document = {}
    for position, name in enumerate(batch.schema.names):
        try:
            document[name] = batch.column(position)[number].as_py()
            _dump({name: document[name]})
        except _errors_of_values() as error:
            wrong = f"{where}, column '{name}': cannot be written as JSON ({_short(error.__cause__ or error)})"
            remedy = (
                "drop the row"
                if position == 0
                else "drop the column, or write it as text (--columns names those to keep)"
            )
            reading.skipped.add(lambda: f"{wrong}; {remedy}")  # noqa: B023 - it is called at once
            return None
    line = _dump(document)
    if len(line) > reading.max_document:
        _skip_long(len(line), reading, lambda: f"{where}: a document")
        return None
    key = batch.schema.names[0]
    if document[key] is None and not isinstance(document.get("content"), str):
        reading.skipped.add(lambda: f"{where}, column '{key}': null; wanted a string; drop the row")
        return None
    return line


def _errors_of_values() -> tuple[type[Exception], ...]:
    """Of bytes that are no UTF-8, dates beyond Python's, time zones that this machine does not know, and others."""
    import pyarrow as pa

    return ValueError, TypeError, OverflowError, LookupError, pa.ArrowException


def _dump(row: dict[str, Any]) -> bytes:
    return orjson.dumps(row, default=_as_text, option=orjson.OPT_APPEND_NEWLINE)


def _as_text(value: Any) -> str:
    """What JSON has no form for."""
    if isinstance(value, bytes):
        return value.decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# --- how much there is -------------------------------------------------------------------------------------------

# Bytes of JSON lines for one of the file, where nothing can be sampled yet. Real ones are larger or about so.
USUAL_EXPANSION = dict.fromkeys(PARQUET, 1.7) | dict.fromkeys(LINES, 1.0) | dict.fromkeys(GZIP + ZSTD, 2.5)


def estimate_expansion(
    files: list[InputFile], columns: tuple[str, ...] | None = None, n_samples: int = 4
) -> dict[str, float]:
    """Bytes of JSON lines for one byte of a file, by suffix, from the beginnings of some files of each."""
    by_suffix: dict[str, list[InputFile]] = {}
    for file in files:
        if file.size:
            by_suffix.setdefault(file.suffix, []).append(file)
    reading = Reading(MAX_LINE_BYTES, columns, Skipped())
    measure: dict[str, Callable[[InputFile], float]] = {
        **dict.fromkeys(PARQUET, lambda file: _parquet_expansion(file, reading)),
        **dict.fromkeys(LINES, lambda file: 1.0),
        **dict.fromkeys(GZIP + ZSTD, _compressed_expansion),
    }
    return {
        suffix: float(np.mean([measure[suffix](file) for file in group[:: -(-len(group) // n_samples)]]))
        for suffix, group in by_suffix.items()
    }


def _parquet_expansion(file: InputFile, reading: Reading) -> float:
    with open_input(file.path) as source, _open_parquet(file, source) as table:
        groups = range(table.metadata.num_row_groups)
        return sum(_group_bytes(table.metadata.row_group(group), reading) for group in groups) / file.size


def _compressed_expansion(file: InputFile) -> float:
    block, n = bytearray(BLOCK_BYTES), 0
    try:
        with open_input(file.path) as source, _open_compressed(file, source) as stream:
            while n < 4 * BLOCK_BYTES and (read := stream.readinto(block)):
                n += read
            return n / max(source.tell(), 1)
    except OSError:
        return 1.0  # reading it tells what is wrong

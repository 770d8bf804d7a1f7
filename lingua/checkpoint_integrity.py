"""Checksums of a checkpoint's files: made of what is written, compared before anything is loaded.

    checksums.json   {"algorithm": "xxh3_64", "block_bytes": 4194304,
                      "files": {"__0_0.distcp": {"bytes": 9437184, "blocks": ["06a16e07f46b5a8f", ...]}, ...}}

There is a checksum for each block of a file, so that ranks and threads share out one file, and who wants the weights
alone need not read the optimizer's state. They find what disks, copies and memory have changed; whoever changes a file
on purpose can change its checksums, too.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.futures import Future

from lingua.args import first_line
from lingua.distributed import broadcast_object, gather_objects, rank_and_size
from lingua.errors import UserError

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
ALGORITHM = "xxh3_64"
BLOCK_BYTES = 2**22

# Stands in a .metadata beside which there must be a CHECKSUMS_FILE.
HAS_CHECKSUMS = "lingua.checkpoint_integrity"

REMEDY = f"copy it anew, or if you have edited it, take it out of {CHECKSUMS_FILE}"

READERS = 4
SECONDS_BETWEEN_REPORTS = 5

# (first byte, byte after the last) of what is wanted of a file; None for all of it.
Spans = list[tuple[int, int]] | None


@dataclass
class Checksums:
    """Of one file."""

    bytes: int = 0
    blocks: list[str] = field(default_factory=list)


# --- writing -------------------------------------------------------------------------------------------------------


class SummingStream:
    """Passes on what is written to a file, and makes its checksums on the way."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sums = Checksums()
        self._hash = xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        self._file.write(data)
        left = memoryview(data).cast("B")
        written = len(left)
        while len(left):
            part = left[: BLOCK_BYTES - self._sums.bytes % BLOCK_BYTES]
            left = left[len(part) :]
            self._hash.update(part)
            self._sums.bytes += len(part)
            if self._sums.bytes % BLOCK_BYTES == 0:
                self._end_block()
        return written

    def _end_block(self) -> None:
        self._sums.blocks.append(self._hash.hexdigest())
        self._hash.reset()

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: `writing` does that, when all is on the disk."""

    def checksums(self) -> Checksums:
        """Of the whole file; nothing more is written after that."""
        if self._sums.bytes % BLOCK_BYTES:
            self._end_block()
        return self._sums


@contextmanager
def writing(file: Path, sums: dict[str, Checksums]) -> Iterator[SummingStream]:
    """A stream into a new file, which is on the disk afterwards; its checksums are in `sums` then, by its name."""
    with open(file, "wb") as opened:
        stream = SummingStream(opened)
        yield stream
        opened.flush()
        os.fsync(opened.fileno())
    sums[file.name] = stream.checksums()


def write_json(file: Path, value: dict[str, Any], sums: dict[str, Checksums]) -> None:
    with writing(file, sums) as stream:
        stream.write(json.dumps(value).encode())


def write_checksums(folder: Path, sums: dict[str, Checksums]) -> None:
    """Of files that are in `folder`, by their names."""
    content = {
        "algorithm": ALGORITHM,
        "block_bytes": BLOCK_BYTES,
        "files": {name: asdict(of_file) for name, of_file in sorted(sums.items())},
    }
    write_json(folder / CHECKSUMS_FILE, content, {})


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _SummingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, Checksums] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with writing(Path(path), self.sums) as stream:
            yield stream


class SummingWriter(FileSystemWriter):
    """Writes a distributed checkpoint with its checksums.

    Each rank sums what it writes; what they have goes to the first one with what PyTorch tells it of their writing.

    Args:
        sums: of the files that this rank has put into the folder before.
    """

    def __init__(self, folder: Path, sums: dict[str, Checksums]):
        super().__init__(folder, sync_files=False)  # `writing` does that
        self.fs = _SummingFileSystem()
        self._sums = sums

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        results = super().write_data(plan, planner).wait()
        told: Future = Future()
        told.set_result([*results, {**self._sums, **self.fs.sums}])
        return told

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id, modules=[HAS_CHECKSUMS])

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        sums = {name: of_file for of_rank in results for name, of_file in of_rank.pop().items()}
        self.fs.sums.clear()
        super().finish(metadata, results)
        (sums[".metadata"],) = self.fs.sums.values()  # under the name that it had while it was written
        write_checksums(Path(self.path), sums)


def is_summed(metadata: Metadata) -> bool:
    """Whether the checkpoint was written with its checksums."""
    return getattr(metadata.storage_meta, "modules", None) == [HAS_CHECKSUMS]


# --- comparing -----------------------------------------------------------------------------------------------------


def read_checksums(folder: Path) -> dict[str, Checksums] | None:
    """By the names of files; None where the folder has none. Raises UserError for what is no such file."""
    file = folder / CHECKSUMS_FILE
    try:
        content = json.loads(file.read_bytes())
        if (content["algorithm"], content["block_bytes"]) != (ALGORITHM, BLOCK_BYTES):
            raise UserError(f"{content['algorithm']} of {content['block_bytes']} bytes, not {ALGORITHM}")
        sums = {name: Checksums(**of_file) for name, of_file in content["files"].items()}
        for name, of_file in sums.items():
            if Path(name).name != name:
                raise UserError(f"{name!r} is no name of a file")
            if len(of_file.blocks) != -(-of_file.bytes // BLOCK_BYTES):
                raise UserError(f"{len(of_file.blocks)} blocks of {name} with {of_file.bytes} bytes")
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)})") from None
    return sums


def find_other_size(folder: Path, sums: dict[str, Checksums]) -> str | None:
    """What is wrong with the files in `folder`, going by their names and sizes; None if nothing is."""
    for name, of_file in sums.items():
        file = folder / name
        if not file.is_file():
            return f"the file {name} is missing, which is in {CHECKSUMS_FILE}"
        size = file.stat().st_size
        if size != of_file.bytes:
            return f"the file {name} has {size} bytes, and {of_file.bytes} by {CHECKSUMS_FILE}; {REMEDY}"
    return None


def find_other_bytes(folder: Path, wanted: dict[str, Spans] | None = None, alone: bool = False) -> str | None:
    """Which file of `folder` holds other bytes than were written; None if none does, or there are no checksums.

    All ranks call it together, each reads a share, and all get the same answer.

    Args:
        wanted: what to read, by the names of files; None for all. Names without checksums are left out.
        alone: on this rank, whatever the others do.
    """
    rank, n_ranks = (0, 1) if alone else rank_and_size()
    problem, blocks = None, []
    if rank == 0:
        try:
            blocks = _wanted_blocks(read_checksums(folder) or {}, wanted)
        except (OSError, ValueError) as error:
            problem = str(error)
    if not alone:
        problem, blocks = broadcast_object((problem, blocks))
    if problem is None:
        begin, end = (len(blocks) * number // n_ranks for number in (rank, rank + 1))
        problem = _compare(folder, blocks[begin:end])
    problems = [problem] if alone else gather_objects(problem)
    return next((problem for problem in problems if problem is not None), None)


def _wanted_blocks(sums: dict[str, Checksums], wanted: dict[str, Spans] | None) -> list[tuple[str, int, str]]:
    """(file, number, checksum) of the blocks that hold what is wanted, in the order in which they lie on the disk."""
    blocks = []
    for name, of_file in sums.items():
        spans = None if wanted is None else wanted.get(name, [])
        numbers = set(range(len(of_file.blocks))) if spans is None else set()
        for begin, end in spans or []:
            numbers.update(range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)))
        blocks += [(name, number, of_file.blocks[number]) for number in sorted(numbers)]
    return blocks


def _compare(folder: Path, blocks: list[tuple[str, int, str]]) -> str | None:
    told = time.monotonic()
    done = 0
    with ThreadPoolExecutor(READERS, thread_name_prefix="checksums") as readers:
        for name, group in itertools.groupby(blocks, key=lambda block: block[0]):
            of_file = list(group)
            try:
                with open(folder / name, "rb", buffering=0) as file:
                    descriptor = file.fileno()
                    found = readers.map(lambda block: _checksum(descriptor, block[1]), of_file)  # noqa: B023
                    for (_, number, expected), checksum in zip(of_file, found, strict=True):
                        if checksum != expected:
                            return _changed(name, number)
                        done += 1
                        if time.monotonic() - told > SECONDS_BETWEEN_REPORTS:
                            told = time.monotonic()
                            share = (amount * BLOCK_BYTES / 2**30 for amount in (done, len(blocks)))
                            logger.info("comparing checksums of %s: %.1f of %.1f GiB", folder, *share)
            except OSError as error:
                return f"the file {name} cannot be read ({first_line(error)})"
    return None


def _checksum(descriptor: int, number: int) -> str:
    return xxhash.xxh3_64_hexdigest(os.pread(descriptor, BLOCK_BYTES, number * BLOCK_BYTES))


def _changed(name: str, number: int) -> str:
    where = f"the block at {number * BLOCK_BYTES}, by {CHECKSUMS_FILE}"
    return f"the file {name} holds other bytes than were written ({where}); {REMEDY}"

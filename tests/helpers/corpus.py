"""Documents to shuffle, and the order that they must come out in, worked out in plain Python."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lingua.documents import find_files
from lingua.shuffle import Plan

MASK = (1 << 64) - 1


def line(file: str, number: int, length: int = 40) -> bytes:
    """A document that tells where it is from."""
    document = {"text": f"é{number}\n" + "x" * length, "from": file, "number": number}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def lines(file: str, count: int, length: int = 40) -> list[bytes]:
    """Of different lengths, about `length`."""
    return [line(file, number, number * 7919 % (2 * length)) for number in range(count)]


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def write_jsonl(path: Path, documents: list[bytes]) -> None:
    """Plain or compressed, as its name says."""
    content = b"".join(document + b"\n" for document in documents)
    if path.suffix == ".gz":
        content = gzip.compress(content, 1)
    elif path.suffix == ".zst":
        # Two frames, as several writers make.
        content = zstd(content[: len(content) // 2]) + zstd(content[len(content) // 2 :])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_parquet(path: Path, documents: list[bytes], rows_in_group: int = 100) -> None:
    table = pa.Table.from_pylist([json.loads(document) for document in documents])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_in_group)


def make_plan(inputs: list[Path] | Path, out: Path, **settings: object) -> Plan:
    """Of small units, so that there are several."""
    patterns = [str(path) for path in ([inputs] if isinstance(inputs, Path) else inputs)]
    work = str(out / ".work")
    defaults = {"work": work, "stage": work, "nchunks": 4, "unit_bytes": 20_000}
    return Plan(name="t", out=str(out), files=tuple(find_files(patterns)), **{**defaults, **settings})


def key(seed: int, file_number: int, place: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{file_number}".encode(), digest_size=16).digest()
    value = place
    for word in (digest[:8], digest[8:]):
        value ^= int.from_bytes(word, "little")
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            value = (value ^ value >> shift) * factor & MASK
    return value


def places(name: str, documents: list[bytes]) -> list[int]:
    """Of documents that are written one after the other."""
    if name.endswith(".parquet"):
        return list(range(len(documents)))
    ends, end = [], 0
    for document in documents:
        ends.append(end)
        end += len(document) + 1
    return ends


def expected_order(files: dict[str, list[bytes]], seed: int = 42) -> list[bytes]:
    """Of the documents of some files, by their names in the dataset."""
    keyed = []
    for file_number, name in enumerate(sorted(files, key=lambda name: name.split("/"))):
        for place, document in zip(places(name, files[name]), files[name], strict=True):
            keyed.append((key(seed, file_number, place), file_number, place, document))
    return [document for *_, document in sorted(keyed)]


def expected_files(files: dict[str, list[bytes]], nchunks: int, n_validation: int, seed: int = 42) -> dict[str, bytes]:
    """The contents of chunk and validation files by name."""
    order = expected_order(files, seed)
    chunks, validation, n_training = {}, [], len(order) - n_validation
    begin = 0
    for chunk in range(nchunks):
        n_val = n_validation * (chunk + 1) // nchunks - n_validation * chunk // nchunks
        end = begin + n_val + n_training * (chunk + 1) // nchunks - n_training * chunk // nchunks
        validation += order[begin : begin + n_val]
        name = f"t.chunk.{chunk:0{max(2, len(str(nchunks - 1)))}d}.jsonl"
        chunks[name] = b"".join(document + b"\n" for document in order[begin + n_val : end])
        begin = end
    if validation:
        chunks["t.val.jsonl"] = b"".join(document + b"\n" for document in validation)
    return chunks


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


def documents_of(content: bytes) -> list[bytes]:
    return content.split(b"\n")[:-1]

"""The shuffle against plain Python, its randomness, memory, faults, and being killed."""

import contextlib
import datetime
import decimal
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingua import shuffle, shuffle_jobs, shuffle_output
from lingua.data import DataArgs, validate_data_args
from lingua.documents import InputFile, find_files, read_lines
from lingua.shuffle import Plan, choose_n_validation, keys_of
from lingua.shuffle_jobs import Cluster, Progress, Resources, run
from tests.helpers.corpus import (
    documents_of,
    expected_files,
    expected_order,
    key,
    line,
    lines,
    make_plan,
    write_jsonl,
    write_parquet,
    written,
)

MEMORY = 300_000_000
ONE = Resources(MEMORY, workers=1)
TWO = Resources(MEMORY, workers=2)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Resources]:
    """Makes resources of this process whose share is so many bytes."""

    def resources(share: int) -> Resources:
        monkeypatch.setattr(shuffle, "MIN_SHARE", share)
        return Resources(0, workers=1)

    return resources


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[bytes]]]:
    """A folder with files of all kinds, and their documents."""
    folder = tmp_path_factory.mktemp("mixed")
    files = {}
    kinds = (".jsonl", ".jsonl.gz", ".parquet", ".json.zst", ".json", ".jsonl.zst", ".ndjson")
    for number, (suffix, count) in enumerate(zip(kinds, (1500, 400, 700, 300, 1, 50, 20), strict=True)):
        name = f"{'sub/' * (number % 3)}f{number}{suffix}"
        files[name] = lines(name, count)
        (write_parquet if suffix == ".parquet" else write_jsonl)(folder / name, files[name])
    (folder / "empty.jsonl").touch()
    files["empty.jsonl"] = []
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.jsonl").write_bytes(b"no document")
    (folder / "README.md").write_bytes(b"no document")
    return folder, files


# --- lines -------------------------------------------------------------------------------------------------------

LINE = st.one_of(
    st.sampled_from([b"", b" ", b"\t \r"]),
    st.text("aé\U0001f40d", max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
)


@given(
    parts=st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    ends_without=st.booleans(),
    has_mark=st.booleans(),
    block=st.integers(1, 64),
    data=st.data(),
)
def test_each_document_belongs_to_one_range_wherever_a_file_is_cut(
    parts: list[tuple[bytes, bytes]], ends_without: bool, has_mark: bool, block: int, data: st.DataObject
) -> None:
    content = b"\xef\xbb\xbf" if has_mark else b""
    expected = []
    for number, (text, end) in enumerate(parts):
        place = len(content)
        end = b"" if ends_without and number == len(parts) - 1 else end
        content += text + end
        if text.strip():
            expected.append((place if number else 0, text + b"\n"))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    found = []
    file = InputFile("f.jsonl", "f.jsonl", len(content), "")
    for first, last in itertools.pairwise([0, *cuts, len(content)]):
        for piece in read_lines(io.BytesIO(content), file, first, last, 10_000, block):
            for place, start, stop in zip(piece.places, piece.starts, piece.stops, strict=True):
                found.append((int(place), bytes(piece.data[start:stop])))
    assert found == expected


def test_reading_on_to_the_end_of_a_stream() -> None:
    content = b"".join(text + b"\n" for text in lines("f", 200))
    file = InputFile("f.jsonl.gz", "f.jsonl.gz", 1, "")
    pieces = read_lines(io.BytesIO(content), file, 0, None, 10_000, block=512)
    assert b"".join(bytes(piece.data[piece.starts[0] : piece.stops[-1]]) for piece in pieces) == content


# --- keys --------------------------------------------------------------------------------------------------------


def test_keys_are_those_of_plain_python_and_never_change() -> None:
    places = np.array([0, 1, 2, 1000, 2**40, 2**63], dtype=np.uint64)
    assert keys_of(42, 7, places).tolist() == [key(42, 7, int(place)) for place in places]
    # Output of other versions of this code must be the same.
    assert keys_of(42, 0, places[:2]).tolist() == [15693688518692557650, 14740149400503519153]


def test_keys_of_different_places_differ() -> None:
    keys = keys_of(1, 0, np.arange(1_000_000, dtype=np.uint64))
    assert len(np.unique(keys)) == len(keys)


# --- against plain Python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "nchunks", "n_validation"), [(100_000, 4, 30), (20_000_000, 3, 7), (4_000, 7, 0)])
def test_output_is_that_of_plain_python(
    mixed: tuple[Path, dict[str, list[bytes]]],
    tmp_path: Path,
    little_memory: Callable[[int], Resources],
    share: int,
    nchunks: int,
    n_validation: int,
) -> None:
    folder, files = mixed
    plan = make_plan(folder, tmp_path / "out", nchunks=nchunks, n_validation=n_validation)
    manifest = run(plan, little_memory(share), {})
    assert written(tmp_path / "out") == expected_files(files, nchunks, n_validation)
    assert manifest["documents"] == sum(map(len, files.values()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*manifest["files"], "t.manifest.json"])


@pytest.mark.parametrize("unit_bytes", [3_000, 10**9])
def test_same_output_whatever_the_units_and_workers(
    mixed: tuple[Path, dict[str, list[bytes]]], tmp_path: Path, unit_bytes: int
) -> None:
    folder, files = mixed
    run(make_plan(folder, tmp_path / "out", n_validation=30, unit_bytes=unit_bytes), TWO, {})
    assert written(tmp_path / "out") == expected_files(files, 4, 30)


def test_other_seeds_give_other_orders(mixed: tuple[Path, dict[str, list[bytes]]], tmp_path: Path) -> None:
    folder, files = mixed
    run(make_plan(folder, tmp_path / "out", n_validation=30, seed=7), ONE, {})
    assert written(tmp_path / "out") == expected_files(files, 4, 30, seed=7) != expected_files(files, 4, 30)


def test_equal_keys_come_in_the_order_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_memory: Callable[[int], Resources]
) -> None:
    """Chunks that begin among documents of equal keys, too."""
    files = {name: lines(name, 300) for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    for name, texts in files.items():
        write_jsonl(tmp_path / "in" / name, texts)
    # Only the first bits, so that about 200 documents share a key.
    monkeypatch.setattr(shuffle, "keys_of", lambda *args: keys_of(*args) >> np.uint64(62) << np.uint64(62))
    run(make_plan(tmp_path / "in", tmp_path / "out", nchunks=5, n_validation=0), little_memory(50_000), {})
    texts = [document for content in written(tmp_path / "out").values() for document in documents_of(content)]
    coarse, numbers = [], []
    for document in texts:
        facts = json.loads(document)
        position = files[facts["from"]].index(document)
        place = sum(len(before) + 1 for before in files[facts["from"]][:position])
        coarse.append(key(42, sorted(files).index(facts["from"]), place) >> 62)
        numbers.append((facts["from"], facts["number"]))
    assert list(zip(coarse, numbers, strict=True)) == sorted(zip(coarse, numbers, strict=True))
    assert len(set(numbers)) == 900


def test_moved_datasets_keep_their_order(tmp_path: Path) -> None:
    for folder in ("here", "zz/there"):
        for name in ("a/2.jsonl", "a-b/1.jsonl", "c.jsonl"):
            write_jsonl(tmp_path / folder / name, lines(name, 50))
    outputs = []
    for number, inputs in enumerate((["here"], ["zz/there"], ["zz/there/c.jsonl", "zz/there/a*", "zz/there/a"])):
        paths = [tmp_path / path for path in inputs]
        files = find_files([str(paths[0]) if len(paths) == 1 else str(path) for path in paths])
        assert [file.name for file in files] == ["a/2.jsonl", "a-b/1.jsonl", "c.jsonl"]
        run(make_plan(paths, tmp_path / str(number)), ONE, {})
        outputs.append(written(tmp_path / str(number)))
    assert outputs[0] == outputs[1] == outputs[2]


def test_no_trace_of_the_input_order(tmp_path: Path) -> None:
    """Position in against position out in tables of chi-square, and neighbours in against distances out."""
    files = {f"{number}.jsonl": lines(f"{number}.jsonl", 20_000, 5) for number in range(3)}
    for name, texts in files.items():
        write_jsonl(tmp_path / "in" / name, texts)
    run(make_plan(tmp_path / "in", tmp_path / "out", n_validation=0, unit_bytes=500_000), ONE, {})
    numbers = []
    for content in written(tmp_path / "out").values():
        for document in documents_of(content):
            facts = json.loads(document)
            numbers.append(20_000 * int(facts["from"][0]) + facts["number"])
    n = len(numbers)
    came_in = np.array(numbers)
    assert sorted(numbers) == list(range(n))
    for cells in (4, 30, 100):
        table, _, _ = np.histogram2d(came_in, np.arange(n), bins=cells)
        chi_square, freedom = ((table - n / cells**2) ** 2 / (n / cells**2)).sum(), (cells - 1) ** 2
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    # Modulo small numbers: units, batches and chunks would show in these.
    for cells in (7, 64):
        table, _, _ = np.histogram2d(came_in % cells, np.arange(n) % cells, bins=cells)
        chi_square, freedom = ((table - n / cells**2) ** 2 / (n / cells**2)).sum(), (cells - 1) ** 2
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    for lag in (1, 2, 3):
        assert abs(np.corrcoef(came_in[:-lag], came_in[lag:])[0, 1]) < 4 / n**0.5
    came_out = np.argsort(came_in)
    assert abs(np.corrcoef(came_out[:-1], came_out[1:])[0, 1]) < 4 / n**0.5


# --- chunks and validation ---------------------------------------------------------------------------------------


def test_validation_is_of_all_chunks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 1003))
    manifest = run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})
    counts = {name: facts["documents"] for name, facts in manifest["files"].items()}
    assert counts.pop("t.val.jsonl") == 10
    assert sorted(counts.values()) == [248, 248, 248, 249]
    (tmp_path / "out").rename(tmp_path / "t_shuffled")
    validate_data_args(DataArgs(root_dir=str(tmp_path), sources={"t_shuffled": 1.0}))


@pytest.mark.parametrize(
    ("wanted", "documents", "nchunks", "expected"), [(None, 10**7, 32, 10_000), (None, 3000, 32, 30), (None, 2, 1, 1)]
)
def test_number_for_validation(wanted: int | None, documents: int, nchunks: int, expected: int) -> None:
    assert choose_n_validation(wanted, documents, nchunks) == expected


def test_too_few_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 5))
    with pytest.raises(ValueError, match="5 documents are too few for 8 chunks and 1 .* use --nchunks 4"):
        run(make_plan(tmp_path / "in", tmp_path / "out", nchunks=8), ONE, {})
    assert written(tmp_path / "out") == {}
    run(make_plan(tmp_path / "in", tmp_path / "out", nchunks=4), ONE, {})
    assert [len(documents_of(content)) for content in written(tmp_path / "out").values()] == [1, 1, 1, 1, 1]


def test_many_chunks_sort_as_they_are_numbered(tmp_path: Path) -> None:
    texts = lines("a.jsonl", 303)
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    run(make_plan(tmp_path / "in", tmp_path / "out", nchunks=101, n_validation=0), ONE, {})
    contents = written(tmp_path / "out")
    assert next(iter(contents)) == "t.chunk.000.jsonl"
    assert b"".join(contents.values()) == b"".join(text + b"\n" for text in expected_order({"a.jsonl": texts}))


# --- lines that are no documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b'{"text": "x"', "not a line of JSON"),
        (b'["text"]', 'a JSON list; wanted an object with "text" or "content"'),
        (b'{"texts": "x"}', 'neither "text" nor "content" among its keys'),
        (b'{"text": null, "content": null}', '"text" is of type NoneType'),
        (b'{"content": 1}', '"content" is of type int'),
        (b'{"text": "a\xffb"}', "byte 12 of the line is no UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "byte 11 of the line is no UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.jsonl.zst"])
def test_wrong_lines_are_named(tmp_path: Path, name: str, wrong: bytes, message: str) -> None:
    texts = lines("f", 500)
    write_jsonl(tmp_path / "in" / name, [*texts[:321], b"", wrong, *texts[321:]])
    with pytest.raises(ValueError, match=rf"{name}:323: .*{message}") as error:
        run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})
    assert "\n" not in str(error.value)
    assert written(tmp_path / "out") == {}
    assert not list((tmp_path / "out").rglob("*.part"))


def test_lines_that_only_the_loader_takes(tmp_path: Path) -> None:
    """NaN and half of a surrogate pair."""
    texts = [b'{"text": "a", "score": NaN}', b'{"content": "\\ud800"}', b'{"text": ""}']
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    run(make_plan(tmp_path / "in", tmp_path / "out", nchunks=1, n_validation=0), ONE, {})
    assert sorted(documents_of(written(tmp_path / "out")["t.chunk.00.jsonl"])) == sorted(texts)


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.jsonl.zst", "f.parquet"])
def test_files_that_were_cut_off(tmp_path: Path, name: str) -> None:
    path = tmp_path / "in" / name
    (write_parquet if name.endswith("parquet") else write_jsonl)(path, lines("f", 500))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"{name}: .*cut off.*get it again"):
        run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})


def test_compressed_files_that_are_none(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b'{"text": "plain"}\n')
        with pytest.raises(ValueError, match=rf"{name}: cut off or no (gzip|zstd) file"):
            run(make_plan(tmp_path / name, tmp_path / "out"), ONE, {})
    # The header of a frame with a window of 1 GiB, and an empty last block.
    (tmp_path / "wide.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa0\x01\x00\x00")
    with pytest.raises(ValueError, match=r"wide.jsonl.zst: compressed with a window of more than 128 MB"):
        run(make_plan(tmp_path / "wide.jsonl.zst", tmp_path / "out"), ONE, {})


def test_long_documents(tmp_path: Path, little_memory: Callable[[int], Resources]) -> None:
    """Far longer than what is read at a time; and one that memory has no room for."""
    texts = [line("a.jsonl", number, length) for number, length in enumerate((10, 3_000_000, 20, 5_000_000, 30))]
    write_jsonl(tmp_path / "a.jsonl", texts)
    run(make_plan(tmp_path / "a.jsonl", tmp_path / "out", nchunks=1, n_validation=0), little_memory(76_000_000), {})
    order = expected_order({"a.jsonl": texts})
    assert written(tmp_path / "out")["t.chunk.00.jsonl"] == b"".join(text + b"\n" for text in order)
    for path in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"):
        write_jsonl(path, texts)
        with pytest.raises(ValueError, match=rf"{path.name}:4: a line of 5.0 MB, .* \(3.1 MB\); give 1.7 times"):
            run(make_plan(path, tmp_path / "other"), little_memory(46_000_000), {})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_documents_longer_than_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of the longest line that it reads, with its line feed, and of one more byte."""
    write = write_parquet if name.endswith("parquet") else write_jsonl
    texts = [b'{"text":"%s"}' % (b"x" * number) for number in (10, 4000, 20, 4001)]
    monkeypatch.setattr("lingua.documents.MAX_LINE_BYTES", len(texts[1]) + 1)
    write(tmp_path / "fits" / name, texts[:3])
    run(make_plan(tmp_path / "fits", tmp_path / "out", nchunks=1, n_validation=0), ONE, {})
    write(tmp_path / "in" / name, texts)
    where = r"row 3 \(from 0\): a document" if name.endswith("parquet") else "4: a line"
    with pytest.raises(ValueError, match=rf"{name}: ?{where} of 0.0 MB, more than the 0.0 MB that training reads"):
        run(make_plan(tmp_path / "in", tmp_path / "out2"), ONE, {})


def test_folders(tmp_path: Path) -> None:
    """Links that lead back, or to what was seen already, repeat nothing; names may be no UTF-8."""
    names = ["a.jsonl", "sub/b.jsonl", os.fsdecode(b"\xff.jsonl")]
    for name in names:
        write_jsonl(tmp_path / "in" / name, lines("f", 20))
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "twice").symlink_to(tmp_path / "in" / "sub")
    for name in ("dataset_infos.json", "sub/dataset_info.json"):
        (tmp_path / "in" / name).write_text("{}")
    assert sorted(Path(file.path).name for file in find_files([str(tmp_path / "in")])) == [
        "a.jsonl",
        "b.jsonl",
        names[2],
    ]
    plan = make_plan(tmp_path / "in", tmp_path / "out")
    for _ in range(2):
        assert run(plan, ONE, {})["documents"] == 60


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no such files"):
        find_files([str(tmp_path / "nothing")])
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"x.csv: not a name of JSON lines or parquet"):
        find_files([str(tmp_path / "*")])
    with pytest.raises(ValueError, match="no such files"):
        find_files([str(tmp_path)])
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl: no regular file"):
        find_files([str(tmp_path / "pipe.jsonl")])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="all 1 files are empty"):
        run(make_plan(tmp_path / "empty.jsonl", tmp_path / "out"), ONE, {})


# --- parquet -----------------------------------------------------------------------------------------------------


def run_one(path: Path, out: Path) -> list[dict[str, object]]:
    run(make_plan(path, out, nchunks=1, n_validation=0), ONE, {})
    return [json.loads(document) for document in documents_of(written(out)["t.chunk.00.jsonl"])]


def test_all_columns_of_parquet(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 678)
    table = pa.table(
        {
            "id": [1, 2**63 - 1],
            "text": ["é\u2028\n\0", ""],
            "score": [0.1, float("nan")],
            "when": pa.array([moment, None], pa.timestamp("us")),
            "when_ns": pa.array([1, None], pa.timestamp("ns")),
            "day": [moment.date(), None],
            "price": [decimal.Decimal("1.50"), None],
            "raw": [b"bytes", None],
            "nested": [{"a": [1], "b": {"c": moment}}, None],
            "kind": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = sorted(run_one(tmp_path / "a.parquet", tmp_path / "out"), key=lambda document: document["id"])
    assert list(first)[0] == "text"
    assert first == {
        "text": "é\u2028\n\0",
        "id": 1,
        "score": 0.1,
        "when": "2024-01-02T03:04:05.000678",
        "when_ns": "1970-01-01T00:00:00.000000001",
        "day": "2024-01-02",
        "price": "1.50",
        "raw": "bytes",
        "nested": {"a": [1], "b": {"c": "2024-01-02T03:04:05.000678"}},
        "kind": "x",
    }
    assert {key: value for key, value in second.items() if value is not None} == {
        "text": "", "id": 2**63 - 1, "kind": "y",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"texts": ["a"]}, 'neither "text" nor "content" among its columns'),
        ({"text": [1]}, 'column "text" is of type int64; wanted strings'),
        ({"text": [b"a"]}, 'column "text" is of type binary'),
        ({"text": ["a"] * 150 + [None]}, r"row 150 \(from 0\), column 'text': null; wanted a string; drop the row"),
        (
            {"text": ["a"] * 3, "when": pa.array([1, 2**62, None], pa.timestamp("us"))},
            r"row 1 \(from 0\), column 'when': cannot be written as JSON \(.*\); drop the column, or write it as text",
        ),
        (
            {"text": ["a"] * 3, "when": pa.array([None, 1, 2], pa.timestamp("us", tz="Nowhere/At_all"))},
            r"row 1 \(from 0\), column 'when': cannot be written as JSON \(.*Nowhere/At_all",
        ),
        (
            {"text": ["a"] * 151, "raw": [b"a"] * 150 + [b"\xff"]},
            r"row 150 \(from 0\), column 'raw': cannot be written",
        ),
    ],
)
def test_wrong_parquet_is_named(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=100)
    with pytest.raises(ValueError, match=rf"a.parquet: {message}"):
        run_one(tmp_path / "a.parquet", tmp_path / "out")


def test_text_of_parquet_that_is_no_utf8(tmp_path: Path) -> None:
    array = (
        pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False)
        if False
        else pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], dtype=np.int32)), pa.py_buffer(b"a\xff"))
    )
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: row 1 \(from 0\), column 'text': cannot be written"):
        run_one(tmp_path / "a.parquet", tmp_path / "out")


# --- what is there already ---------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Plan]:
    """A result of 200 documents, and a function that makes plans for the same."""
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 200))

    def plan(**settings: object) -> Plan:
        return make_plan(tmp_path / "in", tmp_path / "out", **settings)

    run(plan(), ONE, {"files": ["in"]})
    return plan


def test_manifest(finished: Callable[..., Plan], tmp_path: Path) -> None:
    manifest = json.loads((tmp_path / "out" / "t.manifest.json").read_bytes())
    assert manifest["source"] == {"files": ["in"]}
    assert manifest["inputs"] == [["a.jsonl", (tmp_path / "in" / "a.jsonl").stat().st_size]]
    assert (manifest["seed"], manifest["nchunks"], manifest["documents"]) == (42, 4, 200)
    contents = written(tmp_path / "out")
    assert {name: (facts["documents"], facts["bytes"]) for name, facts in manifest["files"].items()} == {
        name: (len(documents_of(content)), len(content)) for name, content in contents.items()
    }


def test_what_is_done_is_not_done_again(finished: Callable[..., Plan], tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    said: list[str] = []
    run(finished(), TWO, {}, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "nothing to do" in said[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 7}, "made with seed 42, wanted 7"),
        ({"nchunks": 2}, "made with nchunks 4, wanted 2"),
        ({"n_validation": 5}, "made with n_validation null, wanted 5"),
    ],
)
def test_another_result_is_refused(
    finished: Callable[..., Plan], tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    before = written(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"out: {message}; remove the folder"):
        run(finished(**settings), ONE, {})
    assert written(tmp_path / "out") == before


def test_other_inputs_are_refused(finished: Callable[..., Plan], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "b.jsonl", lines("b", 200))
    with pytest.raises(ValueError, match="made with inputs .*; remove the folder"):
        run(finished(), ONE, {})


def test_damage_is_seen(finished: Callable[..., Plan], tmp_path: Path) -> None:
    chunk = tmp_path / "out" / "t.chunk.02.jsonl"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"t.chunk.02.jsonl: {len(content) - 1} bytes, but .* {len(content)}"):
        run(finished(), ONE, {})
    chunk.unlink()
    with pytest.raises(ValueError, match="t.chunk.02.jsonl: missing"):
        run(finished(), ONE, {})
    chunk.write_bytes(content)
    (tmp_path / "out" / "t.chunk.04.jsonl").touch()
    with pytest.raises(ValueError, match="t.chunk.04.jsonl: 0 bytes, but the manifest tells of no such file"):
        run(finished(), ONE, {})
    (tmp_path / "out" / "t.manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="not a manifest"):
        run(finished(), ONE, {})


def test_strange_chunks_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 200))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.chunk.31.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds 1 chunk or validation files \(old.chunk.31.jsonl\)"):
        run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old.chunk.31.jsonl"]


def stop_after(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """A run in this process ends before its `count`-th task of a pass."""
    original, done = shuffle.KINDS[kind].run, iter(range(count))

    def run_task(*args: object) -> int:
        if next(done, None) is None:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(shuffle.KINDS[kind], "run", run_task)


@pytest.mark.parametrize("kind", ["scatter", "gather"])
def test_other_memory_goes_on_and_changed_inputs_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_memory: Callable[[int], Resources], kind: str
) -> None:
    files = {name: lines(name, 400) for name in ("a.jsonl", "b.jsonl")}
    for name, texts in files.items():
        write_jsonl(tmp_path / "in" / name, texts)

    def stopped() -> None:
        plan = make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000)
        resources = little_memory(10_000)
        with monkeypatch.context() as patch:
            stop_after(patch, kind, 2)
            with pytest.raises(KeyboardInterrupt):
                run(plan, resources, {})
        assert written(tmp_path / "out") == {}

    said: list[str] = []
    stopped()
    run(
        make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000),
        little_memory(1_000_000),
        {},
        say=said.append,
    )
    assert any("going on: 2 of" in line for line in said)
    assert written(tmp_path / "out") == expected_files(files, 4, 3)
    for path in (tmp_path / "out").iterdir():
        path.unlink()

    stopped()
    files["b.jsonl"] = lines("b.jsonl", 399)
    write_jsonl(tmp_path / "in" / "b.jsonl", files["b.jsonl"])
    run(make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000), ONE, {}, say=said.append)
    assert "starting anew: files changed since the run that was stopped" in said
    assert written(tmp_path / "out") == expected_files(files, 4, 3)


def test_jobs_of_a_run_that_was_given_up_write_nothing_into_another(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a.jsonl", 400))
    old = make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000)
    shuffle_output.begin(old, print)
    job = shuffle.Scatter(old, 100_000)
    job.run(0, lambda done, documents: None)

    files = {"a.jsonl": lines("a.jsonl", 300)}
    write_jsonl(tmp_path / "in" / "a.jsonl", files["a.jsonl"])
    new = make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000)
    shuffle_output.begin(new, print)
    for unit in range(2):
        with pytest.raises(ValueError, match="units-[0-9a-f]{8}: cannot write: No such file or directory"):
            job.run(unit, lambda done, documents: None)
    run(new, ONE, {})
    assert written(tmp_path / "out") == expected_files(files, 4, 3)
    assert not (tmp_path / "out" / ".work").exists()


def test_work_whose_folders_are_gone_is_begun_again(tmp_path: Path) -> None:
    files = {"a.jsonl": lines("a.jsonl", 400)}
    write_jsonl(tmp_path / "in" / "a.jsonl", files["a.jsonl"])
    plan = make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000)
    shuffle_output.begin(plan, print)
    shutil.rmtree(plan.units_folder)
    shutil.rmtree(plan.chunks_folder)
    run(plan, ONE, {})
    assert written(tmp_path / "out") == expected_files(files, 4, 3)
    assert not (tmp_path / "out" / ".work").exists()


def test_too_little_memory_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 200))
    for workers, told in ((1, "MEMORY 0.01: 1 worker(s) take 0.07 GB; give that"),
                          (2, "MEMORY 0.01: 2 worker(s) take 0.18 GB; give that, or use fewer workers")):  # fmt: skip
        said: list[str] = []
        plan = make_plan(tmp_path / "in", tmp_path / f"out{workers}")
        run(plan, Resources(10_000_000, workers), {}, say=said.append)
        assert said == [told]


def test_stopped_while_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.jsonl": lines("a.jsonl", 400)}
    write_jsonl(tmp_path / "in" / "a.jsonl", files["a.jsonl"])
    replaced = os.replace
    for name in ("t.chunk.00.jsonl", "t.chunk.02.jsonl", "t.val.jsonl", "t.manifest.json"):

        def replace(source: Path, target: Path, name: str = name) -> None:
            if Path(target).name == name:
                raise KeyboardInterrupt
            replaced(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000), ONE, {})
    monkeypatch.undo()
    run(make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000), ONE, {})
    assert written(tmp_path / "out") == expected_files(files, 4, 3)
    assert not (tmp_path / "out" / ".work").exists()


def test_stopped_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is there, and what lay between the passes is not all gone."""
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 400))
    plan = make_plan(tmp_path / "in", tmp_path / "out")

    def stop(*folders: str) -> None:
        raise KeyboardInterrupt

    removed = shuffle_output.remove_work
    has_plan = Path(plan.work, "plan.json").exists
    monkeypatch.setattr(shuffle_output, "remove_work", lambda *folders: stop() if has_plan() else removed(*folders))
    with pytest.raises(KeyboardInterrupt):
        run(plan, ONE, {})
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.runs"))
    said: list[str] = []
    run(plan, ONE, {}, say=said.append)
    assert "nothing to do" in said[0]
    assert not (tmp_path / "out" / ".work").exists()


def test_inputs_that_change_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 200))
    plan = make_plan(tmp_path / "in", tmp_path / "out")
    with open(tmp_path / "in" / "a.jsonl", "ab") as file:
        file.write(line("a", 200) + b"\n")
    with pytest.raises(ValueError, match="a.jsonl: changed while it was read"):
        run(plan, ONE, {})


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("scatter", lambda content: content[:-1], "000000.runs: damaged; remove it and start again"),
        # As a loss of power leaves it.
        ("gather", lambda content: content[:4000] + bytes(3000) + content[7000:], "lines where .* belong; remove it"),
        ("gather", lambda content: content[:3000], "000000.runs: cut off; remove .*/out/.work and start again"),
    ],
)
def test_damaged_runs_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 400))
    plan = make_plan(tmp_path / "in", tmp_path / "out", unit_bytes=9000)
    stop_after(monkeypatch, kind, 1)
    with pytest.raises(KeyboardInterrupt):
        run(plan, ONE, {})
    monkeypatch.undo()
    file = plan.unit_file(0)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        run(plan, ONE, {})
    assert written(tmp_path / "out") == {}


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 200))
    plan = make_plan(tmp_path / "in", tmp_path / "out")
    with shuffle_output.lock(Path(plan.stage)), pytest.raises(ValueError, match="another process works here"):
        run(plan, ONE, {})
    assert not (tmp_path / "out").exists()
    run(plan, ONE, {})


def test_free_disk_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl.gz", lines("a", 2000))
    usage = shuffle_output.check_writable.__globals__["shutil"].disk_usage(tmp_path)
    needed = 2 * sum(len(text) + 1 for text in lines("a", 2000))
    for free, fits in ((0.9 * needed, False), (1.1 * needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=int(free)))
        if fits:
            run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})
        else:
            with pytest.raises(ValueError, match="MiB free, and .* MiB are needed at once"):
                run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})
            assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.jsonl": lines("a.jsonl", 400)}
    write_jsonl(tmp_path / "in" / "a.jsonl", files["a.jsonl"])
    plan = make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000)
    with monkeypatch.context() as patch:

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", lambda fd: None)
        begun = shuffle_output.begin
        patch.setattr("lingua.shuffle_jobs.begin", lambda *args: (begun(*args), patch.setattr(os, "fsync", full)))
        with pytest.raises(ValueError, match="units-[0-9a-f]{8}: cannot write: No space left on device; started again"):
            run(plan, ONE, {})
    assert not list((tmp_path / "out").rglob("*.part"))
    run(plan, ONE, {})
    assert written(tmp_path / "out") == expected_files(files, 4, 3)


# --- URLs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_filesystem() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_from_url_to_url(
    mixed: tuple[Path, dict[str, list[bytes]]], tmp_path: Path, memory_filesystem: fsspec.AbstractFileSystem
) -> None:
    folder, files = mixed
    for name in files:
        memory_filesystem.pipe(f"/in/{name}", (folder / name).read_bytes())
    work = str(tmp_path / "work")
    plan = Plan(
        "t", "memory://out", work, work, tuple(find_files(["memory://in"])), nchunks=4, n_validation=30, unit_bytes=9000
    )
    run(plan, ONE, {})
    found = {path.rsplit("/", 1)[1]: memory_filesystem.cat(path) for path in memory_filesystem.ls("/out", detail=False)}
    manifest = json.loads(found.pop("t.manifest.json"))
    assert found == expected_files(files, 4, 30)
    assert manifest["documents"] == sum(map(len, files.values()))
    assert not Path(work).exists()
    said: list[str] = []
    run(plan, ONE, {}, say=said.append)
    assert "nothing to do" in said[0]
    with pytest.raises(ValueError, match="made with seed 42"):
        run(Plan("t", "memory://out", work, work, plan.files, seed=1, nchunks=4, n_validation=30), ONE, {})


def test_stopped_while_uploading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_filesystem: fsspec.AbstractFileSystem
) -> None:
    files = {"a.jsonl": lines("a.jsonl", 400)}
    write_jsonl(tmp_path / "a.jsonl", files["a.jsonl"])
    work = str(tmp_path / "work")
    plan = Plan("t", "memory://out", work, work, tuple(find_files([str(tmp_path / "a.jsonl")])), nchunks=4)
    written_before = shuffle._Sink.count
    counts = iter(range(4))

    def count(sink: object, piece: bytes) -> None:
        written_before(sink, piece)
        if next(counts, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(shuffle._Sink, "count", count)
    with pytest.raises(KeyboardInterrupt):
        run(plan, ONE, {})
    monkeypatch.undo()
    there = [path.rsplit("/", 1)[1] for path in memory_filesystem.ls("/out", detail=False)]
    assert there == ["t.chunk.00.jsonl", "t.chunk.01.jsonl"] or there == ["t.chunk.00.jsonl"]
    run(plan, ONE, {})
    for name, content in expected_files(files, 4, 4).items():
        assert memory_filesystem.cat(f"/out/{name}") == content


def test_urls_that_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match="no package for 's3://' is installed; pip install s3fs"):
        find_files(["s3://bucket/*.jsonl"])
    with pytest.raises(ValueError, match="nonsense://x: Protocol not known: nonsense"):
        find_files(["nonsense://x"])
    with pytest.raises(ValueError, match="memory://nothing: no such files"):
        find_files(["memory://nothing"])
    write_jsonl(tmp_path / "a.jsonl", lines("a", 3))
    assert find_files([f"file://{tmp_path}"]) == find_files([str(tmp_path)])


# --- processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from lingua.documents import find_files
from lingua.shuffle import Plan
from lingua.shuffle_jobs import Resources, run
folder, out, memory, workers, unit_bytes, nchunks = sys.argv[1:]
plan = Plan("t", out, f"{out}/.work", f"{out}/.work", tuple(find_files([folder])), nchunks=int(nchunks),
            unit_bytes=int(unit_bytes))
run(plan, Resources(int(memory), int(workers) or None), {})
"""


def start(folder: Path, out: Path, memory: int, workers: int, unit_bytes: int, nchunks: int) -> subprocess.Popen:
    """A run in a process group of its own."""
    numbers = map(str, (memory, workers, unit_bytes, nchunks))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(out), *numbers],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "serve(" in " ".join(child.cmdline())]


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def count_files(folder: Path, patterns: tuple[str, ...]) -> int:
    return sum(1 for pattern in patterns for _ in folder.glob(pattern))


@pytest.mark.parametrize("n_kills", [6, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, n_kills: int) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    files = {f"{number}.jsonl": lines(f"{number}.jsonl", 4000, 400) for number in range(3)}
    for name, texts in files.items():
        write_jsonl(folder / name, texts)
    nchunks, n_validation = 600, 120
    expected = expected_files(files, nchunks, n_validation)
    arguments = (folder, out, MEMORY, 2, 20_000, nchunks)
    randomness = random.Random(0)
    killed_in: Counter[str] = Counter()
    while killed_in.total() < n_kills:
        process = start(*arguments)
        # Not while Python starts, where there would be nothing to lose; and half of them in the second pass.
        wanted = ("units-*/*.runs", "chunks-*/*.json") if killed_in.total() < n_kills // 2 else ("chunks-*/*.json",)
        before = count_files(out / ".work", wanted)
        while process.poll() is None and count_files(out / ".work", wanted) <= before:
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(randomness.random() * 0.03)
        if process.poll() is None:
            killed_in["gather" if (out / ".work" / "cuts.json").exists() else "scatter"] += 1
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        else:
            # Faster than it was killed: from the beginning.
            assert process.wait() == 0, process.stderr.read()
            assert written(out) == expected
            shutil.rmtree(out)
    process = start(*arguments)
    assert process.wait() == 0, process.stderr.read()
    assert written(out) == expected
    assert not (out / ".work").exists()
    assert killed_in["scatter"] >= n_kills // 6
    assert killed_in["gather"] >= n_kills // 6


def test_a_worker_that_dies(tmp_path: Path) -> None:
    """One line, no worker left, and the next run goes on."""
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 30_000, 400))
    process = start(tmp_path / "in", tmp_path / "out", MEMORY, 2, 1_000_000, 4)
    wait_until(lambda: len(workers_of(process)) == 2)
    workers = workers_of(process)
    workers[1].kill()
    _, errors = process.communicate()
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert "a worker was killed by SIGKILL; out of memory? give less MEMORY, or use fewer workers" in last
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    process = start(tmp_path / "in", tmp_path / "out", MEMORY, 2, 1_000_000, 4)
    assert process.wait() == 0, process.stderr.read()


def test_workers_end_when_who_started_them_does(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines("a", 30_000, 400))
    process = start(tmp_path / "in", tmp_path / "out", MEMORY, 2, 1_000_000, 4)
    wait_until(lambda: len(workers_of(process)) == 2)
    workers = workers_of(process)
    wait_until(lambda: count_files(tmp_path / "out" / ".work", ("units-*/*.part",)))
    process.kill()
    _, errors = process.communicate()
    assert errors == ""
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def peaks(process: subprocess.Popen) -> dict[int, int]:
    """The most resident memory, in bytes, that the process and each of its workers ever had."""
    most: dict[int, int] = {}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):
            for one in [psutil.Process(process.pid), *workers_of(process)]:
                status = Path(f"/proc/{one.pid}/status").read_text()
                found = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
                most[one.pid] = max(most.get(one.pid, 0), int(found.split()[1]) * 1024 if found else 0)
        time.sleep(0.02)
    return most


def test_memory_stays_within_what_is_given_with_long_documents_among_short_ones(tmp_path: Path) -> None:
    """A parquet file of which a stretch is 1000 times as long as the rest."""
    texts = ["short"] * 200_000 + ["x" * 200_000] * 400
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet", write_batch_size=4)
    memory = 180_000_000
    process = start(tmp_path / "in", tmp_path / "out", memory, 1, 1 << 30, 4)
    most = peaks(process)
    assert process.wait() == 0, process.stderr.read()
    assert most.pop(process.pid) < 1.2 * memory  # read all at once: four times as much


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_stays_within_what_is_given(tmp_path: Path, suffix: str) -> None:
    """All processes together, with 80 MB of text."""
    text = np.random.default_rng(0).integers(32, 127, 1_000_000, dtype=np.uint8).tobytes().decode().replace('"', "'")
    starts = range(0, 996_000, 400)
    for number in range(8):
        texts = [text[start : start + 4000] for start in starts]
        if suffix == ".parquet":
            (tmp_path / "in").mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": texts}), tmp_path / "in" / f"{number}.parquet", row_group_size=2_500)
        else:
            write_jsonl(tmp_path / "in" / f"{number}.jsonl", [json.dumps({"text": text}).encode() for text in texts])
    memory = 180_000_000
    process = start(tmp_path / "in", tmp_path / "out", memory, 0, 20_000_000, 4)
    most = peaks(process)
    assert process.wait() == 0, process.stderr.read()
    main = most.pop(process.pid)
    # Two at a time; the second pass has others.
    assert main + sum(sorted(most.values())[-2:]) < 1.05 * memory
    if suffix == ".jsonl":
        assert len(most) == 4


# --- job arrays --------------------------------------------------------------------------------------------------


def test_as_jobs(mixed: tuple[Path, dict[str, list[bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.shuffle_jobs.POLL_SECONDS", 0.05)
    folder, files = mixed
    plan = make_plan(folder, tmp_path / "out", n_validation=30)
    run(plan, ONE, {}, Cluster("local", tasks=2))
    assert written(tmp_path / "out") == expected_files(files, 4, 30)
    assert not (tmp_path / "out" / ".work").exists()


def test_a_job_that_fails_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingua.shuffle_jobs.POLL_SECONDS", 0.05)
    texts = lines("a.jsonl", 500)
    write_jsonl(tmp_path / "in" / "a.jsonl", [*texts[:400], b"no document", *texts[400:]])
    with pytest.raises(
        ValueError, match=r"job \d+ failed: .*a.jsonl:401: not a line of JSON.*; its log is .*\.err"
    ) as error:
        run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {}, Cluster("local", tasks=2))
    assert "\n" not in str(error.value)
    assert Path(str(error.value).rsplit("its log is ", 1)[1]).exists()


@pytest.mark.parametrize(
    ("squeue", "message"),
    [
        ("echo 7_1", "job 7_0 ended without a result: .* its log is x.err"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "job 7_0 ended without a result"),
        ("echo 7_0", "still waiting"),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "still waiting"),
    ],
)
def test_jobs_that_end_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, message: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name in ("POLL_SECONDS", "QUEUE_SECONDS", "LISTING_SECONDS"):
        monkeypatch.setattr(shuffle_jobs, name, 0.01)
    write_jsonl(tmp_path / "a.jsonl", lines("a", 20))
    plan = make_plan(tmp_path / "a.jsonl", tmp_path / "out")
    job = SimpleNamespace(job_id="7_0", paths=SimpleNamespace(result_pickle=tmp_path / "none", stderr="x.err"))
    rounds = iter(range(20))

    def pending_tasks(kind: str, plan: Plan) -> list[int]:
        if next(rounds, None) is None:
            raise ValueError("still waiting")
        return [0]

    monkeypatch.setattr(shuffle, "pending_tasks", pending_tasks)
    with pytest.raises(ValueError, match=message):
        shuffle_jobs._wait_for_jobs("scatter", [0], plan, [job], Cluster(), lambda *args: None)


def test_jobs_of_two_runs_at_once(tmp_path: Path) -> None:
    """As after a kill that left jobs running: the same units and chunks, written side by side."""
    files = {"a.jsonl": lines("a.jsonl", 3000)}
    write_jsonl(tmp_path / "in" / "a.jsonl", files["a.jsonl"])
    plan = make_plan(tmp_path / "in", tmp_path / "out", n_validation=3, unit_bytes=9000)
    shuffle_output.begin(plan, print)
    for kind in ("scatter", "gather"):
        if kind == "gather":
            shuffle.save_cuts(plan)
        both = [threading.Thread(target=work_on_all, args=(kind, plan)) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    shuffle_output.publish(plan, {}, shuffle.load_cuts(plan).totals)
    assert written(tmp_path / "out") == expected_files(files, 4, 3)


def work_on_all(kind: str, plan: Plan) -> None:
    worker = shuffle.KINDS[kind](plan, 100_000)
    for task in range(worker.n_tasks(plan)):
        worker.run(task, lambda done, documents: None)


# --- progress ----------------------------------------------------------------------------------------------------


def test_progress_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(itertools.count(0, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    progress = Progress("scatter", [100e6, 100e6, 100e6], [1, 2], stream)
    for done in (0.25, 0.5, 0.75):
        progress.update(1, done, int(done * 1000))
    progress.update(1, 1.0, 1000)
    progress.update(2, 1.0, 2000)
    progress.finish()
    written_lines = stream.getvalue().splitlines()
    assert len(written_lines) < 5
    assert written_lines[0].startswith("scatter  ")
    assert written_lines[-1].startswith("scatter  300 of 300 MB  3,000 documents")
    assert "\r" not in stream.getvalue()

"""Data preparation: documents that are left out and counted, columns that are kept, files that are no data."""

import itertools
import json
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lingua import documents, shuffle_output
from lingua.documents import Part, Reading, Skipped, find_files, read_lines
from lingua.shuffle_jobs import Resources, run
from tests.helpers.corpus import documents_of, expected_files, line, lines, make_plan, written, zstd

ONE, TWO = Resources(10**9, 1), Resources(10**9, 2)
BAD = [b"no JSON", b'{"text": "\xff"}', b'{"text": null}', b'{"title": "x"}', b"[1]", b'{"content": 3}']


def spoiled(name: str, n: int) -> list[bytes]:
    """Every fifth line is a bad one."""
    return [BAD[i // 5 % len(BAD)] if i % 5 == 3 else line(name, i) for i in range(n)]


def write(path: Path, content: list[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    data = b"".join(one + b"\n" for one in content)
    path.write_bytes(zstd(data) if path.suffix == ".zst" else data)


def good(content: bytes) -> list[bytes]:
    return sorted(one for one in documents_of(content) if one not in BAD)


@pytest.mark.parametrize("resources", [ONE, TWO], ids=["one", "two"])
def test_lines_that_are_no_documents_are_left_out(tmp_path, resources):
    """The others come in the order that they have without: it follows from their places in the file."""
    inputs = tmp_path / "in"
    for name in ("a.jsonl", "b.jsonl.zst"):
        write(inputs / name, spoiled(name, 300))
    said = []
    plan = make_plan(inputs, tmp_path / "out", on_error="skip", unit_bytes=4000)
    manifest = run(plan, resources, {}, say=said.append)
    assert (manifest["documents"], manifest["skipped"]) == (480, 120)
    texts = b"".join(written(tmp_path / "out").values())
    assert good(texts) == sorted(documents_of(texts))
    assert len(documents_of(texts)) == 480
    assert said[-1] == "skipped, in all: 120 documents"
    assert said[-4].startswith(f"skipped: {inputs}/a.jsonl:4: not a line of JSON")
    # However the work is divided.
    other = make_plan(inputs, tmp_path / "other", on_error="skip", unit_bytes=10**9)
    run(other, ONE, {})
    assert written(tmp_path / "other") == written(tmp_path / "out")


def test_without_faults_skipping_changes_nothing(tmp_path):
    write(tmp_path / "in" / "a.jsonl", lines("a.jsonl", 200))
    plan = make_plan(tmp_path / "in", tmp_path / "out", on_error="skip", nchunks=3, n_validation=5)
    assert run(plan, ONE, {})["skipped"] == 0
    expected = expected_files({"a.jsonl": lines("a.jsonl", 200)}, nchunks=3, n_validation=5)
    assert list(written(tmp_path / "out").values()) == list(expected.values())


def test_what_was_skipped_is_known_after_a_stop(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.jsonl", spoiled("a", 300))
    plan = make_plan(tmp_path / "in", tmp_path / "out", on_error="skip", unit_bytes=4000)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lingua.shuffle_jobs.check_unchanged", stop)
        with pytest.raises(KeyboardInterrupt):
            run(plan, ONE, {})
    assert run(plan, ONE, {})["skipped"] == 60


@pytest.mark.parametrize(("first", "then"), [("skip", "stop"), ("stop", "skip")])
def test_a_result_with_documents_skipped_is_not_one_without(tmp_path, first, then):
    write(tmp_path / "in" / "a.jsonl", spoiled("a", 100) if first == "skip" else lines("a", 100))
    run(make_plan(tmp_path / "in", tmp_path / "out", on_error=first), ONE, {})
    again = make_plan(tmp_path / "in", tmp_path / "out", on_error=then)
    if first == "skip":
        with pytest.raises(ValueError, match="made with skipped 20, wanted 0"):
            run(again, ONE, {})
    else:
        assert run(again, ONE, {})["skipped"] == 0


def test_stopping_names_the_way_on(tmp_path):
    write(tmp_path / "in" / "a.jsonl", spoiled("a", 100))
    with pytest.raises(ValueError, match=r"a.jsonl:4: not a line of JSON .*\(--on_error skip leaves it out\)$"):
        run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})


def test_where_nothing_is_left_it_says_why(tmp_path):
    write(tmp_path / "in" / "a.jsonl", [b"no JSON"] * 10)
    with pytest.raises(ValueError, match=r"^t: nothing is left: all 10 documents are skipped: .*a.jsonl:1: not a line"):
        run(make_plan(tmp_path / "in", tmp_path / "out", on_error="skip"), ONE, {})


@pytest.mark.parametrize("block", [512, 2**20])
@pytest.mark.parametrize("n_ranges", [1, 2, 7, 40])
def test_lines_that_training_cannot_read_are_left_out(tmp_path, monkeypatch, block, n_ranges):
    """Each once, whatever range it begins in, and those around it stay."""
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 8_000)
    texts = lines("a", 60)
    for position, length in ((0, 9_000), (21, 60_000), (22, 7_900), (40, 8_100), (63, 20_000)):
        texts.insert(position, json.dumps({"text": "x" * length}).encode())
    write(tmp_path / "a.jsonl", texts)
    (file,) = find_files([str(tmp_path / "a.jsonl")])
    skipped, found = Skipped("skip"), []
    edges = [file.size * number // n_ranges for number in range(n_ranges + 1)]
    for first, last in itertools.pairwise(edges):
        with open(file.path, "rb") as source:
            for piece in read_lines(source, file, first, last, 8_000, block, Reading(8_000, None, skipped)):
                found += [
                    bytes(piece.data[start : stop - 1]) for start, stop in zip(piece.starts, piece.stops, strict=True)
                ]
    assert found == [text for text in texts if len(text) < 8_000]
    assert skipped.count == 4
    assert [why.partition(":")[2].partition(":")[0] for why in skipped.first] == ["1", "22", "41"]
    assert "a line of 0.1 MB, more than the 0.0 MB that training reads; cut it up" in skipped.first[1]


def test_a_line_that_memory_has_no_room_for_is_not_left_out(tmp_path):
    """It may fit another machine, and the output must not depend on that."""
    write(tmp_path / "a.jsonl", [*lines("a", 9), json.dumps({"text": "x" * 6_000}).encode()])
    (file,) = find_files([str(tmp_path / "a.jsonl")])
    skipped = Skipped("skip")
    with pytest.raises(ValueError, match=r"a.jsonl:10: a line of .* more than a worker's share of memory allows"):
        list(documents.read_part(Part(file, 0, 1), 5_000, None, skipped))
    assert skipped.count == 0


# --- parquet -----------------------------------------------------------------------------------------------------


def test_rows_that_are_no_documents_are_left_out(tmp_path):
    table = pa.table(
        {
            "text": ["a", None, "b", None, "c", "d"],
            "content": [None, "instead", None, None, None, None],
            "when": pa.array([1, 2, 3, 4, 2**62, None], pa.timestamp("us")),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    said = []
    plan = make_plan(tmp_path / "a.parquet", tmp_path / "out", on_error="skip", nchunks=1, n_validation=0)
    assert run(plan, ONE, {}, say=said.append)["skipped"] == 2
    found = [json.loads(one) for one in documents_of(b"".join(written(tmp_path / "out").values()))]
    assert sorted(document["text"] or document["content"] for document in found) == ["a", "b", "d", "instead"]
    assert [one.partition("a.parquet: ")[2].partition(" (from")[0] for one in said[:-1]] == ["row 3", "row 4"]


def test_columns_that_are_kept(tmp_path):
    table = pa.table({"id": [1, 2], "text": ["a", "b"], "image": [b"\xff\xfe" * 1000, b"\x00\xff"], "url": ["u", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    options = {"nchunks": 1, "n_validation": 0}
    with pytest.raises(ValueError, match="column 'image': cannot be written as JSON .*--columns names those to keep"):
        run(make_plan(tmp_path / "a.parquet", tmp_path / "all", **options), ONE, {})
    plan = make_plan(tmp_path / "a.parquet", tmp_path / "out", columns=("url", "text"), **options)
    manifest = run(plan, ONE, {})
    found = documents_of(b"".join(written(tmp_path / "out").values()))
    assert sorted(found) == [b'{"text":"a","url":"u"}', b'{"text":"b","url":null}']
    assert json.loads((tmp_path / "out" / "t.manifest.json").read_bytes())["columns"] == ["url", "text"]
    assert "nothing to do" in said_by(plan)
    assert manifest["skipped"] == 0
    # The room for it is that of the columns.
    assert shuffle_output.text_bytes(plan.files, ("text",)) < 500 < shuffle_output.text_bytes(plan.files)


def said_by(plan) -> str:
    said = []
    run(plan, ONE, {}, say=said.append)
    return "\n".join(said)


def test_another_choice_of_columns_is_another_result(tmp_path):
    write(tmp_path / "in" / "a.jsonl", lines("a", 50))
    run(make_plan(tmp_path / "in", tmp_path / "out", columns=("text",)), ONE, {})
    with pytest.raises(ValueError, match=r'made with columns \["text"\], wanted null'):
        run(make_plan(tmp_path / "in", tmp_path / "out"), ONE, {})


def test_a_column_that_is_not_there_is_named(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "url": ["u"]}), tmp_path / "a.parquet")
    plan = make_plan(tmp_path / "a.parquet", tmp_path / "out", columns=("text", "content", "link"))
    with pytest.raises(ValueError, match=r"a.parquet: --columns: no 'link' among its columns \['content', 'url'\]"):
        run(plan, ONE, {})


def test_keys_of_lines_that_are_kept(tmp_path):
    texts = [
        {"id": 1, "text": "a", "raw": "x" * 100},
        {"url": "u", "text": None, "content": "b"},
        {"text": "c", "score": float("nan")},
        {"text": "\ud800", "url": [1, {"a": None}]},
    ]
    write(tmp_path / "in" / "a.jsonl", [json.dumps(one).encode() for one in texts])
    keep = ("text", "content", "url", "score")
    run(make_plan(tmp_path / "in", tmp_path / "out", columns=keep, nchunks=1, n_validation=0), ONE, {})
    found = [json.loads(one) for one in documents_of(b"".join(written(tmp_path / "out").values()))]
    expected = [{name: value for name, value in one.items() if name in keep} for one in texts]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, expected))


# --- files -------------------------------------------------------------------------------------------------------


def test_files_whose_names_begin_with_a_dot_are_no_data(tmp_path):
    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", "._a.jsonl", ".cache/b.jsonl", "c/d.jsonl", "c/._d.jsonl"):
        write_all(tmp_path / "in" / name)
        system.pipe(f"/dots/{name}", b'{"text": "x"}\n')
    for root in (str(tmp_path / "in"), "memory:///dots"):
        for pattern, names in ((root, ["a.jsonl", "c/d.jsonl"]), (f"{root}/*.jsonl", ["a.jsonl"])):
            assert [file.path.removeprefix(f"{root}/") for file in find_files([pattern])] == names
    (file,) = find_files([f"{tmp_path / 'in'}/._a.jsonl"])  # it was asked for
    assert file.size == 14


def write_all(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"text": "x"}\n')


def test_a_dotfile_beside_the_result_is_no_strangers(tmp_path):
    write(tmp_path / "in" / "a.jsonl", lines("a", 50))
    plan = make_plan(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "._t.chunk.00.jsonl").write_bytes(b"of a file manager")
    run(plan, ONE, {})
    assert "nothing to do" in said_by(plan)


def test_an_input_that_is_touched_while_it_is_read(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.jsonl", lines("a", 50))
    plan = make_plan(tmp_path / "in", tmp_path / "out")
    os.utime(tmp_path / "in" / "a.jsonl", (1, 1))
    assert "a.jsonl: its time has changed while it was read, but not its size" in said_by(plan)

"""Faults of the data: told in one line with file, line and byte, or skipped and counted, exactly so after a resume."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingua import data, sources
from lingua.data import (
    DataArgs,
    build_dataloader_from_args,
    count_skipped,
    describe_shared_sources,
    init_dataloader_state_from_args,
    redistribute_state,
    shared_sources,
)
from lingua.errors import UserError
from lingua.sources import (
    TRAIN_FILES,
    VALIDATION_FILES,
    Faults,
    Place,
    encode_document,
    find_files,
    parse_document,
    read_documents,
)
from lingua.tokenizer import ByteTokenizer

BAD = [b"no JSON", b'{"text": "\xff"}', b'{"text": "cut', b'{"title": "x"}', b"[1]"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> None:
    """How far the loader reads ahead, and so when it meets a fault, follows from its threads."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")


def write(path: Path, lines: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def documents(name: str, n: int) -> list[bytes]:
    return [json.dumps({"text": f"{name} {number}"}).encode() for number in range(n)]


def with_faults(name: str, n: int, every: int) -> list[bytes]:
    """Every so manieth line is a bad one."""
    return [BAD[i // every % len(BAD)] if i % every == 2 else line for i, line in enumerate(documents(name, n))]


def make_args(root: Path, **changes) -> DataArgs:
    names = sorted(path.name for path in root.iterdir())
    options = {"batch_size": 2, "seq_len": 8, "prefetch_size": 3, "load_async": False, "on_error": "skip"}
    return DataArgs(root_dir=str(root), sources=dict.fromkeys(names, 1.0), **{**options, **changes})


def take(args: DataArgs, n: int, state=None, rank: int = 0, world_size: int = 1) -> list:
    state = state or init_dataloader_state_from_args(args, rank, world_size)
    with build_dataloader_from_args(args, state) as loader:
        return list(itertools.islice(loader, n))


@contextlib.contextmanager
def opened(args: DataArgs):
    with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as loader:
        yield loader


def check_same(items: list, expected: list) -> None:
    for (batch, state), (other, other_state) in zip(items, expected, strict=True):
        assert np.array_equal(batch, other)
        assert json.dumps(state) == json.dumps(other_state)


def texts_of(items: list) -> str:
    tokens = np.concatenate([batch[..., 0].reshape(-1) for batch, _ in items])
    return bytes(tokens[tokens < 256].astype(np.uint8).tolist()).decode()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_skipping_gives_what_the_same_files_without_faults_give(tmp_path, caplog, load_async):
    for source, every in (("a", 5), ("b", 3)):
        lines = with_faults(source, 40, every)
        path = write(tmp_path / "bad" / source / "x.chunk.0.jsonl", lines)
        write(tmp_path / "good" / source / "x.chunk.0.jsonl", [line for line in lines if line not in BAD])
    got = take(make_args(tmp_path / "bad", load_async=load_async), 40)
    expected = take(make_args(tmp_path / "good"), 40)
    assert all(np.array_equal(batch, other) for (batch, _), (other, _) in zip(got, expected, strict=True))
    counts = [count_skipped(state) for _, state in got]
    assert counts == sorted(counts)
    assert counts[-1] > 20
    assert [count_skipped(state) for _, state in expected] == [0] * 40
    offset = sum(len(line) + 1 for line in lines[:2])
    assert any(
        re.fullmatch(rf"skipped, number 1: {path}:3: not a line of JSON \(.*\); the line begins at byte {offset}", told)
        for told in warnings(caplog)
    )
    assert len(warnings(caplog)) == 12  # of each source the first five and the tenth


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resuming_among_skipped_documents_is_exact(tmp_path, rank, world_size):
    write(tmp_path / "a" / "x.chunk.0.jsonl", with_faults("a", 30, 4))
    write(tmp_path / "b" / "x.chunk.0.jsonl", with_faults("b", 7, 3))
    args = make_args(tmp_path)
    items = take(args, 30, rank=rank, world_size=world_size)
    for place in range(0, 20, 3):
        resumed = take(args, 9, json.loads(json.dumps(items[place][1])))
        for (batch, state), (expected, other) in zip(resumed, items[place + 1 :], strict=False):
            assert np.array_equal(batch, expected)
            assert json.dumps(state) == json.dumps(other)


def test_a_run_that_was_stopped_by_a_fault_goes_on_past_it_with_skip(tmp_path):
    lines = documents("a", 60)
    lines[50] = b"no JSON"
    path = write(tmp_path / "a" / "x.chunk.0.jsonl", lines)
    stop = make_args(tmp_path, on_error="stop")
    states = []
    with (
        opened(stop) as loader,
        pytest.raises(ValueError, match=f"^{path}:51: .* begins at byte 8.. .data.on_error=skip"),
    ):
        states.extend(state for _, state in loader)
    resumed = take(dataclasses.replace(stop, on_error="skip"), 30, states[-1])
    expected = take(make_args(tmp_path), len(states) + 30)[len(states) :]
    assert all(np.array_equal(batch, other) for (batch, _), (other, _) in zip(resumed, expected, strict=True))
    assert count_skipped(resumed[-1][1]) > 0


def test_of_a_stream_that_ranks_share_one_counts():
    streams = [{"n_skipped": 3}, {}]
    assert count_skipped({"streams": streams, "turn": [0, 2]}) == 3
    assert count_skipped({"streams": streams, "turn": [1, 2]}) == 0


def test_a_source_with_nothing_but_faults_ends_in_one_line(tmp_path):
    write(tmp_path / "a" / "x.chunk.0.jsonl", [b"no JSON"] * 3000)
    with pytest.raises(ValueError, match=r"^data\.sources\.a: no documents for this rank"):
        take(make_args(tmp_path), 1)


def test_keys_of_a_document_are_told_in_bounds(tmp_path):
    write(tmp_path / "a" / "x.chunk.0.jsonl", [json.dumps({f"key {number}": 1 for number in range(10_000)}).encode()])
    with pytest.raises(ValueError, match="neither") as caught:
        take(make_args(tmp_path, on_error="stop"), 1)
    assert len(str(caught.value)) < 600


# --- long lines ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short_limit(monkeypatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 64)


@pytest.mark.usefixtures("short_limit")
def test_a_line_that_is_too_long_is_a_fault(tmp_path):
    fits = json.dumps({"text": "x" * 51}).encode()
    assert len(fits) == 63  # 64 with its end
    write(tmp_path / "a" / "x.chunk.0.jsonl", [fits, b'{"text": "' + b"y" * 3_000_000 + b'"}', *documents("a", 5)])
    path = next(tmp_path.rglob("*.jsonl"))
    message = rf"^{path}:2: a line of 3,000,013 bytes, more than the 64 that can be read; .* begins at byte 64 "
    with pytest.raises(ValueError, match=message):
        take(make_args(tmp_path, on_error="stop"), 30)
    text = texts_of(take(make_args(tmp_path), 20))
    assert "x" * 51 in text
    assert "a 4" in text
    assert "y" not in text


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_as_long_as_can_be_at_the_end_of_a_file(tmp_path, end):
    line = json.dumps({"text": "x" * (52 - len(end))}).encode() + end
    assert len(line) == 64
    path = tmp_path / "x.chunk.0.jsonl"
    path.write_bytes(line)
    assert [text for text, _ in read_documents(path)] == ["x" * (52 - len(end))]


READ_LONG_LINE = """
import sys
from lingua.data import DataArgs, build_dataloader_from_args, init_dataloader_state_from_args
args = DataArgs(root_dir=sys.argv[1], sources={"a": 1.0}, seq_len=64, prefetch_size=2, load_async=False)
args.on_error = "skip"
with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as loader:
    for _ in range(30):
        next(loader)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # KiB
"""


def test_memory_stays_bounded_with_a_line_of_100_mb(tmp_path):
    path = tmp_path / "a" / "x.chunk.0.jsonl"
    write(path, [*documents("a", 50), b'{"text": "' + b"y" * 100_000_000 + b'"}', *documents("b", 50)])
    run = subprocess.run(
        [sys.executable, "-c", READ_LONG_LINE, str(tmp_path)],
        cwd=Path(data.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{path}:51: a line of 100,000,013 bytes" in run.stderr
    print(f"{int(run.stdout) / 1024:.0f} MiB at the most")
    assert int(run.stdout) < 200 * 1024


# --- the tokenizer -------------------------------------------------------------------------------------------------


class Panic(BaseException):
    """As code in Rust ends."""


class FailingTokenizer(ByteTokenizer):
    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        if text.endswith("7"):
            raise self.error
        return super().encode(text, add_bos, add_eos)


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), Panic("no luck"), ValueError("no luck"), MemoryError()])
def test_a_tokenizer_that_fails(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(data, "build_tokenizer", lambda name, path: FailingTokenizer(error))
    lines = documents("a", 30)
    path = write(tmp_path / "a" / "x.chunk.0.jsonl", lines)
    offset = sum(len(line) + 1 for line in lines[:7])
    problem = rf"{path}:8: the tokenizer fails on this document \({type(error).__name__}: .*\); .* byte {offset}"
    with pytest.raises(ValueError, match=f"^{problem}") as caught:
        take(make_args(tmp_path, on_error="stop"), 30)
    assert "\n" not in str(caught.value)
    args = make_args(tmp_path)
    items = take(args, 30)
    assert "a 8" in texts_of(items)
    assert "a 7" not in texts_of(items)
    assert any(re.match(f"skipped, number 1: {problem}", told) for told in warnings(caplog))
    resumed = take(args, 10, json.loads(json.dumps(items[12][1])))
    for (batch, state), (expected, other) in zip(resumed, items[13:], strict=False):
        assert np.array_equal(batch, expected)
        assert json.dumps(state) == json.dumps(other)


@pytest.mark.parametrize("n_documents", [2, 32])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_reading_ahead_changes_no_batch_state_or_error(tmp_path, monkeypatch, on_error, n_documents):
    """Against a loader that reads a document only when the one before it is used. With `skip` data and tokenizer fail
    throughout, and with `stop` once each.
    """

    def read_all(**settings: Any) -> tuple[list, str]:
        items, message = [], ""
        with monkeypatch.context() as patched, opened(args) as loader:
            for name, value in settings.items():
                patched.setattr(data, name, value)
            try:
                for item in itertools.islice(loader, 60):
                    items.append(item)
            except UserError as error:
                message = str(error)
        return items, message

    monkeypatch.setattr(data, "build_tokenizer", lambda name, path: FailingTokenizer(RuntimeError("no luck")))
    for source in ("a", "b"):
        lines = with_faults(source, 60, 5)
        if on_error == "stop":
            lines = [b'{"text": "fine"}' if line in BAD or b"7" in line else line for line in lines]
            lines[50] = b"no JSON" if source == "a" else b'{"text": "7"}'
        write(tmp_path / source / "x.chunk.0.jsonl", lines)
    for n_views in (1, 2):
        args = make_args(tmp_path, on_error=on_error, n_views=n_views, add_bos=False, add_eos=False)
        expected, expected_error = read_all(CHUNK_DOCUMENTS=1, CHUNKS_AHEAD=1)
        items, error = read_all(CHUNK_DOCUMENTS=n_documents, count_threads=lambda: 3)
        check_same(items, expected)
        assert error == expected_error
        assert bool(error) == (on_error == "stop")
        assert len(items) >= 20
        for place in (3, 10):
            check_same(take(args, 5, json.loads(json.dumps(items[place][1]))), expected[place + 1 : place + 6])


def test_a_tokenizer_that_always_fails_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "build_tokenizer", lambda name, path: FailingTokenizer(RuntimeError("no")))
    monkeypatch.setattr(data, "MAX_EMPTY_DOCUMENTS", 300)
    write(tmp_path / "a" / "x.chunk.0.jsonl", [b'{"text": "7"}'])
    with pytest.raises(ValueError, match=r"^data\.sources: 300 documents in a row are empty, or fail in the tokenizer"):
        take(make_args(tmp_path), 1)


# --- files that do not stay as they were ----------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path) -> tuple[DataArgs, Path]:
    """The loader of a source of two files, and the first of them."""
    for number in range(2):
        write(tmp_path / "data" / "a" / f"x.chunk.{number}.jsonl", documents(["first", "second"][number], 40))
    return make_args(tmp_path / "data"), tmp_path / "data" / "a" / "x.chunk.0.jsonl"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 3)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "more"}\n')


def replace(path: Path) -> None:
    write(path.with_name("new"), documents("other", 50))
    path.with_name("new").replace(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.replace(b"first", b"FIRST"))


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


CHANGES = {
    Path.unlink: "is gone",
    cut: r"has changed from 830 to 418 bytes",
    append: r"has changed from 830 to 847 bytes",
    replace: "has changed from 830 to 1,040 bytes",
}
SAME_SIZE = [overwrite, touch]


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_is_named(two_files, change, load_async):
    args, path = two_files
    with opened(dataclasses.replace(args, on_error="stop", load_async=load_async)) as loader:
        next(loader)
        change(path)
        with pytest.raises(ValueError, match=".") as caught:
            list(itertools.islice(loader, 10_000))
    message = str(caught.value)
    assert re.match(rf"{path}: {CHANGES[change]} since the run began \(read to line \d+, byte \d+\)", message)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("change", SAME_SIZE, ids=lambda change: change.__name__)
def test_a_file_of_the_same_size_is_read_on_after_one_warning(two_files, caplog, change, on_error, load_async):
    args, path = two_files
    with opened(dataclasses.replace(args, on_error=on_error, load_async=load_async)) as loader:
        items = list(itertools.islice(loader, 20))
        for _ in range(3):
            change(path)
            items += itertools.islice(loader, 200)
            os.utime(path, (len(items), 1))
    assert ("FIRST" if change is overwrite else "first") in texts_of(items[-100:])
    assert "second" in texts_of(items[-100:])
    (told,) = warnings(caplog)
    assert re.match(rf"{path}: has changed since the run began \(.*\), but not its size; read on", told)
    assert count_skipped(items[-1][1]) == 0


def test_a_file_that_was_touched_gives_the_same_batches(two_files):
    args, path = two_files
    expected = take(args, 100)
    with opened(dataclasses.replace(args, on_error="stop")) as loader:
        items = list(itertools.islice(loader, 10))
        touch(path)
        items += itertools.islice(loader, 90)
    check_same(items, expected)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_with_skip_a_file_that_changes_is_told_and_read_on(two_files, caplog, change):
    args, path = two_files
    with opened(args) as loader:
        next(loader)
        change(path)
        items = list(itertools.islice(loader, 400))
    assert "second" in texts_of(items[-100:])
    assert ("first" in texts_of(items[-100:])) == (change in (append, cut))
    (told,) = [told for told in warnings(caplog) if "since the run began" in told]
    assert re.match(f"{path}: {CHANGES[change]}", told)
    n_skipped = count_skipped(items[-1][1])
    if change is Path.unlink:
        assert n_skipped > 3  # once a pass
        assert any(f"{path}: cannot be read from line 1, byte 0, on (No such file" in told for told in warnings(caplog))
    else:
        assert (n_skipped > 0) == (change is cut)


def test_a_change_of_a_long_file_is_seen_after_a_while(tmp_path, monkeypatch):
    """Long before its end."""
    path = write(tmp_path / "a" / "x.chunk.0.jsonl", documents("a", 100_000))
    with opened(make_args(tmp_path, on_error="stop")) as loader:
        next(loader)
        append(path)
        assert len(list(itertools.islice(loader, 100))) == 100
        now = sources.time.monotonic()
        monkeypatch.setattr(sources.time, "monotonic", lambda: now + sources.LOOK_EVERY + 1)
        with pytest.raises(ValueError, match="has changed from .* bytes since the run began"):
            list(itertools.islice(loader, 2000))


@pytest.mark.parametrize("change", [Path.unlink, cut, replace], ids=lambda change: change.__name__)
def test_with_skip_a_run_resumes_from_what_is_left(two_files, change):
    """Inexactly. Without it a file that is gone or has another size is named."""
    args, path = two_files
    state = take(args, 3)[-1][1]
    change(path)
    message = rf"^{path}: .* when the run began|^data.sources.a: 1 files now, but 2 .*x.chunk.0.jsonl"
    with pytest.raises(ValueError, match=message):
        take(dataclasses.replace(args, on_error="stop"), 1, state)
    assert "second" in texts_of(take(args, 300, state))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_files_that_are_new_are_left_out_of_a_run(two_files, caplog, on_error, load_async):
    """They would change who reads what."""
    args, path = two_files
    args = dataclasses.replace(args, on_error=on_error)
    items = take(args, 200)
    for number in (2, 3, 4, 5):
        write(path.with_name(f"x.chunk.{number}.jsonl"), documents("third", 3))
    resumed = take(dataclasses.replace(args, load_async=load_async), 198, items[1][1])
    check_same(resumed, items[2:])
    (told,) = warnings(caplog)
    names = ", ".join(f"x.chunk.{number}.jsonl" for number in (2, 3, 4))
    assert told == f"data.sources.a: left out of this run, which began without them: {names}, ..."
    assert "third" in texts_of(take(args, 200))


def test_the_rank_of_the_first_stream_says_what_is_left_out(two_files, caplog):
    args, path = two_files
    states = [init_dataloader_state_from_args(args, rank, 2) for rank in range(2)]
    write(path.with_name("x.chunk.2.jsonl"), documents("third", 3))
    for state, n_told in zip(states[::-1], [0, 1], strict=True):
        take(args, 1, state)
        assert len(warnings(caplog)) == n_told
    assert warnings(caplog) == ["data.sources.a: left out of this run, which began without it: x.chunk.2.jsonl"]


def test_files_whose_names_begin_with_a_dot_are_no_data(two_files):
    """What macOS, rsync and editors write beside their files."""
    args, path = two_files
    state, before = take(args, 3)[-1]
    for name in ("._x.chunk.0.jsonl", ".x.chunk.1.jsonl.chunk.9.jsonl", "._x.val.jsonl"):
        path.with_name(name).write_bytes(b"no text\n")
    assert [file.name for file in find_files(args.root_dir, "a", TRAIN_FILES)] == ["x.chunk.0.jsonl", "x.chunk.1.jsonl"]
    with pytest.raises(ValueError, match=r"^data\.sources\.a: no files named"):
        find_files(args.root_dir, "a", VALIDATION_FILES)
    take(dataclasses.replace(args, on_error="stop"), 3, before)


# --- sources that are too small for their ranks --------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_a_rank_without_a_document_reads_all_of_the_source(tmp_path, on_error, load_async):
    write(tmp_path / "large" / "x.chunk.0.jsonl", documents("large", 300))
    write(tmp_path / "tiny" / "x.chunk.0.jsonl", documents("tiny", 2))
    # Nothing is shuffled, so that texts stay together.
    args = make_args(tmp_path, on_error=on_error, load_async=load_async, batch_size=1, prefetch_size=1)
    args.sources["tiny"] = 0.1
    states = [init_dataloader_state_from_args(args, rank, 4) for rank in range(4)]
    assert [shared_sources(state) for state in states] == [[], [], [("tiny", 2)], [("tiny", 3)]]
    pairs = [pair for state in states for pair in shared_sources(state)]
    assert describe_shared_sources(pairs, 4) == [
        "data.sources.tiny: not every one of 4 ranks has a document in its share, so all of the source is read by "
        "ranks 2, 3 too"
    ]
    for state, read in zip(states, [["tiny 0"], ["tiny 1"], ["tiny 0", "tiny 1"], ["tiny 0", "tiny 1"]], strict=True):
        items = take(args, 500, state)
        text = texts_of(items)
        assert [name for name in ("tiny 0", "tiny 1") if name in text] == read
        # It resumes as exactly as any, on other numbers of ranks too.
        resumed = take(args, 10, json.loads(json.dumps(items[400][1])))
        check_same(resumed, items[401:411])
    on_two = [redistribute_state(states, rank, 2) for rank in range(2)]
    assert [shared_sources(state) for state in on_two] == [[], [("tiny", 2), ("tiny", 3)]]
    assert "tiny 0" in texts_of(take(args, 500, on_two[1]))


def test_where_every_rank_has_a_document_nothing_is_shared(tmp_path):
    for number in range(3):
        write(tmp_path / "a" / f"x.chunk.{number}.jsonl", [b"", *documents("a", 4)])
    for rank in range(4):
        (stream,) = init_dataloader_state_from_args(make_args(tmp_path), rank, 4)["streams"]
        assert stream == {"stream": rank, "rows_given": 0, "rows_used": 0, "place": None, "n_skipped": 0}


def test_a_share_of_faults_only_has_no_document_where_they_are_skipped(tmp_path, caplog):
    path = write(tmp_path / "a" / "x.chunk.0.jsonl", [documents("a", 1)[0], b"no JSON"])
    skipping, stopping = (make_args(tmp_path, on_error=on_error) for on_error in ("skip", "stop"))
    assert shared_sources(init_dataloader_state_from_args(skipping, 1, 2)) == [("a", 1)]
    assert warnings(caplog) == []
    state = init_dataloader_state_from_args(stopping, 1, 2)
    assert shared_sources(state) == []
    with pytest.raises(ValueError, match=f"^{path}:2: not a line of JSON"):
        take(stopping, 1, state)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_source_without_a_document_ends_it_before_the_first_batch(tmp_path, rank):
    write(tmp_path / "a" / "x.chunk.0.jsonl", documents("a", 3))
    write(tmp_path / "b" / "x.chunk.0.jsonl", [b"", b"  "])
    args = make_args(tmp_path, on_error="stop")
    with pytest.raises(ValueError, match=r"^data\.sources\.b: no documents .*; give it text, or .* data\.sources\.b=0"):
        init_dataloader_state_from_args(args, rank, 2)
    args.sources["b"] = 0.0
    take(args, 1, init_dataloader_state_from_args(args, rank, 2))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"text": None, "content": "x"}, "x"),
        ({"content": None, "text": "x"}, "x"),
        ({"text": "x", "content": 5}, "x"),
        ({"text": "", "content": "x"}, ""),
    ],
)
def test_of_text_and_content_the_one_that_is_there_is_taken(line, text):
    assert parse_document(json.dumps(line).encode(), Path("f"), 1) == text


@pytest.mark.parametrize("line", [{"text": None}, {"text": None, "content": None}, {"content": None}])
def test_a_document_without_text_is_a_fault(line):
    with pytest.raises(ValueError, match=rf'^f:1: "{next(iter(line))}" is of type NoneType; wanted a string'):
        parse_document(json.dumps(line).encode(), Path("f"), 1)


def test_a_source_that_is_gone_ends_the_run_also_with_skip(two_files):
    """The others would not make up for it: the mixture is what was asked for."""
    args, path = two_files
    with opened(args) as loader:
        next(loader)
        for file in path.parent.iterdir():
            file.unlink()
        with pytest.raises(ValueError, match=r"^data\.sources\.a: no documents for this rank in "):
            list(itertools.islice(loader, 10_000))


def test_a_disk_that_fails_in_the_midst_of_a_file(two_files, monkeypatch, caplog):
    args, path = two_files

    def read_line(file):
        if file.name == str(path) and file.tell() > 300:
            raise OSError(5, "Input/output error")
        return original(file)

    original = sources.read_line
    monkeypatch.setattr(sources, "read_line", read_line)
    text = texts_of(take(args, 200))
    assert "first 14" in text
    assert "first 30" not in text
    assert "second 39" in text
    assert f"{path}: cannot be read from line 16, byte 305, on (Input/output error)" in " ".join(warnings(caplog))
    with pytest.raises(ValueError, match=f"^{path}: cannot be read from line 16, byte 305, on .*data.on_error=skip"):
        take(dataclasses.replace(args, on_error="stop"), 200)


# --- whole files ---------------------------------------------------------------------------------------------------


def test_documents_of_a_file_and_their_places(tmp_path, caplog):
    path = write(tmp_path / "x.val.jsonl", [b'{"text": "a"}', b"", b"bad", b'{"content": "b"}'])
    faults = Faults("skip")
    assert list(read_documents(path, faults)) == [("a", Place(path, 1, 0)), ("b", Place(path, 4, 19))]
    assert faults.n_skipped == 1
    assert len(warnings(caplog)) == 1
    with pytest.raises(ValueError, match=f"^{path}:3: not a line of JSON .*; the line begins at byte 15 "):
        list(read_documents(path))
    caplog.clear()
    list(read_documents(path, Faults("skip", is_told=False)))
    assert not warnings(caplog)


def test_a_setting_that_the_tokenizer_cannot_have_is_named_without_the_errors_class():
    class WithoutBos:
        def encode(self, text, add_bos, add_eos):
            raise UserError("data.add_bos=true, but the model has no BOS token")

    with pytest.raises(UserError, match=r"the tokenizer fails on this document \(data\.add_bos=true, but"):
        encode_document(WithoutBos(), "x", True, False)

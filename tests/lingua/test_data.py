"""The loader: who reads which line, rows and batches against plain references, exact resuming, errors, the worker."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingua import data
from lingua.data import (
    DataArgs,
    Mixture,
    RowPacker,
    SourceReader,
    TokenReader,
    build_dataloader_from_args,
    check_state_fits,
    find_files,
    init_dataloader_state_from_args,
    redistribute_state,
    share_files,
)
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs, build_tokenizer

BOS, EOS = 256, 257


def write_source(root: Path, source: str, files: list[list[str]]) -> None:
    """One chunk file for each list of texts."""
    (root / source).mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / source / f"{source}.chunk.{number:02d}.jsonl").write_text(lines)


def write_lines(root: Path, content: bytes, source: str = "a") -> Path:
    (root / source).mkdir(parents=True, exist_ok=True)
    path = root / source / f"{source}.chunk.00.jsonl"
    path.write_bytes(content)
    return path


def make_args(root: Path, **changes) -> DataArgs:
    options = {"sources": {"a": 1.0}, "batch_size": 2, "seq_len": 8, "prefetch_size": 3, "load_async": False}
    return DataArgs(root_dir=str(root), **{**options, **changes})


@contextlib.contextmanager
def opened(args: DataArgs):
    with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as loader:
        yield loader


def take(args: DataArgs, n: int, state=None, rank: int = 0, world_size: int = 1) -> list:
    """The first `n` items `(batch, state)` from a place, or from the beginning."""
    state = state or init_dataloader_state_from_args(args, rank, world_size)
    with build_dataloader_from_args(args, state) as loader:
        return list(itertools.islice(loader, n))


def through_json(state):
    return json.loads(json.dumps(state))


def read_texts(root: Path, rank: int = 0, world_size: int = 1, n_passes: int = 1) -> list[list[str]]:
    """What one rank's reader of source `a` gives in each of the first passes."""
    reader = SourceReader("a", share_files(find_files(str(root), "a", data.TRAIN_FILES), rank, world_size))
    passes = [[] for _ in range(n_passes + 1)]
    while reader.n_pass < n_passes:
        text, _ = reader.next_document()
        passes[reader.n_pass].append(text)
    reader.close()
    return passes[:-1]


def refusal(args: DataArgs, state=None, rank: int = 0, world_size: int = 1, n: int = 50) -> str:
    """The one line with which the loader ends within `n` batches."""
    with pytest.raises(ValueError, match=".") as caught:
        take(args, n, state, rank, world_size)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert type(caught.value) is UserError
    return message


# --- shares ------------------------------------------------------------------------------------------------------


def check_shares(n_files: int, world_size: int) -> None:
    files = [Path(f"{number:03d}") for number in range(n_files)]
    readers = Counter()
    for rank in range(world_size):
        shares = share_files(files, rank, world_size)
        assert [share.path for share in shares] == sorted({share.path for share in shares})
        total = sum(Fraction(share.last - share.first, share.modulus) for share in shares)
        assert total == Fraction(n_files, world_size)
        for share in shares:
            assert 0 <= share.first < share.last <= share.modulus
            for residue in range(share.first, share.last):
                readers[share.path, share.modulus, residue] += 1
    (modulus,) = {modulus for _, modulus, _ in readers}
    assert readers == Counter(dict.fromkeys(itertools.product(files, [modulus], range(modulus)), 1))


def test_every_line_has_one_reader_and_shares_are_equal():
    for n_files, world_size in itertools.product(range(1, 13), range(1, 17)):
        check_shares(n_files, world_size)


@given(st.integers(1, 150), st.integers(1, 150))
def test_every_line_has_one_reader_and_shares_are_equal_for_any_numbers(n_files, world_size):
    check_shares(n_files, world_size)


@pytest.mark.parametrize(("n_files", "world_size"), [(1, 1), (1, 8), (2, 8), (4, 8), (8, 8), (3, 12), (32, 128)])
def test_where_files_divide_ranks_the_published_rule_holds(n_files, world_size):
    files = [Path(f"{number:03d}") for number in range(n_files)]
    per_file = world_size // n_files
    for rank in range(world_size):
        assert share_files(files, rank, world_size) == [
            (files[rank // per_file], rank % per_file, rank % per_file + 1, per_file)
        ]


@pytest.mark.parametrize(("n_files", "world_size"), [(4, 2), (6, 3), (5, 1)])
def test_where_ranks_divide_files_each_reads_whole_ones(n_files, world_size):
    files = [Path(f"{number:03d}") for number in range(n_files)]
    shares = [share_files(files, rank, world_size) for rank in range(world_size)]
    assert [(share.path, share.first, share.last) for part in shares for share in part] == [(f, 0, 1) for f in files]


@pytest.mark.parametrize(("n_files", "world_size"), [(1, 1), (1, 3), (2, 4), (3, 2), (2, 3), (5, 3), (3, 7), (6, 4)])
def test_readers_give_every_document_once_a_pass(tmp_path, n_files, world_size):
    files = [[f"file {number} line {line}" for line in range(7 + 5 * number)] for number in range(n_files)]
    write_source(tmp_path, "a", files)
    passes = [read_texts(tmp_path, rank, world_size, n_passes=3) for rank in range(world_size)]
    for number in range(3):
        assert sorted(text for rank in passes for text in rank[number]) == sorted(itertools.chain(*files))
    for first, *later in passes:
        assert later == [first, first]
        places = [(int(text.split()[1]), int(text.split()[3])) for text in first]
        assert places == sorted(places)


def test_lines_are_told_apart_by_their_number_in_the_file(tmp_path):
    """Blank lines count, so that ranks that skip them still agree on who reads what."""
    lines = [b"\n" if line % 3 == 1 else b'{"text": "%d"}\n' % line for line in range(20)]
    write_lines(tmp_path, b"".join(lines))
    assert read_texts(tmp_path, 0, 2) == [[str(line) for line in range(0, 20, 2) if line % 3 != 1]]
    assert read_texts(tmp_path, 1, 2) == [[str(line) for line in range(1, 20, 2) if line % 3 != 1]]


# --- lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        pytest.param(b'{"text": "x"}\n{"content": "y"}\n', ["x", "y"], id="text and content"),
        pytest.param(b'{"content": "y", "text": "x", "id": 1}\n', ["x"], id="text before content"),
        pytest.param(b'\n{"text": "x"}\n  \n\t\n\n{"text": "y"}\n\n', ["x", "y"], id="blank lines"),
        pytest.param(b'{"text": "x"}\r\n\r\n{"text": "y"}\r\n', ["x", "y"], id="CRLF"),
        pytest.param(b'{"text": "x"}\n{"text": "y"}', ["x", "y"], id="no newline at the end"),
        pytest.param(b'{"text": ""}\n{"text": "y"}\n', ["", "y"], id="empty text"),
        pytest.param(b'\xef\xbb\xbf{"text": "x"}\n', ["x"], id="byte order mark"),
        pytest.param('{"text": "é中😀"}\n'.encode(), ["é中😀"], id="UTF-8"),
        pytest.param(b'{"text": "\\u00e9\\ud83d\\ude00"}\n', ["é😀"], id="escapes"),
        pytest.param(
            '{"text": "a\u2028b\u0085c\u2029d"}\n{"text": "e"}\n'.encode(), ["a\u2028b\u0085c\u2029d", "e"], id="U+2028"
        ),
    ],
)
def test_lines_that_are_read(tmp_path, content, texts):
    write_lines(tmp_path, content)
    assert read_texts(tmp_path, n_passes=2) == [texts, texts]


BAD_LINES = {
    "cut": (b'{"text": "a', "not a line of JSON"),
    "no JSON": (b"text", "not a line of JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not a line of JSON"),
    "invalid UTF-8": (b'{"text": "\xff"}', "not a line of JSON"),
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "not a line of JSON"),
    "zeros": (b"\0\0\0\0", "not a line of JSON"),
    "control character": (b'{"text": "a\tb"}', "not a line of JSON"),
    "nested too deep": (b"[" * 200_000, "not a line of JSON"),
    "list": (b'["a"]', 'wanted an object with "text" or "content"'),
    "string": (b'"text"', 'wanted an object with "text" or "content"'),
    "null": (b"null", 'wanted an object with "text" or "content"'),
    "neither key": (b'{"title": "a", "body": "b"}', 'neither "text" nor "content" among its keys'),
    "no keys": (b"{}", 'neither "text" nor "content"'),
    "number": (b'{"text": 5}', '"text" is of type int; wanted a string'),
    "null text": (b'{"text": null}', '"text" is of type NoneType; wanted a string'),
    "content list": (b'{"content": ["a"]}', '"content" is of type list; wanted a string'),
}


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, kind, load_async):
    line, problem = BAD_LINES[kind]
    path = write_lines(tmp_path, b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    message = refusal(make_args(tmp_path, load_async=load_async))
    assert message.startswith(f"{path}:3: ")
    assert problem in message
    assert "; the line begins at byte 18 " in message


def test_errors_of_the_worker_are_those_of_the_loader_without_one(tmp_path):
    write_lines(tmp_path, b'{"text": "fine"}\n{"nothing": 1}\n')
    messages = [refusal(make_args(tmp_path, load_async=load_async)) for load_async in (False, True)]
    assert messages[0] == messages[1]


# --- the mixture -------------------------------------------------------------------------------------------------


class NamedReader:
    def __init__(self, number: int):
        self.number = number

    def next_document(self) -> tuple[int, None]:
        return self.number, None

    def state(self) -> tuple[int]:
        return (0,)


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=7).filter(any),
    seed=st.tuples(st.integers(0, 2**40), st.integers(0, 100), st.integers(1, 128)),
)
def test_sources_are_drawn_as_numpy_draws_them(weights, seed):
    mixture = Mixture([NamedReader(number) for number in range(len(weights))], weights, seed)
    rng = np.random.default_rng(seed)
    p = np.array(weights) / np.sum(weights)
    draws = [mixture.next_document().text for _ in range(60)]
    assert draws == [rng.choice(len(weights), p=p) for _ in range(60)]
    assert all(weights[number] > 0 for number in draws)


# --- rows --------------------------------------------------------------------------------------------------------


class ListDocuments:
    """Tokens of texts from a list, over and over; the place is that in the list."""

    def __init__(self, texts: list[str], args: DataArgs):
        tokenizer = build_tokenizer("bytes")
        self.tokens = [np.array(tokenizer.encode(text, args.add_bos, args.add_eos), dtype=np.int32) for text in texts]
        self.place = 0

    def state(self, place: int) -> dict:
        return {"place": place}

    def restore(self, state: dict) -> None:
        self.place = state["place"]

    def next_tokens(self) -> np.ndarray:
        self.place += 1
        return self.tokens[(self.place - 1) % len(self.tokens)]


def row_reference(texts, args: DataArgs, n_rows: int) -> np.ndarray:
    """All tokens in one long list, cut."""
    tokens = []
    for text in itertools.cycle(texts):
        tokens += [BOS] * args.add_bos + list(text.encode()) + [EOS] * args.add_eos
        if len(tokens) >= n_rows * args.seq_len + args.n_views:
            break
    width = args.seq_len + args.n_views - 1
    return np.array([tokens[row * args.seq_len :][:width] for row in range(n_rows)])


ROWS = {
    "texts": st.lists(st.text("abcdefgh", max_size=9), min_size=1, max_size=8).filter(any),
    "seq_len": st.integers(1, 9),
    "n_views": st.integers(1, 4),
    "add_bos": st.booleans(),
    "add_eos": st.booleans(),
}


@given(**ROWS, fills=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_rows_are_cut_from_the_concatenated_tokens(texts, fills, **options):
    args = DataArgs(**options)
    packer = RowPacker(ListDocuments(texts, args), args)
    rows = np.full((sum(fills), packer.row_len), -1)
    for part in np.split(rows, np.cumsum(fills)[:-1]):
        packer.fill(part)
    assert np.array_equal(rows, row_reference(texts, args, len(rows)).reshape(rows.shape))


@given(**ROWS, n_rows=st.integers(1, 12))
def test_packing_goes_on_from_its_state(texts, n_rows, **options):
    args = DataArgs(**options)
    packer = RowPacker(ListDocuments(texts, args), args)
    rows = row_reference(texts, args, n_rows + 6)
    packer.fill(np.empty((n_rows, packer.row_len)))

    again = RowPacker(ListDocuments(texts, args), args)
    again.fill(np.empty((1, packer.row_len)))  # restoring forgets what was before
    state = packer.state()
    again.restore(through_json(state))
    assert again.state() == state
    for following in (packer, again):
        got = np.empty((6, packer.row_len))
        following.fill(got)
        assert np.array_equal(got, rows[n_rows:])


def test_documents_that_are_used_up_are_not_kept():
    args = DataArgs(seq_len=50, n_views=2)
    packer = RowPacker(ListDocuments(["a", "", "bcd"], args), args)
    packer.fill(np.empty((500, packer.row_len)))
    assert len(packer._pending) <= 51


def test_empty_documents_in_a_row_are_an_error_and_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_EMPTY_DOCUMENTS", 500)
    write_source(tmp_path, "a", [["", ""]])
    message = refusal(make_args(tmp_path, add_bos=False, add_eos=False))
    assert message.startswith("data.sources: 500 documents in a row are empty")


@pytest.mark.timeout(60)
def test_empty_documents_in_a_row_are_an_error_from_the_worker(tmp_path):
    write_source(tmp_path, "a", [[""] * 20_000])
    message = refusal(make_args(tmp_path, add_bos=False, add_eos=False, load_async=True))
    assert "documents in a row are empty" in message


# --- reading ahead -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_chars", "n_documents"), [(10, 4 * data.CHUNK_DOCUMENTS), (200, 8), (3000, 1)])
def test_reading_ahead_is_bounded_in_documents_and_characters(tmp_path, monkeypatch, n_chars, n_documents):
    monkeypatch.setattr(data, "CHUNK_CHARS", 400)
    monkeypatch.setattr(data, "CHARS_AHEAD", 2500)
    write_source(tmp_path, "a", [["x" * n_chars] * 10])
    files = find_files(str(tmp_path), "a", data.TRAIN_FILES)
    mixture = Mixture([SourceReader("a", share_files(files, 0, 1))], [1.0], (0, 0, 1))
    with ThreadPoolExecutor(1) as pool:
        documents = TokenReader(mixture, build_tokenizer("bytes"), DataArgs(), pool, n_ahead=4)
        assert mixture.mark.n_draws == 0
        for n_given in range(1, 300):
            assert len(documents.next_tokens()) == n_chars + 2
            assert documents.place[0].n_draws == n_given
            assert n_given <= mixture.mark.n_draws < n_given + n_documents


@pytest.mark.parametrize(
    ("n_cores", "n_ranks", "n_threads"), [(16, None, 16), (16, "8", 2), (4, "8", 1), (256, "", 16)]
)
def test_ranks_share_the_cores_of_their_node(monkeypatch, n_cores, n_ranks, n_threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n_cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if n_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", n_ranks)
    assert data.count_threads() == n_threads


# --- batches -----------------------------------------------------------------------------------------------------


def reference_batches(rows: np.ndarray, args: DataArgs, seed):
    """Section 4, step 5 of the interface."""
    rows, rng = iter(rows), np.random.default_rng(seed)
    buffer = np.stack([next(rows) for _ in range(args.prefetch_size * args.batch_size)])
    while True:
        rng.shuffle(buffer, axis=0)
        for start in range(0, len(buffer), args.batch_size):
            batch = buffer[start : start + args.batch_size].copy()
            yield np.stack([batch[:, view : view + args.seq_len] for view in range(args.n_views)], axis=-1)
            for slot in range(start, start + args.batch_size):
                buffer[slot] = next(rows)


@pytest.mark.parametrize(
    ("n_views", "batch_size", "prefetch_size", "seq_len"),
    [(1, 1, 1, 5), (1, 3, 2, 1), (2, 2, 4, 8), (3, 1, 5, 2), (4, 2, 3, 1)],
)
def test_batches_follow_the_published_order(tmp_path, n_views, batch_size, prefetch_size, seq_len):
    texts = ["", "x", "one text", "a", "another one, longer"]
    write_source(tmp_path, "a", [texts])
    args = make_args(
        tmp_path, n_views=n_views, batch_size=batch_size, prefetch_size=prefetch_size, seq_len=seq_len, seed=5
    )
    rows = row_reference(texts, args, 200)
    expected = reference_batches(rows, args, (6, 0, 1))
    for batch, _ in take(args, 20):
        assert batch.shape == (batch_size, seq_len, n_views)
        assert batch.dtype == np.int64
        assert np.array_equal(batch, next(expected))


def test_ranks_draw_with_seeds_of_their_own(tmp_path):
    write_source(tmp_path, "a", [[f"document {number}" for number in range(9)]])
    args = make_args(tmp_path)
    for rank in range(3):
        texts = [f"document {number}" for number in range(rank, 9, 3)]
        expected = reference_batches(row_reference(texts, args, 100), args, (43, rank, 3))
        for batch, _ in take(args, 8, rank=rank, world_size=3):
            assert np.array_equal(batch, next(expected))


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_batches_belong_to_whoever_gets_them(tmp_path, load_async):
    write_source(tmp_path, "a", [[f"document {number}" for number in range(9)]])
    args = make_args(tmp_path, load_async=load_async)
    expected = [batch for batch, _ in take(make_args(tmp_path), 6)]
    with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as loader:
        for batch in expected:
            got, _ = next(loader)
            assert np.array_equal(got, batch)
            assert got.flags.writeable
            got[:] = -1


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> DataArgs:
    """Two sources; the second is so short that it is read many times over. A pass is three batches."""
    write_source(tmp_path, "a", [[f"file {f} document {d} {'x' * (d * 7 % 23)}" for d in range(13)] for f in range(3)])
    write_source(tmp_path, "b", [["", "b", "bb"], ["", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"]])
    return make_args(tmp_path, sources={"a": 2.0, "b": 3.0}, n_views=3, add_bos=False)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_every_state_resumes_behind_its_batch(mixed, rank, world_size):
    items = take(mixed, 24, rank=rank, world_size=world_size)
    for place in range(14):
        state = through_json(items[place][1])
        for (batch, new_state), (expected, old_state) in zip(take(mixed, 9, state), items[place + 1 :], strict=False):
            assert np.array_equal(batch, expected)
            assert through_json(new_state) == through_json(old_state)


@given(
    texts=st.lists(st.text("abc", max_size=12), min_size=1, max_size=6).filter(any),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 3),
            "prefetch_size": st.integers(1, 4),
            "seq_len": st.integers(1, 6),
            "n_views": st.integers(1, 4),
            "add_bos": st.booleans(),
            "seed": st.integers(0, 2**32),
        }
    ),
    place=st.integers(0, 9),
)
def test_any_loader_resumes(tmp_path_factory, texts, options, place):
    root = tmp_path_factory.mktemp("data")
    write_source(root, "a", [texts])
    args = make_args(root, **options, add_eos=False)
    items = take(args, place + 7)
    resumed = take(args, 6, through_json(items[place][1]))
    assert all(np.array_equal(got, batch) for (got, _), (batch, _) in zip(resumed, items[place + 1 :], strict=True))


@pytest.mark.parametrize("place", [1, 2, 3, 10])
def test_the_worker_resumes_as_the_loader_without_one(mixed, place):
    expected = [batch for batch, _ in take(mixed, place + 9)]
    with_worker = dataclasses.replace(mixed, load_async=True)
    items = take(with_worker, place + 1)
    assert all(np.array_equal(batch, other) for (batch, _), other in zip(items, expected, strict=False))
    state = through_json(items[place][1])
    for args in (mixed, with_worker):
        got = take(args, 8, state)
        assert all(np.array_equal(batch, other) for (batch, _), other in zip(got, expected[place + 1 :], strict=True))


def test_resuming_a_resumed_run_is_exact(mixed):
    expected = take(mixed, 20)
    state, batches = None, []
    for _ in range(10):
        items = take(mixed, 2, state)
        batches += [batch for batch, _ in items]
        state = through_json(items[-1][1])
    assert all(np.array_equal(batch, other) for batch, (other, _) in zip(batches, expected, strict=True))


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_states_stay_as_they_were_given(mixed, load_async):
    args = dataclasses.replace(mixed, load_async=load_async)
    start = init_dataloader_state_from_args(args, 0, 1)
    as_given = json.dumps(start)
    with build_dataloader_from_args(args, start) as loader:
        states = [(state, json.dumps(state)) for _, state in itertools.islice(loader, 15)]
    assert json.dumps(start) == as_given
    assert all(json.dumps(state) == written for state, written in states)
    resume_from, written = states[7]
    take(args, 8, resume_from)
    assert json.dumps(resume_from) == written


def test_a_moved_folder_resumes(mixed, tmp_path):
    items = take(mixed, 8)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for source in ("a", "b"):
        (tmp_path / source).rename(moved / source)
    resumed = take(dataclasses.replace(mixed, root_dir=str(moved)), 3, through_json(items[4][1]))
    assert all(np.array_equal(batch, other) for (batch, _), (other, _) in zip(resumed, items[5:], strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 43},
        {"seq_len": 9},
        {"n_views": 2},
        {"prefetch_size": 4},
        {"add_bos": True},
        {"add_eos": False},
        {"sources": {"a": 2.0, "b": 3.5}},
        {"sources": {"b": 3.0, "a": 2.0}},
        {"sources": {"a": 2.0}},
        {"tokenizer": TokenizerArgs(name="mock")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_does_not_fit_other_arguments(mixed, changes):
    state = through_json(take(mixed, 4)[-1][1])
    (key,) = changes
    message = refusal(dataclasses.replace(mixed, **changes), state, n=1)
    assert message.startswith(f"data.{key}")
    assert "when the checkpoint was written" in message


def test_a_state_does_not_fit_fewer_files(mixed, tmp_path):
    state = through_json(take(mixed, 4)[-1][1])
    (tmp_path / "b" / "b.chunk.01.jsonl").unlink()
    message = refusal(mixed, state, n=1)
    assert message.startswith("data.sources.b: 1 files now, but 2 files (among what differs: b.chunk.01.jsonl) when ")


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_a_file_cut_before_the_place_is_named(tmp_path, load_async):
    write_source(tmp_path, "a", [[f"document {number}" for number in range(40)]])
    args = make_args(tmp_path)
    state = through_json(take(args, 7)[-1][1])
    path = tmp_path / "a" / "a.chunk.00.jsonl"
    with path.open("r+b") as file:
        file.truncate(30)
    args = dataclasses.replace(args, load_async=load_async)
    assert refusal(args, state, n=1).startswith(f"{path}: 30 bytes now, but 950 when the run began")
    message = refusal(args, without_sizes(state), n=1)
    assert message.startswith(f"{path}: 30 bytes, but the checkpoint had read ")


def test_a_document_that_became_shorter_is_noticed(tmp_path):
    write_source(tmp_path, "a", [["x" * 1000]])
    args = make_args(tmp_path)
    state = through_json(take(args, 7)[-1][1])
    write_source(tmp_path, "a", [["x"]])
    assert "1,013 when the run began" in refusal(args, state, n=1)
    assert "the data changed" in refusal(args, without_sizes(state), n=1)


def without_sizes(state):
    """As states were before files' sizes were kept in them, and faults counted."""
    made_with = {key: value for key, value in state["made_with"].items() if key != "bytes"}
    return {**state, "made_with": made_with}


def test_a_state_of_before_faults_were_counted_resumes(mixed):
    items = take(mixed, 12)
    state = without_sizes(through_json(items[4][1]))
    (stream,) = state["streams"]
    del stream["n_skipped"]
    sources = stream["place"]["rows"]["documents"]["sources"]
    stream["place"]["rows"]["documents"]["sources"] = [source[:5] for source in sources]
    resumed = take(mixed, 7, state)
    assert all(np.array_equal(got, batch) for (got, _), (batch, _) in zip(resumed, items[5:], strict=True))


# --- other ranks and batch sizes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DataArgs:
    """Random letters, enough for tests that read no line twice, so that all rows differ. A pass is three batches."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop"), n)) for n in rng.integers(0, 30, 2400)]
    write_source(root, "a", [texts[:500], texts[500:1000], texts[1000:1500]])
    write_source(root, "b", [texts[1500:]])
    return make_args(root, sources={"a": 2.0, "b": 1.0}, add_bos=False)


def start(args: DataArgs, world_size: int) -> list:
    return [init_dataloader_state_from_args(args, rank, world_size) for rank in range(world_size)]


def go_on(args: DataArgs, states: list, world_size: int, n: int) -> tuple[list, list]:
    """Each rank's next `n` batches on another number of ranks, and the states behind them, as a file has them."""
    states = [redistribute_state(states, rank, world_size) for rank in range(world_size)]
    items = [take(args, n, state) for state in states]
    batches = [[batch for batch, _ in part] for part in items]
    return batches, through_json([part[-1][1] if n else state for part, state in zip(items, states, strict=True)])


def rows_of(batches) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch]


def streams_of(args: DataArgs, n_streams: int, n_rows: int) -> list[list[bytes]]:
    """At least `n_rows` of each stream, read plainly: on as many ranks, with the batch size of the start."""
    n = n_rows // args.batch_size + 1
    streams = [take(args, n, rank=number, world_size=n_streams) for number in range(n_streams)]
    return [rows_of(batch for batch, _ in items) for items in streams]


# (ranks, batch size, accumulated batches) at the start and then; the rows a step are the same.
SAME_ROWS_A_STEP = [
    ((4, 2, 1), (2, 2, 2)),
    ((4, 2, 1), (2, 4, 1)),
    ((4, 2, 3), (2, 3, 4)),
    ((4, 3, 2), (2, 4, 3)),
    ((4, 2, 1), (1, 2, 4)),
    ((4, 2, 1), (1, 8, 1)),
    ((4, 2, 1), (1, 1, 8)),
    ((2, 2, 2), (4, 2, 1)),
    ((2, 2, 2), (4, 1, 2)),
    ((1, 2, 3), (3, 2, 1)),
    ((1, 6, 1), (3, 2, 1)),
    ((3, 2, 2), (3, 4, 1)),
    ((3, 2, 2), (3, 1, 4)),
]


@pytest.mark.parametrize(("before", "after"), SAME_ROWS_A_STEP)
def test_steps_read_the_same_rows_on_other_ranks(corpus, before, after):
    (old_ranks, old_size, old_acc), (new_ranks, new_size, new_acc) = before, after
    args = dataclasses.replace(corpus, batch_size=old_size)
    expected, _ = go_on(args, start(args, old_ranks), old_ranks, 7 * old_acc)
    _, states = go_on(args, start(args, old_ranks), old_ranks, 2 * old_acc)
    args = dataclasses.replace(corpus, batch_size=new_size)
    got, _ = go_on(args, states, new_ranks, 5 * new_acc)
    for step in range(5):
        old = [rows_of(rank[(step + 2) * old_acc :][:old_acc]) for rank in expected]
        new = [rows_of(rank[step * new_acc :][:new_acc]) for rank in got]
        assert len(set(itertools.chain(*new))) == new_ranks * new_size * new_acc, "two rows of the corpus are the same"
        assert Counter(itertools.chain(*new)) == Counter(itertools.chain(*old)), f"step {step}"


def check_nothing_is_lost(corpus: DataArgs, n_streams: int, batch_size: int, phases: list) -> None:
    """Runs `phases` of (ranks, batch size, batches) and compares with the streams read plainly."""
    args = dataclasses.replace(corpus, batch_size=batch_size)
    states, read = start(args, n_streams), []
    for world_size, size, n in phases:
        batches, states = go_on(dataclasses.replace(corpus, batch_size=size), states, world_size, n)
        assert all(batch.shape == (size, args.seq_len, args.n_views) for rank in batches for batch in rank)
        read += rows_of(itertools.chain(*batches))
    given = {stream["stream"]: stream["rows_given"] for state in states for stream in state["streams"]}
    assert sorted(given) == list(range(n_streams))
    plain = streams_of(args, n_streams, max(given.values()))
    assert Counter(read) == Counter(row for number, n_rows in given.items() for row in plain[number][:n_rows])


@pytest.mark.parametrize(
    ("n_streams", "batch_size", "phases"),
    [
        (4, 2, [(4, 2, 3), (3, 2, 5)]),
        (4, 2, [(4, 2, 3), (2, 2, 3), (3, 2, 4), (1, 2, 5), (4, 2, 3)]),
        (2, 2, [(2, 2, 1), (4, 2, 3), (5, 2, 2), (3, 2, 3), (1, 2, 5), (2, 2, 2)]),
        (1, 3, [(3, 2, 2), (5, 4, 1), (2, 3, 3), (1, 5, 3)]),
        (3, 4, [(3, 4, 1), (2, 5, 3), (6, 1, 4), (1, 7, 5), (3, 4, 2)]),
        (3, 2, [(1, 2, 1), (3, 2, 1), (2, 2, 0), (4, 2, 1)]),
    ],
)
def test_nothing_is_skipped_or_repeated_in_chains_of_changes(corpus, n_streams, batch_size, phases):
    check_nothing_is_lost(corpus, n_streams, batch_size, phases)


@given(
    n_streams=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    phases=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=4),
)
def test_nothing_is_skipped_or_repeated_in_any_chain_of_changes(corpus, n_streams, batch_size, phases):
    check_nothing_is_lost(corpus, n_streams, batch_size, phases)


@pytest.mark.parametrize(
    ("old", "new", "load_async"),
    [
        *[(old, new, False) for old, new in [(2, 4), (4, 2), (3, 5), (5, 3), (2, 1), (1, 7)]],
        (3, 5, True),
    ],
)
def test_another_batch_size_reads_the_same_rows_in_the_same_order(corpus, old, new, load_async):
    args = dataclasses.replace(corpus, batch_size=old, load_async=load_async)
    expected = streams_of(args, 1, 70)[0]
    first = take(args, 4)
    args = dataclasses.replace(args, batch_size=new)
    then = take(args, 5, through_json(first[-1][1]))
    args = dataclasses.replace(args, batch_size=old)
    last = take(args, 3, through_json(then[-1][1]))
    read = rows_of(batch for batch, _ in first + then + last)
    assert read == expected[: len(read)]


def test_the_ranks_of_a_smaller_number_take_whole_batches_in_turn(corpus):
    """Batch for batch what the former ranks would have read, where the batch size stays."""
    expected, _ = go_on(corpus, start(corpus, 4), 4, 6)
    got, _ = go_on(corpus, start(corpus, 4), 2, 12)
    for rank, batches in enumerate(got):
        for number, batch in enumerate(batches):
            assert np.array_equal(batch, expected[2 * rank + number % 2][number // 2])


def test_streams_that_are_behind_catch_up(corpus):
    _, states = go_on(corpus, start(corpus, 2), 3, 4)
    given = [stream["rows_given"] for state in states for stream in state["streams"]]
    assert given == [16, 16, 8]
    _, states = go_on(corpus, states, 1, 4)
    assert [stream["rows_given"] for stream in states[0]["streams"]] == [16, 16]


LEFT_OVER = [(1, 2, 1, 3), (1, 3, 1, 2), (3, 2, 1, 5), (4, 2, 3, 1), (2, 3, 5, 2)]


@pytest.mark.parametrize(("n_streams", "old", "world_size", "new"), LEFT_OVER)
def test_every_state_resumes_with_rows_left_over(corpus, n_streams, old, world_size, new):
    args = dataclasses.replace(corpus, batch_size=old)
    _, states = go_on(args, start(args, n_streams), n_streams, 2)
    args = dataclasses.replace(args, batch_size=new)
    for rank in {0, world_size // 2, world_size - 1}:
        items = take(args, 16, redistribute_state(states, rank, world_size))
        for place in range(11):
            resumed = take(args, 5, through_json(items[place][1]))
            for (batch, new_state), (expected, old_state) in zip(resumed, items[place + 1 :], strict=False):
                assert np.array_equal(batch, expected)
                assert through_json(new_state) == through_json(old_state)


@pytest.mark.parametrize(("n_streams", "old", "world_size", "new"), LEFT_OVER[2:])
def test_the_worker_resumes_with_rows_left_over(corpus, n_streams, old, world_size, new):
    args = dataclasses.replace(corpus, batch_size=old)
    _, states = go_on(args, start(args, n_streams), n_streams, 2)
    state = redistribute_state(states, world_size - 1, world_size)
    args = dataclasses.replace(args, batch_size=new)
    with_worker = dataclasses.replace(args, load_async=True)
    expected = take(args, 12, state)
    first = take(with_worker, 5, state)
    then = take(with_worker, 7, through_json(first[-1][1]))
    for (batch, new_state), (other, old_state) in zip(first + then, expected, strict=True):
        assert np.array_equal(batch, other)
        assert new_state == through_json(old_state)


def test_ranks_that_share_a_stream_have_the_same_state_but_for_their_turn(corpus):
    _, states = go_on(corpus, start(corpus, 2), 5, 3)
    assert [[stream["stream"] for stream in state["streams"]] for state in states] == [[0], [0], [0], [1], [1]]
    assert [state["turn"] for state in states] == [[0, 3], [1, 3], [2, 3], [0, 2], [1, 2]]
    for state in states:
        assert state["streams"] == states[0 if state["turn"][1] == 3 else 3]["streams"]


@given(n_streams=st.integers(1, 40), changes=st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_every_stream_has_a_reader_and_every_rank_a_stream(n_streams, changes):
    made_with = {"data.batch_size": 2, "streams": n_streams}
    places = [{"stream": number, "rows_given": 2, "rows_used": 0, "place": {}} for number in range(n_streams)]
    states = [{"made_with": made_with, "streams": [place], "turn": [0, 1]} for place in places]
    as_given = states
    for world_size in [*changes, n_streams]:
        states = [redistribute_state(states, rank, world_size) for rank in range(world_size)]
        turns = {number: [] for number in range(n_streams)}
        for state in states:
            assert len(state["streams"]) == 1 or state["turn"] == [0, 1]
            for stream in state["streams"]:
                turns[stream["stream"]].append(state["turn"])
        assert all(taken == [[turn, len(taken)] for turn in range(len(taken))] for taken in turns.values())
        assert all(turns.values())
        n_read = [len(state["streams"]) for state in states]
        assert max(n_read) - min(n_read) <= 1
    assert states == as_given


def test_states_stay_as_they_are_for_the_same_number_of_ranks(corpus):
    _, states = go_on(corpus, start(corpus, 3), 2, 3)
    for rank, state in enumerate(states):
        assert redistribute_state(states, rank, 2) is state


def test_another_batch_size_fits_and_another_buffer_does_not(corpus):
    (state,) = start(corpus, 1)
    check_state_fits(dataclasses.replace(corpus, batch_size=5), state)
    with pytest.raises(ValueError, match=r"^data\.prefetch_size: 6 now, but 3 when"):
        check_state_fits(dataclasses.replace(corpus, batch_size=1, prefetch_size=6), state)


def spoil(states: list, rank: int, path: list, value) -> list:
    """A copy of the states with another value at `path` of one rank's."""
    states = through_json(states)
    place = states[rank]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return states


def test_states_that_do_not_go_together_are_refused(corpus):
    states = start(corpus, 4)
    _, shared = go_on(corpus, states, 6, 1)
    for bad, problem in [
        ([], "there is no loader state"),
        (states[:3], "the loader states lack stream 3 of 4 "),
        (states[1:3], "the loader states lack stream 0, 3 of 4 "),
        (spoil(states, 2, ["made_with", "data.seed"], 7), "states of ranks 0 and 2 are not of one run, data.seed"),
        (spoil(states, 1, ["made_with", "streams"], 5), "states of ranks 0 and 1 are not of one run, streams"),
        (spoil(states, 1, ["made_with", "more"], 5), "states of ranks 0 and 1 are not of one run, more"),
        (spoil(shared, 1, ["streams", 0, "rows_given"], 6), "states of ranks 0 and 1 have stream 0 at different"),
        (spoil(shared, 4, ["streams", 0, "place"], None), "states of ranks 3 and 4 have stream 2 at different"),
    ]:
        with pytest.raises(ValueError, match="^data: ") as caught:
            redistribute_state(bad, 0, 2)
        assert problem in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "foreign",
    [
        None,
        {},
        [],
        {"made_with": {"rank": 0, "world_size": 1}, "place": None},
        {"made_with": {}, "streams": [], "turn": [0, 1]},
        {"made_with": {"data.batch_size": 2, "streams": 1}, "streams": [], "turn": [0, 1]},
        {"made_with": {"data.batch_size": 2, "streams": 1}, "streams": None, "turn": [0, 1]},
        {"made_with": {"data.batch_size": 2, "streams": 1}, "streams": [{"stream": 0}], "turn": [0, 1]},
    ],
)
def test_foreign_states_are_refused(corpus, foreign):
    for use in (lambda: redistribute_state([foreign], 0, 2), lambda: check_state_fits(corpus, foreign)):
        with pytest.raises(
            ValueError, match="^data: the checkpoint's loader state is not one of this code; start a new"
        ):
            use()


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_states_for_bad_ranks_are_refused(corpus, rank, world_size):
    with pytest.raises(ValueError, match="data-parallel ranks"):
        redistribute_state(start(corpus, 3), rank, world_size)


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"batch_size": 0}, "data.batch_size: 0 "),
        ({"seq_len": -1}, "data.seq_len: -1 "),
        ({"n_views": 0}, "data.n_views: 0 "),
        ({"prefetch_size": 0}, "data.prefetch_size: 0 "),
        ({"seed": -1}, "data.seed: -1 "),
        ({"on_error": "skipp"}, "data.on_error: 'skipp' "),
        ({"sources": {}}, "data.sources: empty"),
        ({"sources": {"a": 0.0}}, "data.sources: all weights are 0"),
        ({"sources": {"a": -1.0}}, "data.sources.a: "),
        ({"sources": {"a": float("nan")}}, "data.sources.a: "),
        ({"sources": {"a": float("inf")}}, "data.sources.a: "),
        ({"sources": {"full": 1e308, "more": 1e308}}, "data.sources"),
        ({"sources": {"full": 1.0, "missing": 1.0}}, "data.sources.missing: no folder"),
        ({"sources": {"a": 1.0}}, "data.sources.a: no files named *.chunk.*.jsonl"),
        ({"root_dir": None}, "data.root_dir: not set"),
        ({"root_dir": "/nonexistent/folder"}, "data.root_dir: no folder '/nonexistent/folder'"),
        ({"root_dir": __file__}, "data.root_dir: no folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments_are_named(tmp_path, changes, beginning):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.val.jsonl").write_text('{"text": "for validation"}\n')
    write_source(tmp_path, "full", [["text"]])
    write_source(tmp_path, "more", [["text"]])
    args = dataclasses.replace(make_args(tmp_path, sources={"full": 1.0}), **changes)
    with pytest.raises(ValueError, match=".") as caught:
        init_dataloader_state_from_args(args, 0, 1)
    assert str(caught.value).startswith(beginning)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_bad_ranks_are_refused(tmp_path, rank, world_size):
    write_source(tmp_path, "a", [["text"]])
    with pytest.raises(ValueError, match="data-parallel ranks"):
        init_dataloader_state_from_args(make_args(tmp_path), rank, world_size)


def test_a_source_of_blank_lines_says_so(tmp_path):
    write_lines(tmp_path, b"\n  \n\n")
    assert refusal(make_args(tmp_path)).startswith("data.sources.a: no documents")


@pytest.mark.timeout(20)
def test_a_source_that_is_emptied_says_so(tmp_path):
    """Rather than read it over and over."""
    write_source(tmp_path, "a", [["one", "two"]])
    with opened(make_args(tmp_path, on_error="skip")) as loader:
        next(loader)
        write_lines(tmp_path, b"\n" * 100)
        with pytest.raises(ValueError, match=r"^data\.sources\.a: no documents"):
            list(itertools.islice(loader, 1000))


def test_blank_lines_behind_the_place_are_no_empty_source(tmp_path):
    write_lines(tmp_path, b'{"text": "one document"}\n\n\n')
    args = make_args(tmp_path)
    items = take(args, 10)
    for place in range(4):
        resumed = take(args, 4, through_json(items[place][1]))
        assert all(
            np.array_equal(got, batch) for (got, _), (batch, _) in zip(resumed, items[place + 1 :], strict=False)
        )


def test_a_rank_with_documents_in_some_files_only_reads_on(tmp_path):
    write_source(tmp_path, "a", [[], ["one"], [], ["two"]])
    assert read_texts(tmp_path, n_passes=2) == [["one", "two"]] * 2


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    write_source(tmp_path, "a", [["one"]])
    (tmp_path / "a" / "a.val.jsonl").write_text("not JSON")
    (tmp_path / "a" / "notes.txt").write_text("not JSON")
    (tmp_path / "a" / "a.chunk.07.jsonl").mkdir()
    assert read_texts(tmp_path) == [["one"]]


# --- the worker --------------------------------------------------------------------------------------------------


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "serve_batches" in " ".join(process.cmdline()):
                found.append(process)
    return found


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("data-loader", "tokenizer"))]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def with_worker(tmp_path) -> DataArgs:
    write_source(tmp_path, "a", [[f"document {number} {'x' * 50}" for number in range(9)]])
    return make_args(tmp_path, load_async=True)


def test_a_killed_worker_is_reported(with_worker):
    with opened(with_worker) as loader:
        next(loader)
        (worker,) = workers()
        worker.send_signal(signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="SIGKILL") as caught:
            list(itertools.islice(loader, 10_000))
    assert "\n" not in str(caught.value)
    assert not workers()
    assert not loader_threads()


def test_a_worker_that_cannot_start_is_reported(with_worker, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with opened(with_worker) as loader, pytest.raises(ChildProcessError, match="exit code 1"):
        next(loader)
    assert not loader_threads()


@pytest.mark.parametrize("n", [0, 1, 30])
def test_closing_leaves_nothing_behind(with_worker, n):
    before = open_files()
    with opened(with_worker) as loader:
        assert len(list(itertools.islice(loader, n))) == n
        assert len(workers()) == 1
        if n == 1:
            time.sleep(0.5)  # until queue and pipe are full, and worker and thread wait
        start = time.perf_counter()
    assert time.perf_counter() - start < 5
    assert not workers()
    assert not loader_threads()
    assert open_files() == before


def train_badly(args: DataArgs, n: int) -> None:
    with opened(args) as loader:
        list(itertools.islice(loader, n))
        time.sleep(0.3)
        raise ZeroDivisionError("training")


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_an_error_of_the_training_goes_through(with_worker, load_async):
    with pytest.raises(ZeroDivisionError, match="training"):
        train_badly(dataclasses.replace(with_worker, load_async=load_async), 1)
    assert not workers()
    assert not loader_threads()


def test_an_error_of_the_training_goes_through_though_the_data_is_bad(tmp_path):
    write_lines(tmp_path, b"not JSON")
    with pytest.raises(ZeroDivisionError, match="training"):
        train_badly(make_args(tmp_path, load_async=True), 0)
    assert not workers()
    assert not loader_threads()


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_a_closed_loader_does_not_hang(with_worker, load_async):
    """`next` on it may end or raise, but comes back."""
    with opened(dataclasses.replace(with_worker, load_async=load_async)) as loader:
        next(loader)

    def read() -> None:
        with contextlib.suppress(Exception):
            list(itertools.islice(loader, 1000))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert not thread.is_alive(), "next() on a closed loader waits forever"


def test_the_worker_leaves_signals_to_the_trainer(with_worker):
    with opened(with_worker) as loader:
        next(loader)
        (worker,) = workers()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            worker.send_signal(number)
        assert len(list(itertools.islice(loader, 500))) == 500
        assert workers() == [worker]


def test_two_loaders_at_once_do_not_disturb_each_other(with_worker):
    expected = [batch for batch, _ in take(dataclasses.replace(with_worker, load_async=False), 20)]
    with opened(with_worker) as first:
        with opened(with_worker) as second:
            for batch in expected[:10]:
                assert np.array_equal(next(first)[0], batch)
                assert np.array_equal(next(second)[0], batch)
        for batch in expected[10:]:
            assert np.array_equal(next(first)[0], batch)


@pytest.mark.parametrize("load_async", [False, True], ids=["sync", "async"])
def test_a_file_that_goes_away_is_named(with_worker, load_async):
    (path,) = Path(with_worker.root_dir, "a").iterdir()
    with opened(dataclasses.replace(with_worker, load_async=load_async)) as loader:
        next(loader)
        path.unlink()
        with pytest.raises(ValueError, match=f"^{path}: is gone since the run began"):
            list(itertools.islice(loader, 10_000))


TRAINER = """
import json, sys, time
from lingua.data import DataArgs, build_dataloader_from_args, init_dataloader_state_from_args
args = DataArgs(**json.loads(sys.argv[1]))
with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as loader:
    next(loader)
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_trainer(tmp_path, number):
    write_source(tmp_path, "a", [["some text"]])
    options = {"root_dir": str(tmp_path), "sources": {"a": 1.0}, "seq_len": 64, "prefetch_size": 4}
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, json.dumps(options)], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout.readline() == "ready\n"
        (worker,) = psutil.Process(trainer.pid).children()
        assert "serve_batches" in " ".join(worker.cmdline())
        trainer.send_signal(number)
        trainer.wait()
        until = time.monotonic() + 10
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, "the worker still runs"
            time.sleep(0.02)
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()


def test_the_loader_does_not_import_torch():
    code = "import lingua.data, sys; print('torch' in sys.modules)"
    root = Path(data.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "False"


def test_a_source_of_weight_zero_may_be_missing(corpus):
    """So that the command line can leave out one that the config names."""
    args = DataArgs(root_dir=corpus.root_dir, sources={**corpus.sources, "elsewhere": 0.0})
    data.validate_data_args(args)
    assert args.sources == corpus.sources
